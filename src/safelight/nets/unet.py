"""UNet2DConditionModel: the denoiser of Stable Diffusion 1.x and 2.x (arXiv:2112.10752).

Latents go down through blocks that halve the side, across the middle, and up again, each up
block reading what its twin on the way down left for it. The timestep is added in every resnet;
the text is attended to in every transformer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.nets.config import NetConfig
from safelight.nets.layers import (
    Downsample2D,
    ResnetBlock2D,
    TimestepEmbedding,
    Transformer2DModel,
    Upsample2D,
    rows,
    timestep_embedding,
)


@dataclass(frozen=True)
class UNetConfig(NetConfig):
    """The keys of unet/config.json that the arithmetic depends on. Defaults are diffusers'."""

    sample_size: int | None = None
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = (
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    )
    up_block_types: tuple[str, ...] = (
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
    )
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    transformer_layers_per_block: int = 1
    # The number of heads, one for all blocks or one per block: the key's name in the
    # checkpoints says otherwise, and is kept.
    attention_head_dim: int | tuple[int, ...] = 8
    cross_attention_dim: int = 1280
    use_linear_projection: bool = False
    only_cross_attention: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    downsample_padding: int = 1
    time_cond_proj_dim: int | None = None

    _inert: ClassVar = {
        "act_fn": ("silu", "swish"),
        "addition_embed_type": (None,),
        "attention_type": ("default",),
        "center_input_sample": (False,),
        "class_embed_type": (None,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "dual_cross_attention": (False,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "mid_block_scale_factor": (1, 1.0),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "num_attention_heads": (None,),
        "num_class_embeds": (None,),
        "resnet_time_scale_shift": ("default",),
        "time_embedding_act_fn": (None,),
        "time_embedding_dim": (None,),
        "time_embedding_type": ("positional",),
        "timestep_post_act": (None,),
    }

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of each block, on the way down."""
        h = self.attention_head_dim
        return h if isinstance(h, tuple) else (h,) * len(self.block_out_channels)

    def _validate(self) -> None:
        n = len(self.block_out_channels)
        if not len(self.down_block_types) == len(self.up_block_types) == len(self.heads) == n:
            self._refuse("block types, channels and heads differ in number")
        known = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}
        for name in (*self.down_block_types, *self.up_block_types):
            if name not in known:
                self._refuse(
                    f"block {name!r:.40} is not supported; expected {', '.join(sorted(known))}"
                )
        for channels, heads in zip(self.block_out_channels, self.heads, strict=True):
            if channels % heads or channels % self.norm_num_groups:
                self._refuse(f"{channels} channels do not divide into heads and norm groups")
        self._check_sines(self.block_out_channels[0], self.freq_shift)
        if self.time_cond_proj_dim is not None:
            self._check_sines(self.time_cond_proj_dim, 1)


class DownBlock2D(nn.Module):
    """Resnets, each followed by a transformer where the block has them, then a halving."""

    def __init__(self, cfg: UNetConfig, i: int) -> None:
        super().__init__()
        out_ch = cfg.block_out_channels[i]
        in_ch = cfg.block_out_channels[max(i - 1, 0)]
        temb = 4 * cfg.block_out_channels[0]
        self.resnets = nn.ModuleList(
            resnet(cfg, in_ch if j == 0 else out_ch, out_ch, temb)
            for j in range(cfg.layers_per_block)
        )
        self.attentions = None
        if cfg.down_block_types[i].startswith("CrossAttn"):
            self.attentions = nn.ModuleList(
                transformer(cfg, out_ch, cfg.heads[i]) for _ in range(cfg.layers_per_block)
            )
        last = i == len(cfg.block_out_channels) - 1
        self.downsamplers = (
            None if last else nn.ModuleList([Downsample2D(out_ch, cfg.downsample_padding)])
        )

    def forward(self, x: Tensor, temb: Tensor, context: Tensor) -> list[Tensor]:
        skips = []
        for j, block in enumerate(self.resnets):
            x = block(x, temb)
            if self.attentions is not None:
                x = self.attentions[j](x, context)
            skips.append(x)
        if self.downsamplers is not None:
            skips.append(self.downsamplers[0](x))
        return skips


class UpBlock2D(nn.Module):
    """Resnets that read a skip each, transformers where the block has them, then a doubling."""

    def __init__(self, cfg: UNetConfig, i: int) -> None:
        super().__init__()
        widths = cfg.block_out_channels[::-1]
        out_ch, prev = widths[i], widths[max(i - 1, 0)]
        below = widths[min(i + 1, len(widths) - 1)]
        temb = 4 * cfg.block_out_channels[0]
        n = cfg.layers_per_block + 1
        self.resnets = nn.ModuleList(
            resnet(
                cfg,
                (prev if j == 0 else out_ch) + (below if j == n - 1 else out_ch),
                out_ch,
                temb,
            )
            for j in range(n)
        )
        self.attentions = None
        if cfg.up_block_types[i].startswith("CrossAttn"):
            heads = cfg.heads[::-1][i]
            self.attentions = nn.ModuleList(transformer(cfg, out_ch, heads) for _ in range(n))
        last = i == len(widths) - 1
        self.upsamplers = None if last else nn.ModuleList([Upsample2D(out_ch)])

    def forward(self, x: Tensor, skips: list[Tensor], temb: Tensor, context: Tensor) -> Tensor:
        for j, block in enumerate(self.resnets):
            x = block(torch.cat([x, rows(skips.pop(), len(x))], dim=1), temb)
            if self.attentions is not None:
                x = self.attentions[j](x, context)
        if self.upsamplers is not None:
            height, width = skips[-1].shape[-2:]
            x = self.upsamplers[0](x, (height, width))
        return x


class MidBlock2D(nn.Module):
    def __init__(self, cfg: UNetConfig) -> None:
        super().__init__()
        ch, temb = cfg.block_out_channels[-1], 4 * cfg.block_out_channels[0]
        self.resnets = nn.ModuleList(resnet(cfg, ch, ch, temb) for _ in range(2))
        self.attentions = nn.ModuleList([transformer(cfg, ch, cfg.heads[-1], mid=True)])

    def forward(self, x: Tensor, temb: Tensor, context: Tensor) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, temb), context)
        return self.resnets[1](x, temb)


class UNet2DConditionModel(nn.Module):
    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0], config.time_cond_proj_dim)
        self.down_blocks = nn.ModuleList(DownBlock2D(config, i) for i in range(len(widths)))
        self.mid_block = MidBlock2D(config)
        self.up_blocks = nn.ModuleList(UpBlock2D(config, i) for i in range(len(widths)))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """x: [batch, in_channels, h, w]; timestep: [batch], may be fractional and differ by row;
        context: text states [k·batch, tokens, cross_attention_dim], k in turn for each row of x;
        guidance: [batch, time_cond_proj_dim] embedded guidance scale, for networks distilled
        with it. Returns [k·batch, out_channels, h, w]: noise, velocity or clean latents, as
        trained.
        """
        cfg = self.config
        sines = timestep_embedding(
            timestep, cfg.block_out_channels[0], cfg.flip_sin_to_cos, cfg.freq_shift
        )
        temb = self.time_embedding(sines.to(x.dtype), guidance)
        x = self.conv_in(x)
        skips = [x]
        for down in self.down_blocks:
            skips += down(skips[-1], temb, context)
        x = self.mid_block(skips[-1], temb, context)
        for up in self.up_blocks:
            x = up(x, skips, temb, context)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def resnet(cfg: UNetConfig, in_ch: int, out_ch: int, temb: int) -> ResnetBlock2D:
    return ResnetBlock2D(in_ch, out_ch, temb=temb, groups=cfg.norm_num_groups, eps=cfg.norm_eps)


def transformer(
    cfg: UNetConfig, channels: int, heads: int, mid: bool = False
) -> Transformer2DModel:
    return Transformer2DModel(
        channels,
        heads,
        cfg.cross_attention_dim,
        depth=cfg.transformer_layers_per_block,
        linear=cfg.use_linear_projection,
        groups=cfg.norm_num_groups,
        only_cross=cfg.only_cross_attention and not mid,
    )


def guidance_embedding(scale: Sequence[float], dim: int) -> Tensor:
    """The guidance scale as sines, for networks distilled with guidance (arXiv:2310.04378).

    Returns float32 [len(scale), dim].
    """
    w = (torch.tensor(scale, dtype=torch.float32) - 1) * 1000
    return timestep_embedding(w, dim, flip=False, freq_shift=1)
