"""Attention, norms and gates: our own kernels.

They are in attention.cpp and norms.cpp for bfloat16, and in floats.cpp for float32. Tensors have
either dtype, and results have the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from safelight.fast import kernels
from safelight.fast.kernels import Library


def _library(dtype: torch.dtype) -> Library | None:
    """Return the library for numbers of this dtype, or None."""
    of = {torch.bfloat16: kernels.vectors, torch.float32: kernels.floats}.get(dtype)
    return None if of is None else of()


def available(dtype: torch.dtype) -> bool:
    """Return whether there are kernels for this dtype here."""
    return _library(dtype) is not None


def call(name: str, dtype: torch.dtype, **arguments: Tensor | int | float | None) -> None:
    """Run a kernel for numbers of this dtype. arguments: as in `Library.call`."""
    kernels.required(_library(dtype)).call(_kernel(name, dtype), **arguments)


def _kernel(name: str, dtype: torch.dtype) -> str:
    """Return the name of a kernel for numbers of this dtype."""
    return f"{name}_floats" if dtype == torch.float32 else name


def fits_norm(norm: nn.GroupNorm, x: Tensor) -> bool:
    """Return whether the kernels support a group norm of x."""
    return available(x.dtype) and norm.num_channels % 16 == 0


def group_norm(
    norm: nn.GroupNorm, x: Tensor, scale: Tensor, shift: Tensor, *, silu: bool = False
) -> Tensor:
    """Return the norm of a map, with SiLU if asked. scale, shift: weight and bias in float32."""
    x = x.contiguous(memory_format=torch.channels_last)
    return normalise(x, moments(norm, x, scale, shift), silu=silu)


def normalise(
    x: Tensor, factors: Tensor, *, silu: bool = False, out: Tensor | None = None
) -> Tensor:
    """Return a map times factor plus addend, with SiLU if asked. factors: as from `moments`.

    out: a channels-last tensor for the result; None: a new one.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x) if out is None else out
    batch, channels, height, width = x.shape
    call(
        "normalise",
        x.dtype,
        x=x,
        factors=factors,
        out=out,
        images=batch,
        positions=height * width,
        channels=channels,
        active=int(silu),
    )
    return out


def moments(norm: nn.GroupNorm, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return each channel's factor and addend in a map's norm, float32 [batch, 2, channels]."""
    batch, channels, height, width = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    factors = torch.empty(batch, 2, channels)
    call(
        "moments",
        x.dtype,
        x=x,
        scale=scale,
        shift=shift,
        factors=factors,
        images=batch,
        positions=height * width,
        channels=channels,
        groups=norm.num_groups,
        eps=norm.eps,
    )
    return factors


def fits_layer_norm(norm: nn.LayerNorm, x: Tensor) -> bool:
    """Return whether the kernels support a layer norm of x."""
    return available(x.dtype) and x.shape[-1] % 16 == 0 and len(norm.normalized_shape) == 1


def layer_norm(
    norm: nn.LayerNorm, x: Tensor, scale: Tensor, shift: Tensor, plus: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return x or x + plus, and the norm of it. scale, shift: weight and bias in float32."""
    x = x.contiguous()
    out, total = torch.empty_like(x), x
    if plus is not None:
        plus, total = plus.contiguous(), torch.empty_like(x)
    call(
        "layer_norm",
        x.dtype,
        x=x,
        plus=plus,
        total=total,
        factor=scale,
        shift=shift,
        out=out,
        rows=x.numel() // x.shape[-1],
        channels=x.shape[-1],
        eps=norm.eps,
    )
    return total, out


def fits_gate(value: Tensor) -> bool:
    """Return whether the kernels support a gate of this value."""
    return available(value.dtype) and value.shape[-1] % 16 == 0


def gate(value: Tensor, by: Tensor) -> Tensor:
    """Return value · GELU(by). Both are [..., width], width a multiple of 16."""
    value, by = value.contiguous(), by.contiguous()
    out = torch.empty_like(value)
    call("gate", value.dtype, value=value, gate=by, out=out, count=out.numel())
    return out


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q·kᵀ/√d)·v, [batch, length, heads·d].

    q, k, v: [batch, heads, length, d].
    """
    library = kernels.required(_library(q.dtype))
    return attend_by(library, _kernel("attend", q.dtype), q.dtype, q, k, v)


def attend_by(
    of: Library, kernel: str, dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Return `attend` by a kernel for this dtype. Raises ValueError for other dtypes or shapes."""
    batch, heads, queries, size = q.shape
    if {q.dtype, k.dtype, v.dtype} != {dtype} or not (
        k.shape == v.shape == (batch, heads, k.shape[2], size)
    ):
        raise ValueError(
            f"attention of {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} in {q.dtype}"
        )
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    out = q.new_empty(batch, queries, heads, size)
    places: dict[str, int] = {}
    for name, tensor in (("q", q), ("k", k), ("v", v), ("out", out.transpose(1, 2))):
        places[f"{name}_batch"], places[f"{name}_head"], places[f"{name}_row"], _ = tensor.stride()
    of.call(
        kernel,
        q=q,
        k=k,
        v=v,
        out=out,
        batch=batch,
        heads=heads,
        queries=queries,
        keys=k.shape[2],
        size=size,
        scale=size**-0.5,
        **places,
    )
    return out.flatten(2)
