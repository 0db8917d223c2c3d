"""The second pass at a larger size, which web UIs call "hires fix", without PyTorch.

Models draw well at the size that they were trained on. So the picture is drawn there, enlarged, and
drawn once more from the enlarged picture, as image to image. `engine.core` draws both passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from safelight.errors import SafelightError
from safelight.families.references import size_to_draw
from safelight.pixels import resized
from safelight.sizes import MAX_SIDE, allowed_side
from safelight.upscaling.names import LANCZOS

if TYPE_CHECKING:
    from PIL.Image import Image

    from safelight.model import Model
    from safelight.request import Request
    from safelight.weights.plan import Plan

HIRES = ("hires_scale", "hires_upscaler", "hires_strength", "hires_steps")
"""The settings of the second pass."""

MOST_STEPS = 1000
"""The most hires_steps of a request."""


# --- what fits together --------------------------------------------------------------------------


def check_hires(request: Request) -> None:
    """Raise SafelightError if a request has a second pass beside what excludes one."""
    if request.hires_scale == 1:
        return
    for name in ("image", "unconditional"):
        if getattr(request, name):
            raise _refused(f"is for text to image: leave out {name}, or hires_scale")
    _enlarged(request, [side for side in (request.width, request.height) if side is not None])


def check_model(model: Model | Plan, request: Request) -> None:
    """Raise SafelightError if a model cannot draw the second pass of a request.

    model: may be a Plan, read from headers alone, so that a server can refuse at once.
    """
    if request.hires_scale == 1:
        return
    if model.family.fixed_size:
        raise _refused(f"is not for {model.name}, which draws one size: leave it out")
    vae = model.configs.get("vae")
    if not getattr(vae, "has_encoder", True):
        raise _refused(
            f"needs an encoder, and the tiny autoencoder of {model.name} has none: put its "
            "encoder's file beside it, or leave hires_scale out"
        )
    final_size(request, size_to_draw(model, request) or model.native_size)


@contextmanager
def about_second_pass() -> Iterator[None]:
    """Have errors within say that they are about the second pass, and name its settings."""
    try:
        yield
    except SafelightError as error:
        ours = {"strength": "hires_strength", "steps": "hires_steps"}
        field = ours.get(error.field or "", error.field)
        raise SafelightError(f"second pass: {error}", code=error.code, field=field) from None


def unused_hires(request: Request) -> list[str]:
    """Return warnings about settings of a second pass that is not drawn."""
    fields = type(request).model_fields
    names = HIRES[1:] if request.hires_scale == 1 else ()
    return [
        f"{name} does nothing without hires_scale: give one above 1 as well"
        for name in names
        if getattr(request, name) != fields[name].default
    ]


def _refused(why: str) -> SafelightError:
    return SafelightError(f"hires_scale {why}", field="hires_scale")


# --- the two passes ------------------------------------------------------------------------------


def final_size(request: Request, native: tuple[int, int]) -> tuple[int, int]:
    """Return width and height of the finished picture, of a request that is `fitted`.

    native: the width and height that are drawn if neither the request nor its pictures say others:
    the model's own, or `size_to_draw`. Raises SafelightError if the finished ones are too large.
    """
    sized = native if request.sized_by is None else request.sized_by.size
    size = request.width or sized[0], request.height or sized[1]
    width, height = size if request.hires_scale == 1 else _enlarged(request, size)
    return width, height


def _enlarged(request: Request, sides: tuple[int, ...] | list[int]) -> list[int]:
    """Return sides of the second pass, for those of the first."""
    scale = request.hires_scale
    if round(max(sides, default=0) * scale) > MAX_SIDE:
        shown, made = "x".join(map(str, sides)), "x".join(f"{side * scale:g}" for side in sides)
        raise _refused(
            f"{scale:g} makes {made} of {shown}; sides must be at most {MAX_SIDE}: "
            f"at most {math.floor(100 * MAX_SIDE / max(sides)) / 100:g} fits"
        )
    return [allowed_side(side * scale) for side in sides]


def first_pass(request: Request) -> Request:
    """Return the request of the first pass, the same without a second one. It is to be `fitted`."""
    return request if request.hires_scale == 1 else request.without(*HIRES)


def taken(steps: int, strength: float) -> int:
    """Return how many of some steps a strength leaves to take, as in Stable Diffusion's pipelines.

    Flow models count otherwise: see `Family.steps_taken`.
    """
    return max(1, min(int(steps * strength), steps))


def of_second_pass(request: Request) -> Request:
    """Return a request with strength and steps of its second pass, at the size of the first.

    Its steps are known. `Family.steps_taken` says how many of them are taken.
    """
    changed = {"strength": request.hires_strength, "steps": request.hires_steps or request.steps}
    return request.without(*HIRES).model_copy(update=changed)


def second_pass(request: Request, native: tuple[int, int], picture: Image | None = None) -> Request:
    """Return the request of the second pass of a resolved request. It is to be `fitted`.

    picture: of the first pass, enlarged already if a network did it. None: only what does not
    depend on pictures is needed. native: the model's own width and height.
    """
    width, height = final_size(request, native)
    changed: dict[str, Any] = {"width": width, "height": height}
    if picture is None:
        request = request.without_pictures()
    else:
        changed["image"] = resized(picture, (width, height))
    return of_second_pass(request).model_copy(update=changed)


# --- AUTOMATIC1111's terms -----------------------------------------------------------------------


def steps_to_take(steps: int, strength: float) -> int:
    """Return the fewest hires_steps of which a strength leaves so many to take; at most MOST_STEPS.

    AUTOMATIC1111 counts the steps that the second pass takes, of flow models too as `taken` does.
    """
    found = math.ceil(steps / strength)
    near = (found - 1, found)  # the quotient is rounded
    return min(next((n for n in near if int(n * strength) >= steps), found + 1), MOST_STEPS)


def second_steps(settings: Mapping[str, Any], steps: int) -> int:
    """Return how many steps the second pass of some settings takes, 0 without one.

    steps: those of the first pass. They are counted as by `taken`, for text of AUTOMATIC1111 and
    where the model is not known.
    """
    if settings.get("hires_scale", 1) == 1:
        return 0
    return taken(settings.get("hires_steps") or steps, settings["hires_strength"])


def infotext(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return AUTOMATIC1111's pairs for a recipe's settings; empty without a second pass."""
    taken = second_steps(settings, settings.get("steps") or 1)
    if not taken:
        return {}
    return {
        "Denoising strength": settings["hires_strength"],
        "Hires upscale": settings["hires_scale"],
        "Hires steps": taken,
        "Hires upscaler": settings.get("hires_upscaler", LANCZOS),
    }
