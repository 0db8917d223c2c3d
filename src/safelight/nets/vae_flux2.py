"""AutoencoderKLFlux2: the autoencoder of FLUX.2.

It is an AutoencoderKL (`nets.vae`). A latent as the denoiser sees it is a patch of 2×2 of its
latents, normed by the running mean and variance of a batch norm (arXiv:1502.03167).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.nets.vae import AutoencoderKL, Decoder, VAEConfig

PATCH = 2
"""The side of a patch."""


@dataclass(frozen=True)
class Flux2VAEConfig(VAEConfig):
    """The keys of vae/config.json that we build from, with diffusers' defaults.

    latent_channels are those before patches are made. decoder_block_out_channels: the widths of a
    decoder that differ from the encoder's. The scaling_factor is not read.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_block_out_channels: tuple[int, ...] | None = None
    layers_per_block: int = 2
    latent_channels: int = 32
    batch_norm_eps: float = 1e-4

    _inert: ClassVar = {
        "act_fn": ("silu", "swish"),
        "patch_size": ([PATCH, PATCH],),
        "latents_mean": (None,),
        "latents_std": (None,),
        "shift_factor": (None, 0, 0.0),
    }

    @property
    def factor(self) -> int:
        """Side of a picture divided by the side of its latents, as the denoiser sees them."""
        return PATCH * 2 ** (len(self.block_out_channels) - 1)

    @property
    def channels(self) -> int:
        """The numbers of a latent as the denoiser sees it."""
        return PATCH**2 * self.latent_channels

    def scale(self, latents: Tensor) -> Tensor:
        """Return latents as they are: the network norms them."""
        return latents

    def unscale(self, latents: Tensor) -> Tensor:
        """Return latents as they are: the network norms them."""
        return latents

    def _validate(self) -> None:
        super()._validate()
        widths = self.decoder_block_out_channels
        if widths is None:
            return
        if len(widths) != len(self.block_out_channels):
            self._refuse("encoder and decoder have different numbers of levels")
        if any(width % self.norm_num_groups for width in widths):
            self._refuse("channels do not divide into norm groups")


class Statistics(nn.Module):
    """Mean and variance of each of a latent's numbers, as they were in training."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def norm(self, x: Tensor) -> Tensor:
        """Return latents, [batch, channels, h, w], with a mean of 0 and a deviation of 1."""
        mean, std = self._numbers()
        return ((x.float() - mean) / std).to(x.dtype)

    def unnorm(self, x: Tensor) -> Tensor:
        """Return the latents of normed ones."""
        mean, std = self._numbers()
        return (x.float() * std + mean).to(x.dtype)

    def _numbers(self) -> tuple[Tensor, Tensor]:
        mean, var = (one.float().view(1, -1, 1, 1) for one in (self.running_mean, self.running_var))
        return mean, torch.sqrt(var + self.eps)


class AutoencoderKLFlux2(AutoencoderKL):
    """The encoder from pixels to latents as FLUX.2's denoiser sees them, and the decoder back."""

    samples: ClassVar[bool] = False
    """Whether latents of `encode` are sampled. diffusers' pipelines take their mean."""

    def __init__(self, config: Flux2VAEConfig) -> None:
        super().__init__(config)
        if config.decoder_block_out_channels is not None:
            widths = config.decoder_block_out_channels
            self.decoder = Decoder(replace(config, block_out_channels=widths))
        self.bn = Statistics(config.channels, config.batch_norm_eps)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean of the latents, normed, and a standard deviation of 0.

        Each is [batch, channels, h/factor, w/factor]. pixels: [batch, 3, h, w] in −1..1.
        """
        mean, _ = super().encode(pixels)
        latents = self.bn.norm(F.pixel_unshuffle(mean, PATCH))
        return latents, torch.zeros_like(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels around −1..1, [batch, 3, h·factor, w·factor].

        latents: [batch, channels, h, w], normed.
        """
        return super().decode(F.pixel_shuffle(self.bn.unnorm(latents), PATCH))
