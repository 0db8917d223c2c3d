"""AutoencoderTiny: pictures to latents and back with 2.4 million weights.

TAESD, github.com/madebyollin/taesd. It imitates an AutoencoderKL in a fraction of the time, and
loses fine detail. Its latents have the scale that the denoiser sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.nets.config import NetConfig
from safelight.nets.layers import Conv2d, EnlargingConv2d


@dataclass(frozen=True)
class TinyConfig(NetConfig):
    """The keys of config.json that we build from, with diffusers' defaults."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    scaling_factor: float = 1.0
    has_encoder: bool = True

    _inert: ClassVar = {
        "act_fn": ("relu",),
        "upsample_fn": ("nearest",),
        "upsampling_scaling_factor": (2,),
        "shift_factor": (0.0, 0, None),
    }

    @property
    def factor(self) -> int:
        """Side of a picture divided by the side of its latents."""
        return 2 ** (len(self.decoder_block_out_channels) - 1)

    @property
    def depth(self) -> int:
        """Number of blocks in both networks, for the bound on layers."""
        return sum(self.num_encoder_blocks) + sum(self.num_decoder_blocks)

    def scale(self, latents: Tensor) -> Tensor:
        """Return latents as the denoiser sees them, from those of the encoder."""
        return latents * self.scaling_factor

    def unscale(self, latents: Tensor) -> Tensor:
        """Return latents as the decoder reads them, from those of the denoiser."""
        return latents / self.scaling_factor

    def _validate(self) -> None:
        widths = self.encoder_block_out_channels, self.decoder_block_out_channels
        blocks = self.num_encoder_blocks, self.num_decoder_blocks
        if len({*map(len, widths), *map(len, blocks)}) > 1:
            self._refuse("encoder and decoder have different numbers of levels")
        if any(len(set(each)) > 1 for each in widths):
            self._refuse("levels of different widths are not supported")


class Block(nn.Module):
    """Three convolutions with a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        convs = [Conv2d(width, width, 3, padding=1) for _ in range(3)]
        # The numbers of checkpoints, which also count the activations between them.
        self.conv = nn.ModuleDict(dict(zip("024", convs, strict=True)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv["2"](self.conv["0"](x, relu=True), relu=True)
        return self.conv["4"](h, plus=x, consume=True, relu=True)


class Encoder(nn.Module):
    """From pixels in 0..1, [batch, 3, h, w], to latents."""

    def __init__(self, cfg: TinyConfig) -> None:
        super().__init__()
        width = cfg.encoder_block_out_channels[0]
        layers: list[nn.Module] = []
        for i, blocks in enumerate(cfg.num_encoder_blocks):
            if i == 0:
                layers.append(nn.Conv2d(cfg.in_channels, width, 3, padding=1))
            else:
                layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False))
            layers += [Block(width) for _ in range(blocks)]
        layers.append(nn.Conv2d(width, cfg.latent_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Decoder(nn.Module):
    """From latents to pixels around 0..1, [batch, 3, h·factor, w·factor]."""

    def __init__(self, cfg: TinyConfig) -> None:
        super().__init__()
        width, last = cfg.decoder_block_out_channels[0], len(cfg.num_decoder_blocks) - 1
        layers: list[nn.Module] = [nn.Conv2d(cfg.latent_channels, width, 3, padding=1), nn.ReLU()]
        for i, blocks in enumerate(cfg.num_decoder_blocks):
            layers += [Block(width) for _ in range(blocks)]
            if i < last:
                # Identity, as checkpoints count the upsampling as a layer of its own.
                layers += [nn.Identity(), EnlargingConv2d(width, width, bias=False)]
        layers.append(nn.Conv2d(width, cfg.out_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        # Latents beyond ±3 are rare; training limited them softly in this way.
        return self.layers(torch.tanh(z / 3) * 3)


class AutoencoderTiny(nn.Module):
    """The tiny autoencoder. With config.has_encoder False it only decodes, for previews."""

    samples: ClassVar[bool] = False
    """Whether latents of `encode` are sampled. They are not: their standard deviation is 0."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config) if config.has_encoder else None
        self.decoder = Decoder(config)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the unscaled latents, and their standard deviation of 0.

        pixels: [batch, 3, h, w] in −1..1. Latents: [batch, latent_channels, h/factor, w/factor].
        Raises SafelightError if there is no encoder.
        """
        if self.encoder is None:
            raise SafelightError(
                "the tiny autoencoder has no encoder, which a picture to start from needs: put its "
                "encoder's file beside it"
            )
        latents = self.encoder((pixels + 1) / 2)
        return latents, torch.zeros_like(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels around −1..1, [batch, 3, h·factor, w·factor].

        latents: [batch, latent_channels, h, w], unscaled.
        """
        return self.decoder(latents) * 2 - 1
