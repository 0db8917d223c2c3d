"""Compose scenes and encode them: the latents and tokens that the UNet learns from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from recipes.embedded.principal import Principal
from recipes.embedded.scenes import Scenes
from recipes.embedded.stage import Stage
from recipes.embedded.supply import Part, parts
from safelight.prompt.tokenizer import Tokenizer
from safelight.train.autoencoder import to_pixels


@dataclass
class Encoder:
    """Draws parts of scenes, in whichever process it is called, and encodes them.

    device, size, variants: of the stage. principal: the file of the components.
    """

    device: torch.device
    size: int
    variants: int
    principal: Path
    tokenizer: Tokenizer
    _made: tuple[Stage, Principal] | None = field(default=None, init=False)

    def __call__(self, scenes: Scenes, part: Part) -> tuple[NDArray[np.float16], NDArray[np.int16]]:
        """Return latents [n, channels, h, w] and tokens [n, length]."""
        if self._made is None:
            stage = Stage(scenes, self.device, self.size, self.variants)
            self._made = stage, Principal.load(self.principal).to(self.device)
        stage, principal = self._made
        shown, things, rng = part
        latents = principal.encode(to_pixels(stage.draw(shown, things, rng)))
        ids = [self.tokenizer.encode(scene.said).ids for scene in shown]
        return latents.half().cpu().numpy(), np.array(ids, np.int16)


def encoded(scenes: Scenes, path: Path, count: int, encoder: Encoder) -> dict[str, torch.Tensor]:
    """Return the latents and ids of `count` scenes. path: of cutouts.npz.

    With enough processors, each part is invented, drawn and encoded in one of several processes.
    This helps a GPU as well, which waits for Python.
    """
    made = list(parts(scenes, path, count, encoder.size, then=encoder))
    latents, ids = (torch.from_numpy(np.concatenate(each)) for each in zip(*made, strict=True))
    return {"latents": latents, "ids": ids}
