"""Training: adding and removing noise, checkpoints, and the resulting folder."""

import errno
import io
import math
import os
import resource
import signal
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout

from safelight import SafelightError
from safelight.nets.clip import CLIPTextConfig, CLIPTextModel
from safelight.nets.tiny import AutoencoderTiny, TinyConfig
from safelight.nets.unet import UNet2DConditionModel, UNetConfig
from safelight.nets.unet2d import UNet2DConfig
from safelight.nets.vae import AutoencoderKL, VAEConfig
from safelight.sampling.schedule import SchedulerConfig
from safelight.train import board, devices, loop, networks
from safelight.train.denoiser import (
    Noising,
    TextToImage,
    teach_words,
    train_text_to_image,
    train_unconditional,
)
from safelight.train.export import export_text_to_image, export_unconditional, replacing
from safelight.train.loop import Draw, check_plan, fit
from safelight.train.losses import Losses
from safelight.train.out import save_whole
from safelight.train.plan import Plan
from safelight.train.tokens import train_vocabulary
from safelight.weights import load_model

PLAN = Plan(steps=12, batch=4, learning_rate=1e-2, warmup=2)


@pytest.mark.parametrize("missing", ["accelerate", "tensorboard"])
def test_without_a_package_that_training_needs(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setattr(devices, "find_spec", lambda name: None if name == missing else 1)
    with pytest.raises(SafelightError, match=r"pip install 'safelight\[train\]'"):
        devices.accelerator.__wrapped__()


class KilledError(Exception):
    """Stands for an end without time to save."""


class Line(torch.nn.Module):
    """y = w·x, where w is to be found from noisy points."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(3))

    def forward(self, draw: Draw) -> torch.Tensor:
        x = torch.from_numpy(draw.data.standard_normal((4, 3))).float()
        noise = torch.randn(4, generator=draw.noise)
        return (x @ (self.w - torch.tensor([1.0, 2.0, 3.0])) + 0.1 * noise).square().mean()


def train_line(folder: Path, plan: Plan = PLAN, stop_at: int | None = None) -> torch.Tensor:
    line, steps = Line(), 0

    def loss_of(run: torch.nn.Module, draw: Draw) -> torch.Tensor:
        nonlocal steps
        if stop_at is not None and steps == stop_at:
            raise KilledError
        steps += 1
        return run(draw)

    fit(line, loss_of, plan, folder, every=5, log=lambda _: None)
    return line.w.detach()


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path) -> None:
    whole = train_line(tmp_path / "whole")
    with pytest.raises(KilledError):
        train_line(tmp_path / "broken", stop_at=8)
    assert torch.equal(train_line(tmp_path / "broken"), whole)


def test_a_finished_run_gives_its_weights_again(tmp_path: Path) -> None:
    first = train_line(tmp_path)
    assert torch.equal(train_line(tmp_path, stop_at=0), first)


def test_training_finds_the_line(tmp_path: Path) -> None:
    plan = Plan(steps=400, batch=4, learning_rate=5e-2, warmup=5, ema=0.9, weight_decay=0.0)
    found = train_line(tmp_path, plan)
    assert torch.allclose(found, torch.tensor([1.0, 2.0, 3.0]), atol=0.1)


def test_another_plan_does_not_resume(tmp_path: Path) -> None:
    train_line(tmp_path)
    with pytest.raises(SafelightError, match="made by other settings"):
        train_line(tmp_path, Plan(steps=13, batch=4, learning_rate=1e-2, warmup=2))


def test_a_plan_with_a_cooldown_may_change_its_length(tmp_path: Path) -> None:
    long = replace(PLAN, steps=40, cooldown=4)
    short = replace(PLAN, steps=12, cooldown=4)
    with pytest.raises(KilledError):
        train_line(tmp_path / "a", long, stop_at=7)
    train_line(tmp_path / "b", short)
    assert torch.equal(train_line(tmp_path / "a", short), train_line(tmp_path / "b", short))
    # The learning rate has fallen already: it could not go on as a longer run would have.
    with pytest.raises(SafelightError, match="made by other settings"):
        train_line(tmp_path / "a", long)


def test_ctrl_c_loses_no_step(tmp_path: Path) -> None:
    steps = 0

    def loss_of(run: torch.nn.Module, draw: Draw) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 8:
            signal.raise_signal(signal.SIGINT)
        return run(draw)

    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        fit(Line(), loss_of, PLAN, tmp_path / "a", every=5, log=said.append)
    assert said[-1] == "stopped after step 8: the same command goes on from there"
    assert torch.load(tmp_path / "a" / "checkpoint.pt")["step"] == 8
    assert torch.equal(train_line(tmp_path / "a"), train_line(tmp_path / "b"))


def test_a_second_ctrl_c_waits_for_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(value: Any, file: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        written(value, file)

    def loss_of(run: torch.nn.Module, draw: Draw) -> torch.Tensor:
        if draw.step == 2:
            signal.raise_signal(signal.SIGINT)
        return run(draw)

    written = torch.save
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(KeyboardInterrupt):
        fit(Line(), loss_of, PLAN, tmp_path, log=lambda _: None)
    assert torch.load(tmp_path / "checkpoint.pt")["step"] == 3


def test_processes_take_the_steps_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each finds another pace, and one that took more steps would wait for the others."""

    class Second:
        is_main_process = False

        def __getattr__(self, name: str) -> Any:
            return getattr(devices.accelerator(), name)

    seen: list[float] = []
    rate_of = Plan.rate
    monkeypatch.setattr(Plan, "rate", lambda plan, step: seen.append(step) or rate_of(plan, step))
    monkeypatch.setattr(loop, "accelerator", Second)
    monkeypatch.setattr(
        "accelerate.utils.broadcast_object_list", lambda plans: [plans[0].paced(43)]
    )
    train_line(tmp_path, replace(PLAN, steps=0, seconds=0.001))
    assert seen[-1] == 42
    assert not [*tmp_path.iterdir()]


def test_another_recipe_does_not_resume(tmp_path: Path) -> None:
    train_line(tmp_path, replace(PLAN, recipe="cats"))
    with pytest.raises(SafelightError, match=r"\(the pictures, captions, .* changed\): give"):
        train_line(tmp_path, replace(PLAN, recipe="dogs"))


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 9 bytes")],
)
def test_too_little_memory_is_one_line(tmp_path: Path, error: Exception) -> None:
    def loss_of(run: torch.nn.Module, draw: Draw) -> torch.Tensor:
        raise error

    with pytest.raises(SafelightError, match=r"^cpu has too little memory .* smaller --batch"):
        fit(Line(), loss_of, PLAN, tmp_path)


def test_a_folder_whose_name_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SafelightError, match="must have a name in UTF-8"):
        train_line(tmp_path / os.fsdecode(b"\xff"))
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_training_is_refused(tmp_path: Path) -> None:
    check_plan(tmp_path / "mine", PLAN)
    check_plan(tmp_path / "mine", PLAN)
    with pytest.raises(Timeout):
        FileLock(tmp_path / "mine" / ".lock").acquire(blocking=False)
    (tmp_path / "other").mkdir()
    with (
        FileLock(tmp_path / "other" / ".lock"),
        pytest.raises(SafelightError, match=r"another training writes to .*other: wait"),
    ):
        check_plan(tmp_path / "other", PLAN)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    train_line(tmp_path)
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SafelightError, match="not a checkpoint of ours"):
        train_line(tmp_path)


def test_a_full_disk_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = torch.save, 0

    def full(state: object, file: Any) -> None:
        nonlocal saved
        saved += 1
        if saved == 2:
            file.write(b"a part of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, file)

    monkeypatch.setattr("torch.save", full)
    message = r"step 10 could not be written .*No space left.*that of step 5 is kept: make room"
    with pytest.raises(SafelightError, match=message):
        train_line(tmp_path / "a")
    monkeypatch.undo()
    assert not list((tmp_path / "a").glob("*.part"))
    assert torch.equal(train_line(tmp_path / "a"), train_line(tmp_path / "b"))


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let writes of files whose path holds one of these words fail, as on a full disk."""
    words: list[str] = []
    opened = io.open

    class Full(io.FileIO):
        def write(self, data: Any, /) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def opening(file: Any, mode: str = "r", *given: Any, **other: Any) -> Any:
        if set(mode) & set("wx") and any(word in str(file) for word in words):
            raw = io.BufferedWriter(Full(file, "wb"))
            return raw if "b" in mode else io.TextIOWrapper(raw)
        return opened(file, mode, *given, **other)

    monkeypatch.setattr(io, "open", opening)
    return words


def test_a_full_disk_for_the_curves_is_one_line(tmp_path: Path, full: list[str]) -> None:
    full.append("tfevents")
    message = r"tensorboard could not be written \(No space left on device\); checkpoints are kept"
    threads: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", threads.append)
        with pytest.raises(SafelightError, match=message):
            train_line(tmp_path / "a")
    full.clear()
    train_line(tmp_path / "a", stop_at=None)
    assert not threads
    assert not [thread for thread in threading.enumerate() if "AsyncWriter" in repr(thread)]


def test_a_full_disk_on_the_way_for_the_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint before it is kept, and the run goes on from there."""

    class Full(io.BytesIO):
        def write(self, data: Any, /) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    add, kept = board.Board.add_scalar, list[Any]()

    def failing(self: Any, name: str, value: float, step: int) -> None:
        if step == 8:
            kept.append(self._file)
            self._file = Full()
        add(self, name, value, step)

    monkeypatch.setattr(board.Board, "add_scalar", failing)
    with pytest.raises(SafelightError, match=r"could not be written \(No space left on device\)"):
        train_line(tmp_path / "a")
    monkeypatch.undo()
    kept[0].close()
    assert torch.equal(train_line(tmp_path / "a"), train_line(tmp_path / "b"))


def test_a_full_disk_for_the_number_of_steps_is_one_line(
    tmp_path: Path, full: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "PACE", (2, 4))
    full.append(str(tmp_path / "steps"))
    plan = Plan(steps=0, batch=4, learning_rate=1e-2, seconds=0.1)
    with pytest.raises(SafelightError, match=r"steps could not be written \(No space left"):
        train_line(tmp_path, plan)


def test_a_checkpoint_that_cannot_be_written_says_why(tmp_path: Path) -> None:
    """torch's own error says only that its writer failed."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    value = {"large": torch.zeros(2**20)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(
            SafelightError, match=r"^it could not be written .*\(File too large\); "
        ):
            save_whole(tmp_path / "it.pt", value, "it", "nothing is lost")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_all_processes_count_in_the_pace() -> None:
    said: list[str] = []
    for processes in (1, 3):
        losses = Losses(torch.device("cpu"))
        losses.add(torch.tensor(0.5))
        nothing = SimpleNamespace(add_scalar=lambda *_: None)
        losses.report(PLAN, 6, 0.5, said.append, nothing, processes)
    assert "  8 samples/s" in said[0]
    assert "  24 samples/s" in said[1]


@pytest.mark.parametrize(("version", "fast"), [((7, 5), False), ((8, 0), True)])
def test_bfloat16_is_not_emulated(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], fast: bool
) -> None:
    """A GPU before Ampere takes bfloat16, too, and computes it by float32."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: version)
    monkeypatch.setattr(torch, "autocast", lambda kind, **settings: given.update(settings))
    devices.autocast("cuda")
    assert given["enabled"] is fast


def test_min_snr_weighs_clean_levels_less() -> None:
    """The weights follow arXiv:2303.09556: min(SNR, γ) over SNR, for velocity over SNR + 1."""
    bars = torch.tensor([0.99, 0.5, 0.01])
    snr = bars / (1 - bars)
    for kind, over in (("epsilon", snr), ("v_prediction", snr + 1), ("sample", torch.ones(3))):
        noising = Noising(SchedulerConfig.from_dict({"prediction_type": kind}), min_snr=5.0)
        assert torch.allclose(torch.as_tensor(noising._weight(bars)), snr.clamp(max=5) / over)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    line = Line()
    with pytest.raises(SafelightError, match="not finite at step 11, nor at the 11 before it"):
        fit(line, lambda run, draw: run(draw) * math.nan, PLAN, tmp_path, log=lambda _: None)


def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    weights, lines = [], list[str]()
    for wrong in (False, True):
        line = Line()

        def loss_of(run: Any, draw: Draw, wrong: bool = wrong, line: Line = line) -> torch.Tensor:
            weights.append([p.detach().clone() for p in line.parameters()])
            return run(draw) * (math.nan if wrong and draw.step in (3, 4) else 1.0)

        fit(line, loss_of, PLAN, tmp_path / str(wrong), log=lines.append)
    plain, gaps = weights[: PLAN.steps], weights[PLAN.steps :]
    assert all(torch.equal(a, b) for a, b in zip(gaps[3], gaps[5], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(plain[3], plain[4], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(gaps[5], gaps[6], strict=True))
    assert sum("1 steps left out: not finite" in line for line in lines) == 2


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_network_that_knows_the_answer_has_no_loss(kind: str) -> None:
    noising = Noising(SchedulerConfig.from_dict({"prediction_type": kind}))
    clean = torch.randn(8, 1, 4, 4)

    def oracle(noisy: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        bar = noising.bars[steps][:, None, None, None]
        noise = (noisy - bar.sqrt() * clean) / (1 - bar).sqrt()
        velocity = bar.sqrt() * noise - (1 - bar).sqrt() * clean
        return {"epsilon": noise, "v_prediction": velocity, "sample": clean}[kind]

    assert float(noising.loss(clean, Draw.of(0, 0), oracle)) < 1e-4
    guess = noising.loss(clean, Draw.of(0, 0), lambda x, t: torch.zeros_like(x))
    assert float(guess) > 0.1


@pytest.mark.parametrize(("middle", "share"), [(False, 0.5), (True, 0.70)])
def test_timesteps_are_spread_over_the_range(middle: bool, share: float) -> None:
    """No timestep lies beyond the range, even where its last share is rounded up."""
    noising = Noising(SchedulerConfig.from_dict({}), middle=middle)
    drawn: list[torch.Tensor] = []

    def net(noisy: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        drawn.append(steps)
        return noisy

    class Last(Draw):
        def uniform(self, shape: Iterable[int]) -> torch.Tensor:
            return torch.full(tuple(shape), 1 - 2**-24)

    clean = torch.zeros(128, 1, 2, 2)
    for step in range(20):
        noising.loss(clean, Draw.of(0, step), net)
    steps = torch.cat(drawn)
    between = (steps >= 300) & (steps < 800)
    assert float(between.float().mean()) == pytest.approx(share, abs=0.02)
    noising.loss(clean, Last(np.random.default_rng(0), torch.Generator()), net)
    assert int(drawn[-1].max()) == 999


UNET = UNetConfig(
    sample_size=8,
    block_out_channels=(16, 16),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    attention_head_dim=2,
    cross_attention_dim=16,
    norm_num_groups=4,
)
VAE = VAEConfig(block_out_channels=(8, 8, 8, 8), norm_num_groups=4)
TEXT = CLIPTextConfig(
    vocab_size=540,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=8,
)


def test_text_to_image_learns_and_its_folder_draws(tmp_path: Path) -> None:
    tokenizer = train_vocabulary(["a cat", "a dog"] * 10, 540, tmp_path / "model" / "tokenizer", 8)
    # A cat is all +1, a dog all −1.
    ids = torch.tensor([tokenizer.encode(t).ids for t in ("a cat", "a dog")], dtype=torch.int16)
    latents = torch.stack([torch.ones(4, 8, 8), -torch.ones(4, 8, 8)]).half()
    plan = Plan(steps=150, batch=8, learning_rate=5e-3, warmup=20, ema=0.95)
    torch.manual_seed(0)
    encoder = CLIPTextModel(TEXT)
    words = Plan(steps=60, batch=8, learning_rate=1e-2, warmup=5, ema=0.9)
    teach_words(encoder, latents, ids, tokenizer.eos, words, tmp_path / "words")
    with torch.no_grad():
        cat, dog = encoder(ids.long())
    assert float((cat[-1] - dog[-1]).norm()) > 1.0  # far apart even in the padding
    torch.manual_seed(0)
    net = TextToImage(encoder, UNET)
    train_text_to_image(
        net,
        SchedulerConfig.from_dict(networks.SCHEDULER),
        latents,
        ids,
        torch.tensor(tokenizer.encode("").ids, dtype=torch.int16),
        plan,
        tmp_path / "run",
    )
    torch.manual_seed(0)
    notes = {"words": ["a", "cat", "dog"]}
    export_text_to_image(
        tmp_path / "model",
        AutoencoderKL(VAE),
        net.text_encoder,
        net.unet,
        networks.SCHEDULER,
        notes,
    )
    model = load_model(str(tmp_path / "model"))
    assert model.words == {"a", "cat", "dog"}
    means = {}
    for prompt in ("a cat", "a dog"):
        run = model.stream(prompt, sampler="ddim", steps=10, guidance_scale=1.0, seed=0)
        means[prompt] = float([step.clean for step in run][-1].mean())
    assert means["a cat"] > 0.5
    assert means["a dog"] < -0.5


def test_a_model_with_a_tiny_autoencoder_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its texts are UTF-8, also on Windows, where that is not the default."""
    monkeypatch.setattr(io, "text_encoding", lambda encoding, *_: encoding or "cp1252")
    tokenizer = train_vocabulary(["a cat"], 540, tmp_path / "tokenizer", 8)
    widths = dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (8,) * 4)
    vae = AutoencoderTiny(TinyConfig(**widths))
    parts = CLIPTextModel(TEXT), UNet2DConditionModel(UNET)
    export_text_to_image(tmp_path, vae, *parts, networks.SCHEDULER, {"words": ["a", "cat", "кот"]})
    model = load_model(str(tmp_path), dtype="float32")
    assert model.words == {"a", "cat", "кот"}
    assert isinstance(model.vae, AutoencoderTiny)
    assert model.tokenizer is not None
    assert model.tokenizer.encode("a cat").ids == tokenizer.encode("a cat").ids
    z = torch.randn(1, 4, 8, 8)
    assert torch.allclose(model.vae.decode(z), vae.decode(z), atol=0.05)  # float16 in the file


def test_a_model_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    with replacing(folder) as new:
        (new / "a").write_text("first")

    def stopped(by: type[BaseException]) -> None:
        with replacing(folder) as new:
            (new / "a").write_text("sec")
            raise by

    for by in (OSError, KeyboardInterrupt):
        with pytest.raises(by):
            stopped(by)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        assert (folder / "a").read_text() == "first"

    def refused(path: Path, to: Path) -> None:
        if path.name == "model.part":  # as Windows does while another program looks into it
            raise PermissionError
        path.rename(to)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", refused)
        with pytest.raises(PermissionError), replacing(folder) as new:
            (new / "a").write_text("second")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (folder / "a").read_text() == "first"
    folder.rename(tmp_path / "disk")
    folder.symlink_to("disk")
    for text in ("once", "again"):  # a link stays one
        with replacing(folder) as new:
            (new / "a").write_text(text)
        assert folder.is_symlink()
        assert (tmp_path / "disk" / "a").read_text() == text
    folder.unlink()
    (tmp_path / "disk").rename(folder)
    (tmp_path / "model.part" / "b").mkdir(parents=True)  # as SIGKILL leaves it
    with replacing(folder) as new:
        (new / "c").write_text("second")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == [
        "model",
        "model/c",
    ]


def test_unconditional_learns_and_its_folder_draws(tmp_path: Path) -> None:
    config = UNet2DConfig(
        sample_size=8,
        block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    green = np.full((1, 8, 8, 3), (0, 255, 0), np.uint8)
    net = train_unconditional(
        config,
        SchedulerConfig.from_dict(networks.PIXELS_SCHEDULER),
        lambda draw, n: green.repeat(n, axis=0),
        Plan(steps=300, batch=8, learning_rate=5e-3, warmup=20, ema=0.95),
        tmp_path / "run",
    )
    export_unconditional(tmp_path / "model", net, networks.PIXELS_SCHEDULER, {})
    model = load_model(str(tmp_path / "model"))
    image = model.generate(unconditional=True, sampler="ddim", steps=10, seed=0).images[0]
    red, green_mean, blue = np.asarray(image).reshape(-1, 3).mean(axis=0)
    # Some noise is left by a net this small; a net that learned nothing draws gray.
    assert green_mean - max(red, blue) > 40


class TestMinutes:
    PLAN = Plan(steps=0, batch=1, learning_rate=1e-2, warmup=2, seconds=1.0)

    def train(self, folder: Path, plan: Plan = PLAN, stop_at: int | None = None) -> torch.Tensor:
        steps = 0

        def loss_of(run: Any, draw: Any) -> torch.Tensor:
            nonlocal steps
            if steps == stop_at:
                raise KeyboardInterrupt
            steps += 1
            time.sleep(0.005)
            return (run(torch.randn(4, 2, generator=draw.noise)) - 1).square().mean()

        torch.manual_seed(0)
        net = torch.nn.Linear(2, 1)
        fit(net, loss_of, plan, folder, log=lambda _: None)
        return net.weight.detach()

    def test_end_in_time_and_go_on_as_begun(self, tmp_path: Path) -> None:
        whole_run = self.train(tmp_path / "a")
        steps = int((tmp_path / "a" / "steps").read_text())
        assert loop.PACE[1] < steps <= 250
        # Another run with as many steps is stopped before its pace was known, and after.
        with pytest.raises(KeyboardInterrupt):
            self.train(tmp_path / "b", stop_at=20)
        (tmp_path / "b" / "steps").write_text(str(steps))
        with pytest.raises(KeyboardInterrupt):
            self.train(tmp_path / "b", stop_at=15)
        assert torch.equal(self.train(tmp_path / "b"), whole_run)
        assert torch.equal(self.train(tmp_path / "b", stop_at=0), whole_run)

    def test_the_rate_falls_to_nothing(self) -> None:
        plan = self.PLAN.paced(200)
        rates = [plan.rate(step) for step in range(200)]
        assert rates[1:101] == [1e-2] * 100
        assert rates[199] == pytest.approx(1e-2 / 100)
