"""The memory that LoRAs take: large weights in files, refusals, and sets that were let go."""

from __future__ import annotations

import copy
import errno
import gc
import tempfile
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from safelight.adapters import select
from safelight.errors import SafelightError
from safelight.fast import accelerate, keep_codes, layers, memory, replace
from safelight.fast.quantised import of_floats
from safelight.fast.store import in_file
from test_adapters import answers, equal, load, lora
from weights_tiny import text_folder

SMALL = 1000
"""Numbers from which a weight is large in these tests."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("memory")


@pytest.fixture(scope="module")
def folder(root: Path) -> Path:
    return text_folder(root / "tiny")


@pytest.fixture(scope="module")
def ink(root: Path) -> Path:
    return lora(root / "ink.safetensors")


@pytest.fixture
def filed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the weights that go to a file."""
    shapes: list[tuple[int, ...]] = []

    def noted(weight: torch.Tensor, what: str) -> torch.Tensor:
        shapes.append(tuple(weight.shape))
        return in_file(weight, what)

    monkeypatch.setattr(replace, "in_file", noted)
    return shapes


def test_a_copy_of_a_model_has_embeddings_of_its_own(folder: Path) -> None:
    model = load(folder, dtype="float32")
    assert model.embeddings._model is model
    other = copy.deepcopy(model)
    assert other.embeddings._model is other


class TestFiles:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_weights_are_the_same(self, dtype: torch.dtype) -> None:
        weight = torch.randn(30, 7, 3).to(dtype)
        kept = in_file(weight.transpose(0, 1), "a test")
        assert kept.dtype == dtype
        assert torch.equal(kept, weight.transpose(0, 1))

    def test_nothing_is_left_on_the_disk(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr(tempfile, "tempdir", None)
        kept = in_file(torch.ones(100), "a test")
        assert not list(tmp_path.iterdir())
        assert float(kept.sum()) == 100

    def test_a_full_disk(self, folder: Path, ink: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(layers, "LARGE", SMALL)
        model = load(folder, dtype="float32", low_memory=True)

        def full(**_: Any) -> Any:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
        with pytest.raises(SafelightError, match=r"No space left on device; name another folder"):
            model.adapted([str(ink)])

    def test_sets_are_forgotten_for_room_on_the_disk(
        self, folder: Path, ink: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(layers, "LARGE", SMALL)
        model = load(folder, dtype="float32", low_memory=True)
        first = model.adapted([str(ink)])
        real, failed = tempfile.NamedTemporaryFile, []

        def full_while_kept(**how: Any) -> Any:
            if not failed:
                failed.append(True)
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(**how)

        monkeypatch.setattr(tempfile, "NamedTemporaryFile", full_while_kept)
        assert first.base is model
        assert equal(answers(model.adapted([f"{ink}:0.5"])), answers(model.adapted([f"{ink}:0.5"])))
        assert len(model.adapters._kept) == 1


class TestLargeWeights:
    def test_low_memory_puts_them_into_files(
        self, folder: Path, ink: Path, filed: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wanted = answers(load(folder, dtype="float32").adapted([str(ink)]))
        assert not filed
        monkeypatch.setattr(layers, "LARGE", SMALL)
        model = load(folder, dtype="float32", low_memory=True)
        before = answers(model)
        adapted = model.adapted([str(ink)])
        # Two of (32, 32) are read again, as three are packed together.
        assert sorted(filed) == sorted(
            [*[(32, 32)] * 3, (256, 32), (32, 128), (32, 32, 3, 3), (32, 128), (64, 64, 3, 3)]
        )
        assert equal(answers(adapted), wanted)
        assert equal(answers(model), before)

    def test_a_text_encoder_s_stay_mapped(
        self, folder: Path, ink: Path, filed: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = load(folder, dtype="float32")
        plain = model.adapted([str(ink)])
        monkeypatch.setattr(layers, "LARGE", 24 * 24)
        adapted = model.adapted([f"{ink}:0:1"])
        assert filed == [(24, 24)]
        assert equal(answers(adapted)[1:], answers(plain)[1:])
        name = "text_model.encoder.layers.0.self_attn.q_proj"
        assert adapted.text_encoder.get_submodule(name).mapped
        assert not plain.text_encoder.get_submodule(name).mapped  # it has memory of its own

    def test_those_that_were_codes_go_to_a_file(
        self, filed: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(layers, "LARGE", SMALL)
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(32, 64, bias=False)).eval()
        new, x = torch.randn(64, 32), torch.randn(1, 5, 32)
        accelerate(net, torch.float32)
        codes = of_floats(torch.randn(64, 32).to(torch.float8_e4m3fn))
        keep_codes(net, {"0.weight": codes})
        with torch.inference_mode():
            before = net(x)
            changed = replace.with_weights(net, [("0.weight", new)], lambda _: ())
            assert torch.allclose(changed(x), x @ new.T, atol=1e-4)
            assert torch.equal(net(x), before)
        assert filed == [(64, 32)]
        assert changed[0].shelf is not None


class TestMemory:
    def test_too_little_is_told(
        self, folder: Path, ink: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = load(folder, dtype="float32")
        before = answers(model)
        monkeypatch.setattr(memory, "free", lambda: 1)
        monkeypatch.setattr(layers, "LARGE", SMALL)
        with pytest.raises(SafelightError) as told:
            model.adapted([str(ink)])
        assert str(told.value).startswith("lora ink: 0.0 GB of changed weights do not fit beside")
        assert str(told.value).endswith("low_memory keeps them in a file")
        assert told.value.field == "loras"
        assert equal(answers(model), before)
        plain = load(folder, dtype="float32", plain=True)
        with pytest.raises(SafelightError, match="are free: close other programs"):
            plain.adapted([str(ink)])

    def test_what_lies_in_a_file_takes_none(
        self, folder: Path, ink: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(layers, "LARGE", 1)
        model = load(folder, dtype="float32", low_memory=True)
        monkeypatch.setattr(memory, "free", lambda: 24 * 1024)  # proj_in's weight stays
        answers(model.adapted([str(ink)]))
        assert model.adapters.size <= 24 * 1024

    def test_older_sets_are_let_go_first(
        self, folder: Path, ink: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = load(folder, dtype="float32")
        for i in range(3):
            model.adapted([f"{ink}:{i + 2}"])
        kept = model.adapters._kept
        assert len(kept) == 3
        monkeypatch.setattr(memory, "free", lambda: 1 << 40 if len(kept) < 2 else 1)
        model.adapted([str(ink)])
        assert len(kept) == 2

    @pytest.mark.parametrize("plain", [True, False])
    def test_a_set_that_was_let_go_is_freed_at_once(
        self, plain: bool, folder: Path, ink: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = load(folder, dtype="float32", plain=plain)
        asked: dict[str, Any] = {"steps": 1, "sampler": "ddim", "width": 64, "height": 64}
        monkeypatch.setattr(select, "MEMORY_SHARE", 1e-9)
        alive: list[weakref.ref[nn.Module]] = []
        real = select.merged

        def noted(*given: Any) -> Any:
            assert not any(one() for one in alive)  # the old one is gone before the merge
            made = real(*given)
            alive.append(weakref.ref(made.unet))
            return made

        monkeypatch.setattr(select, "merged", noted)
        gc.collect()
        gc.disable()
        try:
            for i in range(3):
                model.generate("a cat", loras=[f"{ink}:{i + 1}"], **asked)
        finally:
            gc.enable()
        assert len(alive) == 3
