"""The reference pictures of a request, as latents that the network reads beside its own."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from safelight.engine.inputs import covering
from safelight.families.conditioning import Conditioning
from safelight.pixels import centre_crop, picture_sha256, resized

if TYPE_CHECKING:
    from safelight.families.conditioning import Cached
    from safelight.families.references import Size
    from safelight.model import Model
    from safelight.request import Request


def read_references(
    model: Model, request: Request, cached: Cached | None = None
) -> tuple[Tensor, ...]:
    """Return the latents of a resolved request's reference pictures, each [1, channels, h, w].

    cached: where they are kept for other requests with the same picture.
    """
    found: list[Tensor] = []
    for image in request.reference_images:
        make = partial(_read, model, image)
        if cached is None:
            found += make().references
        else:
            found += cached(("reference", picture_sha256(image)), make).references
    return tuple(found)


def middle(image: Image.Image, whole: Size, part: Size) -> Image.Image:
    """Return the middle of a picture that is brought to a whole size. part: size of the middle."""
    return centre_crop(image if image.size == whole else resized(image, whole), part)


def latents_read(model: Model, request: Request) -> int:
    """Return how many numbers the latents of a request's reference pictures have."""
    family = model.family
    sizes = (family.reference_size(image.size) for image in request.reference_images)
    return sum(prod(family.latent_shape(model, size)) for size in sizes)


def _read(model: Model, image: Image.Image) -> Conditioning:
    """Return the latents of a picture: their mean, as diffusers takes it."""
    family = model.family
    pixels = covering(model, middle(image, *family.reference_sizes(image.size)))
    shape = family.latent_shape(model, (pixels.shape[-1], pixels.shape[-2]))
    latents = family.encode_picture(model, pixels, torch.zeros(shape, device=model.device))
    return Conditioning(references=(latents.to(model.dtype),))
