"""oneDNN's products, on any CPU, with weights packed into the order in which it multiplies."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_mkldnn: Any = torch.ops.mkldnn

ROWS = 1024
"""The number of rows that all matrices are packed for. One packed for a single row multiplies a row
in another order than one packed for more, and a picture's last bits must not depend on what was
drawn first. It was no slower for any size that was measured."""

KEPT = 1 << 23
"""The most numbers in all kept copies of one convolution's weight, each packed in another order; a
large weight still has two copies. Nearly all maps of a picture need the same order."""

SHAPES_KEPT = 1 << 14
"""The most shapes, of all convolutions together, whose order is remembered."""

_ORDERS: dict[tuple[Any, ...], bytes] = {}
"""The order in which oneDNN multiplies a weight, by the weight's shape and dtype, padding, stride,
dilation, groups, the map's shape and the number of threads. Layers of the same size share it."""


def available() -> bool:
    """Return whether this PyTorch has oneDNN and its fused products."""
    return torch.backends.mkldnn.is_available() and hasattr(_mkldnn, "_linear_pointwise")


@cache
def takes(dtype: torch.dtype) -> bool:
    """Return whether oneDNN multiplies this dtype here. bfloat16 needs AVX512 or AVX-NE-CONVERT."""
    try:
        _mkldnn._reorder_linear_weight(torch.zeros(1, 1, dtype=dtype), 1)
    except RuntimeError:
        return False
    return True


def computes(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that weights of this dtype are multiplied in: itself, or float32."""
    return dtype if takes(dtype) else torch.float32


def _aligned(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return the bias in this dtype, at an address that is a multiple of 16.

    In a mapped file it may begin at any address. On a processor without AVX, one of oneDNN's
    convolutions with a sum crashes the process if the address is not a multiple of 16.
    """
    if bias is None:
        return None
    bias = bias.to(dtype)
    return bias.clone() if bias.data_ptr() % 16 else bias


class Matrix:
    """A weight [out, in] and its bias [out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.packed = _mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
        self.bias = _aligned(bias, weight.dtype)

    def __call__(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """Return [..., out] from x, [..., in]; plus, of the result's shape, is added."""
        if plus is None:
            return _mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "none")
        return _mkldnn._linear_pointwise.binary(x, plus, self.packed, self.bias, "add")

    def weight(self) -> Tensor:
        """Return the unpacked weight."""
        return self.packed.to_dense()


class Convolution:
    """A convolution's weight [out, in, side, side] and bias."""

    def __init__(self, weight: Tensor, conv: nn.Conv2d) -> None:
        """conv: has everything but the weight."""
        self.how = (conv.padding, conv.stride, conv.dilation, 1)
        self._size = (weight.shape, weight.dtype)
        self._weight: Tensor | None = weight.contiguous(memory_format=torch.channels_last)
        self._copies = max(2, KEPT // weight.numel())
        self._packed: dict[bytes, Tensor] = {}  # by order
        self.bias = _aligned(conv.bias, weight.dtype)

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
        """Return the convolution of x, [batch, in, h, w].

        shift: [1 or batch, out], added to the bias. plus: added; with `consume` the result takes
        its memory. relu: applied to the sum. tall: x includes the padding rows above and below.
        """
        bias, (padding, *how) = self.bias, self.how
        padding = (0, padding[1]) if tall else padding
        fused = relu and (shift is None or len(shift) == 1)
        if shift is not None and len(shift) == 1:
            bias = _aligned(shift[0], x.dtype) if bias is None else bias + shift[0]
            shift = None
        x = x.contiguous(memory_format=torch.channels_last)
        packed = self._packed_for(x.shape, (padding, *how))
        if plus is None:
            out = _mkldnn._convolution_pointwise(
                x, packed, bias, padding, *how, "relu" if fused else "none", [], ""
            )
        else:
            plus = plus.contiguous(memory_format=torch.channels_last)
            add = _mkldnn._convolution_pointwise_ if consume else _mkldnn._convolution_pointwise
            pair = (plus, x) if consume else (x, plus)
            out = add.binary(
                *pair,
                packed,
                bias,
                padding,
                *how,
                "add",
                1.0,
                "relu" if fused else None,
                [],
                None,
            )
        if shift is not None:
            out = out.add_(shift[:, :, None, None])
        return F.relu(out, inplace=True) if relu and not fused else out

    def _packed_for(self, shape: torch.Size, how: tuple[Any, ...]) -> Tensor:
        """Return the weight in the order that oneDNN multiplies it in for maps of this shape.

        how: padding, stride, dilation, groups.

        From another order oneDNN would reorder it at each call, a number at a time: for a small map
        that takes hundreds of times as long as the products.
        """
        known = (*self._size, *how, shape, torch.get_num_threads())
        packed = self._packed.get(_ORDERS.get(known, b""))
        if packed is not None:
            return packed
        weight = self._weight
        if weight is None:
            dense = next(iter(self._packed.values())).to_dense()
            # Packing from channels-last is ten times as fast as from any other dense order.
            weight = dense.contiguous(memory_format=torch.channels_last)
        packed = _mkldnn._reorder_convolution_weight(weight, *how, shape)
        order = _mkldnn._get_mkldnn_serialized_md(packed).numpy().tobytes()
        if len(_ORDERS) == SHAPES_KEPT:
            _ORDERS.clear()
        _ORDERS[known] = order
        if order not in self._packed and len(self._packed) == self._copies:
            del self._packed[next(iter(self._packed))]
        packed = self._packed.setdefault(order, packed)
        self._weight = None
        return packed


class Doubling:
    """Nearest-neighbour upsampling by 2 and a 3×3 convolution, as four 2×2 ones of the small map.

    Of the nine products around a pixel of the upsampled map, several read the same pixel of the
    small one: their weights are summed.
    """

    def __init__(self, weight: Tensor, conv: nn.Conv2d) -> None:
        self.out_channels = conv.out_channels
        self.parts = [[Convolution(part, conv) for part in row] for row in quarters(weight)]

    def __call__(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        out = x.new_empty(batch, height, 2, width, 2, self.out_channels)
        for down in (0, 1):
            for right in (0, 1):
                # Padded by one, a 2×2 convolution gives one row and column too many.
                part = self.parts[down][right](x).permute(0, 2, 3, 1)
                out[:, :, down, :, right] = part[:, down : down + height, right : right + width]
        return out.view(batch, 2 * height, 2 * width, -1).permute(0, 3, 1, 2)


def quarters(weight: Tensor) -> list[list[Tensor]]:
    """Return the four 2×2 weights of a 3×3 weight: for [even, odd] rows, [even, odd] columns."""

    def halves(w: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        first, middle, last = w.unbind(dim)
        return torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)

    return [
        [part.to(weight.dtype) for part in halves(half, 3)] for half in halves(weight.float(), 2)
    ]


class Held:
    """Weights that are packed at each use.

    They are in a file, or in a dtype that oneDNN does not multiply here; in that case they are
    multiplied in float32. Results have the dtype of the weights.

    fetch: returns the weights. pack: makes one of the classes above from them.
    """

    def __init__(
        self, fetch: Callable[[], Tensor], dtype: torch.dtype, pack: Callable[[Tensor], Any]
    ) -> None:
        self._fetch, self._dtype, self._pack = fetch, dtype, pack
        self._computed = computes(dtype)

    def __call__(self, *inputs: Any, **how: Any) -> Tensor:
        """Return the result of the object that `pack` makes, for these arguments."""
        layer = self._pack(self._fetch().to(self._computed))
        cast = [x.to(self._computed) if isinstance(x, Tensor) else x for x in inputs]
        return layer(*cast, **how).to(self._dtype)

    def weight(self) -> Tensor:
        """Return the weight; it is valid until another one is fetched."""
        return self._fetch()
