"""3×3 convolutions by Winograd's products (Lavin and Gray, arXiv:1509.09308).

A tile of 6×6 positions and the nine taps are each brought into a form in which 36 products give
4×4 results, which by definition take 144. Maps are float32 or bfloat16; all that is between is
float32, in winograd.h.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from safelight.fast import kernels, memory, vectors

_TAPS = {
    2: [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
    4: [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
}
"""What three taps become, where a tile has 2×2 results and where it has 4×4."""

FEW, SMALL, MANY = 1 << 10, 1 << 14, 3 << 19
"""Input times output channels. With fewer than FEW there is nothing to gain. With more than MANY
the tiles have 2×2 results: 36 products a tile need four times the memory of nine weights, 16
products less than twice; and where channels are many, maps are small, and have few tiles to read
those weights for. So have those of float32 with fewer than SMALL: they take little time, and
rounding is a sixth."""

ENOUGH = 12 << 30
"""Bytes of a machine's memory that this is for: Stable Diffusion 1.5 takes 3 GB more by it, and
1.6 GB more in bfloat16. Not of what is free just now: a picture's last bits would hang on that."""

LANES = 16
"""What the numbers of channels are multiples of."""

PANEL = 32
"""Columns of weights that lie together: winograd.h has the same number."""


def ready(dtype: torch.dtype = torch.float32) -> bool:
    """Return whether this machine has the kernel for a dtype, and memory enough for it."""
    return vectors.available(dtype) and memory.total() >= ENOUGH


def fits_conv(conv: nn.Conv2d, dtype: torch.dtype, scale: int = 1) -> bool:
    """Return whether a convolution is multiplied so. scale: as of `Convolution`."""
    shape = (conv.out_channels, conv.in_channels, 3, 3)
    return kernels.plain_3x3(conv, LANES) and numbers(shape, dtype, scale) > 0


def numbers(shape: Sequence[int], dtype: torch.dtype, scale: int = 1) -> int:
    """Return how many float32 numbers a weight [out, in, h, w] of this dtype is kept as, or 0 if
    it is not multiplied so.

    scale: as of `Convolution`. Not for a convolution with a stride, which is never multiplied so.
    """
    if dtype == torch.bfloat16 and kernels.tiles() is not None:
        return 0  # AMX multiplies directly, at many times the rate
    out, inner = shape[:2]
    side = _side(out * inner, dtype, scale)
    if tuple(shape[2:]) != (3, 3) or out % LANES or inner % LANES or not side or not ready(dtype):
        return 0
    return -(-out // PANEL) * PANEL * inner * len(_taps(side, scale)) ** 2


def _side(size: int, dtype: torch.dtype, scale: int) -> int:
    """Return how many results a tile has in a row, 0 if it does not pay off.

    size: input times output channels. Where bfloat16 has twice the rate of float32, 16 products for
    2×2 gain nothing, and doubled maps too little for the memory that they take.
    """
    # Not by the map's size: a picture's last bits would hang on which size came first.
    if size < FEW:
        return 0
    many = size > MANY * scale**2
    if dtype == torch.bfloat16:
        return 0 if many or scale > 1 else 4
    return 2 if many or size < SMALL else 4


def _taps(side: int, scale: int) -> list[list[float]]:
    """Return what three taps become. In a map that is doubled, what the third of them would be
    multiplied by is zero: two rows cancel out.
    """
    return [row for i, row in enumerate(_TAPS[side]) if scale == 1 or i != 2]


class Convolution:
    """As onednn.Convolution, for 3×3 with a border of one."""

    def __init__(self, weight: Tensor, conv: nn.Conv2d, scale: int = 1) -> None:
        """scale: how often each row and column of the map is repeated before, 1 or 2."""
        self.out_channels, inner = weight.shape[:2]
        self.bias = None if conv.bias is None else conv.bias.float()
        self.scale = scale
        self.side = _side(self.out_channels * inner, weight.dtype, scale)
        taps = torch.tensor(_taps(self.side, scale))
        whole = torch.zeros(-(-self.out_channels // PANEL) * PANEL, inner, 9)
        whole[: self.out_channels] = weight.flatten(2)
        columns = whole.view(-1, PANEL, inner, 9).permute(0, 3, 2, 1).flatten(2)
        # [panels, places, in * PANEL]
        self.weights = torch.kron(taps, taps) @ columns

    def __call__(
        self,
        x: Tensor,
        plus: Tensor | None = None,
        shift: Tensor | None = None,
        consume: bool = False,
        relu: bool = False,
        *,
        tall: bool = False,
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        batch, inner, rows, width = x.shape
        rows, width = rows * self.scale, width * self.scale
        height = rows - 2 if tall else rows
        bias = self.bias
        if shift is not None:
            bias = shift.float() if bias is None else bias + shift
        if plus is not None:
            plus = plus.contiguous(memory_format=torch.channels_last)
        # The kernel reads each number of `plus` just before it writes there.
        out = plus if consume else None
        if out is None:
            out = x.new_empty(batch, height, width, self.out_channels).permute(0, 3, 1, 2)
        each = bias is not None and bias.dim() > 1 and len(bias) > 1
        vectors.call(
            "winograd",
            x.dtype,
            x=x,
            weights=self.weights,
            bias=bias,
            plus=plus,
            out=out,
            bias_step=self.out_channels if each else 0,
            images=batch,
            rows=rows,
            height=height,
            width=width,
            inner=inner,
            channels=self.out_channels,
            side=self.side,
            scale=self.scale,
            above=tall,
            relu=relu,
        )
        return out
