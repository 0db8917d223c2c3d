"""The cost of a request, computed before it is drawn."""

from __future__ import annotations

import math
from typing import Any

from safelight.errors import SafelightError
from safelight.hires import HIRES, about_second_pass, final_size, second_steps
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
    whole = steps + second_steps(_hires(request), steps)
    if whole * request.count > MAX_STEPS:
        raise SafelightError(
            f"steps × count must be at most {MAX_STEPS}, not {whole * request.count}",
            field="steps",
        )
    return steps


def _hires(request: Request) -> dict[str, Any]:
    return {name: getattr(request, name) for name in HIRES}


def pixel_steps(request: Request, steps: int, native: tuple[int, int]) -> int:
    """Return width × height × steps × pictures. native: the model's own width and height.

    A picture that is given counts at its own size, the size to draw once the request is `fitted`.
    A second pass counts at its size, with the steps that it takes.
    """
    width, height = native if request.sized_by is None else request.sized_by.size
    width, height = request.width or width, request.height or height
    taken = width * height * steps
    if second := second_steps(_hires(request), steps):
        taken += math.prod(final_size(request, native)) * second
    return taken * request.count


def cost(request: Request, steps: int, native: tuple[int, int], plan: Plan | None = None) -> int:
    """Return a job's cost: rows of the network, counted in pictures of the model's own size.

    plan: the model's, None if it is not known.
    """
    once = plan is not None and plan.family.takes_guidance(plan)
    rows = pixel_steps(request, steps, native) * (
        2 if request.guidance_scale > 1 and not once else 1
    )
    return max(1, round(rows / (native[0] * native[1])))
