"""The web UI's "hires fix": what a body asks of the second pass."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from safelight.errors import SafelightError
from safelight.hires import steps_to_take, taken
from safelight.request import Request
from safelight.sampler_names import sampler_and_schedule
from safelight.server.apis.sdapi_bodies import Asked, TextToImage
from safelight.server.apis.sdapi_names import find_scheduler
from safelight.server.sizes import fit_to_model
from safelight.sizes import MAX_SIDE, allowed_side, drawable_size, is_small
from safelight.upscaling.names import LANCZOS, is_lanczos

if TYPE_CHECKING:
    from safelight.server.names import Names
    from safelight.weights.plan import Plan

SAME = (None, "", "Use same sampler", "Use same scheduler", "Use same checkpoint")
"""The web UI's words for what the first pass has."""

MOST_TIMES = 4
"""The largest hires_scale."""


def second_pass(
    body: TextToImage,
    size: tuple[int | None, int | None],
    plan: Plan | None,
    sampler: str | None,
    steps: int | None,
) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of a body's second pass, and warnings; nothing without enable_hr.

    size: width and height of the first pass, None for the model's own. sampler, steps: of the first
    pass. plan, sampler and steps are None if only another machine knows the model's.
    """
    if not body.enable_hr:
        return {}, []
    warnings = _ignored(body, sampler)
    native = (None, None) if plan is None else plan.native_size
    width, height = size[0] or native[0], size[1] or native[1]
    scale, why = body.hr_scale, "hr_scale is 1"
    if body.hr_resize_x or body.hr_resize_y:
        if width is None or height is None:
            warnings.append("hr_resize: needs width and height here; hr_scale is used")
        else:
            scale, more = _scale(body, (width, height))
            warnings += more
            why = "hr_resize_x and hr_resize_y are the size of the first"
            if scale > MOST_TIMES:
                return _enlarged(body, (width, height), scale, plan), warnings
    if scale == 1:
        return {}, [*warnings, f"enable_hr: drawn in one pass, as {why}"]
    settings: dict[str, Any] = {"hires_scale": scale}
    # Pictures of a small model may be enlarged alone: strength and steps say nothing then. Others
    # may read reference pictures, which are not decoded yet and say what size is drawn.
    asked = Request(width=size[0], height=size[1], hires_scale=scale)
    drawn = (
        plan is None
        or not is_small(plan.native_size)
        or fit_to_model(asked, plan.native_size)[0].hires_scale > 1
    )
    if body.hr_upscaler and not _is_none(body.hr_upscaler) and not is_lanczos(body.hr_upscaler):
        settings["hires_upscaler"] = body.hr_upscaler
    if (strength := body.denoising_strength) or drawn:
        settings["hires_strength"] = strength
    wanted = body.hr_second_pass_steps or steps
    if wanted is not None and wanted > 0 and 0 < strength <= 1:
        settings["hires_steps"] = most = steps_to_take(wanted, strength)
        if (left := taken(most, strength)) < wanted and drawn:
            told = f"of {most} steps, the most, {strength:g} leaves {left}, not {wanted}"
            warnings.append(f"denoising_strength: second pass: {told}")
    return settings, warnings


def with_known_upscaler(asked: Asked, names: Names) -> Asked:
    """Return what was asked, with Lanczos and a warning for an upscaler that is not here."""
    request = asked.request
    if request.hires_scale == 1:
        return asked
    try:
        names.upscaler(request.hires_upscaler, "hires_upscaler")
    except SafelightError as error:
        told = [*asked.warnings, f"hr_upscaler: enlarged with {LANCZOS}: {error}"]
        return replace(asked, request=request.without("hires_upscaler"), warnings=told)
    return asked


def _is_none(name: str | None) -> bool:
    """Return whether a name means what is not here: no upscaler, or one of latents."""
    return name is not None and (name == "None" or name.startswith("Latent"))


def _scale(body: TextToImage, size: tuple[int, int]) -> tuple[float, list[str]]:
    """Return how many times the picture is enlarged to a size, and warnings.

    size: of the first pass. What has other proportions the web UI cuts off. Raises SafelightError
    for a size that is too large, or smaller than that of the first pass.
    """
    sides = body.hr_resize_x, body.hr_resize_y
    scale = max(side / own for side, own in zip(sides, size, strict=True))
    if scale < 1 or round(scale * max(size)) > MAX_SIDE:
        most = [MAX_SIDE * own // max(size) for own in size]
        raise _refused(body, size, scale, most)
    made = [allowed_side(side * scale) for side in size]
    if all(side in (0, got) for side, got in zip(sides, made, strict=True)):
        return scale, []
    wanted = "x".join(str(side or "any") for side in sides)
    return scale, [
        f"hr_resize: {made[0]}x{made[1]} in place of {wanted}, in the picture's proportions"
    ]


def _enlarged(
    body: TextToImage, size: tuple[int, int], scale: float, plan: Plan | None
) -> dict[str, Any]:
    """Return the settings of a picture that is enlarged more than a second pass can.

    Raises SafelightError unless the model is so small that its pictures are enlarged alone.
    """
    whole = allowed_side(size[0] * scale), allowed_side(size[1] * scale)
    native = None if plan is None else plan.native_size
    if native is None or not is_small(native) or drawable_size(whole, native) == whole:
        raise _refused(body, size, scale, [own * MOST_TIMES for own in size])
    return {"width": whole[0], "height": whole[1]}


def _refused(
    body: TextToImage, size: tuple[int, int], scale: float, most: list[int]
) -> SafelightError:
    """Return the error about a size to enlarge to. most: the largest sides that are possible."""
    place = 0 if scale == body.hr_resize_x / size[0] else 1
    name, side = (("hr_resize_x", "width"), ("hr_resize_y", "height"))[place]
    asked = (body.hr_resize_x, body.hr_resize_y)[place]
    return SafelightError(
        f"{name} must be from {size[place]}, the {side} of the first pass, to {most[place]}, "
        f"not {asked}",
        field=name,
    )


def _ignored(body: TextToImage, sampler: str | None) -> list[str]:
    found = [
        (
            _is_none(body.hr_upscaler),
            f"hr_upscaler: enlarged with {LANCZOS}",
        ),
        (
            body.hr_sampler_name not in SAME
            and (sampler_and_schedule(str(body.hr_sampler_name)) or ("",))[0] != sampler,
            "hr_sampler_name: the second pass has the sampler of the first",
        ),
        (
            body.hr_scheduler not in SAME
            and find_scheduler(body.hr_scheduler) != find_scheduler(body.scheduler),
            "hr_scheduler: the second pass has the scheduler of the first",
        ),
        (
            body.hr_prompt not in ("", body.prompt),
            "hr_prompt: the second pass has the prompt of the first",
        ),
        (
            body.hr_negative_prompt not in ("", body.negative_prompt),
            "hr_negative_prompt: the second pass has the negative prompt of the first",
        ),
        (
            body.hr_cfg not in (None, 0, body.cfg_scale),
            "hr_cfg: the second pass has the cfg_scale of the first",
        ),
        (
            body.hr_checkpoint_name not in SAME,
            "hr_checkpoint_name: the second pass has the model of the first",
        ),
    ]
    return [text for asked, text in found if asked]
