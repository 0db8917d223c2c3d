"""Pictures edited by reference pictures, against diffusers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from safelight.engine import Engine
from safelight.engine.requests import new_result, resolve_request
from safelight.errors import SafelightError
from safelight.families import references
from safelight.request import Request
from tests.parity.flow_models import make_klein
from tests.parity.test_flux2 import INPAINT, TEXT, compare
from tests.parity.test_pictures import NEGATIVE, PROMPT, Worst, left_half, ours, picture, theirs


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_klein(tmp_path_factory.mktemp("references") / "base", distilled=False)


def shown(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Return a picture of noise that is smooth enough to be resized."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("sizes", [[(80, 70)], [(96, 64), (70, 100)]])
def test_klein(worst: Worst, klein: Path, sizes: list[tuple[int, int]]) -> None:
    """One and two pictures, whose sides are no multiples; the first one's size is drawn."""
    pictures = [shown(size, seed) for seed, size in enumerate(sizes)]
    asked = {"prompt": PROMPT, "guidance_scale": 1.0}
    given = {**asked, "image": pictures, "num_inference_steps": 2}
    compare(worst, klein, TEXT, given, **asked, reference_images=pictures, steps=2, seed=7)
