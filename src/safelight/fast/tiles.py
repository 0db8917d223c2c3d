"""Products on CPUs with AMX tiles, bfloat16 alone: our own kernels, in tiles.cpp.

They are compiled when the package is built, where a compiler is at hand, and are not needed: what
they do not take, and every other CPU, is oneDNN's.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from ctypes import c_float, c_int, c_long, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safelight.fast.onednn import quarters

_ARGUMENTS = {
    "safelight_pack": [c_void_p, c_void_p, c_long, c_long],
    "safelight_conv": [c_void_p] * 3
    + [c_long, c_void_p, c_void_p]
    + [c_long] * 6
    + [c_int]
    + [c_long] * 3,
    "safelight_moments": [c_void_p] * 4 + [c_long] * 4 + [c_float],
    "safelight_normalise": [c_void_p] * 3 + [c_long] * 6 + [c_int, c_int],
    "safelight_attend": [c_void_p] * 5 + [c_long] * 5 + [c_float],
}


@cache
def library() -> Any:
    """The compiled kernels, or None: not built, not this processor, or switched off with
    SAFELIGHT_TILES=0.
    """
    built = sorted(Path(__file__).parent.glob("_tiles*.so"))
    if not built or os.environ.get("SAFELIGHT_TILES") == "0":
        return None
    if not (torch.cpu._is_amx_tile_supported() and torch.cpu._is_avx512_bf16_supported()):
        return None
    found = ctypes.CDLL(str(built[0]))
    for name, arguments in _ARGUMENTS.items():
        getattr(found, name).argtypes = arguments
        getattr(found, name).restype = None
    return found if found.safelight_init() else None


def available(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and library() is not None


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class _Arena:
    """Memory for packed weights in large pages: the kernels read gigabytes of it in each step, and
    looking up pages of 4 KB costs a fifth of the time.
    """

    BLOCK = 64 << 20
    PAGE = 2 << 20

    def __init__(self) -> None:
        self.rest = torch.empty(0, dtype=torch.bfloat16)

    def take(self, count: int) -> Tensor:
        count = -(-count // 32) * 32
        if len(self.rest) < count:
            self.rest = self._block(max(self.BLOCK, 2 * count))
        taken, self.rest = self.rest[:count], self.rest[count:]
        return taken

    def _block(self, size: int) -> Tensor:
        memory = mmap.mmap(-1, size + self.PAGE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        block = torch.frombuffer(memory, dtype=torch.bfloat16)
        return block[-block.data_ptr() % self.PAGE // 2 :][: size // 2]


_arena = _Arena()


class _Weights:
    """Rows of taps·blocks·32 numbers for each column, in the order of the kernels."""

    def __init__(self, weight: Tensor, taps: int) -> None:
        """weight: bfloat16 [columns, taps·blocks·32], both sides multiples of 32."""
        weight = weight.contiguous()
        self.columns = len(weight)
        self.blocks = weight.shape[1] // taps // 32
        self.packed = _arena.take(weight.numel())
        library().safelight_pack(
            weight.data_ptr(), self.packed.data_ptr(), self.columns, taps * self.blocks
        )


STRIP = 1 << 23
"""Numbers of a map's padded copy: larger maps are convolved strip by strip of their rows."""


class Map:
    """A map [batch, channels, h, w] as a convolution reads it: with a border of zeros one wide, and
    normed on the way where it comes from a norm. It is made a strip of rows at a time, so that of
    a large picture there is never a second copy.
    """

    def __init__(self, x: Tensor, factors: Tensor | None = None) -> None:
        """factors: float32 [batch, 2, channels], for norm and SiLU."""
        self.x = x.contiguous(memory_format=torch.channels_last)
        self.shape = x.shape
        self.factors = factors

    def strips(self) -> list[tuple[slice, int, int]]:
        """Which pictures, and from which row to which."""
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

    def padded(self, pictures: slice, first: int, last: int) -> Tensor:
        x = self.x[pictures]
        batch, channels, height, width = x.shape
        positions = batch * (last - first + 2) * (width + 2)
        # Beyond the end, numbers are read for whole tiles, multiplied, and not kept.
        memory = torch.empty((positions + 16 + 3 * (width + 2)) * channels, dtype=x.dtype)
        memory[positions * channels :] = 0
        if self.factors is not None:
            _normalise(x, self.factors[pictures], memory, first, last, pad=1, silu=1)
            return memory
        inside = memory[: positions * channels].zero_()
        inside = inside.view(batch, last - first + 2, width + 2, channels)
        top, end = max(first - 1, 0), min(last + 1, height)
        at = top - first + 1
        inside[:, at : at + end - top, 1:-1] = x[:, :, top:end].permute(0, 2, 3, 1)
        return memory


def fits_conv(conv: nn.Conv2d, dtype: torch.dtype) -> bool:
    return (
        available(dtype)
        and not (conv.in_channels % 32 or conv.out_channels % 32)
        and conv.kernel_size == (3, 3)
        and conv.padding == (1, 1)
        and conv.stride == conv.dilation == (1, 1)
    )


class Convolution:
    """As onednn.Convolution, for 3×3 with a border of one."""

    def __init__(self, weight: Tensor, conv: nn.Conv2d, shape: torch.Size) -> None:
        self.weights = _Weights(weight.permute(0, 2, 3, 1).flatten(1), 9)
        self.bias = None if conv.bias is None else conv.bias.float()

    def __call__(
        self, x: Tensor | Map, plus: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        x = x if isinstance(x, Map) else Map(x)
        bias = self.bias
        if shift is not None:
            bias = shift.float() if bias is None else bias + shift.float()
        batch, _, height, width = x.shape
        out = torch.empty(batch, height, width, self.weights.columns, dtype=torch.bfloat16)
        if plus is not None:
            plus = plus.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        for pictures, first, last in x.strips():
            rows = (pictures, slice(first, last))
            _convolve(
                x.padded(pictures, first, last),
                self.weights,
                bias if bias is None or bias.dim() == 1 or len(bias) == 1 else bias[pictures],
                None if plus is None else plus[rows],
                out[rows],
                3,
            )
        return out.permute(0, 3, 1, 2)


def _convolve(
    memory: Tensor,
    w: _Weights,
    bias: Tensor | None,
    plus: Tensor | None,
    out: Tensor,
    side: int,
    spread: tuple[int, int, int] = (1, 0, 0),
) -> None:
    """out: [batch, h, w, columns], h and w those of the map times the first of spread."""
    per_picture = bias is not None and bias.dim() == 2 and len(bias) > 1
    library().safelight_conv(
        memory.data_ptr(),
        w.packed.data_ptr(),
        _at(bias),
        w.columns if per_picture else 0,
        _at(plus),
        out.data_ptr(),
        out.shape[0],
        out.shape[1] // spread[0],
        out.shape[2] // spread[0],
        2,
        w.blocks * 32,
        w.columns,
        side,
        *spread,
    )


class Doubling:
    """As onednn.Doubling: the four convolutions write where their pixels belong."""

    def __init__(self, weight: Tensor, conv: nn.Conv2d, shape: torch.Size) -> None:
        self.bias = None if conv.bias is None else conv.bias.float()
        self.parts = [
            [_Weights(part.permute(0, 2, 3, 1).flatten(1), 4) for part in row]
            for row in quarters(weight)
        ]

    def __call__(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        columns = self.parts[0][0].columns
        out = torch.empty(batch, 2 * height, 2 * width, columns, dtype=torch.bfloat16)
        map_ = Map(x)
        for pictures, first, last in map_.strips():
            memory = map_.padded(pictures, first, last)
            rows = out[pictures, 2 * first : 2 * last]
            for down in (0, 1):
                for right in (0, 1):
                    part = self.parts[down][right]
                    _convolve(memory, part, self.bias, None, rows, 2, (2, down, right))
        return out.permute(0, 3, 1, 2)


def fits_norm(norm: nn.GroupNorm, x: Tensor) -> bool:
    return available(x.dtype) and norm.num_channels % 16 == 0


def group_norm(norm: nn.GroupNorm, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The norm of a map; scale and shift are its weight and bias in float32."""
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x)
    _normalise(x, _moments(norm, x, scale, shift), out, 0, x.shape[2], pad=0, silu=0)
    return out


def group_norm_silu(norm: nn.GroupNorm, x: Tensor, scale: Tensor, shift: Tensor) -> Map:
    """Norm and SiLU, for a convolution."""
    x = x.contiguous(memory_format=torch.channels_last)
    return Map(x, _moments(norm, x, scale, shift))


def _moments(norm: nn.GroupNorm, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    factors = torch.empty(batch, 2, channels)
    library().safelight_moments(
        x.data_ptr(),
        scale.data_ptr(),
        shift.data_ptr(),
        factors.data_ptr(),
        batch,
        height * width,
        channels,
        norm.num_groups,
        norm.eps,
    )
    return factors


def _normalise(
    x: Tensor, factors: Tensor, out: Tensor, first: int, last: int, pad: int, silu: int
) -> None:
    batch, channels, height, width = x.shape
    library().safelight_normalise(
        x.data_ptr(),
        factors.data_ptr(),
        out.data_ptr(),
        batch,
        height,
        width,
        channels,
        first,
        last,
        pad,
        silu,
    )


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ/√d)·v for [batch, heads, length, d] with d side by side.

    Returns [batch, length, heads·d].
    """
    batch, heads, queries, size = q.shape
    out = q.new_empty(batch, queries, heads, size)
    tensors = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), out)
    steps = (c_long * 12)(*[s for t in tensors for s in t.stride()[:3]])
    library().safelight_attend(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        steps,
        batch,
        heads,
        queries,
        k.shape[2],
        size,
        size**-0.5,
    )
    return out.flatten(2)
