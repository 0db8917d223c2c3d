"""3×3 convolutions by Winograd's algorithm (Lavin and Gray, arXiv:1509.09308).

A tile of 6×6 positions and the nine taps are each transformed such that 36 products give 4×4
results; without it they take 144. Maps are float32 or bfloat16. Everything in between, transformed
weights included, is float32, in winograd.h. Weights are kept untransformed, in another order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.fast import kernels, vectors

FEW, SMALL = 1 << 10, 1 << 14
"""Input times output channels. Below FEW there is nothing to gain. Below SMALL in float32, tiles
have 2×2 results: such layers take little time, and the rounding error is a sixth."""

LANES = 16
"""Numbers of channels are multiples of this."""

PANEL = 32
"""Columns of weights that are stored together; winograd.h has the same number."""


def ready(dtype: torch.dtype = torch.float32) -> bool:
    """Return whether this machine has the kernel for a dtype, and nothing faster."""
    if dtype == torch.bfloat16 and kernels.tiles() is not None:
        return False  # AMX multiplies directly, at many times the rate
    return vectors.available(dtype)


def fits_conv(conv: nn.Conv2d, dtype: torch.dtype) -> bool:
    """Return whether a convolution is computed in this way."""
    enough = conv.in_channels * conv.out_channels >= FEW
    return enough and kernels.plain_3x3(conv, LANES) and ready(dtype)


class Convolution:
    """Like onednn.Convolution, for 3×3 with padding 1."""

    def __init__(self, weight: Tensor, conv: nn.Conv2d, scale: int = 1) -> None:
        """scale: 2 for nearest-neighbour upsampling by 2 before the convolution, else 1."""
        self.out_channels, inner = weight.shape[:2]
        self.bias = None if conv.bias is None else conv.bias.float()
        self.scale = scale
        # Not by the map's size, or a picture's last bits would depend on which size came first.
        small = weight.dtype == torch.float32 and self.out_channels * inner < SMALL
        self.side = 2 if small else 4
        rows = F.pad(weight.flatten(1), (0, 0, 0, -self.out_channels % PANEL))
        # [panels, in * 9, PANEL]
        self.weights = rows.view(-1, PANEL, inner * 9).transpose(1, 2).contiguous()

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
        dtype, taps = self.weights.dtype, self.weights.shape[1]
        if x.dtype != dtype or 9 * inner != taps:
            raise ValueError(f"{x.dtype} of {tuple(x.shape)} by {taps // 9} channels of {dtype}")
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
