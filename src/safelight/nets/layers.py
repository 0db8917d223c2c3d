"""The layers that the networks share.

Names are the keys of diffusers folders (`to_out.0`, `ff.net.2`, ...), so a state dict loads
without renaming. Pictures and latents are [batch, channels, height, width]; token sequences are
[batch, length, width].

`safelight.fast` replaces leaf modules: linear layers, convolutions, norms, GEGLU, upsampling and
the product of attention. A leaf takes the addition that follows it (`plus`, `shift`) as an
argument, so that a faster leaf can do both at once, and no block has to be written twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.nets.image_prompt import ImagePrompt, Seen
from safelight.nets.reuse import Reuse


def quick_gelu(x: Tensor) -> Tensor:
    """Return x·sigmoid(1.702·x), the approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
    "silu": F.silu,
    "swish": F.silu,
}


def timestep_embedding(timestep: Tensor, dim: int, flip: bool, freq_shift: float) -> Tensor:
    """Return sines and cosines of timesteps at `dim`/2 frequencies (arXiv:1706.03762, section 3.5).

    timestep: [batch], may be fractional. Returns float32 [batch, dim]: sines first, or cosines
    first where `flip` is set.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timestep.device)
    frequency = torch.exp(-math.log(10000) * exponent / (half - freq_shift))
    angle = timestep.float()[:, None] * frequency[None]
    parts = (angle.cos(), angle.sin()) if flip else (angle.sin(), angle.cos())
    embedding = torch.cat(parts, dim=-1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


def rows(x: Tensor, n: int) -> Tensor:
    """Return `x` with each of its rows repeated next to itself, n rows in all.

    The evaluations of guidance are equal until the first cross-attention. Until then they are one
    row, and cost as much as one.
    """
    if len(x) == n:
        return x
    # Unlike repeat_interleave, this keeps the memory format of a feature map.
    return torch.cat([row for row in x.split(1) for _ in range(n // len(x))])


def as_tokens(x: Tensor) -> Tensor:
    """Return a feature map [batch, channels, h, w] as tokens [batch, h·w, channels]."""
    return x.flatten(2).transpose(1, 2)


def as_map(tokens: Tensor, like: Tensor) -> Tensor:
    """Return tokens [batch, h·w, channels] as a feature map of the height and width of `like`."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[2:])


class Linear(nn.Linear):
    """A linear layer that can add `plus`, of its result's shape, to the result."""

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:  # type: ignore[override]
        out = super().forward(x)
        return out if plus is None else plus + out

    def tokens(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """Return the same as `forward`; `Pointwise` has this method too."""
        return self(x, plus)


class Conv2d(nn.Conv2d):
    """A convolution that can add to its result, and end in a ReLU.

    shift: [1 or batch, out_channels]; plus: of the result's shape. consume: `plus` is not read
    afterwards, so the result may use its memory. relu: applied to the whole sum.
    """

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        plus: Tensor | None = None,
        shift: Tensor | None = None,
        consume: bool = False,
        relu: bool = False,
    ) -> Tensor:
        out = super().forward(x)
        if shift is not None:
            out = out + shift[:, :, None, None]
        out = out if plus is None else out + plus
        return F.relu(out) if relu else out


class Pointwise(nn.Conv2d):
    """A 1×1 convolution, which is a linear layer applied to each position."""

    def __init__(self, in_ch: int, out_ch: int) -> None:
        super().__init__(in_ch, out_ch, 1)

    def tokens(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """Return [batch, h·w, out_ch] from x, [batch, h·w, in_ch]; plus is added to the result."""
        out = F.linear(x, self.weight.flatten(1), self.bias)
        return out if plus is None else plus + out


class GroupNorm(nn.GroupNorm):
    """A group norm that can be followed by SiLU and a convolution."""

    def silu(self, x: Tensor, conv: nn.Conv2d) -> Any:
        """Return silu(norm(x)) in a form that `conv`, its only reader, takes."""
        return F.silu(self(x))


class LayerNorm(nn.LayerNorm):
    """A layer norm that can add before it norms."""

    def add(self, x: Tensor, plus: Tensor) -> tuple[Tensor, Tensor]:
        """Return plus + x, and the norm of that sum. x is not read afterwards."""
        total = plus + x
        return total, self(total)


class TimestepEmbedding(nn.Module):
    """Two linear layers from a timestep's sines to the embedding that the resnets add."""

    def __init__(self, in_dim: int, dim: int, cond_dim: int | None = None, bias: bool = True):
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim, bias=bias)
        # Guidance-distilled networks (LCM) read the guidance scale here.
        self.cond_proj = None if cond_dim is None else nn.Linear(cond_dim, in_dim, bias=False)
        self.linear_2 = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        if self.cond_proj is not None and cond is not None:
            x = x + self.cond_proj(cond)
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock2D(nn.Module):
    """Norm, SiLU and convolution, twice, with a shortcut; the timestep is added in the middle.

    consumes: the input is not read afterwards, so the output may use its memory.
    """

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        *,
        temb: int | None,
        groups: int,
        eps: float,
        consumes: bool = False,
    ) -> None:
        super().__init__()
        self.consumes = consumes
        self.norm1 = GroupNorm(groups, in_ch, eps=eps)
        self.conv1 = Conv2d(in_ch, out_ch, 3, padding=1)
        self.time_emb_proj = None if temb is None else nn.Linear(temb, out_ch)
        self.norm2 = GroupNorm(groups, out_ch, eps=eps)
        self.conv2 = Conv2d(out_ch, out_ch, 3, padding=1)
        self.conv_shortcut = None if in_ch == out_ch else Pointwise(in_ch, out_ch)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        shift = None
        if self.time_emb_proj is not None and temb is not None:
            shift = self.time_emb_proj(F.silu(temb))
            shift = shift if len(shift) == 1 else rows(shift, len(x))
        h = self.conv1(self.norm1.silu(x, self.conv1), shift=shift)
        if self.conv_shortcut is None:
            return self.conv2(self.norm2.silu(h, self.conv2), plus=x, consume=self.consumes)
        short = self.conv_shortcut(x)
        return self.conv2(self.norm2.silu(h, self.conv2), plus=short, consume=True)


class Downsample2D(nn.Module):
    """A strided convolution that halves height and width.

    padding 0 pads a row at the bottom and a column at the right, as the autoencoder was trained.
    """

    def __init__(self, channels: int, padding: int = 1) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.padding == 0 else x)


class EnlargingConv2d(nn.Conv2d):
    """Nearest-neighbour upsampling, then a 3×3 convolution with padding 1.

    size: height and width of the result; by default twice those of the input.
    """

    def __init__(self, in_ch: int, out_ch: int, bias: bool = True) -> None:
        super().__init__(in_ch, out_ch, 3, padding=1, bias=bias)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:  # type: ignore[override]
        size = size or (2 * x.shape[-2], 2 * x.shape[-1])
        return super().forward(F.interpolate(x, size=size, mode="nearest"))


class Upsample2D(nn.Module):
    """Upsampling to `size`, the skip connection's size: for odd sides it is not the double."""

    def __init__(self, channels: int, out: int | None = None) -> None:
        super().__init__()
        self.conv = EnlargingConv2d(channels, out or channels)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        return self.conv(x, size)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q·kᵀ/√d)·v (arXiv:1706.03762). q, k, v: [batch, heads, length, d]."""
    if q.device.type == "cpu" and q.shape[-2] * k.shape[-2] <= 2**18:
        # torch's fused CPU kernel is several times slower than two products at these lengths.
        return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head attention of `x` to `context`, or to itself if there is none."""

    def __init__(
        self, dim: int, heads: int, *, context: int | None = None, qkv_bias: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=qkv_bias)
        self.to_k = nn.Linear(context or dim, dim, bias=qkv_bias)
        self.to_v = nn.Linear(context or dim, dim, bias=qkv_bias)
        self.to_out = nn.ModuleList([Linear(dim, dim)])

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        plus: Tensor | None = None,
        seen: Seen | None = None,
    ) -> Tensor:
        """Return [batch, length, dim]. plus: of the shape of x, added to the result. seen:
        pictures that x attends to beside the context (arXiv:2308.06721)."""
        q, k, v = self.project(x, context)
        out = self.product(q, k, v)
        if seen is not None:
            pair = map(self.split_heads, (seen.keys, seen.values))
            out = out + seen.scale * self.product(q, *pair)
        return self.to_out[0](out, plus)

    def project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries of x, keys and values of the context, each [batch, heads, length, d]."""
        context = x if context is None else context
        return (
            self.split_heads(self.to_q(x)),
            self.split_heads(self.to_k(context)),
            self.split_heads(self.to_v(context)),
        )

    def product(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the result of `attend` with the heads side by side: [batch, length, heads·d]."""
        return attend(q, k, v).transpose(1, 2).flatten(2)

    def split_heads(self, t: Tensor) -> Tensor:
        """Return [batch, heads, length, d] of t, [batch, length, heads·d]."""
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class SpatialAttention(Attention):
    """Self-attention over the positions of a feature map, with norm and shortcut."""

    def __init__(self, channels: int, heads: int, *, groups: int, eps: float) -> None:
        super().__init__(channels, heads, qkv_bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=eps)

    def forward(  # type: ignore[override]
        self, x: Tensor, context: Tensor | None = None, plus: Tensor | None = None
    ) -> Tensor:
        tokens = as_tokens(self.group_norm(x))
        return as_map(super().forward(tokens, context, as_tokens(x)), x)


class GEGLU(nn.Module):
    """A linear layer; GELU of one half of its outputs gates the other (arXiv:2002.05202)."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width, and a linear layer back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # Index 1 is dropout in checkpoints; it has no weights and does nothing here.
        self.net = nn.ModuleList([GEGLU(dim, 4 * dim), nn.Identity(), Linear(4 * dim, dim)])

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """Return [batch, length, dim]. plus: of the shape of x, added to the result."""
        return self.net[2](self.net[0](x), plus)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each with a norm and a shortcut."""

    place = 0  # of its cross-attention, see `UNetConfig.cross_attentions`

    def __init__(self, dim: int, heads: int, context: int, *, only_cross: bool = False) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn1 = Attention(dim, heads, context=context if only_cross else None)
        self.norm2 = LayerNorm(dim)
        self.attn2 = Attention(dim, heads, context=context)
        self.norm3 = LayerNorm(dim)
        self.ff = FeedForward(dim)
        self.only_cross = only_cross

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        reuse: Reuse | None = None,
        image: ImagePrompt | None = None,
    ) -> Tensor:
        if self.only_cross:
            x = rows(x, len(context))
        own = self.attn1(self.norm1(x), context if self.only_cross else None)
        x, normed = (rows(t, len(context)) for t in self.norm2.add(own, x))
        seen = None if image is None else image.at(self.place)
        if reuse is None:
            told = self.attn2(normed, context, seen=seen)
        else:
            told = reuse.text(self, lambda: self.attn2(normed, context, seen=seen))
        x, normed = self.norm3.add(told, x)
        return self.ff(normed, x)


class Transformer2DModel(nn.Module):
    """Transformer blocks over the positions of a feature map.

    SD 1.x projects in and out by 1×1 convolutions, SD 2.x by linear layers: the arithmetic is the
    same, only the shapes of the weights differ.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        context: int,
        *,
        depth: int,
        linear: bool,
        groups: int,
        only_cross: bool = False,
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        make = Linear if linear else Pointwise
        self.proj_in = make(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, heads, context, only_cross=only_cross)
            for _ in range(depth)
        )
        self.proj_out = make(channels, channels)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        reuse: Reuse | None = None,
        image: ImagePrompt | None = None,
    ) -> Tensor:
        h = self.proj_in.tokens(as_tokens(self.norm(x)))
        for block in self.transformer_blocks:
            h = block(h, context, reuse, image)
        x = rows(x, len(h))
        return as_map(self.proj_out.tokens(h, as_tokens(x)), x)
