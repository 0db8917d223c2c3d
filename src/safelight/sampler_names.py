"""The names that other programs have for samplers and schedules."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from safelight.errors import SafelightError
from safelight.sampling import SAMPLERS
from safelight.sampling.schedule import SCHEDULES
from safelight.settings import shown

SPACINGS: Mapping[str, str] = {"sgm_uniform": "trailing", "simple": "trailing", "ddim": "leading"}
"""AUTOMATIC1111's schedulers that are a spacing of the model's own schedule here, by its names."""

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


def in_our_names(given: dict[str, Any]) -> dict[str, Any]:
    """Return settings with our name of their sampler, and the schedule that its name includes.

    An unknown name stays. Raises SafelightError if the settings have another schedule than the
    sampler's name.
    """
    found = sampler_and_schedule(given["sampler"])
    if found is None:
        return given
    name, schedule = found
    if schedule is None:
        return {**given, "sampler": name}
    if given.get("schedule") not in (None, schedule):
        raise SafelightError(
            f"schedule must be left out, or {schedule}, with the sampler "
            f"{shown(given['sampler'])}, not {shown(given['schedule'])}",
            field="schedule",
        )
    return {**given, "sampler": name, "schedule": schedule}
