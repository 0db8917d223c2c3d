"""Pictures of FLUX.1 against diffusers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from safelight.engine.requests import new_result, resolve_request
from safelight.request import Request
from tests.parity.flow_models import make_flux
from tests.parity.test_pictures import (
    PROMPT,
    Worst,
    check,
    draw,
    left_half,
    ours,
    picture,
    theirs,
)

TEXT, IMAGE, INPAINT = "FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"
SIZE = {"height": 64, "width": 96}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("flux")
    return {
        "dev": make_flux(root / "dev", guided=True),
        "schnell": make_flux(root / "schnell", guided=False),
    }


def unpacked(tokens: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return FLUX.1's tokens, which have four numbers a channel, as latents of a shape."""
    _, channels, h, w = shape
    patches = tokens.reshape(h // 2, w // 2, channels, 2, 2).permute(2, 0, 3, 1, 4)
    return patches.reshape(1, channels, h, w)


def compare(
    worst: Worst,
    folder: Path,
    task: str,
    given: dict[str, Any],
    as_latents: Callable[[torch.Tensor, tuple[int, ...]], torch.Tensor] = unpacked,
    **settings: Any,
) -> None:
    """Compare latents and pictures. as_latents: of a pipeline's tokens and the latents' shape."""
    latents, shown = draw(ours(folder), **settings)
    pipe = theirs(folder, task)
    made: list[torch.Tensor] = []

    def stepped(_pipe: Any, _step: int, _time: Any, found: dict[str, Any]) -> dict[str, Any]:
        made.append(found["latents"])
        return {}

    generator = torch.Generator().manual_seed(settings["seed"])
    found = pipe(generator=generator, callback_on_step_end=stepped, **given).images[0]
    expected = as_latents(made[-1], latents.shape).numpy()
    error = np.linalg.norm(latents - expected) / np.linalg.norm(expected)
    check(worst, float(error), float(np.abs(shown.astype(int) - np.asarray(found)).max()))


@pytest.mark.parametrize(("name", "longest", "scale"), [("dev", 512, 3.5), ("schnell", 256, 1.0)])
def test_text_to_image(
    worst: Worst, models: dict[str, Path], name: str, longest: int, scale: float
) -> None:
    asked = {"prompt": PROMPT, "guidance_scale": scale, **SIZE}
    given = {**asked, "num_inference_steps": 4, "max_sequence_length": longest}
    compare(worst, models[name], TEXT, given, **asked, steps=4, seed=11)


@pytest.mark.parametrize("strength", [0.65, 1.0])
def test_image_to_image(worst: Worst, models: dict[str, Path], strength: float) -> None:
    asked = {"prompt": PROMPT, "guidance_scale": 2.5, "image": picture(), "strength": strength}
    given = {**asked, "num_inference_steps": 10, "height": 64, "width": 64}
    compare(worst, models["dev"], IMAGE, given, **asked, steps=10, seed=11)


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting(worst: Worst, models: dict[str, Path], strength: float) -> None:
    asked = {"prompt": PROMPT, "guidance_scale": 2.5, "image": picture(), "strength": strength}
    given = {**asked, "mask_image": left_half(), "num_inference_steps": 8}
    given |= {"height": 64, "width": 64}
    compare(worst, models["dev"], INPAINT, given, **asked, mask=left_half(), steps=8, seed=11)


def test_what_does_nothing_is_a_warning(models: dict[str, Path]) -> None:
    model = ours(models["schnell"])
    request = Request(prompt="a cat", negative_prompt="a dog", guidance_scale=4, spacing="leading")
    found = new_result(model, request, resolve_request(model, request)).warnings
    for name in ("negative_prompt", "guidance_scale", "spacing"):
        assert any(said.startswith(f"{name} does nothing with schnell") for said in found), name
