"""Compose the pictures of scenes on a device, many at a time."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.embedded import grounds
from recipes.embedded.captions import SCENES
from recipes.embedded.colours import COLOURS, TO_CONES, TO_LAB, Main, oklab, towards
from recipes.embedded.scenes import Scene, Scenes, Thing

AT_ONCE = 256
"""Things drawn at a time. At 240 pixels in float32 they take a gigabyte, painting included."""


class Stage:
    """Draws scenes as pictures of `size` pixels a side on `device`.

    variants: pictures of each drawn ground.
    """

    def __init__(
        self,
        scenes: Scenes,
        device: torch.device | str,
        size: int = 256,
        variants: int = grounds.VARIANTS,
    ) -> None:
        self.scenes, self.device, self.size = scenes, torch.device(device), size
        self.variants = variants
        self._cutouts = torch.from_numpy(scenes.pictures).to(self.device)
        self._cones = torch.from_numpy(TO_CONES).float().to(self.device)
        self._lab = torch.from_numpy(TO_LAB).float().to(self.device)

    @cached_property
    def _grounds(self) -> Tensor:
        """All drawn grounds, drawn when the first scene needs one: it takes seconds."""
        return torch.from_numpy(grounds.draw_all(self.size, self.variants)).to(self.device)

    def batch(self, n: int, rng: np.random.Generator, **given: Any) -> tuple[Tensor, list[Scene]]:
        """Return `n` pictures, uint8 [n, size, size, 3] on the device, and their scenes.

        given: as for `Scenes.invent`.
        """
        scenes = [self.scenes.invent(rng, **given) for _ in range(n)]
        return self.compose(scenes, rng), scenes

    def compose(self, scenes: list[Scene], rng: np.random.Generator) -> Tensor:
        """Return the pictures of these scenes, uint8 [n, size, size, 3] on the device."""
        parts = []
        for i in range(0, len(scenes), AT_ONCE):
            some = scenes[i : i + AT_ONCE]
            things = [self.scenes.arrange(rng, scene) for scene in some]
            parts.append(self.draw(some, things, rng))
        return torch.cat(parts)

    @torch.inference_mode()
    def draw(
        self, scenes: list[Scene], things: list[list[Thing]], rng: np.random.Generator
    ) -> Tensor:
        """Return pictures, uint8 [n, size, size, 3], of the things of each scene on its ground."""
        out = self._behind(scenes, rng)
        for layer in range(max(map(len, things))):
            have = [i for i, of in enumerate(things) if len(of) > layer]
            drawn = self._layer([things[i][layer] for i in have])
            out[have] = out[have] * (1 - drawn[:, 3:]) + drawn[:, :3]
        return out.clamp(0, 255).add(0.5).to(torch.uint8).permute(0, 2, 3, 1)

    def _behind(self, scenes: list[Scene], rng: np.random.Generator) -> Tensor:
        out = torch.empty(len(scenes), 3, self.size, self.size, device=self.device)
        drawn = [i for i, scene in enumerate(scenes) if scene.ground in SCENES]
        plain = [i for i, scene in enumerate(scenes) if scene.ground not in SCENES]
        if drawn:
            which = [list(SCENES).index(scenes[i].ground) for i in drawn]
            variant = rng.integers(self._grounds.shape[1], size=len(drawn))
            pictures = self._grounds[which, torch.from_numpy(variant)].permute(0, 3, 1, 2).float()
            flipped = torch.from_numpy(rng.random(len(drawn)) < 0.5).to(self.device)
            out[drawn] = torch.where(flipped[:, None, None, None], pictures.flip(3), pictures)
        if plain:
            colours = np.array([COLOURS[scenes[i].ground] for i in plain], np.float32)
            # White stays pure; other colours vary a little.
            change = rng.integers(-6, 7, colours.shape) * (colours.min(1, keepdims=True) < 255)
            colours = torch.from_numpy(np.clip(colours + change, 0, 255)).float().to(self.device)
            out[plain] = colours[:, :, None, None]
        return out

    def _layer(self, things: list[Thing]) -> Tensor:
        """Return a layer for each thing: premultiplied colours and alpha, [n, 4, size, size]."""
        index = torch.tensor([thing.index for thing in things], device=self.device)
        pictures = self._cutouts[index].float()
        self._paint(pictures, things)
        alpha = pictures[..., 3:] / 255
        layers = torch.cat([pictures[..., :3] * alpha, alpha], dim=-1).permute(0, 3, 1, 2)
        theta = torch.tensor(np.stack([self._place(t) for t in things]), device=self.device)
        out = torch.zeros(len(things), 4, self.size, self.size, device=self.device)
        # Averaged by the factor by which they shrink, or fine lines would break up.
        scale = [max(1, round(layers.shape[-1] / (thing.share * self.size))) for thing in things]
        level = torch.tensor(scale, device=self.device)
        for times in sorted(set(scale)):
            some = level == times
            small = F.avg_pool2d(layers[some], times)
            shape = [len(small), 4, self.size, self.size]
            grid = F.affine_grid(theta[some], shape, align_corners=False)
            out[some] = F.grid_sample(small, grid, align_corners=False)
        return out

    def _place(self, thing: Thing) -> np.ndarray:
        """Return the map [2, 3] from places on the picture to places on the cut-out's square.

        Both are in −1..1. A thing that is turned keeps its size.
        """
        angle = math.radians(thing.angle)
        cos, sin = math.cos(angle), math.sin(angle)
        width, height = self.scenes.extents[thing.index] * thing.share
        reach = abs(cos) * width + abs(sin) * height, abs(sin) * width + abs(cos) * height
        x, y = (
            min(max(2 * middle - 1, side - 1), 1 - side) if side < 1 else 0.0
            for middle, side in zip((thing.x, thing.y), reach, strict=True)
        )
        rotated = np.array([[cos, -sin], [sin, cos]]) / thing.share
        if thing.mirrored:
            rotated[0] *= -1
        return np.column_stack([rotated, -rotated @ (x, y)]).astype(np.float32)

    def _paint(self, pictures: Tensor, things: list[Thing]) -> None:
        """Do in place what `colours.paint` does: pictures [n, h, w, 4] of 0..255."""
        which = [i for i, thing in enumerate(things) if thing.colour is not None]
        if not which:
            return
        rows = []
        for thing in (things[i] for i in which):
            hue, *mean = self.scenes.rows[thing.index]["main"]
            main = Main(hue, tuple(mean))
            assert thing.colour is not None
            target = oklab(np.array(COLOURS[thing.colour]))
            rows.append([main.hue, main.mean[0], target[0], *towards(np.array(main.mean), target)])
        table = torch.tensor(rows, dtype=torch.float32, device=self.device)
        main, mean, light, scale, turn = (column[:, None, None] for column in table.unbind(1))
        rgb = pictures[which][..., :3] / 255
        linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        seen = (linear @ self._cones.T).pow(1 / 3) @ self._lab.T
        chroma = torch.hypot(seen[..., 1], seen[..., 2])
        hue = torch.atan2(seen[..., 2], seen[..., 1])
        away = torch.remainder(hue - main + math.pi, 2 * math.pi).sub(math.pi).abs()
        share = ((1.2 - away) / 0.4).clamp(0, 1) * ((chroma - 0.02) / 0.04).clamp(0, 1)
        new = torch.stack(
            [
                light + 0.7 * (seen[..., 0] - mean),
                scale * chroma * torch.cos(hue + turn),
                scale * chroma * torch.sin(hue + turn),
            ],
            dim=-1,
        )
        mixed = seen + share[..., None] * (new - seen)
        linear = (mixed @ torch.linalg.inv(self._lab).T) ** 3 @ torch.linalg.inv(self._cones).T
        linear = linear.clamp(0, 1)
        rgb = torch.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
        pictures[which] = torch.cat([rgb * 255, pictures[which][..., 3:]], dim=-1)
