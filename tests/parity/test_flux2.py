"""Pictures of FLUX.2 klein against diffusers."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from safelight.request import Request
from safelight.weights import load_model
from tests.parity import test_flux as of_flux
from tests.parity.flow_models import check_shared_calls, make_klein
from tests.parity.test_pictures import (
    NEGATIVE,
    PROMPT,
    Worst,
    draw,
    left_half,
    ours,
    picture,
    theirs,
)

TEXT, INPAINT = "Flux2KleinPipeline", "Flux2KleinInpaintPipeline"
SIZE = {"height": 64, "width": 96}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("flux2")
    return {
        "klein": make_klein(root / "klein", distilled=True),
        "base": make_klein(root / "base", distilled=False),
        "fixed": make_klein(root / "fixed", distilled=False, shift=False),
    }


def as_latents(tokens: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return FLUX.2's tokens, one a place, as latents of a shape."""
    return tokens.transpose(1, 2).reshape(shape)


compare = partial(of_flux.compare, as_latents=as_latents)


@pytest.mark.parametrize("steps", [1, 4])
def test_klein(worst: Worst, models: dict[str, Path], steps: int) -> None:
    """Its pipeline ignores the guidance scale."""
    asked = {"prompt": PROMPT, **SIZE, "guidance_scale": 3.0}
    given = {**asked, "num_inference_steps": steps}
    compare(worst, models["klein"], TEXT, given, **asked, steps=steps, seed=11)


@pytest.mark.parametrize("name", ["base", "fixed"])
@pytest.mark.parametrize("negative", ["", NEGATIVE])
def test_guidance(worst: Worst, models: dict[str, Path], name: str, negative: str) -> None:
    """With the shift of the pipeline, and with that of a scheduler that has its own."""
    pipe = theirs(models[name], TEXT)
    asked = {"prompt": PROMPT, **SIZE, "guidance_scale": 3.0}
    told = pipe.encode_prompt(negative)[0] if negative else None
    given = {**asked, "num_inference_steps": 5, "negative_prompt_embeds": told}
    said = {**asked, "negative_prompt": negative, "steps": 5, "seed": 11}
    compare(worst, models[name], TEXT, given, **said)


def test_a_base_model_without_guidance(worst: Worst, models: dict[str, Path]) -> None:
    asked = {"prompt": PROMPT, **SIZE, "guidance_scale": 1.0}
    given = {**asked, "num_inference_steps": 3}
    compare(worst, models["base"], TEXT, given, **asked, steps=3, seed=2)


def test_a_prompt_that_is_cut(worst: Worst, models: dict[str, Path]) -> None:
    """What is put behind the prompt is cut off with its end; nothing is left to fill up."""
    asked = {"prompt": "a red apple on a table, " * 30, **SIZE, "guidance_scale": 1.0}
    given = {**asked, "num_inference_steps": 2}
    compare(worst, models["klein"], TEXT, given, **asked, steps=2, seed=2)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the picture as a condition away from diffusers' pipeline for inpainting.

    The pipeline always shows the picture to the transformer, too. Without it, it does what
    pipelines of other families do; with a white mask, that is image to image.
    """

    def none(pipe: Any, images: Any, batch: int, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        channels = pipe.transformer.config.in_channels
        return torch.zeros(batch, 0, channels), torch.zeros(batch, 0, 4)

    monkeypatch.setattr(diffusers.Flux2KleinInpaintPipeline, "prepare_image_latents", none)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("strength", [0.3, 0.65, 1.0])
def test_image_to_image(worst: Worst, models: dict[str, Path], strength: float) -> None:
    asked = {"prompt": PROMPT, "guidance_scale": 2.5, "image": picture(), "strength": strength}
    white = Image.new("L", (64, 64), 255)
    given = {**asked, "mask_image": white, "num_inference_steps": 10}
    compare(worst, models["base"], INPAINT, given, **asked, steps=10, seed=11)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting(worst: Worst, models: dict[str, Path], strength: float) -> None:
    asked = {"prompt": PROMPT, "guidance_scale": 1.0, "image": picture(), "strength": strength}
    given = {**asked, "mask_image": left_half(), "num_inference_steps": 8}
    compare(worst, models["klein"], INPAINT, given, **asked, mask=left_half(), steps=8, seed=11)


def test_a_folder_tells_what_is_distilled(models: dict[str, Path], tmp_path: Path) -> None:
    klein, base = ours(models["klein"]), ours(models["base"])
    assert (klein.family.name, base.family.name) == (
        "flux2-klein-custom",
        "flux2-klein-base-custom",
    )
    assert (klein.defaults["steps"], klein.defaults["guidance_scale"]) == (4, 1.0)
    assert (base.defaults["steps"], base.defaults["guidance_scale"]) == (50, 4.0)
    # As older writers and the pipeline for inpainting have it: no word of it is false.
    index = json.loads((models["klein"] / "model_index.json").read_text())
    del index["is_distilled"]
    folder = shutil.copytree(models["klein"], tmp_path / "other")
    index["_class_name"] = INPAINT
    (folder / "model_index.json").write_text(json.dumps(index))
    assert ours(folder).family is base.family


def test_pictures_share_a_call(models: dict[str, Path]) -> None:
    """All texts have one length: guided and unguided pictures share calls."""
    model = ours(models["base"])
    asked = {"steps": 2, "width": 64, "height": 64, "seed": 5}
    requests = [
        Request(prompt="a red apple", negative_prompt="blurred", guidance_scale=3.0, **asked),
        Request(prompt="a long prompt about a cat", guidance_scale=2.0, **asked),
        Request(prompt="a dog", guidance_scale=1.0, **asked),
    ]
    check_shared_calls(model, requests)


def test_sides_that_are_no_multiples_of_a_latent(models: dict[str, Path]) -> None:
    """The latents cover more than the picture, which is cut from what they show."""
    model = ours(models["klein"])
    asked = {"prompt": PROMPT, "steps": 1, "seed": 2}
    small = model.generate(**asked, width=72, height=88).images[0]
    large = model.generate(**asked, width=80, height=96).images[0]
    assert small.size == (72, 88)
    assert small.tobytes() == large.crop((0, 0, 72, 88)).tobytes()
    changed = model.generate(**asked, image=picture(72), strength=0.5, mask=left_half(72))
    assert changed.images[0].size == (72, 72)


def test_bfloat16(models: dict[str, Path]) -> None:
    asked = {"prompt": PROMPT, "width": 64, "height": 64, "steps": 4, "seed": 2}
    wanted, _ = draw(ours(models["klein"]), **asked)
    half = load_model(str(models["klein"]), device="cpu", dtype="bfloat16")
    found, _ = draw(half, **asked)
    assert np.linalg.norm(found - wanted) < 0.1 * np.linalg.norm(wanted)
