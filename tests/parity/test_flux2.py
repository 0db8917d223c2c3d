"""Pictures of FLUX.2 klein against diffusers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.parity.flow_models import make_klein
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


def compare(worst: Worst, folder: Path, task: str, given: dict[str, Any], **settings: Any) -> None:
    """Compare latents and pictures: these pipelines' latents are tokens."""
    latents, shown = draw(ours(folder), **settings)
    pipe = theirs(folder, task)
    made: list[torch.Tensor] = []

    def stepped(_pipe: Any, _step: int, _time: Any, found: dict[str, Any]) -> dict[str, Any]:
        made.append(found["latents"])
        return {}

    generator = torch.Generator().manual_seed(settings["seed"])
    found = pipe(generator=generator, callback_on_step_end=stepped, **given).images[0]
    expected = made[-1].transpose(1, 2).reshape(latents.shape).numpy()
    error = np.linalg.norm(latents - expected) / np.linalg.norm(expected)
    check(worst, float(error), float(np.abs(shown.astype(int) - np.asarray(found)).max()))


@pytest.mark.parametrize("steps", [1, 4])
def test_klein(worst: Worst, models: dict[str, Path], steps: int) -> None:
    """Its pipeline ignores the guidance scale."""
    asked = {"prompt": PROMPT, **SIZE, "guidance_scale": 3.0}
    given = {**asked, "num_inference_steps": steps}
    compare(worst, models["klein"], TEXT, given, **asked, steps=steps, seed=11)
