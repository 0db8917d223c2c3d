"""UNet2DConditionModel: the denoiser of Stable Diffusion 1.x, 2.x (arXiv:2112.10752) and XL
(arXiv:2307.01952), and of the smaller networks that were distilled from them.

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

from safelight.nets.config import Depths, NetConfig
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
    # Of each level on the way down; of each on the way up, where those are not the same.
    transformer_layers_per_block: int | Depths = 1
    reverse_transformer_layers_per_block: Depths | None = None
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
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
    # "text_time": the network also reads a pooled text state and numbers about the picture's size.
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    _inert: ClassVar = {
        "act_fn": ("silu", "swish"),
        "attention_type": ("default",),
        "center_input_sample": (False,),
        "class_embed_type": (None,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "dual_cross_attention": (False,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "mid_block_scale_factor": (1, 1.0),
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

    @property
    def depth(self) -> int:
        return sum(map(sum, self.down_depths)) + sum(map(sum, self.up_depths))

    @property
    def down_depths(self) -> tuple[tuple[int, ...], ...]:
        """Blocks of each transformer on the way down, by level and layer."""
        levels, layers = len(self.block_out_channels), self.layers_per_block
        return _spread(self.transformer_layers_per_block, levels, layers)

    @property
    def up_depths(self) -> tuple[tuple[int, ...], ...]:
        """The same on the way up, in the order in which the levels run."""
        levels, layers = len(self.block_out_channels), self.layers_per_block + 1
        if self.reverse_transformer_layers_per_block is not None:
            return _spread(self.reverse_transformer_layers_per_block, levels, layers)
        down = self.transformer_layers_per_block
        return _spread(down if isinstance(down, int) else down[::-1], levels, layers)

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
        if self.mid_block_type not in ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None):
            self._refuse(
                f"mid_block_type={self.mid_block_type!r:.40} is not supported; expected "
                "UNetMidBlock2DCrossAttn, UNetMidBlock2D or null"
            )
        self._check_depths()
        self._check_added()

    def _check_depths(self) -> None:
        """Refuse numbers of transformer blocks that do not fit the levels and layers."""
        down, up = self.transformer_layers_per_block, self.reverse_transformer_layers_per_block
        uneven = isinstance(down, tuple) and any(isinstance(level, tuple) for level in down)
        if uneven and up is None:
            self._refuse(
                "transformer_layers_per_block has a list in it: "
                "reverse_transformer_layers_per_block is needed as well"
            )
        for depths, layers in ((down, self.layers_per_block), (up, self.layers_per_block + 1)):
            levels = depths if isinstance(depths, tuple) else ()
            if levels and len(levels) != len(self.block_out_channels):
                self._refuse(f"{len(levels)} levels of transformers; channels have another number")
            if any(isinstance(level, tuple) and len(level) != layers for level in levels):
                self._refuse(f"a level of transformers has not {layers} layers")
        if self.mid_block_type == "UNetMidBlock2DCrossAttn" and len(set(self.down_depths[-1])) > 1:
            self._refuse("the middle's transformer has no single number of blocks")

    def _check_added(self) -> None:
        """Refuse an embedding of pooled text and sizes that is incomplete."""
        if self.addition_embed_type not in (None, "text_time"):
            self._refuse(
                f"addition_embed_type={self.addition_embed_type!r:.40} is not supported; "
                "expected text_time or null"
            )
        if self.addition_embed_type is None:
            return
        width, total = self.addition_time_embed_dim, self.projection_class_embeddings_input_dim
        if width is None or total is None:
            self._refuse(
                "text_time needs addition_time_embed_dim and projection_class_embeddings_input_dim"
            )
        else:
            self._check_sines(width, self.freq_shift)


def _spread(depths: int | Depths, levels: int, layers: int) -> tuple[tuple[int, ...], ...]:
    """Return depths by level and layer."""
    by_level: Depths = (depths,) * levels if isinstance(depths, int) else depths
    return tuple(one if isinstance(one, tuple) else (one,) * layers for one in by_level)


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
                transformer(cfg, out_ch, cfg.heads[i], depth) for depth in cfg.down_depths[i]
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
            self.attentions = nn.ModuleList(
                transformer(cfg, out_ch, heads, depth) for depth in cfg.up_depths[i]
            )
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
    """Two resnets around a transformer; of some small networks, one resnet alone."""

    def __init__(self, cfg: UNetConfig) -> None:
        super().__init__()
        ch, temb = cfg.block_out_channels[-1], 4 * cfg.block_out_channels[0]
        attends = cfg.mid_block_type == "UNetMidBlock2DCrossAttn"
        self.resnets = nn.ModuleList(resnet(cfg, ch, ch, temb) for _ in range(1 + attends))
        self.attentions = None
        if attends:
            depth = cfg.down_depths[-1][0]
            self.attentions = nn.ModuleList([transformer(cfg, ch, cfg.heads[-1], depth, mid=True)])

    def forward(self, x: Tensor, temb: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[0](x, temb)
        if self.attentions is None:
            return x
        return self.resnets[1](self.attentions[0](x, context), temb)


class UNet2DConditionModel(nn.Module):
    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0], config.time_cond_proj_dim)
        self.add_embedding = None
        if config.projection_class_embeddings_input_dim and config.addition_embed_type:
            self.add_embedding = TimestepEmbedding(
                config.projection_class_embeddings_input_dim, 4 * widths[0]
            )
        self.down_blocks = nn.ModuleList(DownBlock2D(config, i) for i in range(len(widths)))
        self.mid_block = None if config.mid_block_type is None else MidBlock2D(config)
        self.up_blocks = nn.ModuleList(UpBlock2D(config, i) for i in range(len(widths)))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        guidance: Tensor | None = None,
        pooled: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> Tensor:
        """x: [batch, in_channels, h, w]; timestep: [batch], may be fractional and differ by row;
        context: text states [k·batch, tokens, cross_attention_dim], k in turn for each row of x;
        guidance: [batch, time_cond_proj_dim] embedded guidance scale, for networks distilled
        with it. pooled: text states [k·batch, width] and sizes: [k·batch, numbers], for networks
        with an `addition_embed_type`. Returns [k·batch, out_channels, h, w]: noise, velocity or
        clean latents, as trained.
        """
        cfg = self.config
        sines = timestep_embedding(
            timestep, cfg.block_out_channels[0], cfg.flip_sin_to_cos, cfg.freq_shift
        )
        temb = self.time_embedding(sines.to(x.dtype), guidance)
        x = self.conv_in(x)
        if self.add_embedding is not None:
            assert pooled is not None
            assert sizes is not None
            # Each row of the context has a text and sizes of its own: no two rows stay equal.
            temb = rows(temb, len(pooled)) + self.add_embedding(self._added(pooled, sizes))
            x = rows(x, len(pooled))
        skips = [x]
        for down in self.down_blocks:
            skips += down(skips[-1], temb, context)
        x = skips[-1]
        if self.mid_block is not None:
            x = self.mid_block(x, temb, context)
        for up in self.up_blocks:
            x = up(x, skips, temb, context)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def _added(self, pooled: Tensor, sizes: Tensor) -> Tensor:
        """Return pooled text states with the sines of each size number behind them
        (arXiv:2307.01952, section 2.2)."""
        cfg = self.config
        assert cfg.addition_time_embed_dim is not None
        sines = timestep_embedding(
            sizes.flatten(), cfg.addition_time_embed_dim, cfg.flip_sin_to_cos, cfg.freq_shift
        )
        return torch.cat([pooled, sines.view(len(sizes), -1).to(pooled.dtype)], dim=1)


def resnet(cfg: UNetConfig, in_ch: int, out_ch: int, temb: int) -> ResnetBlock2D:
    return ResnetBlock2D(in_ch, out_ch, temb=temb, groups=cfg.norm_num_groups, eps=cfg.norm_eps)


def transformer(
    cfg: UNetConfig, channels: int, heads: int, depth: int, mid: bool = False
) -> Transformer2DModel:
    return Transformer2DModel(
        channels,
        heads,
        cfg.cross_attention_dim,
        depth=depth,
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
