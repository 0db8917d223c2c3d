"""UNet2DConditionModel: the denoiser of Stable Diffusion 1.x, 2.x (arXiv:2112.10752) and XL
(arXiv:2307.01952), and of the smaller networks that were distilled from them.

Latents go through down blocks, which halve the sides, a middle block, and up blocks. Each up block
reads the skip connections of the down block at its level. The timestep is added in every resnet;
every transformer attends to the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor, nn

from safelight.nets.image_prompt import ImagePrompt
from safelight.nets.layers import (
    BasicTransformerBlock,
    Downsample2D,
    GroupNorm,
    ResnetBlock2D,
    TimestepEmbedding,
    Transformer2DModel,
    Upsample2D,
    rows,
    timestep_embedding,
)
from safelight.nets.reuse import Reuse
from safelight.nets.sums import plus
from safelight.nets.unet_config import UNetConfig


class DownBlock2D(nn.Module):
    """Resnets, each followed by a transformer if the block has them, then downsampling."""

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

    def forward(
        self,
        x: Tensor,
        temb: Tensor,
        context: Tensor,
        reuse: Reuse | None = None,
        most: int | None = None,
        image: ImagePrompt | None = None,
        added: Tensor | None = None,
    ) -> list[Tensor]:
        """Return the states for the skip connections. most: how many of them; None: all.

        added: to the state after the last transformer; of a block without, to the last state, as in
        diffusers.
        """
        skips = []
        for j, block in enumerate(self.resnets[:most]):
            x = block(x, temb)
            if self.attentions is not None:
                x = self.attentions[j](x, context, reuse, image)
                if added is not None and j == len(self.resnets) - 1:
                    x = plus(x, added)
            skips.append(x)
        if self.downsamplers is not None and len(skips) != most:
            skips.append(self.downsamplers[0](x))
        whole = len(skips) == len(self.resnets) + (self.downsamplers is not None)
        if added is not None and self.attentions is None and whole:
            skips[-1] = plus(skips[-1], added)
        return skips


class UpBlock2D(nn.Module):
    """Resnets that read one skip each, transformers if the block has them, then upsampling."""

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

    def forward(
        self,
        x: Tensor,
        skips: list[Tensor],
        temb: Tensor,
        context: Tensor,
        reuse: Reuse | None = None,
        first: int = 0,
        image: ImagePrompt | None = None,
    ) -> Tensor:
        """Return the state after the block. It removes the skips that it reads from `skips`.

        first: index of the resnet that reads x; those before it are not run.
        """
        for j in range(first, len(self.resnets)):
            if reuse is not None:
                reuse.meet(x, len(skips))
            x = self.resnets[j](torch.cat([x, rows(skips.pop(), len(x))], dim=1), temb)
            if self.attentions is not None:
                x = self.attentions[j](x, context, reuse, image)
        if self.upsamplers is not None:
            height, width = skips[-1].shape[-2:]
            x = self.upsamplers[0](x, (height, width))
        return x


class MidBlock2D(nn.Module):
    """Two resnets around a transformer; in some small networks one resnet alone."""

    def __init__(self, cfg: UNetConfig) -> None:
        super().__init__()
        ch, temb = cfg.block_out_channels[-1], 4 * cfg.block_out_channels[0]
        attends = cfg.mid_block_type == "UNetMidBlock2DCrossAttn"
        self.resnets = nn.ModuleList(resnet(cfg, ch, ch, temb) for _ in range(1 + attends))
        self.attentions = None
        if attends:
            depth = cfg.down_depths[-1][0]
            self.attentions = nn.ModuleList([transformer(cfg, ch, cfg.heads[-1], depth, mid=True)])

    def forward(
        self,
        x: Tensor,
        temb: Tensor,
        context: Tensor,
        reuse: Reuse | None = None,
        image: ImagePrompt | None = None,
    ) -> Tensor:
        x = self.resnets[0](x, temb)
        if self.attentions is None:
            return x
        return self.resnets[1](self.attentions[0](x, context, reuse, image), temb)


class UNetEncoder(nn.Module):
    """The first half of the UNet, which a ControlNet copies: everything before the up blocks."""

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

    def begin(
        self,
        x: Tensor,
        timestep: Tensor,
        guidance: Tensor | None = None,
        pooled: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the first feature map, and the embedding of the timestep and the sizes.

        See `UNet2DConditionModel.forward`.
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
            # Each row of the context has its own pooled text and sizes: the rows differ from here.
            temb = rows(temb, len(pooled)) + self.add_embedding(self._added(pooled, sizes))
            x = rows(x, len(pooled))
        return x, temb

    def skips(
        self,
        x: Tensor,
        temb: Tensor,
        context: Tensor,
        reuse: Reuse | None = None,
        most: int | None = None,
        image: ImagePrompt | None = None,
        maps: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """Return the states for the skip connections. most: how many of them; None: all.

        maps: what is added in each block.
        """
        found = [x]
        for down, added in zip_longest(self.down_blocks, maps[: len(self.down_blocks)]):
            left = None if most is None else most - len(found)
            if left is None or left > 0:
                found += down(found[-1], temb, context, reuse, left, image, added)
        return found

    def _added(self, pooled: Tensor, sizes: Tensor) -> Tensor:
        """Return pooled text states followed by the sines of each size number.

        [k·batch, width + numbers · addition_time_embed_dim] (arXiv:2307.01952, section 2.2).
        """
        cfg = self.config
        assert cfg.addition_time_embed_dim is not None
        sines = timestep_embedding(
            sizes.flatten(), cfg.addition_time_embed_dim, cfg.flip_sin_to_cos, cfg.freq_shift
        )
        return torch.cat([pooled, sines.view(len(sizes), -1).to(pooled.dtype)], dim=1)


class UNet2DConditionModel(UNetEncoder):
    """The UNet that reads text."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        widths = config.block_out_channels
        self.up_blocks = nn.ModuleList(UpBlock2D(config, i) for i in range(len(widths)))
        parts = (self.down_blocks, self.up_blocks, self.mid_block)
        modules = (module for part in parts if part is not None for module in part.modules())
        blocks = (module for module in modules if isinstance(module, BasicTransformerBlock))
        for place, block in enumerate(blocks):
            block.place = place
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        guidance: Tensor | None = None,
        pooled: Tensor | None = None,
        sizes: Tensor | None = None,
        reuse: Reuse | None = None,
        control: Sequence[Tensor] = (),
        image: ImagePrompt | None = None,
        maps: Sequence[Tensor] = (),
    ) -> Tensor:
        """Return noise, velocity or clean latents, as trained: [k·batch, out_channels, h, w].

        x: [batch, in_channels, h, w]. timestep: [batch], may be fractional and differ by row.
        context: text states [k·batch, tokens, cross_attention_dim], k in turn for each row of x.
        guidance: embedded guidance scale [batch, time_cond_proj_dim], for networks distilled with
        it. pooled: text states [k·batch, width] and sizes: [k·batch, numbers], for networks with an
        `addition_embed_type`. reuse: what is reused from an earlier call of the same rows.
        control: what is added to each skip connection that is computed, and to the middle block's
        state; see `ControlNetModel`. image: what it reads of pictures, one row for each of context.
        maps: what is added in each down block, and to the middle block's state; see `T2IAdapter`.
        """
        x, temb = self.begin(x, timestep, guidance, pooled, sizes)
        taken = reuse is not None and reuse.taken
        most = reuse.skips if reuse is not None and taken else None
        skips = self.skips(x, temb, context, reuse, most, image, maps)
        layers, first = self.config.layers_per_block + 1, 0
        if reuse is not None and taken:
            assert reuse.deep is not None
            x, first = reuse.deep, self.config.skips - reuse.skips
        else:
            x = skips[-1]
            if self.mid_block is not None:
                x = self.mid_block(x, temb, context, reuse, image)
                if len(maps) > len(self.down_blocks):
                    x = plus(x, maps[-1])
        if control:
            if not taken:
                x = plus(x, control[-1])
            skips = [plus(*both) for both in zip(skips, control, strict=False)]
        for i, up in enumerate(self.up_blocks):
            if first < layers * (i + 1):
                x = up(x, skips, temb, context, reuse, max(0, first - layers * i), image)
        return self.conv_out(self.conv_norm_out.silu(x, self.conv_out))


def resnet(cfg: UNetConfig, in_ch: int, out_ch: int, temb: int) -> ResnetBlock2D:
    """Return a resnet of this network. temb: width of the timestep's embedding."""
    return ResnetBlock2D(in_ch, out_ch, temb=temb, groups=cfg.norm_num_groups, eps=cfg.norm_eps)


def transformer(
    cfg: UNetConfig, channels: int, heads: int, depth: int, mid: bool = False
) -> Transformer2DModel:
    """Return a transformer of this network, of `depth` blocks. mid: that of the middle block."""
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
    """Return the sines of guidance scales, for networks distilled with guidance, as LCM is.

    float32 [len(scale), dim] (arXiv:2310.04378).
    """
    w = (torch.tensor(scale, dtype=torch.float32) - 1) * 1000
    return timestep_embedding(w, dim, flip=False, freq_shift=1)
