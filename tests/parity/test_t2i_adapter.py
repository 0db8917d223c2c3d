"""T2I-Adapters against diffusers: the same checkpoint, adapters, pictures and settings."""

import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from safelight import SafelightError
from safelight.model import Model
from safelight.weights import load_model
from safelight.weights.kinds import kind_of
from tests.parity.guided_models import TEXTS, compare, controlnet, picture
from tests.parity.sdxl_models import UNET, make_folder

XL = {
    **UNET,
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [2, 4, 4],
    "transformer_layers_per_block": [1, 1, 1],
}
"""As many levels as SDXL's UNet: the last map goes to the middle block."""

THREE_LEVELS = {
    "block_out_channels": [32, 64, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
"""Of Stable Diffusion 1, where the channels of the last two levels are equal."""

BOTH = [picture(), picture(seed=2)]


def adapter(folder: Path, kind: str, seed: int = 5, **config: Any) -> Path:
    """Write a random adapter."""
    torch.manual_seed(seed)
    shape = {"channels": [32, 64, 64], "num_res_blocks": 2, "downscale_factor": 8}
    if kind == "light_adapter":  # it has another map
        shape["channels"] = [32, 64]
    if kind == "full_adapter_xl":
        shape = {"channels": [16, 32, 32, 32], "num_res_blocks": 1, "downscale_factor": 16}
    net: Any = diffusers.T2IAdapter(adapter_type=kind, **{**shape, **config})
    with torch.no_grad():
        for weight in net.parameters():
            torch.nn.init.normal_(weight, std=0.1)
    net.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> dict[str, Path]:
    """Adapters by kind, and an SDXL model of three levels."""
    root = tmp_path_factory.mktemp("t2i-adapters")
    kinds = ("full_adapter", "light_adapter", "full_adapter_xl")
    made = {kind: adapter(root / kind, kind) for kind in kinds}
    made["other"] = adapter(root / "other", "full_adapter", 6)
    made["gray"] = adapter(root / "gray", "full_adapter", in_channels=1)
    made["xl-other"] = adapter(root / "xl-other", "full_adapter_xl", 6)
    sd1 = shutil.copytree(folders["sd1"], root / "sd1")
    unet: Any = diffusers.UNet2DConditionModel
    torch.manual_seed(1)
    config = {**unet.load_config(folders["sd1"] / "unet"), **THREE_LEVELS}
    unet.from_config(config).save_pretrained(sd1 / "unet")
    return {**made, "sd1": sd1, "xl": make_folder(root / "xl", XL)}


def loaded(model: Path, *given: Path) -> Model:
    return load_model(model, device="cpu", dtype="float32", controlnet=list(given))


def drawn(model: Model, **settings: Any) -> np.ndarray:
    """Return the pixels of a picture of 64 by 64."""
    asked = {"sampler": "ddim", "steps": 2, "seed": 7, "width": 64, "height": 64, **settings}
    return np.asarray(model.generate(**{**TEXTS, **asked}).images[0]).astype(int)


SD, SDXL = "StableDiffusionAdapterPipeline", "StableDiffusionXLAdapterPipeline"


@pytest.mark.parametrize("kind", ["full_adapter", "light_adapter", "full_adapter_xl"])
def test_one(worst: dict[str, float], nets: dict[str, Path], kind: str) -> None:
    """SDXL's pipeline ends its guidance after a share of the steps."""
    is_xl = kind == "full_adapter_xl"
    model = nets["xl" if is_xl else "sd1"]
    theirs = {"adapter_conditioning_factor": 0.5} if is_xl else {}
    compare(
        worst,
        loaded(model, nets[kind]),
        SDXL if is_xl else SD,
        model,
        nets[kind],
        {"image": picture(), "adapter_conditioning_scale": 0.7, **theirs},
        kind="T2IAdapter",
        steps=2,
        control_image=picture(),
        control_scale=0.7,
        control_end=0.5 if is_xl else 1.0,
    )


@pytest.mark.parametrize("is_xl", [False, True])
def test_several(worst: dict[str, float], nets: dict[str, Path], is_xl: bool) -> None:
    names = ("full_adapter_xl", "xl-other") if is_xl else ("full_adapter", "other")
    model, given = nets["xl" if is_xl else "sd1"], [nets[name] for name in names]
    compare(
        worst,
        loaded(model, *given),
        SDXL if is_xl else SD,
        model,
        given,
        {"image": BOTH, "adapter_conditioning_scale": [0.7, 0.4]},
        kind="T2IAdapter",
        steps=2,
        control_image=BOTH,
        control_scale=[0.7, 0.4],
    )


def test_a_gray_one_at_a_side_that_is_halved_unevenly(
    worst: dict[str, float], nets: dict[str, Path]
) -> None:
    gray = picture(72).convert("L")
    compare(
        worst,
        loaded(nets["sd1"], nets["gray"]),
        SD,
        nets["sd1"],
        nets["gray"],
        {"image": gray, "width": 72, "height": 72},
        kind="T2IAdapter",
        steps=2,
        control_image=gray,
    )


# --- without diffusers' pipelines -----------------------------------------------------------------


def original(folder: Path, blocks: int, light: bool) -> dict[str, torch.Tensor]:
    """Return the weights of an adapter by the original code's names. blocks: of each level."""
    found = {}
    for key, tensor in load_file(folder / "diffusion_pytorch_model.safetensors").items():
        name = key.removeprefix("adapter.")
        parts = name.split(".")
        if parts[0] == "body" and light:
            name = name.replace(".resnets.", ".body.")
        elif parts[0] == "body" and parts[2] == "resnets":
            place = int(parts[1]) * blocks + int(parts[3])
            name = ".".join(["body", str(place), *parts[4:]])
        elif parts[0] == "body":
            name = ".".join(["body", str(int(parts[1]) * blocks), *parts[2:]])
        found[name] = tensor
    return found


@pytest.mark.parametrize(
    ("kind", "blocks"), [("full_adapter", 2), ("light_adapter", 2), ("full_adapter_xl", 1)]
)
def test_single_files(nets: dict[str, Path], tmp_path: Path, kind: str, blocks: int) -> None:
    """They have no config, and draw the folder's picture; with the original names, too."""
    model = nets["xl" if kind == "full_adapter_xl" else "sd1"]
    expected = drawn(loaded(model, nets[kind]), control_image=picture())
    assert not np.array_equal(drawn(loaded(model, nets[kind])), expected)
    theirs = load_file(nets[kind] / "diffusion_pytorch_model.safetensors")
    own = original(nets[kind], blocks, kind == "light_adapter")
    for name, tensors in (("theirs", theirs), ("original", own)):
        file = tmp_path / f"{name}.safetensors"
        save_file(tensors, file)
        assert kind_of(tensors) == "controlnet"
        assert np.array_equal(drawn(loaded(model, file), control_image=picture()), expected)
        with pytest.raises(SafelightError, match="this is a T2I-Adapter, not a whole model"):
            load_model(file, device="cpu")


def test_the_fast_modes_reuse(nets: dict[str, Path]) -> None:
    model = loaded(nets["sd1"], nets["full_adapter"])
    asked = {"steps": 8, "guidance_scale": 1.0}
    whole = drawn(model, control_image=picture(), **asked)
    fast = drawn(model, control_image=picture(), **asked, cache_every=2, cache_branch=2)
    near, far = np.abs(fast - whole).mean(), np.abs(drawn(model, **asked) - whole).mean()
    assert 0 < near < far / 2


def test_a_side_that_an_xl_adapter_does_not_divide(nets: dict[str, Path]) -> None:
    """It reads 16x16 pixels a place: the edge is repeated, where diffusers refuses."""
    model = loaded(nets["xl"], nets["full_adapter_xl"])
    made = model.generate("a dog", steps=1, seed=1, control_image=picture(72))
    assert made.images[0].size == (72, 72)


def test_refusals(nets: dict[str, Path], folders: dict[str, Path], tmp_path: Path) -> None:
    def refused(model: str, *given: Path) -> str:
        with pytest.raises(SafelightError) as found:
            loaded({**folders, **nets}[model], *given)
        return str(found.value)

    assert "draws pixels: it takes no ControlNet" in refused("pixels", nets["full_adapter"])
    assert "with maps of 1/16" in refused(
        "sd1", adapter(tmp_path / "a", "full_adapter", downscale_factor=16)
    )
    assert "for channels (32, 32, 32)" in refused(
        "sd1", adapter(tmp_path / "b", "light_adapter", channels=[32, 32])
    )
    assert "does not fit" in refused("xl", nets["full_adapter"])
    assert "does not fit" in refused("sd1", nets["full_adapter_xl"])
    net = controlnet(tmp_path / "net", nets["sd1"])
    told = "a ControlNet and a T2I-Adapter cannot guide together"
    assert told in refused("sd1", net, nets["full_adapter"])
    weights = load_file(nets["full_adapter"] / "diffusion_pytorch_model.safetensors")
    for changed, told in (
        ({"adapter.conv_in.weight": torch.zeros(32, 7, 3, 3)}, "reads 7 numbers a place"),
        ({"adapter.body.0.more.weight": torch.zeros(4)}, "belong to nothing"),
        ({"adapter.body.1.resnets.0.block1.weight": torch.zeros(32, 32, 3, 3)}, "does not fit"),
    ):
        save_file({**weights, **changed}, tmp_path / "one.safetensors")
        assert told in refused("sd1", tmp_path / "one.safetensors")
    flat = original(nets["full_adapter"], 2, light=False)
    more = {f"body.6.{name}": torch.zeros(64) for name in ("block1.bias", "block2.bias")}
    save_file({**flat, **more}, tmp_path / "one.safetensors")
    assert "of 7 blocks does not fit" in refused("sd1", tmp_path / "one.safetensors")


def test_a_pipeline_with_an_adapter(nets: dict[str, Path], tmp_path: Path) -> None:
    """Its folder is a model, and holds the adapter that is given beside it."""
    pipe = diffusers.StableDiffusionAdapterPipeline.from_pretrained(
        nets["sd1"], adapter=diffusers.T2IAdapter.from_pretrained(nets["full_adapter"])
    )
    pipe.save_pretrained(tmp_path / "whole")
    model = loaded(tmp_path / "whole", tmp_path / "whole")
    expected = drawn(loaded(nets["sd1"], nets["full_adapter"]), control_image=picture())
    assert np.array_equal(drawn(model, control_image=picture()), expected)
