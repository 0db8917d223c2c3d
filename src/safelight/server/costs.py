"""The cost of a request, computed before it is drawn."""

from __future__ import annotations

import math

from safelight.errors import SafelightError
from safelight.families.references import pixels_read, size_to_draw
from safelight.hires import about_second_pass, final_size, of_second_pass
from safelight.request import Request
from safelight.sampling import SAMPLERS, check
from safelight.weights.plan import Plan

MAX_STEPS = 4000
"""The most steps of one request, all pictures together."""


def steps_of(request: Request, plan: Plan | None) -> int:
    """Return the steps of each picture. Raises SafelightError if they cannot be taken.

    plan: the model's; the request has its defaults. None if the model is on another machine: the
    worker that draws it checks what depends on the model, or on settings that are left out.
    """
    sampler, said = SAMPLERS[request.sampler], request.model_fields_set
    steps = request.steps or sampler.steps
    if plan is not None or "sampler" in said:
        # Models of flow matching take a step at any strength.
        flow = sampler.flow is not None if plan is None else plan.scheduler.is_flow
        known = not flow and (plan is not None or "steps" in said)
        strength = request.strength_taken if known else None
        check(sampler, steps, request.schedule, request.spacing, strength=strength or 1.0)
        if request.hires_scale > 1:
            strength = request.hires_strength if known else 1.0
            second = request.hires_steps or steps
            with about_second_pass():
                check(sampler, second, request.schedule, request.spacing, strength=strength)
    whole = steps + _second_steps(request, steps, plan)
    if whole * request.count > MAX_STEPS:
        raise SafelightError(
            f"steps × count must be at most {MAX_STEPS}, not {whole * request.count}",
            field="steps",
        )
    return steps


def _second_steps(request: Request, steps: int, plan: Plan | None) -> int:
    """Return the steps that the second pass takes, 0 without one. steps: of the first pass."""
    if request.hires_scale == 1:
        return 0
    again = of_second_pass(request.model_copy(update={"steps": steps}))
    return again.steps_taken if plan is None else plan.family.steps_taken(again)


def pixel_steps(
    request: Request, steps: int, native: tuple[int, int], plan: Plan | None = None
) -> int:
    """Return width × height × steps × pictures. native: the model's own width and height.

    A picture that is given counts at its own size, the size to draw once the request is `fitted`.
    A second pass counts at its size, with the steps that it takes. Where only the part around a
    mask is drawn, each pixel of the whole picture counts once beside it: the result is as large.
    Reference pictures are read at each step, and count as what is drawn does. plan: the model's,
    None if it is not known.
    """
    return (_drawn(request, steps, native, plan) + _laid_back(request)) * request.count


def _drawn(request: Request, steps: int, native: tuple[int, int], plan: Plan | None) -> int:
    """Return the pixels that the network draws for one picture, over all steps."""
    own = (None if plan is None else size_to_draw(plan, request)) or native
    width, height = own if request.sized_by is None else request.sized_by.size
    width, height = request.width or width, request.height or height
    beside = pixels_read(request, plan)
    drawn = (width * height + beside) * steps
    if second := _second_steps(request, steps, plan):
        drawn += (math.prod(final_size(request, own)) + beside) * second
    return drawn


def _laid_back(request: Request) -> int:
    """Return the pixels of the picture that a drawn part is laid back into."""
    return 0 if request.image is None or not request.is_cropped else math.prod(request.image.size)


def cost(request: Request, steps: int, native: tuple[int, int], plan: Plan | None = None) -> int:
    """Return a job's cost: rows of the network, counted in pictures of the model's own size.

    The whole picture around a part that is drawn counts as in `pixel_steps`. plan: the model's,
    None if it is not known.
    """
    once = plan is not None and plan.family.takes_guidance(plan)
    calls = 2 if request.guidance_scale > 1 and not once else 1
    pixels = _drawn(request, steps, native, plan) * calls + _laid_back(request)
    return max(1, round(pixels * request.count / (native[0] * native[1])))
