"""Fast classes for the networks' leaf modules, with the same names, weights and arguments.

A layer packs its weights at its first use, and releases the loaded ones. Feature maps are
channels-last in memory, so that a map's positions are tokens without a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.fast import int8, kernels, memory, onednn, split, strips, tiles, vectors, winograd
from safelight.fast.quantised import Quantised
from safelight.fast.store import ARENA, Shelf, Store
from safelight.nets import layers, tokens
from safelight.nets.layers import as_map, as_tokens, attend
from safelight.progress import get_on

LARGE = 1 << 22
"""Numbers from which a weight is large: low_memory keeps it in a file, and packing frees memory."""

HUGE = 1 << 24
"""Numbers in a map that is too large for the memory that smaller ones freed."""

PART = 2048
"""Tokens in a part, when a feed-forward has at least twice as many; half of that with AMX."""


def _count(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _weight(layer: Any) -> Tensor:
    """Return a layer's weight in its precision, to be packed.

    The layer keeps the loaded weight until it has the packed one: if packing is interrupted or runs
    out of memory, the next use tries it again.
    """
    loaded: Tensor = layer.weight
    weight = loaded.to(layer.precision)
    if weight is not loaded:
        memory.page_out(loaded)
    if weight.numel() >= LARGE:
        memory.give_back()  # that of the layer before, which is packed by now
    return weight


def _packed(weight: Tensor, pack: Callable[[Tensor], Any], store: Store = ARENA) -> Any:
    """Return the packed weight: packed now, or at each use where it is kept unpacked."""
    if store is ARENA and onednn.takes(weight.dtype):
        return pack(weight)
    return onednn.Held(store.keep(weight), weight.dtype, pack)


def _store(layer: Any, numbers: int) -> Store:
    """Return where to keep a layer's weight of so many numbers."""
    return ARENA if layer.shelf is None or numbers < LARGE else layer.shelf


def _matrix(layer: Any, weight: Tensor, bias: Tensor | None) -> Any:
    """Return an object that multiplies tokens by a layer's weight [out, in]."""
    # Weights of our float32 kernels are packed once, and stay in memory.
    store = ARENA if split.available(layer.precision) else _store(layer, weight.numel())
    plain = _packed(weight, lambda w: split.matrix(w, bias), store)
    return int8.Either(plain, bias, store) if int8.fits(weight) else plain


def _make_room(x: Tensor) -> None:
    """Choose where the memory for the result of a convolution of this map comes from.

    Up to HUGE numbers it is freed memory. The last four maps of a tiny decoder at 512×512 have as
    many, and took a quarter of its time when each came from the operating system. Memory for larger
    maps comes from the operating system, after freed memory is given back: they would seldom fit
    into freed memory, and a picture would take more memory.
    """
    large = x.numel() > HUGE
    memory.map_large(large)
    if large:
        memory.give_back()


def _decoding(layer: Any, tokens: bool) -> onednn.Held | int8.Each:
    """Return an object that decodes a layer's codes at each use, and multiplies by the weight.

    Its results are those of the packed weight, to the byte. tokens: it multiplies tokens.
    """
    codes: Quantised = layer.weight
    precision, bias = layer.precision, layer.bias

    def fetch() -> Tensor:
        memory.map_large(False)  # the operating system would provide new pages for each weight
        return codes.to(precision)

    pack = split.matrix if tokens else onednn.Matrix
    plain = onednn.Held(fetch, precision, lambda weight: pack(weight, bias))
    either = tokens and int8.fits_shape(codes.shape, precision, codes.codes.device)
    return int8.Each(plain, bias) if either else plain


class FastLinear(layers.Linear):
    """A linear layer. shelf: where its weight is kept if it is large; None: in memory."""

    weight: Any  # None once it is packed, a Quantised if it stays as codes
    precision: torch.dtype
    shelf: Shelf | None = None
    _product: Any = None

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        if self._product is None:
            if isinstance(self.weight, Quantised):
                self._product = _decoding(self, tokens=x.dim() > 2)
            elif x.dim() > 2:
                self._product = _matrix(self, _weight(self), self.bias)
            else:  # no tokens: a timestep embedding has one row per picture
                store, weight = _store(self, self.weight.numel()), _weight(self)
                self._product = _packed(weight, lambda w: onednn.Matrix(w, self.bias), store)
            self.weight = None
        return self._product(x, plus)


class FastConv2d(layers.Conv2d):
    """A convolution. shelf: where its weight is kept if it is large; None: in memory."""

    weight: Any  # None once it is packed
    precision: torch.dtype
    shelf: Shelf | None = None
    _product: Any = None

    def forward(
        self,
        x: Any,
        plus: Tensor | None = None,
        shift: Tensor | None = None,
        consume: bool = False,
        relu: bool = False,
    ) -> Tensor:
        """x: a map, a strips.Normed, or a tiles.Map if the layer reads those."""
        normed = isinstance(x, strips.Normed)
        if normed or isinstance(x, Tensor):
            _make_room(x.x if normed else x)
        if self._product is None:
            self._product = self._pack()
            self.weight = None
        if normed:
            return strips.convolve(self._product, x, self.out_channels, plus, shift, consume, relu)
        return self._product(x, plus, shift, consume, relu)

    def _pack(self) -> Any:
        store = _store(self, self.weight.numel())
        if tiles.fits_conv(self, self.precision):
            return tiles.Convolution(_weight(self), self, store)
        if winograd.fits_conv(self, self.precision):
            return _packed(_weight(self), lambda w: winograd.Convolution(w, self), store)
        return _packed(_weight(self), lambda w: onednn.Convolution(w, self), store)

    def reads_maps(self) -> bool:
        """Return whether it takes a tiles.Map, which norms as it is laid out."""
        return isinstance(self._product, tiles.Convolution) or (
            self._product is None and tiles.fits_conv(self, self.precision)
        )


class FastPointwise(layers.Pointwise):
    weight: Any  # None once it is packed
    precision: torch.dtype
    shelf: Shelf | None = None
    _product: Any = None

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return as_map(self.tokens(as_tokens(x)), x)

    def tokens(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        if self._product is None:
            self._product = _matrix(self, _weight(self).flatten(1), self.bias)
            self.weight = None
        return self._product(x, plus)


class FastEnlargingConv2d(layers.EnlargingConv2d):
    """Upsampling and a convolution. The loaded weight stays, for rare sides that do not double."""

    precision: torch.dtype
    shelf: Shelf | None = None
    _product: Any = None

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if size is not None and size != (2 * x.shape[-2], 2 * x.shape[-1]):
            return self._plain(F.interpolate(x, size=size, mode="nearest"))
        _make_room(x)
        if self._product is None:
            self._product = self._pack(self.weight.to(self.precision))
            memory.page_out(self.weight)
        return self._product(x)

    def _plain(self, x: Tensor) -> Tensor:
        dtype = onednn.computes(self.precision)
        bias = None if self.bias is None else self.bias.to(dtype)
        weight = self.weight.to(self.precision).to(dtype)
        return F.conv2d(x.to(dtype), weight, bias, padding=1).to(self.precision)

    def _pack(self, weight: Tensor) -> Any:
        store = _store(self, weight.numel())
        if winograd.fits_conv(self, self.precision):
            return _packed(weight, lambda w: winograd.Convolution(w, self, scale=2), store)
        if tiles.fits_conv(self, self.precision):
            return tiles.Doubling(weight, self, store)
        return _packed(weight, lambda w: onednn.Doubling(w, self), store)


def _affine(norm: FastGroupNorm | FastLayerNorm) -> tuple[Tensor, Tensor]:
    """Return a norm's weight and bias in float32, as the kernels read them; converted once."""
    if norm._float is None:
        norm._float = norm.weight.float(), norm.bias.float()
    return norm._float


class FastGroupNorm(layers.GroupNorm):
    _float: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if vectors.fits_norm(self, x):
            return vectors.group_norm(self, x, *_affine(self))
        return super().forward(x)

    def silu(self, x: Tensor, conv: nn.Conv2d) -> Any:
        ours = vectors.fits_norm(self, x)
        if isinstance(conv, FastConv2d):
            if ours and conv.reads_maps():
                return tiles.Map(x, vectors.moments(self, x, *_affine(self)))
            if x.numel() >= HUGE and kernels.plain_3x3(conv, 1):
                found = vectors.moments(self, x, *_affine(self)) if ours else None
                return strips.Normed(x, strips.moments(self, x) if found is None else found)
        if ours:
            return vectors.group_norm(self, x, *_affine(self), silu=True)
        return F.silu(self(x), inplace=True)


class FastLayerNorm(layers.LayerNorm):
    _float: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if vectors.fits_layer_norm(self, x):
            return vectors.layer_norm(self, x, *_affine(self))[1]
        return super().forward(x)

    def add(self, x: Tensor, plus: Tensor) -> tuple[Tensor, Tensor]:
        if vectors.fits_layer_norm(self, x):
            return vectors.layer_norm(self, x, *_affine(self), plus)
        total = x.add_(plus)
        return total, super().forward(total)


class FastGEGLU(layers.GEGLU):
    proj: Any
    _halves: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self._halves is None:
            # Two products, as one of twice the width would not stay in the cache.
            self._halves = [
                _matrix(self.proj, w.clone(), b)
                for w, b in zip(_weight(self.proj).chunk(2), self.proj.bias.chunk(2), strict=True)
            ]
            self.proj.weight = None
        value, gate = (half(x) for half in self._halves)
        if vectors.fits_gate(value):
            return vectors.gate(value, gate)
        return F.gelu(gate).mul_(value)


class FastFeedForward(layers.FeedForward):
    """Computes many tokens in parts, so that values between the products stay in the cache."""

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        count = _count(x)
        if count < 2 * PART:
            return super().forward(x, plus)
        amx = x.dtype == torch.bfloat16 and kernels.tiles() is not None
        part = PART // 2 if amx else PART
        out = torch.empty_like(x)
        # In three dimensions, as FastLinear takes a tensor of two for one without tokens.
        for i in range(0, count, part):
            get_on()
            here = slice(i, i + part)
            more = None if plus is None else plus.flatten(0, -2)[None, here]
            out.flatten(0, -2)[None, here] = super().forward(x.flatten(0, -2)[None, here], more)
        return out


class FastHeads(layers.Attention):
    """Self-attention gets queries, keys and values from one product. Cross-attention keeps a text's
    keys and values as long as the text is the same tensor.
    """

    to_q: Any
    to_k: Any
    to_v: Any
    _own: Any = None
    _text: tuple[Tensor, Tensor, Tensor] | None = None

    def project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if context is None:
            if self._own is None:
                self._own = self._pack()
                self.to_q.weight = self.to_k.weight = self.to_v.weight = None
            q, k, v = (self.split_heads(t) for t in self._own(x).chunk(3, dim=-1))
            return q, k, v
        if self._text is None or self._text[0] is not context:
            with int8.asked(False):  # they are kept for calls with int8 and without
                k, v = (self.split_heads(to(context)) for to in (self.to_k, self.to_v))
            self._text = (context, k, v)
        return self.split_heads(self.to_q(x)), *self._text[1:]

    def _pack(self) -> Any:
        parts = (self.to_q, self.to_k, self.to_v)
        bias = None if self.to_q.bias is None else torch.cat([part.bias for part in parts])
        weight = torch.cat([_weight(part) for part in parts])
        return _matrix(self.to_q, weight, bias)

    def product(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(q, k, v)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the product of attention with the heads side by side, [batch, length, heads·d]."""
    dtype = q.dtype if vectors.available(q.dtype) else onednn.computes(q.dtype)
    qkv = [t.to(dtype) for t in (q, k, v)]
    for ours in (split, vectors):
        if ours.available(dtype):
            return ours.attend(*qkv).to(q.dtype)
    return attend(*qkv).to(q.dtype).transpose(1, 2).flatten(2)


class FastProduct(tokens.Product):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(q, k, v)


class FastAttention(FastHeads, layers.Attention):
    pass


class FastSpatialAttention(FastHeads, layers.SpatialAttention):
    pass


class MappedLinear(layers.Linear):
    """For a network that runs once per prompt: packing would take longer, and more memory."""

    precision: torch.dtype
    mapped = True

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        dtype = onednn.computes(self.precision)
        bias = None if self.bias is None else self.bias.to(dtype)
        weight = self.weight.to(self.precision).to(dtype)
        out = F.linear(x.to(dtype), weight, bias).to(self.precision)
        if self.mapped:
            loaded: Any = self.weight
            memory.page_out(loaded.codes if isinstance(loaded, Quantised) else loaded)
        return out if plus is None else plus + out


class MappedEmbedding(nn.Embedding):
    precision: torch.dtype

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        weight: Tensor | Quantised = self.weight
        if isinstance(weight, Quantised):
            return weight.rows(ids).to(self.precision)
        return super().forward(ids).to(self.precision)
