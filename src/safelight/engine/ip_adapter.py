"""The picture that is a prompt of a model, read through its IP-Adapter (arXiv:2308.06721)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from safelight.controls import in_bounds
from safelight.families.base import Conditioning
from safelight.nets.image_prompt import ImagePrompt, joined
from safelight.picture import to_tensor
from safelight.pixels import centre_crop, picture_sha256

if TYPE_CHECKING:
    from safelight.families.conditioning import Cached
    from safelight.model import Model
    from safelight.request import Request

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Of the three colours, from 0 to 1, in the pictures that CLIP was trained on."""

_WIDEST = 16
"""The most short sides that are resized of a picture's long side; only one of them is seen."""


@dataclass(frozen=True, eq=False)
class PicturePrompt:
    """What the steps of a picture read of its ip_adapter_image.

    read: what is read at a step with guidance, a row for each evaluation; of several, the first is
    beside the negative prompt. Pictures with the same prompt share it, as it may take megabytes.
    request: says how much it counts, and when.
    """

    read: ImagePrompt
    request: Request

    def rows(self, evaluations: int) -> ImagePrompt:
        """Return what is read in all evaluations, or in the one of a step without guidance."""
        read = self.read if evaluations == len(self.read) else self.read.last()
        return read.scaled(self.request.ip_adapter_scale)


def counts(request: Request, row: int, rows: int) -> bool:
    """Return whether ip_adapter_image counts at a row: if all of it is in bounds."""
    within = in_bounds(request.ip_adapter_start, request.ip_adapter_end, row, rows)
    return within and request.ip_adapter_scale != 0


def read_prompted(
    model: Model, request: Request, evaluations: int, cached: Cached | None = None
) -> PicturePrompt | None:
    """Return what is read of a resolved request's ip_adapter_image; None without one.

    evaluations: of the network at a step with guidance. cached: where it is kept for other requests
    with the same picture.
    """
    image = request.ip_adapter_image
    if image is None:
        return None
    size = model.image_encoder.config.image_size
    digest = picture_sha256(image)

    def kept(key: tuple[str | int, ...], make: Callable[[], ImagePrompt]) -> ImagePrompt:
        def made() -> Conditioning:
            return Conditioning(image=make())

        found = (made() if cached is None else cached(("ip_adapter_image", *key), made)).image
        assert found is not None
        return found

    def positive() -> ImagePrompt:
        return kept((digest,), lambda: _read(model, seen_pixels(image, size)))

    def all_rows() -> ImagePrompt:
        negative = kept((), lambda: _read(model, None))
        return joined([negative, *[positive()] * (evaluations - 1)])

    read = positive() if evaluations == 1 else kept((digest, evaluations), all_rows)
    return PicturePrompt(read, request.without_pictures())


def _read(model: Model, pixels: Tensor | None) -> ImagePrompt:
    """Return what the adapter says of a picture, or of none, as diffusers does it.

    pixels: see `seen_pixels`. None: a base adapter reads zeros in place of an embedding; others
    read the encoder's states of a picture of zeros.
    """
    encoder, adapter = model.image_encoder, model.ip_adapter
    size = encoder.config.image_size
    like = {"device": model.device, "dtype": model.dtype}
    base = adapter.config.kind == "base"
    if pixels is None and base:
        return adapter(torch.zeros(1, encoder.config.projection_dim, **like))
    pixels = torch.zeros(1, 3, size, size) if pixels is None else pixels
    return adapter((encoder if base else encoder.states)(pixels.to(**like)))


def seen_pixels(image: Image.Image, size: int) -> Tensor:
    """Return a picture as CLIP's image encoder sees it, float32 [1, 3, size, size].

    The short side is resized to `size`, the middle is cut out, and the colours are brought to mean
    0 and deviation 1, as transformers' CLIPImageProcessor does.
    """
    short = min(image.size)
    most = _WIDEST * short
    if max(image.size) > most:  # an endless strip would take endless memory
        image = centre_crop(image, (min(image.width, most), min(image.height, most)))
    width, height = (int(size * side / short) for side in image.size)
    image = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    pixels = to_tensor(centre_crop(image, (size, size))).add(1).div(2)
    mean, deviation = (torch.tensor(t).view(1, 3, 1, 1) for t in (MEAN, DEVIATION))
    return (pixels - mean) / deviation
