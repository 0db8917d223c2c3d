"""UNet2DModel: the unconditional denoiser of pixels (DDPM, arXiv:2006.11239)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from safelight.nets.config import NetConfig
from safelight.nets.layers import (
    Downsample2D,
    GroupNorm,
    ResnetBlock2D,
    SpatialAttention,
    TimestepEmbedding,
    Upsample2D,
    timestep_embedding,
)


@dataclass(frozen=True)
class UNet2DConfig(NetConfig):
    """The keys of a UNet2DModel's config.json that we build from, with diffusers' defaults."""

    sample_size: int | None = None
    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = (
        "DownBlock2D",
        "AttnDownBlock2D",
        "AttnDownBlock2D",
        "AttnDownBlock2D",
    )
    up_block_types: tuple[str, ...] = (
        "AttnUpBlock2D",
        "AttnUpBlock2D",
        "AttnUpBlock2D",
        "UpBlock2D",
    )
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    # Channels of one head; None is a single head.
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    downsample_padding: int = 1

    _inert: ClassVar = {
        "act_fn": ("silu", "swish"),
        "add_attention": (True,),
        "attn_norm_num_groups": (None,),
        "center_input_sample": (False,),
        "class_embed_type": (None,),
        "downsample_type": ("conv",),
        "mid_block_scale_factor": (1, 1.0),
        "mid_block_type": ("UNetMidBlock2D",),
        "num_class_embeds": (None,),
        "resnet_time_scale_shift": ("default",),
        "time_embedding_dim": (None,),
        "time_embedding_type": ("positional",),
        "upsample_type": ("conv",),
    }

    def _validate(self) -> None:
        n = len(self.block_out_channels)
        if not len(self.down_block_types) == len(self.up_block_types) == n:
            self._refuse("block types and channels differ in number")
        known = {"DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"}
        for name in (*self.down_block_types, *self.up_block_types):
            if name not in known:
                self._refuse(
                    f"block {name!r:.40} is not supported; expected {', '.join(sorted(known))}"
                )
        head = self.attention_head_dim or 1
        blocks = zip(self.down_block_types, reversed(self.up_block_types), strict=True)
        for i, (channels, pair) in enumerate(zip(self.block_out_channels, blocks, strict=True)):
            # The middle block has attention at the lowest level, whatever the others have there.
            attends = i == n - 1 or any(block.startswith("Attn") for block in pair)
            if channels % self.norm_num_groups or (attends and channels % head):
                self._refuse(f"{channels} channels do not divide into heads and norm groups")
        self._check_sines(self.block_out_channels[0], self.freq_shift)

    def heads(self, channels: int) -> int:
        """Return the number of attention heads for so many channels."""
        return channels // (self.attention_head_dim or channels)


class _Block(nn.Module):
    """Resnets, each followed by attention if `attn` is set."""

    def __init__(self, cfg: UNet2DConfig, ins: list[int], out_ch: int, attn: bool) -> None:
        super().__init__()
        temb = 4 * cfg.block_out_channels[0]
        self.resnets = nn.ModuleList(
            ResnetBlock2D(i, out_ch, temb=temb, groups=cfg.norm_num_groups, eps=cfg.norm_eps)
            for i in ins
        )
        self.attentions = None
        if attn:
            self.attentions = nn.ModuleList(
                SpatialAttention(
                    out_ch, cfg.heads(out_ch), groups=cfg.norm_num_groups, eps=cfg.norm_eps
                )
                for _ in ins
            )

    def layer(self, j: int, x: Tensor, temb: Tensor) -> Tensor:
        x = self.resnets[j](x, temb)
        return x if self.attentions is None else self.attentions[j](x)


class DownBlock(_Block):
    """Returns the states for the skip connections; the last is downsampled."""

    def __init__(self, cfg: UNet2DConfig, i: int) -> None:
        out_ch = cfg.block_out_channels[i]
        ins = [cfg.block_out_channels[max(i - 1, 0)]] + [out_ch] * (cfg.layers_per_block - 1)
        super().__init__(cfg, ins, out_ch, cfg.down_block_types[i].startswith("Attn"))
        self.downsamplers = None
        if i < len(cfg.block_out_channels) - 1:
            self.downsamplers = nn.ModuleList([Downsample2D(out_ch, cfg.downsample_padding)])

    def forward(self, x: Tensor, temb: Tensor) -> list[Tensor]:
        skips = []
        for j in range(len(self.resnets)):
            x = self.layer(j, x, temb)
            skips.append(x)
        if self.downsamplers is not None:
            skips.append(self.downsamplers[0](x))
        return skips


class UpBlock(_Block):
    """Reads a skip connection in each layer, then upsamples."""

    def __init__(self, cfg: UNet2DConfig, i: int) -> None:
        widths = cfg.block_out_channels[::-1]
        out_ch, prev = widths[i], widths[max(i - 1, 0)]
        below = widths[min(i + 1, len(widths) - 1)]
        n = cfg.layers_per_block + 1
        ins = [(prev if j == 0 else out_ch) + (below if j == n - 1 else out_ch) for j in range(n)]
        super().__init__(cfg, ins, out_ch, cfg.up_block_types[i].startswith("Attn"))
        self.upsamplers = None
        if i < len(widths) - 1:
            self.upsamplers = nn.ModuleList([Upsample2D(out_ch)])

    def forward(self, x: Tensor, skips: list[Tensor], temb: Tensor) -> Tensor:
        for j in range(len(self.resnets)):
            x = self.layer(j, torch.cat([x, skips.pop()], dim=1), temb)
        if self.upsamplers is not None:
            height, width = skips[-1].shape[-2:]
            x = self.upsamplers[0](x, (height, width))
        return x


class MidBlock(_Block):
    """Two resnets around self-attention."""

    def __init__(self, cfg: UNet2DConfig) -> None:
        ch = cfg.block_out_channels[-1]
        super().__init__(cfg, [ch, ch], ch, attn=False)
        self.attentions = nn.ModuleList(
            [SpatialAttention(ch, cfg.heads(ch), groups=cfg.norm_num_groups, eps=cfg.norm_eps)]
        )

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        x = self.layer(0, x, temb)
        return self.resnets[1](x, temb)


class UNet2DModel(nn.Module):
    """The UNet without text."""

    def __init__(self, config: UNet2DConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0])
        self.down_blocks = nn.ModuleList(DownBlock(config, i) for i in range(len(widths)))
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(UpBlock(config, i) for i in range(len(widths)))
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """Return the noise, or what it was trained to predict: [batch, out_channels, h, w].

        x: [batch, in_channels, h, w], pixels in −1..1 with noise. timestep: [batch].
        """
        cfg = self.config
        sines = timestep_embedding(
            timestep, cfg.block_out_channels[0], cfg.flip_sin_to_cos, cfg.freq_shift
        )
        temb = self.time_embedding(sines.to(x.dtype))
        x = self.conv_in(x)
        skips = [x]
        for down in self.down_blocks:
            skips += down(skips[-1], temb)
        x = self.mid_block(skips[-1], temb)
        for up in self.up_blocks:
            x = up(x, skips, temb)
        return self.conv_out(self.conv_norm_out.silu(x, self.conv_out))
