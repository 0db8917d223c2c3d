"""Flux2Transformer2DModel: the denoiser of FLUX.2 klein.

Black Forest Labs published no paper. The blocks are those of FLUX.1 (`nets.flux`) with other
feed-forwards, and no layer has a bias. The numbers that shift, scale and gate a block are computed
once, and shared by all blocks of a kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.nets.config import NetConfig
from safelight.nets.joint import (
    EPS,
    TIME_CHANNELS,
    FinalNorm,
    JointAttention,
    Modulation,
    bounded,
    modulated,
    sizes_of,
)
from safelight.nets.layers import (
    Linear,
    TimestepEmbedding,
    as_map,
    as_tokens,
    timestep_embedding,
)
from safelight.nets.tokens import (
    Product,
    RMSNorm,
    places,
    rotary_angles,
    rotate_pairs,
    split_heads,
)

_APART = 10
"""The step between the numbers of a picture and of those that it refers to."""

Numbers = tuple[Tensor, ...]
"""Shift, scale and gate of each step of a block, each [batch, 1, dim]."""


@dataclass(frozen=True)
class Flux2Config(NetConfig):
    """The keys of transformer/config.json that we build from, with diffusers' defaults."""

    in_channels: int = 128
    out_channels: int | None = None
    num_layers: int = 8
    num_single_layers: int = 48
    attention_head_dim: int = 128
    num_attention_heads: int = 48
    joint_attention_dim: int = 15360
    mlp_ratio: float = 3.0
    # The numbers of a head that are turned by: a picture's number, row, column, a word's index.
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: float = 2000.0

    # FLUX.2 dev, which reads the guidance scale, is another network.
    _inert: ClassVar = {
        "patch_size": (1,),
        "timestep_guidance_channels": (TIME_CHANNELS,),
        "eps": (EPS,),
        "guidance_embeds": (False,),
    }

    @property
    def width(self) -> int:
        """The width of the tokens."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def inner(self) -> int:
        """The width inside the feed-forwards."""
        return int(self.width * self.mlp_ratio)

    @property
    def depth(self) -> int:
        return self.num_layers + self.num_single_layers

    def _validate(self) -> None:
        self._check_axes(self.axes_dims_rope, 4, self.attention_head_dim)
        if self.inner < 1:
            self._refuse(f"mlp_ratio={self.mlp_ratio} leaves no width of {self.width}")


class TimeEmbedding(nn.Module):
    """The embedding of a timestep after SiLU, [batch, dim], from timesteps [batch], 0 to 1000."""

    def __init__(self, dim: int, *, bias: bool = False) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(TIME_CHANNELS, dim, bias=bias)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        sines = timestep_embedding(timestep, TIME_CHANNELS, flip=True, freq_shift=0)
        return F.silu(self.timestep_embedder(sines.to(dtype)))


class FeedForward(nn.Module):
    """A linear layer to gate and value, SiLU of the gate (arXiv:2002.05202), and one back."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.linear_in = Linear(dim, 2 * inner, bias=False)
        self.linear_out = Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_out(_gated(self.linear_in(x)))


class DoubleBlock(nn.Module):
    """Joint attention and a feed-forward for picture and text, each with weights of its own."""

    def __init__(self, cfg: Flux2Config) -> None:
        super().__init__()
        width = cfg.width
        self.attn = JointAttention(width, cfg.num_attention_heads, norm=True, bias=False)
        self.ff = FeedForward(width, cfg.inner)
        self.ff_context = FeedForward(width, cfg.inner)

    def forward(
        self, x: Tensor, context: Tensor, numbers: Numbers, text_numbers: Numbers, angles: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return picture and text after the block.

        x: [batch, length, dim]. context: [batch, n, dim]. numbers, text_numbers: six for picture
        and text. angles: of rotary positions, [n + length, d/2].
        """
        shift, scale, gate = numbers[:3]
        text_shift, text_scale, text_gate = text_numbers[:3]
        normed, normed_text = modulated(x, shift, scale), modulated(context, text_shift, text_scale)
        to_picture, to_text = self.attn(normed, normed_text, angles)
        x, context = torch.addcmul(x, gate, to_picture), torch.addcmul(context, text_gate, to_text)
        shift, scale, gate = numbers[3:]
        x = torch.addcmul(x, gate, self.ff(modulated(x, shift, scale)))
        shift, scale, gate = text_numbers[3:]
        context = torch.addcmul(context, gate, self.ff_context(modulated(context, shift, scale)))
        return x, bounded(context)


class ParallelAttention(nn.Module):
    """Attention and feed-forward side by side (arXiv:2302.05442), between two linear layers."""

    def __init__(self, cfg: Flux2Config) -> None:
        super().__init__()
        width, self.heads = cfg.width, cfg.num_attention_heads
        self.sizes = (width, width, width, 2 * cfg.inner)
        self.to_qkv_mlp_proj = Linear(width, sum(self.sizes), bias=False)
        self.norm_q, self.norm_k = (RMSNorm(cfg.attention_head_dim, EPS) for _ in range(2))
        self.to_out = Linear(width + cfg.inner, width, bias=False)
        self.product = Product()

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """Return [batch, length, dim]. angles: of rotary positions, [length, d/2]."""
        q, k, v, inner = self.to_qkv_mlp_proj(x).split(self.sizes, dim=-1)
        q, k, v = (split_heads(one, self.heads) for one in (q, k, v))
        q, k = rotate_pairs(self.norm_q(q), angles), rotate_pairs(self.norm_k(k), angles)
        return self.to_out(torch.cat([self.product(q, k, v), _gated(inner)], dim=-1))


class SingleBlock(nn.Module):
    """Attention and feed-forward over text and picture in one sequence."""

    def __init__(self, cfg: Flux2Config) -> None:
        super().__init__()
        self.attn = ParallelAttention(cfg)

    def forward(self, x: Tensor, numbers: Numbers, angles: Tensor) -> Tensor:
        """Return [batch, length, dim]. numbers: three. angles: as in `ParallelAttention`."""
        shift, scale, gate = numbers
        return bounded(torch.addcmul(x, gate, self.attn(modulated(x, shift, scale), angles)))


class Flux2Transformer2DModel(nn.Module):
    """The denoiser of FLUX.2 klein. It predicts noise minus picture."""

    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.time_guidance_embed = TimeEmbedding(width)
        self.double_stream_modulation_img = Modulation(width, 6, bias=False)
        self.double_stream_modulation_txt = Modulation(width, 6, bias=False)
        self.single_stream_modulation = Modulation(width, 3, bias=False)
        self.x_embedder = Linear(config.in_channels, width, bias=False)
        self.context_embedder = Linear(config.joint_attention_dim, width, bias=False)
        self.transformer_blocks = nn.ModuleList(
            DoubleBlock(config) for _ in range(config.num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(config) for _ in range(config.num_single_layers)
        )
        self.norm_out = FinalNorm(width, bias=False)
        self.proj_out = Linear(width, config.out_channels or config.in_channels, bias=False)
        self._kept: tuple[tuple[Any, ...], Tensor] | None = None

    def forward(
        self, x: Tensor, timestep: Tensor, context: Tensor, references: Sequence[Tensor] = ()
    ) -> Tensor:
        """Return the predicted velocity, [batch, out_channels, h, w].

        x: noisy latents [batch, in_channels, h, w], each of which is a token. timestep: [batch],
        0 to 1000. context: states of the texts' tokens, [batch, n, joint_attention_dim].
        references: clean latents of the pictures to refer to, each [batch, in_channels, any, any].
        """
        n, (h, w) = context.shape[1], x.shape[-2:]
        temb = self.time_guidance_embed(timestep, x.dtype)
        for_picture = self.double_stream_modulation_img(temb)
        for_text = self.double_stream_modulation_txt(temb)
        for_both = self.single_stream_modulation(temb)
        shown = [x, *references]
        angles = self._angles(n, sizes_of(shown), x.device)
        tokens = self.x_embedder(torch.cat([as_tokens(one) for one in shown], dim=1))
        context = self.context_embedder(context)
        for block in self.transformer_blocks:
            tokens, context = block(tokens, context, for_picture, for_text, angles)
        tokens = torch.cat([context, tokens], dim=1)
        for block in self.single_transformer_blocks:
            tokens = block(tokens, for_both, angles)
        return as_map(self.proj_out(self.norm_out(tokens[:, n : n + h * w], temb)), x)

    def _angles(self, n: int, sizes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
        """Return the rotary angles of n text tokens and pictures of some sizes, [tokens, d/2].

        Those of the last call are kept, because all steps of a picture have the same.
        """
        key = (n, sizes, device)
        if self._kept is None or self._kept[0] != key:
            pictures = places(sizes, _APART)
            positions = torch.zeros(n + len(pictures), 4, device="cpu")
            positions[:n, 3] = torch.arange(n, device="cpu")
            positions[n:, :3] = pictures
            cfg = self.config
            angles = rotary_angles(positions, cfg.axes_dims_rope, cfg.rope_theta)
            self._kept = key, angles.to(device)
        return self._kept[1]


def _gated(x: Tensor) -> Tensor:
    """Return the second half of the numbers times the SiLU of the first."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value
