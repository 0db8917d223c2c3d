"""Pictures of Qwen-Image against diffusers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from safelight.request import Request
from safelight.weights import load_model
from tests.parity import test_flux as of_flux
from tests.parity.flow_models import check_shared_calls, make_qwen_image
from tests.parity.test_pictures import (
    NEGATIVE,
    PROMPT,
    Worst,
    draw,
    left_half,
    ours,
    picture,
)

TEXT, IMAGE, INPAINT = (f"QwenImage{task}Pipeline" for task in ("", "Img2Img", "Inpaint"))
SIZE = {"height": 64, "width": 96}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen_image(tmp_path_factory.mktemp("qwen") / "qwen-image")


def compare(worst: Worst, folder: Path, task: str, **asked: Any) -> None:
    """Compare with a pipeline of diffusers, whose guidance scale has another name."""
    given = {key: value for key, value in asked.items() if key not in ("seed", "steps", "mask")}
    given["true_cfg_scale"] = given.pop("guidance_scale")
    given |= {"num_inference_steps": asked["steps"], "mask_image": asked.get("mask")}
    given = {key: value for key, value in given.items() if value is not None}
    of_flux.compare(worst, folder, task, given, **asked)


@pytest.mark.parametrize("steps", [2, 5])
def test_without_guidance(worst: Worst, folder: Path, steps: int) -> None:
    asked = {"prompt": PROMPT, **SIZE, "guidance_scale": 1.0}
    compare(worst, folder, TEXT, **asked, steps=steps, seed=11)


@pytest.mark.parametrize("negative", ["", NEGATIVE])
def test_guidance(worst: Worst, folder: Path, negative: str) -> None:
    """The texts have different lengths, and the result the length of the prompt's own output."""
    asked = {"prompt": PROMPT, "negative_prompt": negative, **SIZE, "guidance_scale": 4.0}
    compare(worst, folder, TEXT, **asked, steps=4, seed=11)


def test_a_fixed_shift(worst: Worst, tmp_path: Path) -> None:
    """As the scheduler of models distilled to few steps has it."""
    told = {"base_shift": 1.0986, "max_shift": 1.0986, "shift_terminal": None}
    other = make_qwen_image(tmp_path / "few", **told)
    asked = {"prompt": PROMPT, **SIZE, "guidance_scale": 1.0}
    compare(worst, other, TEXT, **asked, steps=4, seed=3)


def test_a_prompt_that_is_cut(worst: Worst, folder: Path) -> None:
    """512 tokens are read behind the system's message, of which the tiny tokenizer makes more."""
    asked = {"prompt": "a red apple on a table, " * 30, **SIZE, "guidance_scale": 1.0}
    compare(worst, folder, TEXT, **asked, steps=2, seed=2)
    model = ours(folder)
    assert model.family.left_out(model, asked["prompt"])
    assert not model.family.left_out(model, PROMPT)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_image_to_image(worst: Worst, folder: Path, strength: float) -> None:
    asked = {"prompt": PROMPT, "guidance_scale": 1.0, "image": picture(), "strength": strength}
    compare(worst, folder, IMAGE, **asked, height=64, width=64, steps=4, seed=11)


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting(worst: Worst, folder: Path, strength: float) -> None:
    asked = {"prompt": PROMPT, "guidance_scale": 1.0, "image": picture(), "strength": strength}
    compare(
        worst, folder, INPAINT, **asked, mask=left_half(), height=64, width=64, steps=5, seed=11
    )


def test_pictures_share_a_call(folder: Path) -> None:
    """Of texts of several lengths, guided and not."""
    model = ours(folder)
    asked = {"steps": 2, "width": 64, "height": 64, "seed": 5}
    requests = [
        Request(prompt="a red apple", negative_prompt="blurred", guidance_scale=3.0, **asked),
        Request(prompt="a long prompt about a cat", guidance_scale=2.0, **asked),
        Request(prompt="a dog", guidance_scale=1.0, **asked),
    ]
    check_shared_calls(model, requests)


def test_sides_that_are_no_multiples_of_a_patch(folder: Path) -> None:
    """The latents cover more than the picture, which is cut from what they show."""
    model = ours(folder)
    asked = {"prompt": PROMPT, "steps": 1, "seed": 2, "guidance_scale": 1.0}
    small = model.generate(**asked, width=72, height=88).images[0]
    large = model.generate(**asked, width=80, height=96).images[0]
    assert small.tobytes() == large.crop((0, 0, 72, 88)).tobytes()


def test_bfloat16(folder: Path) -> None:
    asked = {"prompt": PROMPT, "width": 64, "height": 64, "steps": 2, "seed": 2}
    wanted, _ = draw(ours(folder), **asked)
    half = load_model(str(folder), device="cpu", dtype="bfloat16")
    found, _ = draw(half, **asked)
    assert np.linalg.norm(found - wanted) < 0.1 * np.linalg.norm(wanted)


def test_guidance_of_nothing(folder: Path) -> None:
    """Outputs of zeros stay zeros, where diffusers divides by their length."""
    zeros = torch.zeros(1, 16, 4, 4)
    model = ours(folder)
    assert not model.family.rescaled(model, zeros, zeros).any()


def test_defaults(folder: Path) -> None:
    model: Any = ours(folder)
    assert (model.family.name, model.native_size) == ("qwen-image", (1328, 1328))
    assert (model.defaults["steps"], model.defaults["guidance_scale"]) == (50, 4.0)
