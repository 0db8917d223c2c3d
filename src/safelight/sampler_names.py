"""The names that other programs have for the samplers."""

from functools import cache

from safelight.sampling import SAMPLERS
from safelight.sampling.schedule import SCHEDULES

_COMFYUI = {
    "euler_ancestral": "euler_a",
    "dpm_2": "dpm2",
    "dpm_2_ancestral": "dpm2_a",
    "uni_pc": "unipc",
}


@cache
def _names() -> dict[str, str]:
    """Our name of each sampler by all of its names, in lower case."""
    names = {name: name for name in SAMPLERS} | _COMFYUI
    for name, sampler in SAMPLERS.items():
        for other in (sampler.a1111, sampler.diffusers):
            if other:  # two samplers share a class of diffusers: the first is its default
                names.setdefault(other.lower(), name)
    return names


def sampler_and_schedule(name: str) -> tuple[str, str | None] | None:
    """Return our names of a sampler and the schedule that its name includes; None if unknown.

    Knows our own names, AUTOMATIC1111's ("DPM++ 2M", and "DPM++ 2M Karras" with a schedule),
    diffusers' classes ("DPMSolverMultistepScheduler") and ComfyUI's ("euler_ancestral").
    """
    wanted = " ".join(name.lower().split())
    names = _names()
    if wanted in names:
        return names[wanted], None
    joined, _, schedule = wanted.rpartition(" ")
    if joined in names and schedule in SCHEDULES:
        return names[joined], schedule
    return None
