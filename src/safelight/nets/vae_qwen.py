"""AutoencoderKLQwenImage: the autoencoder of Qwen-Image, for one picture.

It is a video autoencoder (arXiv:2503.20314) with causal 3D convolutions. Before a single frame
there are only zeros, so only the last slice in time of each kernel counts, and the layers that
change the number of frames do nothing. Here it is built of 2D convolutions with those slices as
weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.nets.config import Channels, NetConfig
from safelight.nets.layers import (
    Conv2d,
    Downsample2D,
    Pointwise,
    Upsample2D,
    as_map,
    as_tokens,
    attend,
)

# Those of AutoencoderKLQwenImage in diffusers, which the published model has.
_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


@dataclass(frozen=True)
class QwenVAEConfig(NetConfig):
    """The keys of vae/config.json that we build from, with diffusers' defaults.

    temperal_downsample, which says what levels change the number of frames, is not read.
    """

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    latents_mean: Channels = _MEAN
    latents_std: Channels = _STD

    _inert: ClassVar = {"attn_scales": ([],), "input_channels": (3,)}

    # As `nets.vae` calls the same numbers.

    @property
    def latent_channels(self) -> int:
        return self.z_dim

    @property
    def layers_per_block(self) -> int:
        return self.num_res_blocks

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        return tuple(self.base_dim * times for times in self.dim_mult)

    @property
    def factor(self) -> int:
        """Side of a picture divided by the side of its latents."""
        return 2 ** (len(self.dim_mult) - 1)

    def scale(self, latents: Tensor) -> Tensor:
        """Return latents as the denoiser sees them, from those of the encoder."""
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def unscale(self, latents: Tensor) -> Tensor:
        """Return latents as the decoder reads them, from those of the denoiser."""
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, like: Tensor) -> Iterator[Tensor]:
        return (like.new_tensor(v).view(1, -1, 1, 1) for v in (self.latents_mean, self.latents_std))

    def _validate(self) -> None:
        if {len(self.latents_mean), len(self.latents_std)} != {self.z_dim}:
            self._refuse("latents_mean and latents_std need a value for each channel")
        if any(width % 2 for width in self.block_out_channels):
            self._refuse("channels do not divide by two, as upsampling needs it")


class ChannelNorm(nn.Module):
    """x divided by the root mean square of its channels, times a weight (arXiv:1910.07467).

    x: [batch, channels, h, w]. The mean is taken in float32.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
        factor = x.shape[1] ** 0.5 / norm.clamp_min(1e-12)
        return (x * factor).to(x.dtype) * self.gamma[:, None, None]


class ResnetBlock(nn.Module):
    """Norm, SiLU and convolution, twice, with a shortcut."""

    def __init__(self, in_ch: int, out_ch: int) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(in_ch)
        self.conv1 = Conv2d(in_ch, out_ch, 3, padding=1)
        self.norm2 = ChannelNorm(out_ch)
        self.conv2 = Conv2d(out_ch, out_ch, 3, padding=1)
        self.conv_shortcut = None if in_ch == out_ch else Pointwise(in_ch, out_ch)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm2(self.conv1(F.silu(self.norm1(x)))))
        # Nothing reads x afterwards: the sum may use its memory.
        short = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return self.conv2(h, plus=short, consume=True)


class AttentionBlock(nn.Module):
    """Self-attention of one head over the places of a map, with norm and shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.to_qkv = Pointwise(channels, 3 * channels)
        self.proj = Pointwise(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv.tokens(as_tokens(self.norm(x)))[:, None].chunk(3, dim=-1)
        return as_map(self.proj.tokens(attend(q, k, v)[:, 0], as_tokens(x)), x)


class MidBlock(nn.Module):
    """Two resnets around self-attention."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([AttentionBlock(channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class UpBlock(nn.Module):
    """Resnets, then upsampling to half as many channels, except at the last level."""

    def __init__(self, cfg: QwenVAEConfig, i: int) -> None:
        super().__init__()
        widths = cfg.block_out_channels[::-1]
        in_ch, out_ch = widths[max(i - 1, 0)] // (2 if i else 1), widths[i]
        self.resnets = nn.ModuleList(
            ResnetBlock(out_ch if j else in_ch, out_ch) for j in range(cfg.num_res_blocks + 1)
        )
        self.upsamplers = None
        if i < len(widths) - 1:
            self.upsamplers = nn.ModuleList([Upsample2D(out_ch, out_ch // 2)])

    def layers(self) -> Iterator[nn.Module]:
        """Return the layers in the order in which they run, see `nets.vae.UpBlock`."""
        yield from self.resnets
        if self.upsamplers is not None:
            yield from self.upsamplers


class Encoder(nn.Module):
    """From pixels to means and log variances, [batch, 2·z_dim, h/factor, w/factor]."""

    def __init__(self, cfg: QwenVAEConfig) -> None:
        super().__init__()
        widths = cfg.block_out_channels
        self.conv_in = nn.Conv2d(3, cfg.base_dim, 3, padding=1)
        # diffusers numbers resnets and downsamplers of all levels in one list.
        self.down_blocks = nn.ModuleList(_down_blocks(cfg))
        self.mid_block = MidBlock(widths[-1])
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * cfg.z_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(self.mid_block(x))))


def _down_blocks(cfg: QwenVAEConfig) -> Iterator[nn.Module]:
    width = cfg.base_dim
    for i, out_ch in enumerate(cfg.block_out_channels):
        for _ in range(cfg.num_res_blocks):
            yield ResnetBlock(width, out_ch)
            width = out_ch
        if i < len(cfg.dim_mult) - 1:
            yield Downsample2D(out_ch, padding=0)


class Decoder(nn.Module):
    """From latents to pixels, [batch, 3, h·factor, w·factor]."""

    def __init__(self, cfg: QwenVAEConfig) -> None:
        super().__init__()
        widths = cfg.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(cfg.z_dim, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0])
        self.up_blocks: Any = nn.ModuleList(UpBlock(cfg, i) for i in range(len(widths)))
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            for layer in block.layers():
                x = layer(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoencoderKLQwenImage(nn.Module):
    """The encoder from pixels to latents, and the decoder back."""

    samples: ClassVar[bool] = True
    """Whether latents of `encode` are sampled from their mean and standard deviation."""

    def __init__(self, config: QwenVAEConfig) -> None:
        super().__init__()
        self.config = config
        z = config.z_dim
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv2d(z, z, 1)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the latents, unscaled.

        Each is [batch, z_dim, h/factor, w/factor]. pixels: [batch, 3, h, w] in −1..1.
        """
        mean, logvar = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
        # The bound is part of the trained model's definition, not only a guard.
        return mean, torch.exp(0.5 * logvar.clamp(-30.0, 20.0))

    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels around −1..1, [batch, 3, h·factor, w·factor].

        latents: [batch, z_dim, h, w], unscaled.
        """
        return self.decoder(self.post_quant_conv(latents))
