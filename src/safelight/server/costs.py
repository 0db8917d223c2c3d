"""The cost of a request, computed before it is drawn."""

from __future__ import annotations

from safelight.errors import SafelightError
from safelight.request import Request
from safelight.sampling import SAMPLERS, check

MAX_STEPS = 4000
"""The most steps of one request, all pictures together."""


def steps_of(request: Request, *, known: bool) -> int:
    """Return the steps of each picture. Raises SafelightError if they cannot be taken.

    known: whether the request has its model's defaults. If not, the worker that draws it checks
    what depends on a sampler or a number of steps that the request leaves out.
    """
    sampler, said = SAMPLERS[request.sampler], request.model_fields_set
    steps = request.steps or sampler.steps
    if known or "sampler" in said:
        strength = request.strength_taken if known or "steps" in said else None
        check(sampler, steps, request.schedule, request.spacing, strength=strength or 1.0)
    if steps * request.count > MAX_STEPS:
        raise SafelightError(
            f"steps × count must be at most {MAX_STEPS}, not {steps * request.count}",
            field="steps",
        )
    return steps


def pixel_steps(request: Request, steps: int, native: tuple[int, int]) -> int:
    """Return width × height × steps × pictures. native: the model's own width and height.

    A picture that is given counts at its own size, the size to draw once the request is `fitted`.
    """
    width, height = native if request.sized_by is None else request.sized_by.size
    width, height = request.width or width, request.height or height
    return width * height * steps * request.count


def cost(request: Request, steps: int, native: tuple[int, int]) -> int:
    """Return a job's cost: rows of the network, counted in pictures of the model's own size."""
    rows = pixel_steps(request, steps, native) * (2 if request.guidance_scale > 1 else 1)
    return max(1, round(rows / (native[0] * native[1])))
