"""A picture in overlapping tiles, so that a network's memory does not grow with the picture.

A network sees each tile with OVERLAP pixels of its neighbours. At a seam two tiles are mixed over
2 · BLEND pixels, each at least OVERLAP − BLEND away from its own edge. So the result is that of the
whole picture, up to rounding, for a network that looks at most OVERLAP − BLEND pixels far. Networks
that look farther differ near seams, and little: what is far counts for little in them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from safelight.upscaling.names import TILE

OVERLAP = 32
BLEND = 8
LEAST_TILE = 128
ALIGNED = 32
"""Tiles begin at multiples of it: the windows of transformers, of 8 or 16 pixels, lie the same."""


@dataclass(frozen=True, slots=True)
class Span:
    """A tile along one side: the pixels that a network sees, and those that the tile is for."""

    start: int
    stop: int
    first: int
    last: int


def spans(length: int, tile: int = TILE) -> list[Span]:
    """Return the tiles along a side of `length` pixels, of about the same size.

    tile: the most pixels of one, at least LEAST_TILE.
    """
    if length <= tile:
        return [Span(0, length, 0, length)]
    most = (tile - 2 * OVERLAP) // ALIGNED * ALIGNED
    count = -(-length // most)
    step = -(-length // (count * ALIGNED)) * ALIGNED
    edges = [*range(0, length, step), length]
    return [
        Span(max(0, first - OVERLAP), min(length, last + OVERLAP), first, last)
        for first, last in pairwise(edges)
    ]


def weights(span: Span, length: int, scale: int) -> Tensor:
    """Return how much each pixel of an enlarged tile counts along a side, 0 to 1.

    length: of the picture's side. The weights of all tiles add up to 1 at each pixel.
    """
    at = torch.arange(span.start * scale, span.stop * scale, dtype=torch.float32) + 0.5
    counts = torch.ones_like(at)
    if span.first > 0:
        counts *= _risen(at, span.first, scale)
    if span.last < length:
        counts *= 1 - _risen(at, span.last, scale)
    return counts


def _risen(at: Tensor, seam: int, scale: int) -> Tensor:
    """Return how much the tile after a seam counts, at positions in the enlarged picture."""
    return ((at / scale - (seam - BLEND)) / (2 * BLEND)).clamp(0, 1)


class Tiled:
    """Enlarges a picture, a tile at each `step`.

    call: enlarges a picture of float32 [1, 3, h, w] in 0…1 by `scale`. picture: the same. tile: see
    `spans`; None: the picture is one tile.
    """

    def __init__(
        self,
        call: Callable[[Tensor], Tensor],
        picture: Tensor,
        scale: int,
        tile: int | None = TILE,
    ) -> None:
        self._call, self._picture, self._scale = call, picture, scale
        height, width = picture.shape[-2:]
        rows, columns = (spans(side, tile or side) for side in (height, width))
        self._left = [(row, column) for row in rows for column in columns]
        self._sum: Tensor | None = None
        if len(self._left) > 1:
            shape = (1, 3, height * scale, width * scale)
            self._sum = torch.zeros(shape, dtype=torch.float32, device=picture.device)

    @property
    def left(self) -> int:
        """The tiles that are still to be made."""
        return len(self._left)

    def step(self) -> None:
        """Make the next tile."""
        row, column = self._left[0]
        seen = self._picture[..., row.start : row.stop, column.start : column.stop]
        made = self._call(seen)
        if self._sum is None:
            self._sum = made
        else:
            height, width = self._picture.shape[-2:]
            down = weights(row, height, self._scale).to(made.device)
            across = weights(column, width, self._scale).to(made.device)
            y, x = row.start * self._scale, column.start * self._scale
            part = self._sum[..., y : y + made.shape[-2], x : x + made.shape[-1]]
            part += made * down[:, None] * across
        del self._left[0]

    @property
    def made(self) -> Tensor:
        """The enlarged picture, float32 [1, 3, h · scale, w · scale], once no tile is left."""
        assert self._sum is not None
        assert not self._left
        return self._sum
