"""The networks' layers, with another `forward`: the same names, the same weights.

A layer packs its weights at its first use, and lets go of those that were loaded. Maps are
channels-last in memory, so that a map's positions are tokens with no copy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.fast import memory, onednn, split, tiles, winograd
from safelight.fast.store import ARENA, Shelf, Store
from safelight.nets.layers import (
    Attention,
    BasicTransformerBlock,
    FeedForward,
    ResnetBlock2D,
    SpatialAttention,
    Transformer2DModel,
    Upsample2D,
    attend,
    rows,
)

LARGE = 1 << 22
"""Numbers in a weight whose memory is worth giving back at once."""

HUGE = 1 << 24
"""Numbers in a map that does not fit where smaller ones were."""

PART = 1024
"""Tokens that pass a feed-forward at once, if there are many times as many."""


def _count(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _take(layer: Any, precision: torch.dtype) -> Tensor:
    """A layer's weight in this precision, to be packed; the layer lets go of the one it loaded."""
    loaded: Tensor = layer.weight
    layer.weight = None
    weight = loaded.to(precision)
    if weight is not loaded:
        memory.page_out(loaded)
    if weight.numel() >= LARGE:
        memory.give_back()  # of the layer before, by now packed
    return weight


def _store(conv: Any) -> Store:
    return conv.shelf if conv.shelf is not None and conv.weight.numel() >= LARGE else ARENA


def _make_room(x: Tensor) -> None:
    """Give back the memory of maps that are done with: such as the decoder's last find no other."""
    if x.numel() >= HUGE:
        memory.give_back()


class FastLinear(nn.Linear):
    precision: torch.dtype
    _packed: Any = None

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """plus: added to the result."""
        if self._packed is None:
            # What has no tokens, the time's embedding, has but a row for each picture.
            pack = split.matrix if x.dim() > 2 else onednn.Matrix
            self._packed = pack(_take(self, self.precision), self.bias, _count(x))
        return self._packed(x, plus)


class FastConv2d(nn.Conv2d):
    """shelf: where large weights are kept, if not in memory."""

    precision: torch.dtype
    shelf: Shelf | None = None
    _packed: Any = None

    def forward(  # type: ignore[override]
        self,
        x: Any,
        plus: Tensor | None = None,
        shift: Tensor | None = None,
        consume: bool = False,
    ) -> Tensor:
        """plus: added to the result, which with `consume` may take its memory; shift: [1 or batch,
        out_channels], added, too.
        """
        if self._packed is None:
            self._packed = self._pack(x.shape)
        return self._packed(x, plus, shift, consume)

    def _pack(self, shape: torch.Size) -> Any:
        store = _store(self)
        if tiles.fits_conv(self, self.precision):
            return tiles.Convolution(_take(self, self.precision), self, shape, store)
        if store is not ARENA:
            return onednn.Unpacked(self)
        if winograd.fits_conv(self, self.precision):
            return winograd.Convolution(_take(self, self.precision), self, shape)
        return onednn.Convolution(_take(self, self.precision), self, shape)

    def reads_maps(self) -> bool:
        """Whether it takes a tiles.Map, normed on the way."""
        return isinstance(self._packed, tiles.Convolution) or (
            self._packed is None and tiles.fits_conv(self, self.precision)
        )


class FastPointwise(nn.Conv2d):
    """A 1×1 convolution is a product of the tokens."""

    precision: torch.dtype
    _packed: Any = None

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return _map(self.tokens(_tokens(x)), x)

    def tokens(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        if self._packed is None:
            weight = _take(self, self.precision).flatten(1)
            self._packed = split.matrix(weight, self.bias, _count(x))
        return self._packed(x, plus)


def _affine(norm: FastGroupNorm | FastLayerNorm) -> tuple[Tensor, Tensor]:
    """A norm's weight and bias in float32, as the kernels read them, made once."""
    if norm._float is None:
        norm._float = norm.weight.float(), norm.bias.float()
    return norm._float


class FastGroupNorm(nn.GroupNorm):
    _float: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if tiles.fits_norm(self, x):
            return tiles.group_norm(self, x, *_affine(self))
        return super().forward(x)

    def silu(self, x: Tensor, conv: FastConv2d) -> Any:
        """Norm and SiLU, as `conv` wants to read it."""
        if conv.reads_maps() and tiles.fits_norm(self, x):
            return tiles.group_norm_silu(self, x, *_affine(self))
        return F.silu(self(x), inplace=True)


class FastResnetBlock2D(ResnetBlock2D):
    """What comes after a convolution is added by it."""

    norm1: Any
    norm2: Any
    conv1: Any
    conv2: Any

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        _make_room(x)
        shift = None
        if self.time_emb_proj is not None and temb is not None:
            shift = self.time_emb_proj(F.silu(temb))
            shift = shift if len(shift) == 1 else rows(shift, len(x))
        h = self.conv1(self.norm1.silu(x, self.conv1), shift=shift)
        if self.conv_shortcut is None:
            return self.conv2(self.norm2.silu(h, self.conv2), plus=x, consume=self.consumes)
        short = self.conv_shortcut(x)
        return self.conv2(self.norm2.silu(h, self.conv2), plus=short, consume=True)


class FastUpsample2D(Upsample2D):
    """Keeps the weight as it was loaded, too, for sides that are not doubled."""

    precision: torch.dtype
    _packed: Any = None

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        weight, bias = self.conv.weight, self.conv.bias
        if size is not None and size != (2 * x.shape[-2], 2 * x.shape[-1]):
            large = F.interpolate(x, size=size, mode="nearest")
            return F.conv2d(large, weight.to(self.precision), bias, padding=1)
        _make_room(x)
        if self._packed is None:
            self._packed = self._pack(weight.to(self.precision), x.shape)
            memory.page_out(weight)
        return self._packed(x)

    def _pack(self, weight: Tensor, shape: torch.Size) -> Any:
        store = _store(self.conv)
        if tiles.fits_conv(self.conv, self.precision):
            return tiles.Doubling(weight, self.conv, shape, store)
        if store is ARENA and winograd.fits_conv(self.conv, self.precision):
            return winograd.Convolution(weight, self.conv, shape, scale=2)
        return onednn.Doubling(weight, self.conv, shape)


class FastAttention(Attention):
    """Queries, keys and values of a map's own positions come from one product; the keys and values
    of a text are kept for as long as the text is the same tensor.
    """

    to_q: Any
    to_k: Any
    to_v: Any
    to_out: Any
    _own: Any = None
    _text: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(
        self, x: Tensor, context: Tensor | None = None, plus: Tensor | None = None
    ) -> Tensor:
        if context is None:
            q, k, v = (self._heads(t) for t in self._project(x).chunk(3, dim=-1))
        else:
            if self._text is None or self._text[0] is not context:
                k, v = self._heads(self.to_k(context)), self._heads(self.to_v(context))
                self._text = (context, k, v)
            _, k, v = self._text
            q = self._heads(self.to_q(x))
        return self.to_out[0](_attended(q, k, v), plus)

    def _heads(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _project(self, x: Tensor) -> Tensor:
        if self._own is None:
            layers = (self.to_q, self.to_k, self.to_v)
            bias = None if self.to_q.bias is None else torch.cat([layer.bias for layer in layers])
            weight = torch.cat([_take(layer, layer.precision) for layer in layers])
            self._own = split.matrix(weight, bias, _count(x))
        return self._own(x)


class FastSpatialAttention(FastAttention):
    group_norm: nn.GroupNorm

    def forward(
        self, x: Tensor, context: Tensor | None = None, plus: Tensor | None = None
    ) -> Tensor:
        return _map(super().forward(_tokens(self.group_norm(x)), context, _tokens(x)), x)


def _attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All heads' values side by side: [batch, length, heads·d]."""
    for kernels in (tiles, split):
        if kernels.available(q.dtype):
            return kernels.attend(q, k, v)
    return attend(q, k, v).transpose(1, 2).flatten(2)


def _tokens(x: Tensor) -> Tensor:
    """A map as tokens [batch, h·w, channels]."""
    return x.flatten(2).transpose(1, 2)


def _map(tokens: Tensor, like: Tensor) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, like.shape[2:])


class FastFeedForward(FeedForward):
    """Of many tokens a part at a time, so that what is between the products stays in the cache."""

    net: Any
    _gated: Any = None

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        count = _count(x)
        if count < 4 * PART:
            return self._part(x, plus)
        out = torch.empty_like(x)
        for i in range(0, count, PART):
            here = slice(i, i + PART)
            more = None if plus is None else plus.flatten(0, -2)[here]
            out.flatten(0, -2)[here] = self._part(x.flatten(0, -2)[here], more)
        return out

    def _part(self, x: Tensor, plus: Tensor | None) -> Tensor:
        if self._gated is None:
            proj = self.net[0].proj
            halves = _take(proj, proj.precision).chunk(2), proj.bias.chunk(2)
            # Two products: one of twice the width would not stay in the cache.
            self._gated = [
                split.matrix(w.clone(), b, _count(x)) for w, b in zip(*halves, strict=True)
            ]
        value, gate = (half(x) for half in self._gated)
        if value.shape[-1] % 16 == 0:
            for kernels in (tiles, split):
                if kernels.available(x.dtype):
                    return self.net[2](kernels.gate(value, gate), plus)
        return self.net[2](F.gelu(gate).mul_(value), plus)


class FastLayerNorm(nn.LayerNorm):
    _float: tuple[Tensor, Tensor] | None = None

    def forward(  # type: ignore[override]
        self, x: Tensor, plus: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x, or with `plus` the sum of both, and its norm."""
        if tiles.fits_layer_norm(self, x):
            return tiles.layer_norm(self, x, *_affine(self), plus)
        total = x if plus is None else x.add_(plus)
        return total, super().forward(total)


class FastTransformerBlock(BasicTransformerBlock):
    """A block's norms also make the sums before them."""

    norm1: Any
    norm2: Any
    norm3: Any
    attn1: Any
    attn2: Any
    ff: Any

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        if self.only_cross:
            x = rows(x, len(context))
        _, normed = self.norm1(x)
        own = self.attn1(normed, context if self.only_cross else None)
        x, normed = (rows(t, len(context)) for t in self.norm2(own, plus=x))
        x, normed = self.norm3(self.attn2(normed, context), plus=x)
        return self.ff(normed, plus=x)


class FastTransformer2DModel(Transformer2DModel):
    """Both ways to project in and out are one product of the tokens."""

    proj_in: Any
    proj_out: Any

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = _tokens(self.norm(x))
        h = self.proj_in(h) if self.linear else self.proj_in.tokens(h)
        for block in self.transformer_blocks:
            h = block(h, context)
        x = rows(x, len(h))
        project = self.proj_out if self.linear else self.proj_out.tokens
        return _map(project(h, _tokens(x)), x)


class MappedLinear(nn.Linear):
    """For what runs once for a prompt: to pack it would take longer, and to hold it, memory."""

    precision: torch.dtype

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        out = F.linear(x, self.weight.to(self.precision), self.bias)
        memory.page_out(self.weight)
        return out


class MappedEmbedding(nn.Embedding):
    precision: torch.dtype

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(ids).to(self.precision)


_MAPPED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: MappedLinear,
    nn.Embedding: MappedEmbedding,
}
_FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FastLinear,
    nn.Conv2d: FastConv2d,
    nn.GroupNorm: FastGroupNorm,
    nn.LayerNorm: FastLayerNorm,
    ResnetBlock2D: FastResnetBlock2D,
    Upsample2D: FastUpsample2D,
    Attention: FastAttention,
    SpatialAttention: FastSpatialAttention,
    FeedForward: FastFeedForward,
    BasicTransformerBlock: FastTransformerBlock,
    Transformer2DModel: FastTransformer2DModel,
}


def swap(net: nn.Module, precision: torch.dtype, shelf: Shelf | None = None) -> None:
    """Give the layers of `net`, in place, their fast classes.

    Weights that will be packed stay as they were loaded until then, in whatever precision; all
    else is converted.
    """
    enlarging = {module.conv for module in net.modules() if isinstance(module, Upsample2D)}
    module: Any
    for module in net.modules():
        kind = type(module) if module in enlarging else _FAST.get(type(module), type(module))
        if kind is FastConv2d and module.kernel_size == (1, 1):
            kind = FastPointwise
        module.__class__ = kind
        if kind is FastConv2d or module in enlarging:
            module.shelf = shelf
        kinds = FastLinear | FastConv2d | FastPointwise | FastUpsample2D
        _settle(module, precision, waits=isinstance(module, kinds) or module in enlarging)


def leave_mapped(net: nn.Module, precision: torch.dtype) -> None:
    """Let the matrices of `net` stay in the mapped file, to be converted at each use."""
    for module in net.modules():
        module.__class__ = _MAPPED.get(type(module), type(module))
        _settle(module, precision, waits=isinstance(module, MappedLinear | MappedEmbedding))


def _settle(module: Any, precision: torch.dtype, waits: bool) -> None:
    """Convert a layer's parameters, save a weight that waits to be used."""
    if waits:
        module.precision = precision
    for name, parameter in module.named_parameters(recurse=False):
        if not (waits and name == "weight"):
            setattr(module, name, nn.Parameter(parameter.to(precision), requires_grad=False))
