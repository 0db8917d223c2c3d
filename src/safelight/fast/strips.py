"""Large maps between a norm and its convolution, a strip of rows at a time.

Of a map of hundreds of MB there is then no normed copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.fast import vectors

STRIP = 1 << 22
"""Numbers of a strip."""


class Normed:
    """silu(norm(x)) of a map [batch, channels, h, w], made where it is read.

    factors: float32 [batch, 2, channels], each channel's factor and addend.
    """

    def __init__(self, x: Tensor, factors: Tensor) -> None:
        self.x, self.factors = x, factors

    def rows(self, picture: int, first: int, last: int) -> Tensor:
        """Return these rows of one picture, [1, channels, last - first, w]."""
        part = self.x[picture : picture + 1, :, first:last]
        if vectors.available(part.dtype) and part.shape[1] % 16 == 0:
            return vectors.normalise(part, self.factors[picture : picture + 1], silu=True)
        factor, addend = self.factors[picture][:, None, :, None, None]
        found = torch.addcmul(addend, part.float(), factor)
        return F.silu(found, inplace=True).to(self.x.dtype)


def strips(x: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield each strip of a map: which picture, from which row to which."""
    batch, channels, height, width = x.shape
    tall = max(STRIP // (channels * width), 1)
    for picture in range(batch):
        for first in range(0, height, tall):
            yield picture, first, min(first + tall, height)


def moments(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Return what vectors.moments does, without a kernel, for any precision."""
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
    """Return the sum of each channel of [channels, h, w], float64: of 64 numbers in float32 first,
    which is five times as fast."""
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
) -> Tensor:
    """Return the convolution, 3×3 with a border of one, of a normed map.

    product: the convolution of a map, as layers.Conv2d has it. channels: of the result.
    plus, shift, consume: see layers.Conv2d.
    """
    x = map_.x
    batch, _, height, width = x.shape
    out: Any = plus if consume else None
    if out is None:
        out = x.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)
    for picture, first, last in strips(x):
        # A row more on both sides, where there is one: elsewhere is the border of zeros.
        top, end = max(first - 1, 0), min(last + 1, height)
        one = slice(picture, picture + 1)
        found = product(
            map_.rows(picture, top, end),
            None if plus is None else plus[one, :, top:end],
            shift if shift is None or len(shift) == 1 else shift[one],
            False,
        )
        # Rows of `plus` that an earlier strip has written over are in those that are left out.
        out[one, :, first:last] = found[:, :, first - top : last - top]
    return out
