"""SD3Transformer2DModel: the denoiser of Stable Diffusion 3 and 3.5 (arXiv:2403.03206)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.nets.config import Layers, NetConfig
from safelight.nets.joint import FinalNorm, JointTransformerBlock, TimeTextEmbedding, check_sides
from safelight.nets.layers import Linear


@dataclass(frozen=True)
class SD3Config(NetConfig):
    """The keys of transformer/config.json that we build from, with diffusers' defaults."""

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int | None = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    pos_embed_max_size: int = 96
    # The layers whose picture tokens attend to themselves a second time.
    dual_attention_layers: Layers = ()
    qk_norm: str | None = None

    @property
    def width(self) -> int:
        """The width of the tokens."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def depth(self) -> int:
        return self.num_layers

    def _validate(self) -> None:
        if self.caption_projection_dim != self.width:
            self._refuse(
                f"caption_projection_dim={self.caption_projection_dim}, but picture tokens have "
                f"{self.width} channels; they attend to each other, so both should be equal"
            )
        if self.qk_norm not in (None, "rms_norm"):
            self._refuse(f"qk_norm={self.qk_norm!r:.60}; expected rms_norm or none")
        if any(layer >= self.num_layers for layer in self.dual_attention_layers):
            self._refuse(f"dual_attention_layers name a layer beyond the {self.num_layers}")


class PatchEmbed(nn.Module):
    """From latents to tokens, one for each patch, with a table of positions."""

    def __init__(self, cfg: SD3Config) -> None:
        super().__init__()
        self.patch, self.side = cfg.patch_size, cfg.pos_embed_max_size
        self.proj = nn.Conv2d(cfg.in_channels, cfg.width, cfg.patch_size, stride=cfg.patch_size)
        # Checkpoints hold the table, so it is not computed here.
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", torch.zeros(1, self.side**2, cfg.width))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.proj(x).permute(0, 2, 3, 1)
        # The table may be stored in a finer precision than the network's.
        placed = (tokens + self._middle(*tokens.shape[1:3])).to(tokens.dtype)
        # All layers after this one read the numbers of a token next to each other.
        return placed.flatten(1, 2).contiguous()

    def _middle(self, h: int, w: int) -> Tensor:
        """Return the positions of h×w patches from the middle of the table, [1, h, w, width]."""
        if max(h, w) > self.side:
            most = self.side * self.patch
            raise SafelightError(
                f"latents of {w * self.patch}×{h * self.patch} are larger than this network's "
                f"table of positions: {most}×{most} are the largest"
            )
        top, left = (self.side - h) // 2, (self.side - w) // 2
        table = self.pos_embed.unflatten(1, (self.side, self.side))
        return table[:, top : top + h, left : left + w]


class SD3Transformer2DModel(nn.Module):
    """The denoiser of Stable Diffusion 3 and 3.5. It predicts noise minus picture."""

    def __init__(self, config: SD3Config) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.pos_embed = PatchEmbed(config)
        self.time_text_embed = TimeTextEmbedding(width, config.pooled_projection_dim)
        self.context_embedder = Linear(config.joint_attention_dim, width)
        self.transformer_blocks = nn.ModuleList(
            JointTransformerBlock(
                width,
                config.num_attention_heads,
                norm=config.qk_norm is not None,
                dual=i in config.dual_attention_layers,
                last=i == config.num_layers - 1,
            )
            for i in range(config.num_layers)
        )
        self.norm_out = FinalNorm(width)
        channels = config.out_channels or config.in_channels
        self.proj_out = Linear(width, config.patch_size**2 * channels)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """Return the predicted velocity, [batch, out_channels, h, w].

        x: noisy latents [batch, in_channels, h, w]. timestep: [batch], 0 to 1000. context: states
        of the texts' tokens, [batch, n, joint_attention_dim]. pooled: pooled states of the texts,
        [batch, pooled_projection_dim].

        Raises SafelightError if h or w is not a multiple of patch_size, or is above
        pos_embed_max_size·patch_size.
        """
        patch = self.config.patch_size
        check_sides(x, patch)
        tokens = self.pos_embed(x)
        temb = self.time_text_embed(timestep, pooled)
        context = self.context_embedder(context)
        for block in self.transformer_blocks:
            tokens, context = block(tokens, context, temb)
        out = self.proj_out(self.norm_out(tokens, temb))
        # A token has the channels of each place in its patch; pixel_shuffle wants the places of
        # each channel.
        out = out.unflatten(-1, (patch**2, -1)).transpose(-1, -2).flatten(-2)
        out = out.transpose(1, 2).unflatten(2, (x.shape[2] // patch, x.shape[3] // patch))
        return F.pixel_shuffle(out, patch)
