"""Scenes composed on a device, many at a time, for pictures too large for a CPU to keep up with.

What is shown, where and how it is said is `recipe.Scenes`' and the same as on a CPU. Only what is
done to pixels is done here: painted, turned, scaled and pasted, by a few calls for a whole batch.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from safelight.train.colours import COLOURS, TO_CONES, TO_LAB, Main, main_colour, oklab, towards
from safelight.train.drawing import Thing
from safelight.train.recipe import Scenes

AT_ONCE = 256
"""Things drawn at a time: at 240 pixels of float32 a gigabyte, with all that painting needs."""


class Stage:
    """Draws the scenes of `scenes` on `device`, with the contract of its `batch`."""

    def __init__(self, scenes: Scenes, device: torch.device | str) -> None:
        self.scenes, self.device, self.size = scenes, torch.device(device), scenes.size
        pictures = scenes.cutouts.pictures
        self._cutouts = torch.from_numpy(pictures).to(self.device)
        # How much of the square a thing fills, from its middle: it must come wholly inside.
        solid = self._cutouts[..., 3] > 0
        self._extent = torch.stack(
            [solid.any(dim=1).sum(dim=1), solid.any(dim=2).sum(dim=1)], dim=1
        ).cpu().numpy() / pictures.shape[1]  # fmt: skip
        self._cones = torch.from_numpy(TO_CONES).float().to(self.device)
        self._lab = torch.from_numpy(TO_LAB).float().to(self.device)

    def batch(self, n: int, rng: np.random.Generator) -> tuple[Tensor, list[str]]:
        """`n` pictures, uint8 [n, size, size, 3] on the device, and their captions."""
        scenes = [self.scenes.invent(rng) for _ in range(n)]
        arranged = [self.scenes.arrange(rng, scene) for scene in scenes]
        grounds = torch.from_numpy(np.stack([ground for ground, _ in arranged]))
        return self.draw(grounds, [things for _, things in arranged]), [s.said for s in scenes]

    @torch.inference_mode()
    def draw(self, grounds: Tensor, things: list[list[Thing]]) -> Tensor:
        """Pictures, uint8 [n, size, size, 3], of backgrounds, [n, 3], and the things on each."""
        ground = grounds.to(self.device).float()[:, :, None, None]
        out = ground.expand(-1, -1, self.size, self.size).clone()
        for layer in range(max(map(len, things))):
            have = [i for i, of in enumerate(things) if len(of) > layer]
            for start in range(0, len(have), AT_ONCE):
                some = have[start : start + AT_ONCE]
                drawn = self._layer([things[i][layer] for i in some])
                out[some] = out[some] * (1 - drawn[:, 3:]) + drawn[:, :3]
        return out.clamp(0, 255).add(0.5).to(torch.uint8).permute(0, 2, 3, 1)

    def _layer(self, things: list[Thing]) -> Tensor:
        """One thing on each picture: premultiplied colours and alpha, [n, 4, size, size]."""
        index = torch.tensor([thing.index for thing in things], device=self.device)
        pictures = self._cutouts[index].float()
        self._paint(pictures, things)
        alpha = pictures[..., 3:] / 255
        layers = torch.cat([pictures[..., :3] * alpha, alpha], dim=-1).permute(0, 3, 1, 2)
        theta = torch.tensor(np.stack([self._place(t) for t in things]), device=self.device)
        out = torch.zeros(len(things), 4, self.size, self.size, device=self.device)
        # Averaged by as much as they shrink, or fine lines would break up.
        scale = [layers.shape[-1] / (thing.share * self.size) for thing in things]
        level = torch.tensor([max(1, round(s)) for s in scale], device=self.device)
        for times in sorted({max(1, round(s)) for s in scale}):
            some = level == times
            small = F.avg_pool2d(layers[some], times)
            shape = [len(small), 4, self.size, self.size]
            grid = F.affine_grid(theta[some], shape, align_corners=False)
            out[some] = F.grid_sample(small, grid, align_corners=False)
        return out

    def _place(self, thing: Thing) -> np.ndarray:
        """From places on the picture to places on the square of its cut-out, both in −1..1: [2, 3].

        A thing that is turned keeps its size; `Scenes` makes its longer side what it was.
        """
        angle = math.radians(thing.angle)
        cos, sin = math.cos(angle), math.sin(angle)
        width, height = self._extent[thing.index] * thing.share
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
        """In place, what `colours.paint` does: [n, h, w, 4] of 0..255."""
        which = [i for i, thing in enumerate(things) if thing.colour is not None]
        if not which:
            return
        rows = []
        for thing in (things[i] for i in which):
            main = self._main(thing.index)
            assert main is not None
            assert thing.colour is not None
            target = oklab(np.array(COLOURS[thing.colour]))
            rows.append([main.hue, main.mean[0], target[0], *towards(np.array(main.mean), target)])
        table = torch.tensor(rows, dtype=torch.float32, device=self.device)
        main, mean, light, scale, turn = (column[:, None, None] for column in table.unbind(1))
        rgb = pictures[which][..., :3] / 255
        linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        seen = (linear @ self._cones.T).pow(1 / 3) @ self._lab.T
        chroma, hue = (
            torch.hypot(seen[..., 1], seen[..., 2]),
            torch.atan2(seen[..., 2], seen[..., 1]),
        )
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

    def _main(self, index: int) -> Main | None:
        row = self.scenes.rows[index]
        if "main" not in row:
            return main_colour(self.scenes.cutouts.pictures[index])
        hue, *mean = row["main"]
        return Main(hue, tuple(mean))
