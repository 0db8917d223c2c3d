"""bfloat16 convolutions by tiles: our own kernels, in convolution.cpp."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.fast import kernels
from safelight.fast.kernels import Library
from safelight.fast.onednn import quarters
from safelight.fast.store import ARENA, Store
from safelight.progress import get_on


def library() -> Library:
    """Return the library of products by tiles. Raises RuntimeError if there is none here."""
    return kernels.required(kernels.tiles())


def available(dtype: torch.dtype) -> bool:
    """Return whether this dtype is convolved by tiles here."""
    return dtype == torch.bfloat16 and kernels.tiles() is not None


def in_tiles(rows: Tensor) -> Tensor:
    """Return weights in the order in which products by tiles read them.

    rows: int32 [columns, n], the weights of each column, as pairs of bfloat16 or fours of bytes;
    columns is a multiple of 32, n of 16. Returns [columns / 32, n / 16, 2, 16, 16]: the columns of
    a tile are its last dimension.
    """
    columns, count = rows.shape
    return rows.view(columns // 32, 2, 16, count // 16, 16).permute(0, 3, 1, 4, 2)


class _Weights:
    """A convolution's weights in the order of the kernel.

    That is: for each 32 columns, for each plane of 32 channels, all taps.
    """

    def __init__(self, weight: Tensor, store: Store) -> None:
        """weight: bfloat16 [columns, channels, h, w], columns and channels multiples of 32."""
        self.columns, self.channels = weight.shape[:2]
        self.side = weight.shape[2]
        taps = self.side**2
        weight = weight.reshape(self.columns, -1, 32, taps).transpose(2, 3).flatten(1)
        packed = store.room(weight.numel())
        laid = in_tiles(weight.view(torch.int32))
        packed.view(torch.int32).view(laid.shape).copy_(laid)
        self.packed = store.keep(packed)


STRIP = 1 << 22
"""The most numbers in a map's padded copy; larger maps are convolved in strips of rows."""


class Map:
    """A map [batch, channels, h, w] in the layout that a convolution reads.

    That is planes of 32 channels with a border of zeros one wide, normed if there are `factors`. It
    is made a strip of rows at a time, so that a large map is never copied as a whole.
    """

    def __init__(self, x: Tensor, factors: Tensor | None = None) -> None:
        """factors: float32 [batch, 2, channels], for norm and SiLU."""
        self.x = x.contiguous(memory_format=torch.channels_last)
        self.shape = x.shape
        self.factors = factors

    def strips(self) -> list[tuple[slice, int, int]]:
        """Return the strips: which pictures, and the first and the end row."""
        batch, channels, height, width = self.shape
        row = (width + 2) * channels
        if batch * (height + 2) * row <= STRIP:
            return [(slice(0, batch), 0, height)]
        tall = max(STRIP // row - 2, 1)
        return [
            (slice(i, i + 1), y, min(y + tall, height))
            for i in range(batch)
            for y in range(0, height, tall)
        ]

    def laid(self, pictures: slice, first: int, last: int) -> tuple[Tensor, int]:
        """Return these rows in planes of 32 channels, and the size of a plane in numbers."""
        x = self.x[pictures]
        batch, channels, height, width = x.shape
        plane = batch * (last - first + 2) * (width + 2) * 32
        # Tiles are read as a whole; products of numbers beyond the end are not kept.
        memory = torch.empty(channels // 32 * plane + (16 + 3 * (width + 2)) * 32, dtype=x.dtype)
        memory[channels // 32 * plane :] = 0
        library().call(
            "lay",
            x=x,
            factors=None if self.factors is None else self.factors[pictures],
            out=memory,
            plane=plane,
            images=batch,
            height=height,
            width=width,
            channels=channels,
            first=first,
            last=last,
        )
        return memory, plane


def fits_conv(conv: nn.Conv2d, dtype: torch.dtype) -> bool:
    """Return whether a convolution in this dtype is computed by tiles."""
    return available(dtype) and kernels.plain_3x3(conv, 32)


class Convolution:
    """Like onednn.Convolution, for 3×3 with padding 1."""

    def __init__(self, weight: Tensor, conv: nn.Conv2d, store: Store = ARENA) -> None:
        self.weights = _Weights(weight, store)
        self.bias = None if conv.bias is None else conv.bias.float()

    def __call__(
        self,
        x: Tensor | Map,
        plus: Tensor | None = None,
        shift: Tensor | None = None,
        consume: bool = False,
        relu: bool = False,
    ) -> Tensor:
        x = x if isinstance(x, Map) else Map(x)
        bias = self.bias
        if shift is not None:
            bias = shift.float() if bias is None else bias + shift.float()
        batch, _, height, width = x.shape
        if plus is not None:
            plus = plus.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        # The kernel reads each number of `plus` just before it writes there.
        out = plus if consume else None
        if out is None:
            out = torch.empty(batch, height, width, self.weights.columns, dtype=torch.bfloat16)
        for pictures, first, last in x.strips():
            get_on()
            rows = (pictures, slice(first, last))
            _convolve(
                *x.laid(pictures, first, last),
                self.weights,
                bias if bias is None or bias.dim() == 1 or len(bias) == 1 else bias[pictures],
                None if plus is None else plus[rows],
                out[rows],
            )
        out = F.relu(out, inplace=True) if relu else out
        return out.permute(0, 3, 1, 2)


def linear_by(
    of: Library,
    kernel: str,
    dtype: torch.dtype,
    matrix: Any,
    x: Tensor,
    plus: Tensor | None,
    **more: Any,
) -> Tensor:
    """Return x times a packed matrix, plus its bias and `plus`, by a kernel for x of this dtype.

    matrix: has `packed`, `bias`, `inner` and `columns`. x: [..., inner]. more: further arguments of
    this kernel. Raises ValueError if x does not fit.
    """
    if x.dtype != dtype or x.shape[-1] != matrix.inner:
        raise ValueError(f"{x.dtype} of {tuple(x.shape)} by a matrix of {matrix.inner} rows")
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], matrix.columns)
    if plus is not None:
        plus = plus.to(out).expand_as(out).contiguous()
    of.call(
        kernel,
        x=x,
        weights=matrix.packed(),
        bias=matrix.bias,
        plus=plus,
        out=out,
        rows=x.numel() // matrix.inner,
        inner=matrix.inner,
        columns=matrix.columns,
        **more,
    )
    return out


def _convolve(
    memory: Tensor,
    plane: int,
    w: _Weights,
    bias: Tensor | None,
    plus: Tensor | None,
    out: Tensor,
    spread: tuple[int, int, int] = (1, 0, 0),
) -> None:
    """Write a convolution to out, [batch, h, w, columns].

    h and w are those of the map times spread[0].
    """
    per_picture = bias is not None and bias.dim() == 2 and len(bias) > 1
    library().call(
        "conv",
        x=memory,
        weights=w.packed(),
        bias=bias,
        plus=plus,
        out=out,
        plane=plane,
        bias_step=w.columns if per_picture else 0,
        images=out.shape[0],
        height=out.shape[1] // spread[0],
        width=out.shape[2] // spread[0],
        border=2,
        channels=w.channels,
        columns=w.columns,
        side=w.side,
        spread=spread[0],
        down=spread[1],
        right=spread[2],
    )


class Doubling:
    """Like onednn.Doubling; the four convolutions write directly to their pixels."""

    def __init__(self, weight: Tensor, conv: nn.Conv2d, store: Store = ARENA) -> None:
        self.bias = None if conv.bias is None else conv.bias.float()
        self.parts = [[_Weights(part, store) for part in row] for row in quarters(weight)]

    def __call__(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        columns = self.parts[0][0].columns
        out = torch.empty(batch, 2 * height, 2 * width, columns, dtype=torch.bfloat16)
        map_ = Map(x)
        for pictures, first, last in map_.strips():
            get_on()
            laid = map_.laid(pictures, first, last)
            rows = out[pictures, 2 * first : 2 * last]
            for down in (0, 1):
                for right in (0, 1):
                    part = self.parts[down][right]
                    _convolve(*laid, part, self.bias, None, rows, (2, down, right))
        return out.permute(0, 3, 1, 2)
