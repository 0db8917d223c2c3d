"""The web UI's "hires fix": what a body asks of the second pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safelight.hires import UPSCALER, final_size, steps_to_take
from safelight.request import Request
from safelight.sampler_names import sampler_and_schedule
from safelight.server.apis.sdapi_bodies import TextToImage
from safelight.server.apis.sdapi_names import find_scheduler

if TYPE_CHECKING:
    from safelight.weights.plan import Plan

SAME = (None, "", "Use same sampler", "Use same scheduler", "Use same checkpoint")
"""The web UI's words for what the first pass has."""


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
    scale, more = _scale(body, (width, height) if width and height else None)
    warnings += more
    if scale == 1:
        return {}, [*warnings, "enable_hr: drawn in one pass, as hr_scale is 1"]
    settings: dict[str, Any] = {"hires_scale": scale, "hires_strength": body.denoising_strength}
    taken = body.hr_second_pass_steps or steps
    if taken is not None and taken > 0 and 0 < body.denoising_strength <= 1:
        settings["hires_steps"] = steps_to_take(taken, body.denoising_strength)
    return settings, warnings


def _scale(body: TextToImage, size: tuple[int, int] | None) -> tuple[float, list[str]]:
    """Return how many times the picture is enlarged, and warnings.

    Of a size to enlarge to, the web UI cuts off what has other proportions. Raises SafelightError
    for a size that is too large, or smaller than that of the first pass.
    """
    sides = body.hr_resize_x, body.hr_resize_y
    if not any(sides):
        return body.hr_scale, []
    if size is None:
        return body.hr_scale, ["hr_resize: needs width and height here; hr_scale is used"]
    scale = max(side / own for side, own in zip(sides, size, strict=True))
    asked = Request(width=size[0], height=size[1], hires_scale=scale)
    made = final_size(asked, size)
    if all(side in (0, got) for side, got in zip(sides, made, strict=True)):
        return scale, []
    wanted = "x".join(str(side or "any") for side in sides)
    return scale, [
        f"hr_resize: {made[0]}x{made[1]} in place of {wanted}, in the picture's proportions"
    ]


def _ignored(body: TextToImage, sampler: str | None) -> list[str]:
    found = [
        (
            body.hr_upscaler not in (None, "", UPSCALER),
            f"hr_upscaler: enlarged with {UPSCALER}",
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
