"""The base of the families that denoise the latents of an autoencoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelight.families.base import Family

if TYPE_CHECKING:
    from torch import Tensor

    from safelight.model import Model


class AutoencodedFamily(Family):
    """A family whose pictures are latents of its part "vae"."""

    def factor(self, model: Model) -> int:
        return model.vae.config.factor

    def encode_picture(self, model: Model, pixels: Tensor, noise: Tensor) -> Tensor:
        config = model.vae.config
        mean, std = model.vae.encode(pixels.to(self.dtype_of("vae", config, model.dtype)))
        return config.scale(mean.float() + std.float() * noise)

    def decode_latents(self, model: Model, latents: Tensor) -> Tensor:
        config = model.vae.config
        latents = config.unscale(latents)
        return model.vae.decode(latents.to(self.dtype_of("vae", config, model.dtype))).float()
