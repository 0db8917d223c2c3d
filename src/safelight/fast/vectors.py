"""Attention, norms and gates: our own kernels.

They are in attention.cpp and norms.cpp for bfloat16, and in floats.cpp for float32.
"""

from __future__ import annotations

from ctypes import c_long
from typing import Any

import torch
from torch import Tensor, nn

from safelight.fast import kernels
from safelight.fast.kernels import at

library = kernels.vectors


def available(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and library() is not None


def fits_norm(norm: nn.GroupNorm, x: Tensor) -> bool:
    return available(x.dtype) and norm.num_channels % 16 == 0


def group_norm(norm: nn.GroupNorm, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The norm of a map; scale and shift are its weight and bias in float32."""
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x)
    factors = moments(norm, x, scale, shift)
    batch, channels, height, width = x.shape
    library().safelight_normalise(
        x.data_ptr(),
        factors.data_ptr(),
        out.data_ptr(),
        batch,
        height * width,
        channels,
    )
    return out


def moments(norm: nn.GroupNorm, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return each channel's factor and addend in a map's norm, float32 [batch, 2, channels]."""
    batch, channels, height, width = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
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


def fits_layer_norm(norm: nn.LayerNorm, x: Tensor) -> bool:
    return available(x.dtype) and x.shape[-1] % 16 == 0 and len(norm.normalized_shape) == 1


def layer_norm(
    norm: nn.LayerNorm, x: Tensor, scale: Tensor, shift: Tensor, plus: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x, or with `plus` the sum of both, and its norm; scale, shift: weight and bias in float32."""
    x = x.contiguous()
    out, total = torch.empty_like(x), x
    if plus is not None:
        plus, total = plus.contiguous(), torch.empty_like(x)
    library().safelight_layer_norm(
        x.data_ptr(),
        at(plus),
        total.data_ptr(),
        scale.data_ptr(),
        shift.data_ptr(),
        out.data_ptr(),
        x.numel() // x.shape[-1],
        x.shape[-1],
        norm.eps,
    )
    return total, out


def gate(value: Tensor, by: Tensor) -> Tensor:
    """value · GELU(by), both [..., width] with a width of a multiple of 16."""
    value, by = value.contiguous(), by.contiguous()
    out = torch.empty_like(value)
    library().safelight_gate(value.data_ptr(), by.data_ptr(), out.data_ptr(), out.numel())
    return out


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q·kᵀ/√d)·v in bfloat16, [batch, length, heads·d].

    q, k, v: [batch, heads, length, d], d side by side.
    """
    return attend_by(library().safelight_attend, torch.bfloat16, q, k, v)


def attend_floats(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return what `attend` does, for float32."""
    return attend_by(kernels.floats().safelight_attend_floats, torch.float32, q, k, v)


def attend_by(kernel: Any, dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` by a kernel for numbers of this dtype. ValueError if these do not fit together."""
    batch, heads, queries, size = q.shape
    if {q.dtype, k.dtype, v.dtype} != {dtype} or not (
        k.shape == v.shape == (batch, heads, k.shape[2], size)
    ):
        raise ValueError(
            f"attention of {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} in {q.dtype}"
        )
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    out = q.new_empty(batch, queries, heads, size)
    tensors = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), out)
    steps = (c_long * 12)(*[s for t in tensors for s in t.stride()[:3]])
    sizes = batch, heads, queries, k.shape[2], size
    kernel(at(q), at(k), at(v), at(out), steps, *sizes, size**-0.5)
    return out.flatten(2)
