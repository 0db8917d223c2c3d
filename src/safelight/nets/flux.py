"""FluxTransformer2DModel: the denoiser of FLUX.1 schnell and dev.

Black Forest Labs published no paper. The blocks of two streams are those of Stable Diffusion 3
(arXiv:2403.03206), with rotary positions (arXiv:2104.09864); in the blocks of one stream attention
and feed-forward run side by side (arXiv:2302.05442).
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
    FinalNorm,
    JointTransformerBlock,
    Modulation,
    SelfAttention,
    TimeTextEmbedding,
    bounded,
    check_sides,
    modulated,
    sizes_of,
)
from safelight.nets.layers import Linear, as_map, as_tokens
from safelight.nets.tokens import places, rotary_angles

PATCH = 2
"""The side of the patch that a token stands for. diffusers packs in its pipeline, so no config
holds it."""

_THETA = 10000.0

_APART = 1
"""The step between the numbers of a picture and of the one that Kontext edits."""


@dataclass(frozen=True)
class FluxConfig(NetConfig):
    """The keys of transformer/config.json that we build from, with diffusers' defaults.

    in_channels and out_channels count the numbers of a token: those of a patch of 2×2.
    """

    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    # The numbers of a head that are turned by a token's index, row and column.
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    _inert: ClassVar = {"patch_size": (1,)}

    @property
    def width(self) -> int:
        """The width of the tokens."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def depth(self) -> int:
        return self.num_layers + self.num_single_layers

    def _validate(self) -> None:
        self._check_axes(self.axes_dims_rope, 3, self.attention_head_dim)
        for channels in (self.in_channels, self.out_channels or self.in_channels):
            if channels % PATCH**2:
                self._refuse(f"{channels} channels are not those of patches of {PATCH}×{PATCH}")


class SingleTransformerBlock(nn.Module):
    """Attention and feed-forward side by side, over text and picture in one sequence."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm = Modulation(dim, 3)
        self.attn = SelfAttention(dim, heads, norm=True, out=False)
        self.proj_mlp = Linear(dim, 4 * dim)
        self.proj_out = Linear(5 * dim, dim)

    def forward(self, x: Tensor, temb: Tensor, angles: Tensor) -> Tensor:
        """Return [batch, length, dim]. angles: of rotary positions, [length, d/2]."""
        shift, scale, gate = self.norm(temb)
        normed = modulated(x, shift, scale)
        inner = F.gelu(self.proj_mlp(normed), approximate="tanh")
        added = self.proj_out(torch.cat([self.attn(normed, angles), inner], dim=-1))
        return bounded(torch.addcmul(x, gate, added))


class FluxTransformer2DModel(nn.Module):
    """The denoiser of FLUX.1. It predicts noise minus picture."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.config = config
        width, heads = config.width, config.num_attention_heads
        self.time_text_embed = TimeTextEmbedding(
            width, config.pooled_projection_dim, config.guidance_embeds
        )
        self.context_embedder = Linear(config.joint_attention_dim, width)
        self.x_embedder = Linear(config.in_channels, width)
        self.transformer_blocks = nn.ModuleList(
            JointTransformerBlock(width, heads, norm=True) for _ in range(config.num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            SingleTransformerBlock(width, heads) for _ in range(config.num_single_layers)
        )
        self.norm_out = FinalNorm(width)
        self.proj_out = Linear(width, config.out_channels or config.in_channels)
        self._kept: tuple[tuple[Any, ...], Tensor] | None = None

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        pooled: Tensor,
        guidance: Tensor | None = None,
        references: Sequence[Tensor] = (),
    ) -> Tensor:
        """Return the predicted velocity, [batch, out_channels/4, h, w].

        x: noisy latents [batch, in_channels/4, h, w]. timestep: [batch], 0 to 1000. context: states
        of the texts' tokens, [batch, n, joint_attention_dim]. pooled: pooled states of the texts,
        [batch, pooled_projection_dim]. guidance: [batch], the scale for a network with
        guidance_embeds; others do not read it. references: clean latents of the pictures to edit,
        which Kontext reads, each [batch, in_channels/4, any, any].

        Raises SafelightError if a side is odd, or if a guidance is needed and not given.
        """
        for one in (x, *references):
            check_sides(one, PATCH)
        patches, *others = (F.pixel_unshuffle(one, PATCH) for one in (x, *references))
        shown = [patches, *others]
        n, (h, w) = context.shape[1], patches.shape[-2:]
        temb = self.time_text_embed(timestep, pooled, guidance)
        angles = self._angles(n, sizes_of(shown), x.device)
        tokens = self.x_embedder(torch.cat([as_tokens(one) for one in shown], dim=1))
        context = self.context_embedder(context)
        for block in self.transformer_blocks:
            tokens, context = block(tokens, context, temb, angles)
        tokens = torch.cat([context, tokens], dim=1)
        for block in self.single_transformer_blocks:
            tokens = block(tokens, temb, angles)
        out = self.proj_out(self.norm_out(tokens[:, n : n + h * w], temb))
        return F.pixel_shuffle(as_map(out, patches), PATCH)

    def _angles(self, n: int, sizes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
        """Return the rotary angles of n text tokens and pictures of some sizes, [tokens, d/2].

        Those of the last call are kept, because all steps of a picture have the same.
        """
        key = (n, sizes, device)
        if self._kept is None or self._kept[0] != key:
            # Text has no place. float64 is computed on the CPU, because some devices have none.
            positions = torch.cat([torch.zeros(n, 3, device="cpu"), places(sizes, _APART)])
            angles = rotary_angles(positions, self.config.axes_dims_rope, _THETA)
            self._kept = key, angles.to(device)
        return self._kept[1]
