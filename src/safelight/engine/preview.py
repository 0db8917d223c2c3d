"""Small previews of latents, in a fraction of the time that decoding the picture takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from safelight.engine.job import cut, decode
from safelight.picture import from_tensor

if TYPE_CHECKING:
    from safelight.model import Model

MAX_DECODED = 256
"""Longest side in pixels of a preview that the model's own autoencoder decodes."""

MAX_TINY = 512
"""The same for a tiny autoencoder."""

ENLARGED = 4
"""Pixels per latent, along each side, of a preview made by the table of colours."""


def preview(model: Model, latents: Tensor, size: tuple[int, int] | None = None) -> Image.Image:
    """Return latents, float32 [1, channels, h, w], as a small picture.

    size: width and height of the finished picture, if the latents cover more; None: show them all.

    The tiny autoencoder decodes it if one was loaded for previews. Else the family's table of
    latents to colours makes it, or if there is none, the model's own autoencoder. Large latents are
    averaged down before they are decoded.
    """
    return cut(model, _shown(model, latents), latents, size)


def decodes_previews(model: Model) -> bool:
    """Return whether previews are decoded by the model's own autoencoder."""
    return model.preview_vae is None and model.family.latent_rgb is None


def _shown(model: Model, latents: Tensor) -> Image.Image:
    table = model.family.latent_rgb
    with torch.inference_mode():
        if model.preview_vae is not None:
            return decode_tiny(
                model, _smaller(latents, MAX_TINY // model.preview_vae.config.factor)
            )
        if table is not None:
            return from_tensor(_colours(latents, table))
        if model.vae is not None:
            latents = _smaller(latents, MAX_DECODED // model.vae.config.factor)
        return decode(model, latents)


def decode_tiny(model: Model, latents: Tensor) -> Image.Image:
    """Return the picture of latents, [1, channels, h, w], by the tiny autoencoder for previews."""
    vae = model.preview_vae
    return from_tensor(vae.decode(vae.config.unscale(latents).to(model.dtype)).float())


def _smaller(latents: Tensor, side: int) -> Tensor:
    largest = max(latents.shape[-2:])
    return (
        latents if largest <= side else F.avg_pool2d(latents, -(-largest // side), ceil_mode=True)
    )


def _colours(latents: Tensor, table: tuple[tuple[float, ...], ...]) -> Tensor:
    """Return pixels from −1 to 1, [1, 3, h, w]: a linear map of each latent's channels.

    table: weights of red, green and blue for each channel, and last the colour of latents of 0.
    """
    *rows, bias = (latents.new_tensor(row) for row in table)
    pixels = torch.einsum("bchw,cr->brhw", latents, torch.stack(rows)) + bias.view(1, 3, 1, 1)
    return F.interpolate(pixels, scale_factor=ENLARGED, mode="bilinear").clamp(-1, 1)
