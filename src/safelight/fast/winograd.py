"""3×3 convolutions in float32 by Winograd's products (Lavin and Gray, arXiv:1509.09308).

A tile of 6×6 positions and the nine taps are each brought into a form in which 36 products give
4×4 results, which by definition take 144. All tiles' products at one of the 36 places are a matrix
product, and that is oneDNN's; our own kernel, in winograd.cpp, lays out the tiles and sums up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from ctypes import addressof, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.fast import kernels, memory, onednn, split
from safelight.fast.kernels import Library
from safelight.progress import get_on

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

FEW, MANY = 1 << 16, 3 << 19
"""Input times output channels: with fewer there is nothing to gain, with more the tiles are small.
36 products a tile need four times the memory of nine weights, 16 products less than twice; and
where channels are many, maps are small, and have few tiles to read those weights for."""

ENOUGH = 12 << 30
"""Bytes of a machine's memory that this is for: Stable Diffusion 1.5 takes 3 GB more by it. Not of
what is free just now: a picture's last bits would hang on that."""

LANES = 16
"""What the numbers of channels are multiples of."""

STRIP = 1 << 22
"""Numbers that are laid out at once."""


def library() -> Library:
    return kernels.required(kernels.winograd())


def ready() -> bool:
    """Return whether this machine has the kernels, and memory enough for them."""
    return kernels.winograd() is not None and memory.total() >= ENOUGH


def fits_conv(conv: nn.Conv2d, dtype: torch.dtype) -> bool:
    return (
        dtype == torch.float32
        and ready()
        and kernels.plain_3x3(conv, LANES)
        and conv.in_channels * conv.out_channels >= FEW
    )


def kept(shape: Sequence[int], scale: int = 1) -> int:
    """Return how many numbers a convolution's float32 weight [out, in, h, w] is kept as.

    scale: as of `Convolution`. Of one with a stride, which is not multiplied so, it is too many.
    """
    size = math.prod(shape[:2])
    if tuple(shape[2:]) != (3, 3) or size < FEW or any(n % LANES for n in shape[:2]) or not ready():
        return math.prod(shape)
    return size * (2 + _side(size, scale)) ** 2


def _side(size: int, scale: int) -> int:
    """Return how many results a tile has in a row. size: input times output channels."""
    # Not by the map's size: a picture's last bits would hang on which size came first.
    return 2 if size > MANY * scale**2 else 4


class Convolution:
    """As onednn.Convolution, for 3×3 with a border of one."""

    def __init__(self, weight: Tensor, conv: nn.Conv2d, scale: int = 1) -> None:
        """scale: how often each row and column of the map is repeated before."""
        self.out_channels, self.in_channels = weight.shape[:2]
        self.bias, self.scale = conv.bias, scale
        self.side = _side(self.out_channels * self.in_channels, scale)
        taps = torch.tensor(_TAPS[self.side], dtype=weight.dtype)
        places = torch.kron(taps, taps) @ weight.reshape(-1, 9).T
        pack = split.matrix if self.side == 2 else onednn.Matrix
        self.places = [pack(place.view(weight.shape[:2]), None) for place in places]

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
        if tall:  # its results for the outermost rows are of no use
            found = self(x, None, shift)[:, :, 1:-1]
            out = found if plus is None else plus.add_(found) if consume else plus + found
            return F.relu(out, inplace=True) if relu else out
        x = x.contiguous(memory_format=torch.channels_last)
        batch, _, height, width = x.shape
        height, width = height * self.scale, width * self.scale
        bias = self.bias
        if shift is not None:
            bias = shift if bias is None else bias + shift
        if plus is not None:
            plus = plus.contiguous(memory_format=torch.channels_last)
        # The kernel reads each number of `plus` just before it writes there.
        out = plus if consume else None
        if out is None:
            out = x.new_empty(batch, height, width, self.out_channels).permute(0, 3, 1, 2)
        bias_step = (
            self.out_channels if bias is not None and bias.dim() > 1 and len(bias) > 1 else 0
        )
        tiles, strip = self._tiles(batch, height, width), self._strip()
        for first in range(0, tiles, strip):
            get_on()
            last = min(first + strip, tiles)
            sums = self._products(x, height, width, first, last)
            places = (c_void_p * len(sums))(*[one.data_ptr() for one in sums])
            library().call(
                "gather",
                sums=addressof(places),
                bias=bias,
                plus=plus,
                out=out,
                bias_step=bias_step,
                height=height,
                width=width,
                channels=self.out_channels,
                side=self.side,
                first=first,
                last=last,
            )
        return F.relu(out, inplace=True) if relu else out

    def _tiles(self, batch: int, height: int, width: int) -> int:
        return batch * -(-height // self.side) * -(-width // self.side)

    def _strip(self) -> int:
        """Tiles that are laid out at once."""
        return max(STRIP // ((self.side + 2) ** 2 * self.in_channels), 128)

    def _products(self, x: Tensor, height: int, width: int, first: int, last: int) -> list[Tensor]:
        """Of these tiles, at each place: [tiles, out_channels]."""
        count = (last - first) * self.in_channels
        # Some lines between the planes: at a large power of two they would share places in the
        # cache.
        plane = count + 272
        laid = torch.empty(len(self.places), plane)
        library().call(
            "spread",
            x=x,
            planes=laid,
            plane=plane,
            height=height,
            width=width,
            channels=self.in_channels,
            scale=self.scale,
            side=self.side,
            first=first,
            last=last,
        )
        return [
            place(laid[i, :count].view(-1, self.in_channels)) for i, place in enumerate(self.places)
        ]
