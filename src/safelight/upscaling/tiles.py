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
MIN_TILE = 128
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

    tile: the most pixels of one, at least MIN_TILE.
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
    """Enlarges a picture, a tile at each `step`, and hands on what is finished of it.

    call: enlarges a picture of float32 [1, 3, h, w] in 0…1 by `scale`, and may return it on another
    device. picture: [1, 3, H, W], of any dtype that `call` takes. take: called with rows of the
    enlarged picture, float32 [1, 3, h, w · scale] on the picture's device, from the top. tile: see
    `spans`; None: the picture is one tile.

    Of the enlarged picture only the rows of one tile are kept.
    """

    def __init__(
        self,
        call: Callable[[Tensor], Tensor],
        picture: Tensor,
        scale: int,
        take: Callable[[Tensor], object],
        tile: int | None = TILE,
    ) -> None:
        self._call, self._picture, self._scale, self._take = call, picture, scale, take
        rows, columns = (spans(side, tile or side) for side in picture.shape[-2:])
        self._left = [(row, column) for row in rows for column in columns]
        self._is_one = len(self._left) == 1
        # The sum of tiles in rows that are not finished, which begin at `_top`.
        self._top, self._sum = 0, self._zeros(0)

    @property
    def left(self) -> int:
        """The tiles that are still to be made."""
        return len(self._left)

    def step(self) -> None:
        """Make the next tile."""
        row, column = self._left[0]
        seen = self._picture[..., row.start : row.stop, column.start : column.stop]
        made = self._call(seen).to(self._picture.device)
        if self._is_one:
            self._take(made)
        else:
            self._add(made, row, column)
        del self._left[0]

    def _add(self, made: Tensor, row: Span, column: Span) -> None:
        height, width = self._picture.shape[-2:]
        down, across = weights(row, height, self._scale), weights(column, width, self._scale)
        first, last = _touched(row, height)
        skipped = (first - row.start) * self._scale  # the weights there are 0
        count = (last - first) * self._scale
        if self._sum.shape[-2] < (last - self._top) * self._scale:
            more = self._zeros((last - self._top) * self._scale - self._sum.shape[-2])
            self._sum = torch.cat([self._sum, more], -2)
        y, x = (first - self._top) * self._scale, column.start * self._scale
        made = made[..., skipped : skipped + count, :]
        part = self._sum[..., y : y + count, x : x + made.shape[-1]]
        part += made * down[skipped : skipped + count, None] * across
        if column.last == width:  # the last of its row
            done = height if row.last == height else row.last - BLEND
            finished = (done - self._top) * self._scale
            self._take(self._sum[..., :finished, :])
            self._top, self._sum = done, self._sum[..., finished:, :].clone()

    def _zeros(self, height: int) -> Tensor:
        shape = (1, 3, height, self._picture.shape[-1] * self._scale)
        return torch.zeros(shape, dtype=torch.float32, device=self._picture.device)


def _touched(span: Span, length: int) -> tuple[int, int]:
    """Return where a tile begins and ends to count along a side."""
    first = max(0, span.first - BLEND)
    return first, length if span.last == length else min(length, span.last + BLEND)
