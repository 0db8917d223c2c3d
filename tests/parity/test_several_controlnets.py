"""Several ControlNets at once against diffusers' MultiControlNetModel, and what refuses them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import safelight
from safelight import SafelightError
from safelight.model import Model
from safelight.region import drawn_part
from safelight.request import Request
from safelight.weights import load_model
from safelight.weights.estimate import estimate
from tests.parity.guided_models import TEXTS, compare, controlnet, picture
from tests.parity.sdxl_models import UNET, make_folder

BOTH = [picture(), picture(seed=2)]
"""The pictures that guide, each through its ControlNet."""

OURS = {"control_scale": [0.7, 0.4], "control_start": [0.0, 0.5], "control_end": [0.5, 1.0]}
THEIRS = {
    "controlnet_conditioning_scale": [0.7, 0.4],
    "control_guidance_start": [0.0, 0.5],
    "control_guidance_end": [0.5, 1.0],
}


@pytest.fixture(scope="module")
def pairs(
    tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]
) -> dict[str, tuple[Path, list[Path]]]:
    """Models, each with two ControlNets."""
    root = tmp_path_factory.mktemp("several-controlnets")
    models = {"sd1": folders["sd1"], "sd2": folders["sd2"], "xl": make_folder(root / "xl", UNET)}
    return {
        name: (model, [controlnet(root / f"{name}-{seed}", model, seed) for seed in (5, 6)])
        for name, model in models.items()
    }


def loaded(pair: tuple[Path, list[Path]]) -> Model:
    model, nets = pair
    return load_model(model, device="cpu", dtype="float32", controlnet=nets)


def drawn(model: Model, **settings: Any) -> safelight.Result:
    asked = {"sampler": "ddim", "steps": 2, "seed": 7, "width": 64, "height": 64, **settings}
    return model.generate(**{**TEXTS, **asked})


@pytest.mark.parametrize("name", ["sd1", "sd2", "xl"])
def test_text_to_image(
    worst: dict[str, float], pairs: dict[str, tuple[Path, list[Path]]], name: str
) -> None:
    """Each has a scale and bounds of its own: at either step another one guides."""
    task = "StableDiffusionXLControlNetPipeline" if name == "xl" else ""
    compare(
        worst,
        loaded(pairs[name]),
        task or "StableDiffusionControlNetPipeline",
        *pairs[name],
        {"image": BOTH, **THEIRS},
        steps=2,
        control_image=BOTH,
        **OURS,
    )


def test_image_to_image_with_one_scale_for_both(
    worst: dict[str, float], pairs: dict[str, tuple[Path, list[Path]]]
) -> None:
    start = picture(seed=3)
    compare(
        worst,
        loaded(pairs["sd1"]),
        "StableDiffusionControlNetImg2ImgPipeline",
        *pairs["sd1"],
        {
            "image": start,
            "control_image": BOTH,
            "strength": 0.6,
            "controlnet_conditioning_scale": [0.7, 0.7],
        },
        steps=4,
        image=start,
        strength=0.6,
        control_image=BOTH,
        control_scale=0.7,
    )


def test_a_recipe_names_both(pairs: dict[str, tuple[Path, list[Path]]], tmp_path: Path) -> None:
    model = loaded(pairs["sd1"])
    result = drawn(model, control_image=BOTH, **OURS)
    recipe = result.recipe()
    assert [one["name"] for one in recipe["controlnet"]] == ["sd1-5", "sd1-6"]
    assert recipe["settings"]["control_scale"] == [0.7, 0.4]
    again = Request.from_dict(recipe["settings"], control_image=BOTH)
    pixels = np.asarray(result.images[0])
    assert np.array_equal(np.asarray(model.generate(again).images[0]), pixels)
    with pytest.raises(SafelightError, match="control_image must be the one of SHA-256"):
        Request.from_dict(recipe["settings"], control_image=BOTH[::-1])
    with pytest.raises(SafelightError, match="control_image_2 is needed again"):
        Request.from_dict(recipe["settings"], control_image=BOTH[0])
    (path,) = result.save(tmp_path / "both.png")
    text = path.read_bytes().decode("latin-1")
    assert 'ControlNet 1: "Module: none, Model: sd1-6 [' in text
    assert "Weight: 0.4, Guidance Start: 0.5, Guidance End: 1" in text


def test_scale_zero_turns_one_off(pairs: dict[str, tuple[Path, list[Path]]]) -> None:
    folder, nets = pairs["sd1"]
    both = loaded((folder, nets))
    one = load_model(folder, device="cpu", dtype="float32", controlnet=nets[1])
    off = drawn(both, control_image=BOTH, control_scale=[0, 0.5])
    alone = drawn(one, control_image=BOTH[1], control_scale=0.5)
    assert np.array_equal(np.asarray(off.images[0]), np.asarray(alone.images[0]))
    assert not off.warnings
    plain = drawn(both, control_scale=[0.5, 0.7])
    assert plain.warnings == ["control_scale does nothing without control_image: give one as well"]
    none = drawn(both, control_image=BOTH, control_scale=[0, 0])
    assert any("guides no step" in told for told in none.warnings)


def test_refusals(pairs: dict[str, tuple[Path, list[Path]]]) -> None:
    folder, nets = pairs["sd1"]
    both = loaded((folder, nets))
    assert len(both.controlnets) == 2
    assert both.controlnet is both.controlnets[0]
    with pytest.raises(
        SafelightError, match=r"must be 2 pictures for .*ControlNets, not 1"
    ) as told:
        drawn(both, control_image=BOTH[0])
    assert told.value.field == "control_image"
    with pytest.raises(SafelightError, match="must be 1 picture"):
        drawn(load_model(folder, device="cpu", controlnet=nets[0]), control_image=BOTH)
    with pytest.raises(SafelightError, match="5 ControlNets: at most 4 guide at once"):
        load_model(folder, device="cpu", controlnet=nets[:1] * 5)
    with pytest.raises(SafelightError, match="no controlnet 'missing'"):
        load_model(folder, device="cpu", controlnet=[nets[0], "missing"])
    with pytest.raises(SafelightError, match="does not fit"):
        load_model(folder, device="cpu", controlnet=[nets[0], pairs["xl"][1][0]])
    with pytest.raises(SafelightError, match="control_scale has 3 values, and control_image is 2"):
        Request(control_image=BOTH, control_scale=[1, 1, 1])
    with pytest.raises(SafelightError, match="control_start has 2 values, and another setting"):
        Request(control_scale=[1, 1, 1], control_start=[0, 0])
    with pytest.raises(SafelightError, match=r"at least control_start, 0\.5, not 0\.4"):
        Request(control_image=BOTH, control_start=[0.0, 0.5], control_end=0.4)
    for bad in ({"control_image": [BOTH[0]] * 5}, {"control_scale": [0.5, 11]}):
        with pytest.raises(SafelightError, match="a list of at most 4, one for each ControlNet"):
            Request(**bad)


def test_memory_counts_each(pairs: dict[str, tuple[Path, list[Path]]]) -> None:
    folder, nets = pairs["sd1"]
    sizes = [estimate(folder, device="cpu", controlnet=nets[:n] or None).weights for n in range(3)]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] > 0


def test_a_part_around_a_mask_has_its_part_of_each() -> None:
    start, mask = Image.new("RGB", (64, 64)), Image.new("L", (64, 64))
    mask.paste(255, (32, 32, 64, 64))
    left, right = Image.new("RGB", (64, 64)), Image.new("RGB", (128, 128))
    left.paste("red", (32, 32, 64, 64))
    right.paste("blue", (64, 64, 128, 128))
    asked = Request(
        image=start, mask=mask, mask_padding=0, width=64, height=64, control_image=[left, right]
    )
    part, _ = drawn_part(asked)
    assert [one.getpixel((32, 32)) for one in part.control_image] == [(255, 0, 0), (0, 0, 255)]  # type: ignore[union-attr]
    assert [one.getpixel((2, 2)) for one in part.control_image] == [(255, 0, 0), (0, 0, 255)]  # type: ignore[union-attr]
