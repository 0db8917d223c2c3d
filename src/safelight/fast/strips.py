"""A norm and its convolution on large maps, a strip of rows at a time.

So a map of hundreds of MB has no normed copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.fast import vectors

STRIP = 1 << 22
"""Numbers in a strip."""


class Normed:
    """silu(norm(x)) of a map [batch, channels, h, w], computed when it is read.

    factors: float32 [batch, 2, channels], each channel's factor and addend.
    """

    def __init__(self, x: Tensor, factors: Tensor) -> None:
        self.x, self.factors = x, factors

    def rows(self, picture: int, first: int, last: int) -> Tensor:
        """Return these rows of one picture, [1, channels, last - first, w].

        Rows beyond the map's edges are zeros.
        """
        _, channels, height, width = self.x.shape
        out = self.x.new_empty(1, last - first, width, channels).permute(0, 3, 1, 2)
        top, end = max(first, 0), min(last, height)
        out[:, :, : top - first] = 0
        out[:, :, end - first :] = 0
        part, inner = (
            self.x[picture : picture + 1, :, top:end],
            out[:, :, top - first : end - first],
        )
        if vectors.available(part.dtype) and channels % 16 == 0:
            vectors.normalise(part, self.factors[picture : picture + 1], silu=True, out=inner)
            return out
        factor, addend = self.factors[picture][:, None, :, None, None]
        inner.copy_(F.silu(torch.addcmul(addend, part.float(), factor), inplace=True))
        return out


def strips(x: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield each strip of a map: which picture, from which row to which."""
    batch, channels, height, width = x.shape
    tall = max(STRIP // (channels * width), 1)
    for picture in range(batch):
        for first in range(0, height, tall):
            yield picture, first, min(first + tall, height)


def moments(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Return the same as vectors.moments, without a kernel, for any precision."""
    batch, channels = x.shape[:2]
    sums = torch.zeros(2, batch, channels, dtype=torch.float64)
    for picture, first, last in strips(x):
        part = x[picture, :, first:last].float()
        sums[0, picture] += _sums(part)
        sums[1, picture] += _sums(part.square())
    groups = sums.view(2, batch, norm.num_groups, -1).mean(-1) / (x.shape[2] * x.shape[3])
    mean, variance = groups[0], (groups[1] - groups[0].square()).clamp_min(0)
    spread = (variance + norm.eps).rsqrt()
    each = channels // norm.num_groups
    mean, spread = mean.repeat_interleave(each, 1), spread.repeat_interleave(each, 1)
    factor = spread * norm.weight.double()
    return torch.stack([factor, norm.bias.double() - mean * factor], 1).float()


def _sums(part: Tensor) -> Tensor:
    """Return the float64 sum of each channel of [channels, h, w].

    Groups of 64 numbers are summed in float32 first, which is five times as fast.
    """
    flat = part.permute(1, 2, 0).reshape(-1, len(part))
    whole = len(flat) // 64 * 64
    blocks = flat[:whole].view(-1, 64, len(part)).sum(1)
    return blocks.double().sum(0) + flat[whole:].double().sum(0)


def convolve(
    product: Callable[..., Tensor],
    map_: Normed,
    channels: int,
    plus: Tensor | None,
    shift: Tensor | None,
    consume: bool,
    relu: bool = False,
) -> Tensor:
    """Return the 3×3 convolution, with padding 1, of a normed map.

    product: the convolution of rows with their padding rows, as onednn.Convolution with `tall`.
    channels: of the result. plus, shift, consume, relu: see layers.Conv2d.
    """
    x = map_.x
    batch, _, height, width = x.shape
    out: Any = plus if consume else None
    if out is None:
        out = x.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)
    for picture, first, last in strips(x):
        one = slice(picture, picture + 1)
        here = out[one, :, first:last]
        added = None if plus is None else plus[one, :, first:last]
        found = product(
            map_.rows(picture, first - 1, last + 1),
            added,
            shift if shift is None or len(shift) == 1 else shift[one],
            consume,
            relu,
            tall=True,
        )
        if found.data_ptr() != here.data_ptr():
            here.copy_(found)
    return out
