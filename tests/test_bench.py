"""The benchmark compares equal work: checked on small networks."""

import importlib.util
from typing import Any

import pytest
import torch

from safelight import bench, cli
from safelight.errors import SafelightError

pytest.importorskip("diffusers")

UNET = {
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
    "sample_size": 8,
}
VAE = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
}


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of diffusers' scheduler
def test_step_decode_and_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    small: dict[str, Any] = {"unet": UNET, "vae": VAE}
    monkeypatch.setattr(bench.networks, "_config", lambda part: dict(small[part]))
    monkeypatch.setattr(bench.networks, "SIDE", 8)
    monkeypatch.setattr(bench, "_matmul_gflops", lambda: 1.0)
    monkeypatch.setattr(bench.one_step, "UNET", UNET)
    names, parts = ["safelight float32", "diffusers float32"], ["step", "decode", "picture"]
    parts.append("one-step")
    found = bench.run(names, parts=parts, repeat=2)
    for part in parts:
        # Twenty guided steps of random networks amplify the rounding of one step.
        most = 1e-2 if part == "picture" else 1e-4
        assert found[part]["error"]["safelight float32"] < most
        assert [len(times) for times in found[part]["times"].values()] == [2, 2]
        assert found[part]["ratio"]["safelight float32"].keys() == {"diffusers float32"}
    assert "start" not in found


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.networks, "_config", lambda part: dict(UNET))
    monkeypatch.setattr(bench.networks, "SIDE", 8)
    monkeypatch.setattr("safelight.processors.cores", lambda: 3)
    before = torch.get_num_threads()
    found = bench.run(["safelight float32"], parts=["threads"], repeat=2)["by threads"]
    assert list(found["seconds"]) == [f"{count} threads" for count in (1, 2, 3, 4, 8, 16)]
    assert found["ratio"]["3 threads"].keys() == found["seconds"].keys() - {"3 threads"}
    assert torch.get_num_threads() == before


def test_the_ways_of_the_fast_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    small: dict[str, Any] = {"unet": UNET, "vae": VAE}
    monkeypatch.setattr(bench.networks, "_config", lambda part: dict(small[part]))
    monkeypatch.setattr(bench.networks, "SIDE", 8)
    ways = {name: bench.shortcuts.WAYS[name] for name in ("full", "fast 1", "fast 3")}
    monkeypatch.setattr(bench.shortcuts, "WAYS", ways)
    monkeypatch.setattr(bench.shortcuts, "PROMPTS", ("a red apple",))
    found = bench.run(["safelight float32"], parts=["fast"], repeat=1)["fast"]
    assert found["seconds"].keys() == ways.keys()
    assert found["ratio"]["full"].keys() == {"fast 1", "fast 3"}
    near, far = (found["distance"][way] for way in ("fast 1", "fast 3"))
    # How far they are depends on the weights that ship; docs/fast.md has figures.
    assert 100 > near["psnr"] > far["psnr"] > 10
    assert 1 > near["worst ssim"] > far["worst ssim"] > 0.2


@pytest.mark.parametrize("wrong", [{"names": ["x"]}, {"names": [], "parts": ["x"]}])
def test_unknown_names(wrong: dict[str, Any]) -> None:
    with pytest.raises(SafelightError, match="'x'"):
        bench.run(**wrong)


def test_a_part_or_model_that_cannot_be_measured_is_said_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for wrong in ("none/such.safetensors", "embedded-unconditional"):
        with pytest.raises(SafelightError, match=wrong):
            bench.run([], parts=["fast"], model=wrong)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "skimage" else find(name)
    )
    assert bench.parts_here() == [part for part in bench.PARTS if part != "fast"]
    with pytest.raises(SafelightError, match=r"safelight\[bench\]"):
        bench.run([], parts=["fast"])


def test_each_part_is_printed_when_it_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(names: list[str], *, parts: list[str], **_: Any) -> dict[str, Any]:
        if parts == ["busy"]:
            raise SafelightError("a process ended")
        return {"start": {"seconds": {"safelight float32": 2}, "ratio": {"safelight float32": {}}}}

    monkeypatch.setattr(bench, "run", run)
    assert cli.run(["bench", "--part", "start", "--part", "busy"]) == 2
    said = capsys.readouterr()
    assert "START" in said.out
    assert said.err == "error: a process ended\n"
