"""Measure what the fast mode saves and costs.

That is seconds on the shapes of Stable Diffusion 1.5, and how far a real model's pictures are from
those without it.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from safelight.bench.networks import Run, fast_pictures
from safelight.engine import Engine
from safelight.model import Model
from safelight.request import Request

WAYS: Mapping[str, Mapping[str, Any]] = {
    "full": {},
    "fast 1": {"fast": 1},
    "fast 2": {"fast": 2},
    "fast 3": {"fast": 3},
    "cache_every 2": {"cache_every": 2},
    "cache_every 5": {"cache_every": 5},
    "guidance_start 0.3": {"guidance_start": 0.3},
    "guidance_end 0.6": {"guidance_end": 0.6},
    "text_end 0.4": {"text_end": 0.4},
    "linears int8": {"linears": "int8"},
    "13 steps": {"steps": 13},
}
"""Each level of the fast mode, and each of its parts alone."""

PROMPTS = (
    "a red apple",
    "a cat",
    "a guitar",
    "three teddy bears on yellow",
    "a house",
    "a blue bird",
    "a car",
    "a dog",
    "a yellow banana",
    "a tree",
    "two cats",
    "a green frog",
    "a rocket",
    "a pizza",
    "a purple flower",
    "a fish on blue",
    "a key",
    "an umbrella",
    "a cow",
    "a ship",
)


def seconds(names: list[str], log: Callable[[str], None]) -> dict[str, Run]:
    """Return what draws a picture of 512×512 in each way, with random weights.

    It takes 20 steps unless the way has its own. names: contenders; the first of ours gives the
    precision.
    """
    dtype = next((name.split()[1] for name in names if name.startswith("safelight")), "float32")
    draw = fast_pictures(dtype, log)
    return {way: partial(draw, dict(asked)) for way, asked in WAYS.items()}


def distances(model: Model, log: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """Return how far each way's pictures of PROMPTS are from the full ones.

    "psnr" is in decibels; it and "ssim" are means over the pictures, beside the worst.
    """
    found: dict[str, dict[str, float]] = {}
    full: list[Any] = []
    for way, asked in WAYS.items():
        log(f"  {way}")
        drawn = _drawn(model, dict(asked))
        if not full:
            full = drawn
            continue
        pairs = list(zip(drawn, full, strict=True))
        noise, alike = [psnr(*pair) for pair in pairs], [_ssim(*pair) for pair in pairs]
        found[way] = {
            "psnr": statistics.mean(noise),
            "worst psnr": min(noise),
            "ssim": statistics.mean(alike),
            "worst ssim": min(alike),
        }
    return found


def _drawn(model: Model, asked: dict[str, Any]) -> list[Any]:
    engine = Engine(model)
    made: dict[int, Image.Image] = {}
    with torch.inference_mode():
        for i, prompt in enumerate(PROMPTS):
            engine.add(Request(prompt=prompt, seed=i, **asked), i)
        while engine.busy:
            for ticket in engine.step()[1]:
                assert ticket.image is not None
                made[ticket.tag] = ticket.image
    return [np.asarray(made[i]) for i in range(len(PROMPTS))]


def psnr(a: Any, b: Any) -> float:
    """Return the peak signal-to-noise ratio of two pictures of 0..255, in decibels; at most 78."""
    error = np.square(a.astype(float) - b).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-3)))


def _ssim(a: Any, b: Any) -> float:
    """Return the structural similarity (doi:10.1109/TIP.2003.819861), 1 for equal pictures."""
    metrics: Any = importlib.import_module("skimage.metrics")
    return float(metrics.structural_similarity(a, b, channel_axis=2))
