"""What each thing looks like: latents of one picture of it, cut into parts.

A UNet alone learns slowly what 458 things look like: after two million samples it had not even
learned the mean picture of each. A text encoder learns it within minutes, if each of its last
states has to tell one part of the picture. The UNet can then read what to draw where.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from recipes.embedded.captions import STYLES
from recipes.embedded.principal import Principal
from recipes.embedded.scenes import STEADY_SHARE, Scene, Thing, held_back
from recipes.embedded.stage import AT_ONCE, Stage
from safelight.train.autoencoder import to_pixels

SIDE = 4
"""Parts a side. A caption has 23 tokens at most and a text encoder 48 states: 16 are free."""

PARTS = SIDE * SIDE
THINGS = 2
"""The most things that a caption names."""


class Looks:
    """Latents of each thing in each of its styles and colours, alone on white.

    parts: [n, PARTS, numbers], on the stage's device; around a mean of zero, with unit variance.
    What is held out from training is not among them.
    """

    def __init__(self, stage: Stage, principal: Principal) -> None:
        self._rows: dict[tuple[str, str, str | None], int] = {}
        shown: list[Scene] = []
        for concept in stage.scenes.names:
            for style in STYLES:
                paints = (None, *stage.scenes.paints(concept, style))
                if held_back(style, concept):
                    continue
                for paint in paints:
                    if paint is None or not held_back(paint, concept):
                        self._rows[concept, style, paint] = len(shown)
                        shown.append(Scene("one", (concept,), style, paints=(paint,)))
        rng, share, latents = np.random.default_rng(0), STEADY_SHARE[0], []
        for i in range(0, len(shown), AT_ONCE):
            some = shown[i : i + AT_ONCE]
            things = [
                [Thing(stage.scenes.drawing(one), one.colour, 0.5, 0.5, share)] for one in some
            ]
            latents.append(principal.encode(to_pixels(stage.draw(some, things, rng))))
        parts = cut(torch.cat(latents))
        parts = parts - parts.mean(dim=0)
        self.parts = parts / parts.std()

    def rows(self, scene: Scene) -> list[int]:
        """Return the rows of `parts` that a caption tells, for each thing and each style.

        −1 stands for what does not exist: a second thing, or a style that is held out.
        """
        found: list[int] = []
        for i in range(THINGS):
            for style in STYLES:
                there = i < len(scene.concepts)
                key = (scene.concepts[i], style, scene.paints[i]) if there else None
                found.append(-1 if key is None else self._rows.get(key, -1))
        return found

    @property
    def numbers(self) -> int:
        """How many numbers one state has to tell."""
        return THINGS * len(STYLES) * self.parts.shape[-1]

    def unexplained(self, told: Tensor, rows: Tensor) -> Tensor:
        """Return the share of the variance that is not told.

        told: [n, PARTS, numbers] of the text encoder's last states; rows: [n, things and styles].
        """
        wanted = self.parts[rows.clamp(min=0)]
        shape = len(told), PARTS, rows.shape[1], -1
        error = (told.float().view(shape).transpose(1, 2) - wanted).square().mean(dim=(2, 3))
        return error[rows >= 0].mean()


def cut(latents: Tensor) -> Tensor:
    """Return latents [n, channels, h, w] in parts [n, PARTS, numbers], row by row."""
    n, channels, height, width = latents.shape
    tall, wide = height // SIDE, width // SIDE
    parts = latents.view(n, channels, SIDE, tall, SIDE, wide)
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(n, PARTS, channels * tall * wide)
