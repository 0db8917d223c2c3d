"""Reference pictures: what models read of them, without PyTorch and Pillow.

A model that edits reads the latents of whole pictures beside those that it denoises. Each family
brings a picture to a size of its own before it is encoded.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from safelight.errors import SafelightError
from safelight.request_pictures import REFERENCES
from safelight.sizes import allowed_size

if TYPE_CHECKING:
    from safelight.model import Model
    from safelight.request import Request
    from safelight.weights.plan import Plan

Size = tuple[int, int]
"""Width and height in pixels."""

AREA = 1024 * 1024
"""The most pixels that a family reads of a reference picture, or about so many."""


def within(size: Size, area: int, multiple: int) -> tuple[Size, Size]:
    """Return a size of at most so many pixels, and the one that is cut out of its middle.

    The sides of the second are multiples. That is what diffusers' pipelines of FLUX.2 do.
    """
    width, height = size
    if width * height > area:
        scale = math.sqrt(area / (width * height))
        width, height = int(width * scale), int(height * scale)
    return (width, height), (width // multiple * multiple, height // multiple * multiple)


def check_references(model: Model | Plan, request: Request) -> None:
    """Raise SafelightError if a model cannot read the reference pictures of a request.

    model: may be a Plan, read from headers alone, so that a server can refuse at once.
    """
    images, family = request.reference_images, model.family
    if not images:
        return
    if family.references == 0:
        raise _refused(
            f"are for models that edit pictures, as FLUX.2 klein and FLUX.1 Kontext do; with "
            f"{model.name} start from a picture: give it as image"
        )
    if len(images) > family.references:
        raise _refused(
            f"must be one picture for {model.name}, not {len(images)}: put them side by side into "
            "one"
            if family.references == 1
            else f"must be at most {family.references} for {model.name}, not {len(images)}"
        )
    if not getattr(model.configs.get("vae"), "has_encoder", True):
        raise _refused(
            f"need an encoder, and the tiny autoencoder of {model.name} has none: put its "
            "encoder's file beside it"
        )
    for image in images:
        if problem := family.reference_problem(image.size):
            raise _refused(f"has a picture of {image.width}x{image.height}: {problem}")


def size_to_draw(model: Model | Plan, request: Request) -> Size | None:
    """Return the size of the first reference picture as a model reads it.

    It is what is drawn if no size is asked for. None without a picture that the model can read.
    """
    images, family = request.reference_images, model.family
    if not images or not family.references or family.reference_problem(images[0].size):
        return None
    return allowed_size(family.reference_size(images[0].size))


def pixels_read(request: Request, model: Model | Plan | None = None) -> int:
    """Return how many pixels of reference pictures a step reads beside those it draws.

    model: None if it is not known: the number is about right then.
    """
    sizes = [image.size for image in request.reference_images]
    if model is None or not model.family.references:
        return sum(min(math.prod(size), AREA) for size in sizes)
    return sum(math.prod(model.family.reference_size(size)) for size in sizes)


def _refused(why: str) -> SafelightError:
    return SafelightError(f"{REFERENCES} {why}", field=REFERENCES)
