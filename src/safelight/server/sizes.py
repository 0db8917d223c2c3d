"""Draw at a size that the model can, and enlarge: for clients that ask every model for 512x512."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from PIL import Image

from safelight.families.references import size_to_draw
from safelight.hires import HIRES, final_size
from safelight.picture import encode
from safelight.recipe import enlarge, png_texts, read_recipe
from safelight.request import Request
from safelight.sizes import drawable_size, is_small, size_of

if TYPE_CHECKING:
    from safelight.server.hub import Hub
    from safelight.weights.plan import Plan


def fit_to_model(
    request: Request, native: tuple[int, int], plan: Plan | None = None
) -> tuple[Request, tuple[int, int] | None]:
    """Return a request that a model can draw, and the size to enlarge its pictures to.

    The size is None, and the request unchanged, if the model draws the requested size; see
    `drawable_size`. Without a requested size, a picture that is given asks for its own. native: the
    width and height that the model draws best. plan: the model's, None if it is not known: the
    first reference picture asks for its size, too. A small model gets no second pass at a size that
    it cannot draw: its pictures are enlarged alone.
    """
    unasked = (None if plan is None else size_to_draw(plan, request)) or native
    own = unasked if request.sized_by is None else request.sized_by.size
    if request.sized_by is not None and (request.width is None) != (request.height is None):
        return request, None  # the engine keeps the picture's proportions
    size = request.width or own[0], request.height or own[1]
    whole = final_size(request, unasked)
    if request.hires_scale > 1 and is_small(native) and drawable_size(whole, native) != whole:
        request, size = request.without(*HIRES), whole
    drawn = drawable_size(size, native)
    if drawn == size:
        return request, None
    # Of a picture that is cropped to its mask, only the part that is drawn has this size.
    return request.replace(width=drawn[0], height=drawn[1]), None if request.is_cropped else whole


def enlarging_note(
    asked: Request,
    request: Request,
    size: tuple[int, int] | None,
    model: str,
    native: tuple[int, int],
) -> list[str]:
    """Return the warning about a picture that is drawn smaller than requested, or no warning.

    asked: what `fit_to_model` was given. request, size: what it returned.
    """
    if size is None:
        return []
    once = "" if request.hires_scale == asked.hires_scale else "in one pass "
    drawn = f"{once}at {request.width}x{request.height}"
    if request.hires_scale > 1:
        drawn += ", again at {}x{},".format(*final_size(request, native))
    return [
        f"{model} draws {native[0]}x{native[1]}: drawn {drawn} and enlarged to {size[0]}x{size[1]}"
    ]


def picture_at(
    hub: Hub, picture_id: str, size: tuple[int | None, int | None] | None
) -> bytes | None:
    """Return the PNG of a finished picture at a size, with its recipe; None if it is gone.

    size: width and height; None for one side keeps the picture's proportions. Without a size, the
    PNG is as it was saved. To be called in a thread.
    """
    png = hub.picture_bytes(picture_id)
    if png is None or size is None:
        return png
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        wanted = size_of(image.size, *size)
        if image.size == wanted:
            return png
        picture, recipe = enlarge(image, read_recipe(png), wanted)
        return encode(picture, "PNG", png_texts(recipe))
