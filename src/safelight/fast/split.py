"""float32 products on CPUs with AMX: each is three products of bfloat16, in split.cpp.

A number is split into the sum of two of bfloat16, which keeps about 16 of its 24 bits. Such a
product's relative error is 3e-6; that of float32 is 3e-7, and that of bfloat16 3e-3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from safelight.fast import kernels, onednn, tiles, vectors
from safelight.fast.store import ARENA


def available(dtype: torch.dtype) -> bool:
    """Return whether products of this dtype can be split here: float32 with AMX."""
    return dtype == torch.float32 and kernels.tiles() is not None


def matrix(weight: Tensor, bias: Tensor | None) -> onednn.Matrix | Matrix:
    """Return the fastest Matrix here for a weight [out, in], to multiply tokens by."""
    if available(weight.dtype) and not (weight.shape[0] % 32 or weight.shape[1] % 32):
        return Matrix(weight, bias)
    return onednn.Matrix(weight, bias)


class Matrix:
    """Like onednn.Matrix, in float32, for weights whose sides are multiples of 32."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.columns, self.inner = weight.shape
        heads = weight.bfloat16()
        parts = (heads, (weight - heads.float()).bfloat16())
        laid = torch.stack([tiles.in_tiles(p.contiguous().view(torch.int32)) for p in parts], 2)
        packed = ARENA.room(2 * weight.numel())
        packed.view(torch.int32).view(laid.shape).copy_(laid)
        self.packed = ARENA.keep(packed)
        self.bias = None if bias is None else bias.float().contiguous()

    def __call__(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        library = tiles.library()
        return tiles.linear_by(library, "split_linear", torch.float32, self, x, plus)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Like vectors.attend, in float32."""
    return vectors.attend_by(tiles.library(), "split_attend", torch.float32, q, k, v)
