"""ControlNets against diffusers: the same checkpoint, ControlNet, picture and settings.

Folders and single files, all tasks, part of the steps, SDXL, and the fast mode's reuse.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from safelight import SafelightError
from safelight.model import Model
from safelight.weights import load_model
from safelight.weights.controlnets import with_controlnet
from safelight.weights.find import find, find_controlnet
from safelight.weights.names import unet_names
from safelight.weights.plan import Plan, read_plan
from tests.parity.flow_models import make_sd3
from tests.parity.guided_models import TEXTS, compare, controlnet, picture
from tests.parity.sdxl_models import UNET, make_folder


def controlnet_of(folder: Path, like: Path, shape: dict[str, Any]) -> Path:
    """Write a random ControlNet with the config of another one, except for its shape."""
    torch.manual_seed(6)
    config = {**diffusers.ControlNetModel.load_config(like), **shape}
    net: Any = diffusers.ControlNetModel.from_config(config)
    with torch.no_grad():
        for weight in net.parameters():
            torch.nn.init.normal_(weight, std=0.05)
    net.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> dict[str, Path]:
    """ControlNets for models of the same names."""
    root = tmp_path_factory.mktemp("controlnets")
    made = {name: controlnet(root / name, folders[name]) for name in ("sd1", "sd2")}
    xl = make_folder(root / "xl-model", UNET)
    return {**made, "xl": controlnet(root / "xl", xl), "xl-model": xl}


HALF = {"control_scale": 0.7, "control_start": 0.25, "control_end": 0.8}
THEIR_HALF = {
    "controlnet_conditioning_scale": 0.7,
    "control_guidance_start": 0.25,
    "control_guidance_end": 0.8,
}


@pytest.mark.parametrize("name", ["sd1", "sd2"])
@pytest.mark.parametrize("part", [False, True])
def test_text_to_image(
    worst: dict[str, float],
    folders: dict[str, Path],
    nets: dict[str, Path],
    name: str,
    part: bool,
) -> None:
    model = load_model(folders[name], device="cpu", dtype="float32", controlnet=nets[name])
    compare(
        worst,
        model,
        "StableDiffusionControlNetPipeline",
        folders[name],
        nets[name],
        {"image": picture(), **(THEIR_HALF if part else {})},
        control_image=picture(),
        **(HALF if part else {}),
    )


def test_image_to_image(
    worst: dict[str, float], folders: dict[str, Path], nets: dict[str, Path]
) -> None:
    model = load_model(folders["sd1"], device="cpu", dtype="float32", controlnet=nets["sd1"])
    start = picture(seed=2)
    compare(
        worst,
        model,
        "StableDiffusionControlNetImg2ImgPipeline",
        folders["sd1"],
        nets["sd1"],
        {"image": start, "control_image": picture(), "strength": 0.6, **THEIR_HALF},
        image=start,
        control_image=picture(),
        strength=0.6,
        **HALF,
    )


@pytest.mark.parametrize("name", ["sd1", "inpainting"])
def test_inpainting(
    worst: dict[str, float], folders: dict[str, Path], nets: dict[str, Path], name: str
) -> None:
    """The ControlNet does not read the mask that an inpainting UNet reads."""
    model = load_model(folders[name], device="cpu", dtype="float32", controlnet=nets["sd1"])
    start = picture(seed=2)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    compare(
        worst,
        model,
        "StableDiffusionControlNetInpaintPipeline",
        folders[name],
        nets["sd1"],
        {
            "image": start,
            "mask_image": mask,
            "control_image": picture(),
            "controlnet_conditioning_scale": 0.7,  # its default is 0.5, unlike the others'
            "strength": 0.6,
        },
        image=start,
        mask=mask,
        control_image=picture(),
        control_scale=0.7,
        strength=0.6,
    )


SMALL = {
    "transformer_layers_per_block": [0, 0],
    "down_block_types": ["DownBlock2D"] * 2,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
}
MIDDLE = {"transformer_layers_per_block": [0, 2]}
"""As the published ControlNets "small" and "mid" for SDXL: transformers of no blocks remain."""

NOWHERE = {**SMALL, "mid_block_type": "UNetMidBlock2D"}


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({}, id="whole"),
        pytest.param(MIDDLE, id="mid"),
        pytest.param(SMALL, id="small", marks=pytest.mark.soak),
        pytest.param(NOWHERE, id="nowhere", marks=pytest.mark.soak),
    ],
)
def test_sdxl(
    worst: dict[str, float], nets: dict[str, Path], tmp_path: Path, shape: dict[str, Any]
) -> None:
    """The single file has no config, and draws the same picture as the folder."""
    net = nets["xl"] if not shape else controlnet_of(tmp_path / "net", nets["xl"], shape)
    model = load_model(nets["xl-model"], device="cpu", dtype="float32", controlnet=net)
    compare(
        worst,
        model,
        "StableDiffusionXLControlNetPipeline",
        nets["xl-model"],
        net,
        {"image": picture(), "controlnet_conditioning_scale": 0.8},
        control_image=picture(),
        control_scale=0.8,
    )
    file = tmp_path / "net.safetensors"
    save_file(load_file(net / "diffusion_pytorch_model.safetensors"), file)
    single = load_model(nets["xl-model"], device="cpu", dtype="float32", controlnet=file)
    expected = drawn(model, control_image=picture())
    assert np.array_equal(drawn(single, control_image=picture()), expected)


# --- without diffusers' pipelines -----------------------------------------------------------------


def drawn(model: Model, **settings: Any) -> np.ndarray:
    """Return the pixels of a picture of 64 by 64."""
    asked = {"sampler": "ddim", "steps": 4, "seed": 7, "width": 64, "height": 64, **settings}
    return np.asarray(model.generate(**{**TEXTS, **asked}).images[0]).astype(int)


def original_names(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a ControlNet by the original code's names."""
    net: Any = diffusers.ControlNetModel.from_pretrained(folder)
    config = {**net.config, "up_block_types": []}
    theirs = {ours: name for name, ours in unet_names(config).items()}
    theirs["controlnet_mid_block"] = "middle_block_out.0"
    blocks = [f"blocks.{i}" for i in range(len(net.controlnet_cond_embedding.blocks))]
    for i, name in enumerate(["conv_in", *blocks, "conv_out"]):
        theirs[f"controlnet_cond_embedding.{name}"] = f"input_hint_block.{2 * i}"
    for i in range(len(net.controlnet_down_blocks)):
        theirs[f"controlnet_down_blocks.{i}"] = f"zero_convs.{i}.0"
    found = {}
    for key, tensor in net.state_dict().items():
        module = max((one for one in theirs if key.startswith(f"{one}.")), key=len)
        found[theirs[module] + key.removeprefix(module)] = tensor.contiguous()
    return found


@pytest.mark.parametrize("prefix", ["control_model.", ""])
@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_a_file_in_the_original_layout(
    folders: dict[str, Path], nets: dict[str, Path], tmp_path: Path, name: str, prefix: str
) -> None:
    path = tmp_path / "control.safetensors"
    tensors = {prefix + key: one for key, one in original_names(nets[name]).items()}
    if prefix:  # a whole model lies beside it in the authors' first files
        tensors["model.diffusion_model.input_blocks.0.0.bias"] = torch.zeros(4)
    save_file(tensors, path)
    whole = load_model(folders[name], device="cpu", dtype="float32", controlnet=nets[name])
    single = load_model(folders[name], device="cpu", dtype="float32", controlnet=path)
    expected = drawn(whole, control_image=picture())
    assert np.array_equal(drawn(single, control_image=picture()), expected)
    assert not np.array_equal(drawn(single), expected)
    with pytest.raises(SafelightError, match="this is a ControlNet, not a whole model"):
        load_model(path, device="cpu")


def test_the_fast_modes_reuse(folders: dict[str, Path], nets: dict[str, Path]) -> None:
    """Steps that reuse the deep part add to the skip connections that they compute."""
    model = load_model(folders["sd1"], device="cpu", dtype="float32", controlnet=nets["sd1"])
    asked = {"control_image": picture(), "steps": 8, "guidance_scale": 1.0}
    whole = drawn(model, **asked)
    fast = drawn(model, **asked, cache_every=2, cache_branch=2)
    plain = drawn(model, steps=8, guidance_scale=1.0)
    near, far = np.abs(fast - whole).mean(), np.abs(plain - whole).mean()
    assert 0 < near < far / 2


def test_the_size_is_that_of_the_control_image(
    folders: dict[str, Path], nets: dict[str, Path]
) -> None:
    model = load_model(folders["sd1"], device="cpu", dtype="float32", controlnet=nets["sd1"])
    result = model.generate("a dog", steps=1, seed=1, control_image=picture(96))
    assert result.images[0].size == (96, 96)
    recipe = result.recipe()
    assert recipe["controlnet"] == model.control
    assert recipe["settings"]["control_image_sha256"]
    assert not [one for one in result.warnings if "control" in one]
    result = model.generate("a dog", steps=1, seed=1, control_image=picture(96), control_end=0.6)
    assert any("control_image guides no step" in one for one in result.warnings)


def test_what_is_refused(folders: dict[str, Path]) -> None:
    model = load_model(folders["sd1"], device="cpu", dtype="float32")
    for settings, told in (
        ({"control_image": picture()}, "control_image needs a ControlNet"),
        ({"control_start": 0.8, "control_end": 0.2}, "control_end must be at least control_start"),
        ({"control_scale": -1.0}, "control_scale must be a number from 0 to 10"),
    ):
        with pytest.raises(SafelightError, match=told):
            model.generate("a dog", steps=1, **settings)


def test_files_that_are_no_controlnet_for_the_model(
    folders: dict[str, Path], nets: dict[str, Path], tmp_path: Path
) -> None:
    def refused(path: Path, model: str = "sd1") -> str:
        with pytest.raises(SafelightError) as found:
            load_model(folders[model], device="cpu", dtype="float32", controlnet=path)
        return str(found.value)

    path = tmp_path / "control_v11e_sd15_shuffle.safetensors"
    save_file(original_names(nets["sd1"]), path)
    assert "averages over the picture" in refused(path)
    for key, told in (
        ("lora_controlnet", "Control-LoRA"),
        ("difference", "the difference to a base model"),
        ("adapter.body.0.resnets.0.block1.weight", "T2I-Adapter"),
        ("task_embedding", "union"),
        ("something.weight", "this is no ControlNet"),
    ):
        path = tmp_path / "one.safetensors"
        save_file({key: torch.zeros(4, 4)}, path)
        assert told in refused(path)
    assert "does not fit" in refused(nets["xl"])
    assert "is no ControlNet" in refused(folders["sd1"] / "unet")
    assert "a model without a ControlNet" in refused(folders["sd1"])
    assert "takes no ControlNet" in refused(nets["sd1"], "pixels")
    folders = {**folders, "sd3": make_sd3(tmp_path / "sd3", t5=False)}
    assert "which takes no ControlNet yet" in refused(nets["sd1"], "sd3")


@pytest.mark.parametrize(("base", "net"), [("sd1", "sd1"), ("xl-model", "xl")])
def test_a_pipeline_with_a_controlnet(
    folders: dict[str, Path], nets: dict[str, Path], tmp_path: Path, base: str, net: str
) -> None:
    """Its folder is a model, and holds the ControlNet that is given beside it."""
    plain = {**nets, **folders}[base]
    whole = shutil.copytree(plain, tmp_path / "whole")
    shutil.copytree(nets[net], whole / "controlnet")
    index = json.loads((plain / "model_index.json").read_text())
    kind = index["_class_name"].replace("Pipeline", "ControlNetPipeline")

    def plan(network: str) -> Plan:
        entry = {"_class_name": kind, "controlnet": ["diffusers", network]}
        (whole / "model_index.json").write_text(json.dumps({**index, **entry}))
        return read_plan(find(whole))

    model = plan("ControlNetModel")
    assert "controlnet" not in model.weights
    found = with_controlnet(model, find_controlnet(whole)).weights["controlnet"]
    assert (
        found.keys()
        == with_controlnet(model, find_controlnet(nets[net])).weights["controlnet"].keys()
    )
    with pytest.raises(SafelightError, match="several ControlNets: give its folders"):
        with_controlnet(plan("MultiControlNetModel"), find_controlnet(whole))


def test_a_single_file_for_a_model_whose_config_leaves_out_defaults(
    folders: dict[str, Path], nets: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "net.safetensors"
    save_file(original_names(nets["sd1"]), file)
    plan = read_plan(find(folders["sd1"]))
    short = replace(plan, raw={**plan.raw, "unet": {}})
    found = [with_controlnet(one, find_controlnet(file)) for one in (plan, short)]
    assert found[0].configs["controlnet"] == found[1].configs["controlnet"]
