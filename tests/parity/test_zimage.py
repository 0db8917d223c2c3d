"""Pictures of Z-Image against diffusers."""

from pathlib import Path

import pytest

from safelight.request import Request
from tests.parity.flow_models import check_shared_calls, make_zimage
from tests.parity.test_pictures import (
    NEGATIVE,
    PROMPT,
    Worst,
    compare,
    left_half,
    ours,
    picture,
    theirs,
)

TEXT, IMAGE = "ZImagePipeline", "ZImageImg2ImgPipeline"
SIZE = {"height": 64, "width": 96}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("zimage")
    return {
        "turbo": make_zimage(root / "turbo", shift=3.0),
        "base": make_zimage(root / "base", shift=6.0),
    }


def test_turbo(worst: Worst, models: dict[str, Path]) -> None:
    asked = {"prompt": PROMPT, **SIZE}
    given = {**asked, "num_inference_steps": 5, "guidance_scale": 0.0}
    pipe = theirs(models["turbo"], TEXT)
    compare(worst, ours(models["turbo"]), pipe, given, **asked, steps=5, guidance_scale=1, seed=11)


def test_guidance(worst: Worst, models: dict[str, Path]) -> None:
    """Their guidance scale is ours less 1. The texts have different lengths."""
    asked = {"prompt": PROMPT, "negative_prompt": NEGATIVE, **SIZE}
    given = {**asked, "num_inference_steps": 5, "guidance_scale": 3.0}
    pipe = theirs(models["base"], TEXT)
    compare(worst, ours(models["base"]), pipe, given, **asked, steps=5, guidance_scale=4, seed=11)


def test_another_shift(worst: Worst, models: dict[str, Path]) -> None:
    """As that of a scheduler config, which is how LoRAs for few steps are drawn with diffusers."""
    asked = {"prompt": PROMPT, **SIZE}
    given = {**asked, "num_inference_steps": 4, "guidance_scale": 0.0}
    pipe = theirs(models["base"], TEXT)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=1.7)
    said = {**asked, "steps": 4, "guidance_scale": 1, "shift": 1.7, "seed": 11}
    compare(worst, ours(models["base"]), pipe, given, **said)


def test_image_to_image(worst: Worst, models: dict[str, Path]) -> None:
    asked = {"prompt": PROMPT, "image": picture(), "strength": 0.65}
    given = {**asked, "num_inference_steps": 10, "guidance_scale": 0.0}
    given |= {"height": 64, "width": 64}
    pipe = theirs(models["turbo"], IMAGE)
    compare(worst, ours(models["turbo"]), pipe, given, **asked, steps=10, guidance_scale=1, seed=2)


def test_inpainting(worst: Worst, models: dict[str, Path]) -> None:
    asked = {"prompt": PROMPT, "image": picture(), "strength": 0.6}
    given = {**asked, "mask_image": left_half(), "num_inference_steps": 8, "guidance_scale": 0.0}
    given |= {"height": 64, "width": 64}
    pipe = theirs(models["turbo"], "ZImageInpaintPipeline")
    said = {**asked, "mask": left_half(), "steps": 8, "guidance_scale": 1, "seed": 2}
    compare(worst, ours(models["turbo"]), pipe, given, **said)


def test_variants_are_told_by_their_shift(models: dict[str, Path]) -> None:
    turbo, base = ours(models["turbo"]), ours(models["base"])
    assert (turbo.family.name, base.family.name) == ("z-image-turbo", "z-image")
    assert turbo.defaults["steps"] == 8
    assert base.defaults["guidance_scale"] == 5.0


def test_pictures_share_a_call(models: dict[str, Path]) -> None:
    """Prompts of different lengths, guided, give in one call what each gives alone."""
    model = ours(models["base"])
    asked = {"steps": 2, "width": 64, "height": 64, "guidance_scale": 3.0, "seed": 5}
    requests = [
        Request(prompt="a red apple", negative_prompt="blurred and dark", **asked),
        Request(prompt="a dark and long negative", negative_prompt="a cat, too", **asked),
        Request(prompt="a dog", **asked | {"guidance_scale": 1.0}),
    ]
    check_shared_calls(model, requests)
