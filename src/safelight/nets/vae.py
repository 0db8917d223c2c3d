"""AutoencoderKL: pictures to latents and back (arXiv:2112.10752, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from safelight.nets.config import NetConfig
from safelight.nets.layers import (
    Downsample2D,
    GroupNorm,
    ResnetBlock2D,
    SpatialAttention,
    Upsample2D,
)


@dataclass(frozen=True)
class VAEConfig(NetConfig):
    """The keys of vae/config.json that we build from, with diffusers' defaults."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    force_upcast: bool = True

    _inert: ClassVar = {
        "act_fn": ("silu", "swish"),
    }

    @property
    def factor(self) -> int:
        """Side of a picture divided by the side of its latents."""
        return 2 ** (len(self.block_out_channels) - 1)

    def scale(self, latents: Tensor) -> Tensor:
        """Return latents as the denoiser sees them, from those of the encoder."""
        mean, std = self._statistics(latents)
        return (latents - mean) * (self.scaling_factor / std)

    def unscale(self, latents: Tensor) -> Tensor:
        """Return latents as the decoder reads them, from those of the denoiser."""
        mean, std = self._statistics(latents)
        return latents * std / self.scaling_factor + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Return mean and standard deviation of each channel, by default the shift and 1."""
        if self.latents_mean is None or self.latents_std is None:
            return self.shift_factor or 0.0, 1.0
        mean, std = (like.new_tensor(v) for v in (self.latents_mean, self.latents_std))
        return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)

    def _validate(self) -> None:
        if (self.latents_mean is None) != (self.latents_std is None):
            self._refuse("latents_mean and latents_std come together")
        if self.latents_mean is not None and self.shift_factor:
            self._refuse("latents_mean and shift_factor exclude each other")
        for values in (self.latents_mean, self.latents_std):
            if values is not None and len(values) != self.latent_channels:
                self._refuse("latents_mean and latents_std need a value for each channel")
        if any(c % self.norm_num_groups for c in self.block_out_channels):
            self._refuse("channels do not divide into norm groups")


def resnet(cfg: VAEConfig, in_ch: int, out_ch: int) -> ResnetBlock2D:
    """Return a resnet of this network, without a timestep."""
    return ResnetBlock2D(
        in_ch, out_ch, temb=None, groups=cfg.norm_num_groups, eps=1e-6, consumes=True
    )


class MidBlock(nn.Module):
    """Two resnets around self-attention, if the config has it."""

    def __init__(self, cfg: VAEConfig) -> None:
        super().__init__()
        ch = cfg.block_out_channels[-1]
        self.resnets = nn.ModuleList(resnet(cfg, ch, ch) for _ in range(2))
        self.attentions = None
        if cfg.mid_block_add_attention:
            self.attentions = nn.ModuleList(
                [SpatialAttention(ch, 1, groups=cfg.norm_num_groups, eps=1e-6)]
            )

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        if self.attentions is not None:
            x = self.attentions[0](x)
        return self.resnets[1](x)


class DownBlock(nn.Module):
    """Resnets, then downsampling, except at the last level."""

    def __init__(self, cfg: VAEConfig, i: int) -> None:
        super().__init__()
        out_ch, in_ch = cfg.block_out_channels[i], cfg.block_out_channels[max(i - 1, 0)]
        self.resnets = nn.ModuleList(
            resnet(cfg, in_ch if j == 0 else out_ch, out_ch) for j in range(cfg.layers_per_block)
        )
        self.downsamplers = None
        if i < len(cfg.block_out_channels) - 1:
            self.downsamplers = nn.ModuleList([Downsample2D(out_ch, padding=0)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        return x if self.downsamplers is None else self.downsamplers[0](x)


class UpBlock(nn.Module):
    """Resnets, then upsampling, except at the last level."""

    def __init__(self, cfg: VAEConfig, i: int) -> None:
        super().__init__()
        widths = cfg.block_out_channels[::-1]
        out_ch, in_ch = widths[i], widths[max(i - 1, 0)]
        self.resnets = nn.ModuleList(
            resnet(cfg, in_ch if j == 0 else out_ch, out_ch)
            for j in range(cfg.layers_per_block + 1)
        )
        self.upsamplers = None
        if i < len(widths) - 1:
            self.upsamplers = nn.ModuleList([Upsample2D(out_ch)])

    def layers(self) -> Iterator[nn.Module]:
        """Return the layers in the order in which they run.

        The decoder runs them itself, so that nothing else keeps a feature map alive: the last ones
        are the largest.
        """
        yield from self.resnets
        if self.upsamplers is not None:
            yield from self.upsamplers


class Encoder(nn.Module):
    """From pixels to means and log variances, [batch, 2·latent_channels, h/factor, w/factor]."""

    def __init__(self, cfg: VAEConfig) -> None:
        super().__init__()
        widths = cfg.block_out_channels
        self.conv_in = nn.Conv2d(cfg.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(DownBlock(cfg, i) for i in range(len(widths)))
        self.mid_block = MidBlock(cfg)
        self.conv_norm_out = GroupNorm(cfg.norm_num_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * cfg.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out.silu(self.mid_block(x), self.conv_out))


class Decoder(nn.Module):
    """From latents to pixels, [batch, 3, h·factor, w·factor]."""

    def __init__(self, cfg: VAEConfig) -> None:
        super().__init__()
        widths = cfg.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(cfg.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(cfg)
        self.up_blocks: Any = nn.ModuleList(UpBlock(cfg, i) for i in range(len(widths)))
        self.conv_norm_out = GroupNorm(cfg.norm_num_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], cfg.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            for layer in block.layers():
                x = layer(x)
        return self.conv_out(self.conv_norm_out.silu(x, self.conv_out))


class AutoencoderKL(nn.Module):
    """The encoder from pixels to latents, and the decoder back."""

    samples: ClassVar[bool] = True
    """Whether latents of `encode` are sampled from their mean and standard deviation."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        z = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(z, z, 1) if config.use_post_quant_conv else None

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the latents, unscaled.

        Each is [batch, latent_channels, h/factor, w/factor]. pixels: [batch, 3, h, w] in −1..1.
        """
        moments = self.encoder(pixels)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = moments.chunk(2, dim=1)
        # The bound is part of the trained model's definition, not only a guard.
        return mean, torch.exp(0.5 * logvar.clamp(-30.0, 20.0))

    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels around −1..1, [batch, 3, h·factor, w·factor].

        latents: [batch, latent_channels, h, w], unscaled.
        """
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)
