"""What the unconditional model learns: few things, alone on white, that a person can name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.embedded.colours import WHITE, Pixels
from recipes.embedded.figures import written
from recipes.embedded.judge import WHOLE, Judge
from recipes.embedded.scenes import Scene, Scenes
from recipes.embedded.stage import Stage
from safelight.model import Model
from safelight.train import networks
from safelight.train.autoencoder import to_pixels
from safelight.train.loop import progress
from safelight.train.sheet import grid

NAMEABLE = (
    "a red apple", "a banana", "a strawberry", "a pizza", "a cat", "a lion", "a panda", "a pig",
    "a penguin", "a frog", "a fish", "a butterfly", "a car", "a bus", "a rocket", "a sailboat",
    "a robot", "a pumpkin", "a key", "a guitar", "a balloon", "an umbrella", "a tree", "a star",
)  # fmt: skip
"""The things that the model draws."""

STYLE = "flat"
VARIATIONS = 32
"""Pictures of each thing, mirrored at random where that makes sense."""

PIXELS_SCHEDULER: dict[str, Any] = {
    **networks.PIXELS_SCHEDULER,
    "prediction_type": "v_prediction",
}
"""The model predicts velocity. At high noise, a small error in predicted noise would be a large
error in the picture."""

DRAWN, AT_ONCE = 200, 50
"""How many pictures are drawn to be judged, and how many in one call."""

DRAW_PIXELS_WITH: dict[str, Any] = {"sampler": "ddim", "steps": 30, "guidance_scale": 1.0}
"""What the model draws best with."""


def taught(scenes: Scenes) -> list[str]:
    """Return NAMEABLE; where the data has none of them, all that it has."""
    return [name for name in NAMEABLE if name in scenes.names] or list(scenes.names)


def nameable(stage: Stage) -> Tensor:
    """Return pictures of what is taught, uint8 [n, side, side, 3], on the stage's device.

    side: half the stage's size.
    """
    rng = np.random.default_rng(3)
    shown = [
        stage.scenes.invent(rng, "one", concept, STYLE, WHITE, disturbed=False)
        for concept in taught(stage.scenes)
        for _ in range(VARIATIONS)
    ]
    pictures = F.avg_pool2d(to_pixels(stage.compose(shown, rng)), 2)
    return ((pictures + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def evaluate(
    model: Model,
    judge: Judge,
    stage: Stage,
    out: Path,
    *,
    share: float = 1.0,
    log: Callable[[str], None] = progress,
) -> Path:
    """Draw from noise and ask the judge what it sees; returns out/evaluation.json.

    share: of DRAWN pictures. Composed pictures of what the model learned from are judged, too.
    """
    out.mkdir(parents=True, exist_ok=True)
    shown = nameable(Stage(stage.scenes, stage.device, 128))
    rng = np.random.default_rng(0)
    count = max(1, round(DRAWN * share))
    composed = shown[torch.from_numpy(rng.integers(len(shown), size=count))].cpu().numpy()
    images = [
        image
        for seed in range(0, count, AT_ONCE)
        for image in model.generate(
            unconditional=True, count=min(AT_ONCE, count - seed), seed=seed, **DRAW_PIXELS_WITH
        ).images
    ]
    drawn = np.stack([np.asarray(image) for image in images])
    known = [list(stage.scenes.names).index(name) for name in taught(stage.scenes)]
    found = {
        "model_sha256": model.sha256,
        "pictures": count,
        "drawn": named(judge, drawn, known),
        "composed": named(judge, composed, known),
    }
    grid(images[:100], 10).save(out / "sheet.png")
    log(json.dumps(found))
    return written(found, out / "evaluation.json")


def named(judge: Judge, pictures: Pixels, known: list[int]) -> dict[str, Any]:
    """Return the share of pictures to which the judge gives a name, and how many names they have.

    It gives one if it finds one of the `known` concepts more likely than all others together.
    """
    nothing = Scene("one", ("",), "")
    verdict = judge.look(pictures, [nothing] * len(pictures))
    chance = verdict.concepts[:, WHOLE, known].exp()
    sure = chance.amax(dim=-1) >= 0.5
    names = chance.argmax(dim=-1)[sure].unique()
    return {"named": round(float(sure.float().mean()), 4), "names": len(names)}
