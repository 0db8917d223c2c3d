"""QwenImageTransformer2DModel: the denoiser of Qwen-Image (arXiv:2508.02324).

All its blocks have two streams, as those of Stable Diffusion 3 (arXiv:2403.03206). Positions are
rotary (arXiv:2104.09864): rows and columns are counted from the middle of the picture, and the text
goes on along the diagonal from its corner, so that a larger picture adds places on all sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.nets.config import NetConfig
from safelight.nets.flux2 import TimeEmbedding
from safelight.nets.joint import (
    EPS,
    FeedForward,
    FinalNorm,
    JointAttention,
    bounded,
    check_sides,
    modulated,
)
from safelight.nets.layers import Linear, as_map, as_tokens
from safelight.nets.tokens import RMSNorm, places, rotary_angles

PATCH = 2
"""The side of the patch that a token stands for."""

_THETA = 10000.0


@dataclass(frozen=True)
class QwenImageConfig(NetConfig):
    """The keys of transformer/config.json that we build from, with diffusers' defaults.

    in_channels counts the numbers of a token, those of a patch of 2×2; out_channels those of a
    latent.
    """

    in_channels: int = 64
    out_channels: int = 16
    num_layers: int = 60
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 3584
    # The numbers of a head that are turned by: a picture's number, row, column.
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    # Models that edit pictures, or draw in layers, have the others.
    _inert: ClassVar = {
        "patch_size": (PATCH,),
        "guidance_embeds": (False,),
        "zero_cond_t": (False,),
        "use_additional_t_cond": (False,),
        "use_layer3d_rope": (False,),
    }

    @property
    def width(self) -> int:
        """The width of the tokens."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def depth(self) -> int:
        return self.num_layers

    def _validate(self) -> None:
        self._check_axes(self.axes_dims_rope, 3, self.attention_head_dim)
        if self.in_channels % PATCH**2:
            self._refuse(f"{self.in_channels} channels are not those of patches of {PATCH}×{PATCH}")


class Block(nn.Module):
    """Joint attention and a feed-forward for picture and text, each with weights of its own."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.img_mod, self.txt_mod = (_modulation(dim) for _ in range(2))
        self.attn = JointAttention(dim, heads, norm=True)
        self.img_mlp, self.txt_mlp = FeedForward(dim), FeedForward(dim)

    def forward(
        self, x: Tensor, context: Tensor, temb: Tensor, angles: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return picture and text after the block.

        x: [batch, length, dim]. context: [batch, n, dim]. temb: [batch, dim], after SiLU. angles:
        of rotary positions, [n + length, d/2].
        """
        # Shift, scale and gate of attention and of the feed-forward (arXiv:2212.09748).
        mine = self.img_mod[1](temb)[:, None].chunk(6, dim=-1)
        texts = self.txt_mod[1](temb)[:, None].chunk(6, dim=-1)
        to_picture, to_text = self.attn(
            modulated(x, *mine[:2]), modulated(context, *texts[:2]), angles
        )
        assert to_text is not None
        x = torch.addcmul(x, mine[2], to_picture)
        context = torch.addcmul(context, texts[2], to_text)
        x = torch.addcmul(x, mine[5], self.img_mlp(modulated(x, *mine[3:5])))
        told = self.txt_mlp(modulated(context, *texts[3:5]))
        return bounded(x), bounded(torch.addcmul(context, texts[5], told))


def _modulation(dim: int) -> nn.ModuleList:
    # Index 0 is SiLU, which is applied once for all blocks.
    return nn.ModuleList([nn.Identity(), Linear(dim, 6 * dim)])


class QwenImageTransformer2DModel(nn.Module):
    """The denoiser of Qwen-Image. It predicts noise minus picture."""

    def __init__(self, config: QwenImageConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.time_text_embed = TimeEmbedding(width, bias=True)
        self.txt_norm = RMSNorm(config.joint_attention_dim, EPS)
        self.img_in = Linear(config.in_channels, width)
        self.txt_in = Linear(config.joint_attention_dim, width)
        self.transformer_blocks = nn.ModuleList(
            Block(width, config.num_attention_heads) for _ in range(config.num_layers)
        )
        self.norm_out = FinalNorm(width)
        self.proj_out = Linear(width, PATCH**2 * config.out_channels)
        self._kept: tuple[tuple[int, int, torch.device], Tensor] | None = None

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """Return the predicted velocity, [batch, out_channels, h, w].

        x: noisy latents [batch, in_channels/4, h, w]. timestep: [batch], 0 to 1000. context: states
        of the texts' tokens, [batch, n, joint_attention_dim].

        Raises SafelightError if h or w is odd.
        """
        check_sides(x, PATCH)
        patches = F.pixel_unshuffle(x, PATCH)
        temb, (h, w) = self.time_text_embed(timestep, x.dtype), patches.shape[-2:]
        angles = self._angles(context.shape[1], h, w, x.device)
        tokens, context = self.img_in(as_tokens(patches)), self.txt_in(self.txt_norm(context))
        for block in self.transformer_blocks:
            tokens, context = block(tokens, context, temb, angles)
        out = self.proj_out(self.norm_out(tokens, temb))
        return F.pixel_shuffle(as_map(out, patches), PATCH)

    def _angles(self, n: int, h: int, w: int, device: torch.device) -> Tensor:
        """Return the rotary angles of n text tokens and h×w patches, [n + h·w, d/2].

        Those of the last picture are kept, because all steps have the same. The evaluations of
        guidance have texts of different lengths.
        """
        axes, key = self.config.axes_dims_rope, (h, w, device)
        if self._kept is None or self._kept[0] != key:
            middle = torch.tensor([0, h - h // 2, w - w // 2], device="cpu")
            around = places([(h, w)], 0) - middle
            self._kept = key, rotary_angles(around, axes, _THETA).to(device)
        first = max(h // 2, w // 2)
        text = torch.arange(first, first + n, device="cpu")[:, None].expand(n, 3)
        return torch.cat([rotary_angles(text, axes, _THETA).to(device), self._kept[1]])
