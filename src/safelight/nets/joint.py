"""What Stable Diffusion 3, FLUX.1 and FLUX.2 share: joint attention of picture and text.

Picture and text have weights of their own, and attend to both together (arXiv:2403.03206, section
4). Tokens are [batch, length, width]. `temb` is the embedding of the timestep and the pooled text,
[batch, width], after SiLU. The text comes first where both are in one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.nets.layers import Linear, TimestepEmbedding, timestep_embedding
from safelight.nets.tokens import Product, RMSNorm, rotate_pairs, split_heads

EPS = 1e-6
"""The epsilon of all norms of these networks."""

TIME_CHANNELS = 256
"""The number of sines and cosines of a timestep. No config holds it."""

_GUIDANCE_SCALE = 1000
_FLOAT16_MAX = torch.finfo(torch.float16).max


def check_sides(x: Tensor, patch: int) -> None:
    """Raise SafelightError unless height and width of x are multiples of a patch's side."""
    h, w = x.shape[-2:]
    if h % patch or w % patch:
        raise SafelightError(
            f"latents of {w}×{h} do not divide into patches of {patch}×{patch}: "
            f"both sides should be multiples of {patch}"
        )


def sizes_of(pictures: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    """Return height and width of each picture's tokens, which are maps [batch, channels, h, w]."""
    return tuple((one.shape[-2], one.shape[-1]) for one in pictures)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return norm(x)·(1 + scale) + shift; the norm has no weights. shift, scale: [batch, 1, d]."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)


def bounded(x: Tensor) -> Tensor:
    """Return x with float16's infinities as its largest numbers: FLUX.1 overflows float16."""
    return x.clamp(-_FLOAT16_MAX, _FLOAT16_MAX) if x.dtype == torch.float16 else x


class Modulation(nn.Module):
    """A linear layer from `temb` to the numbers that shift, scale and gate a block.

    This is adaLN-Zero (arXiv:2212.09748, section 3.2).
    """

    def __init__(self, dim: int, count: int, *, bias: bool = True) -> None:
        super().__init__()
        self.count = count
        self.linear = Linear(dim, count * dim, bias=bias)

    def forward(self, temb: Tensor) -> tuple[Tensor, ...]:
        """Return `count` tensors [batch, 1, dim]: shift, scale and gate of each step of a block."""
        return self.linear(temb)[:, None].chunk(self.count, dim=-1)


class FinalNorm(nn.Module):
    """The norm before the last linear layer, shifted and scaled by `temb`."""

    def __init__(self, dim: int, *, bias: bool = True) -> None:
        super().__init__()
        self.linear = Linear(dim, 2 * dim, bias=bias)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        # Here the scale comes first.
        scale, shift = self.linear(temb)[:, None].chunk(2, dim=-1)
        return modulated(x, shift, scale)


class TimeTextEmbedding(nn.Module):
    """The embedding of timestep, pooled text and, if the network has it, guidance.

    guided: the network was distilled from guidance (arXiv:2210.03142), and reads its scale.
    """

    def __init__(self, dim: int, pooled: int, guided: bool = False) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(TIME_CHANNELS, dim)
        self.guidance_embedder = TimestepEmbedding(TIME_CHANNELS, dim) if guided else None
        # The same two linear layers; it reads the pooled text in place of sines.
        self.text_embedder = TimestepEmbedding(pooled, dim)

    def forward(self, timestep: Tensor, pooled: Tensor, guidance: Tensor | None = None) -> Tensor:
        """Return the sum of the embeddings after SiLU, [batch, dim].

        timestep: [batch], 0 to 1000. pooled: [batch, pooled]. guidance: [batch], a scale; it is
        read if the network has it.

        Raises SafelightError if the network needs a guidance and there is none.
        """
        total = self.timestep_embedder(self._sines(timestep, pooled))
        if self.guidance_embedder is not None:
            if guidance is None:
                raise SafelightError("this network reads a guidance scale, and none is given")
            scaled = guidance.float() * _GUIDANCE_SCALE
            total = total + self.guidance_embedder(self._sines(scaled, pooled))
        return F.silu(total + self.text_embedder(pooled))

    def _sines(self, numbers: Tensor, like: Tensor) -> Tensor:
        return timestep_embedding(numbers, TIME_CHANNELS, flip=True, freq_shift=0).to(like.dtype)


class GELU(nn.Module):
    """A linear layer and the tanh approximation of GELU (arXiv:1606.08415)."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = Linear(dim, inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """GELU at four times the width, and a linear layer back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # Index 1 is dropout in checkpoints; it has no weights and does nothing here.
        self.net = nn.ModuleList([GELU(dim, 4 * dim), nn.Identity(), Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class SelfAttention(nn.Module):
    """Multi-head self-attention.

    norm: queries and keys are normed in each head. out: a linear layer follows. bias: the linear
    layers have one.
    """

    def __init__(
        self, dim: int, heads: int, *, norm: bool, out: bool = True, bias: bool = True
    ) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (Linear(dim, dim, bias=bias) for _ in range(3))
        self.norm_q, self.norm_k = (_head_norm(dim // heads, norm) for _ in range(2))
        self.to_out = nn.ModuleList([Linear(dim, dim, bias=bias)]) if out else None
        self.product = Product()

    def forward(self, x: Tensor, angles: Tensor | None = None) -> Tensor:
        """Return [batch, length, dim]. angles: of rotary positions, [length, d/2]."""
        out = self.product(*rotated(*self.own(x), angles))
        return out if self.to_out is None else self.to_out[0](out)

    def own(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of x, each [batch, heads, length, d]."""
        q, k, v = (split_heads(to(x), self.heads) for to in (self.to_q, self.to_k, self.to_v))
        return self.norm_q(q), self.norm_k(k), v


class JointAttention(SelfAttention):
    """Attention of picture and text to both together, each with weights of its own.

    last: what the text attends to is not used, so the text has no linear layer after it.
    """

    def __init__(
        self, dim: int, heads: int, *, norm: bool, last: bool = False, bias: bool = True
    ) -> None:
        super().__init__(dim, heads, norm=norm, bias=bias)
        added = (Linear(dim, dim, bias=bias) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = added
        self.norm_added_q, self.norm_added_k = (_head_norm(dim // heads, norm) for _ in range(2))
        self.to_add_out = None if last else Linear(dim, dim, bias=bias)

    def forward(  # type: ignore[override]
        self, x: Tensor, context: Tensor, angles: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return what is added to picture and text; None for the text of the last block.

        x: [batch, length, dim]. context: [batch, n, dim]. angles: [n + length, d/2].
        """
        added = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        q, k, v = (split_heads(to(context), self.heads) for to in added)
        text = (self.norm_added_q(q), self.norm_added_k(k), v)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(text, self.own(x), strict=True))
        out = self.product(*rotated(q, k, v, angles))
        n = context.shape[1]
        to_text = None if self.to_add_out is None else self.to_add_out(out[:, :n])
        assert self.to_out is not None
        return self.to_out[0](out[:, n:]), to_text


class JointTransformerBlock(nn.Module):
    """Joint attention and a feed-forward for picture and text.

    norm: queries and keys are normed. dual: the picture also attends to itself alone
    (Stable Diffusion 3.5). last: the text is not used after this block.
    """

    def __init__(
        self, dim: int, heads: int, *, norm: bool, dual: bool = False, last: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = Modulation(dim, 9 if dual else 6)
        self.norm1_context = FinalNorm(dim) if last else Modulation(dim, 6)
        self.attn = JointAttention(dim, heads, norm=norm, last=last)
        self.attn2 = SelfAttention(dim, heads, norm=norm) if dual else None
        self.ff = FeedForward(dim)
        self.ff_context = None if last else FeedForward(dim)

    def forward(
        self, x: Tensor, context: Tensor, temb: Tensor, angles: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return picture and text after the block; the text of the last block as it was.

        x: [batch, length, dim]. context: [batch, n, dim]. angles: as in `JointAttention`.
        """
        numbers = self.norm1(temb)
        shift, scale, gate = numbers[:3]
        normed = modulated(x, shift, scale)
        if self.ff_context is None:
            added, _ = self.attn(normed, self.norm1_context(context, temb), angles)
        else:
            for_text = self.norm1_context(temb)
            text_shift, text_scale, text_gate = for_text[:3]
            normed_text = modulated(context, text_shift, text_scale)
            added, to_text = self.attn(normed, normed_text, angles)
            context = torch.addcmul(context, text_gate, to_text)
            context = bounded(_fed(self.ff_context, context, *for_text[3:]))
        out = torch.addcmul(x, gate, added)
        if self.attn2 is not None:
            shift, scale, gate = numbers[6:]
            out = torch.addcmul(out, gate, self.attn2(modulated(x, shift, scale)))
        return _fed(self.ff, out, *numbers[3:6]), context


def rotated(
    q: Tensor, k: Tensor, v: Tensor, angles: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries and keys turned by the angles of their positions, if any, and the values."""
    if angles is None:
        return q, k, v
    return rotate_pairs(q, angles), rotate_pairs(k, angles), v


def _head_norm(width: int, norm: bool) -> nn.Module:
    return RMSNorm(width, EPS) if norm else nn.Identity()


def _fed(ff: FeedForward, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    """Return x plus its gated feed-forward."""
    return torch.addcmul(x, gate, ff(modulated(x, shift, scale)))
