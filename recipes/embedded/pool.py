"""Keep composed pictures on the device, to learn from many times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from recipes.embedded.scenes import Scene
from recipes.embedded.stage import Stage
from recipes.embedded.supply import parts


class Pool:
    """Pictures, uint8 [n, size, size, 3] on the stage's device, and their scenes.

    They depend on count, seed and data alone. path: of cutouts.npz. given: as for
    `Scenes.invent`, and `workers` as for `supply.parts`.
    """

    def __init__(self, stage: Stage, path: Path, count: int, seed: int, **given: Any) -> None:
        self.scenes: list[Scene] = []
        size = stage.size
        shape = (count, size, size, 3)
        self.pictures = torch.empty(shape, dtype=torch.uint8, device=stage.device)
        for scenes, things, rng in parts(stage.scenes, path, count, seed, **given):
            at = len(self.scenes)
            self.pictures[at : at + len(scenes)] = stage.draw(scenes, things, rng)
            self.scenes += scenes

    def __len__(self) -> int:
        return len(self.scenes)
