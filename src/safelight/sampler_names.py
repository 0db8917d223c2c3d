"""The names that other programs have for samplers and schedules."""

import difflib
from collections.abc import Mapping
from functools import cache
from typing import Any

from safelight.errors import SafelightError
from safelight.sampling import SAMPLERS
from safelight.sampling.schedule import SCHEDULES
from safelight.settings import shown

SPACINGS: Mapping[str, str] = {"sgm_uniform": "trailing", "simple": "trailing", "ddim": "leading"}
"""AUTOMATIC1111's schedulers that are a spacing of the model's own schedule here, by its names."""

MODELS_OWN = ("automatic", "uniform", "normal")
"""AUTOMATIC1111's and ComfyUI's names of the model's own schedule, or of the sampler's."""

_COMFYUI = {
    "euler_ancestral": "euler_a",
    "dpm_2": "dpm2",
    "dpm_2_ancestral": "dpm2_a",
    "uni_pc": "unipc",
}


_LIKE = {
    **dict.fromkeys(("dpm++ sde", "dpmpp_sde", "dpmsolversdescheduler"), "dpmpp_2m_sde"),
    **dict.fromkeys(("dpm++ 3m sde", "dpmpp_3m_sde"), "dpmpp_2m_sde"),
    **dict.fromkeys(("dpm++ 2s a", "dpmpp_2s_a", "dpmpp_2s_ancestral"), "dpm2_a"),
    **dict.fromkeys(("dpm fast", "dpm_fast", "dpm adaptive", "dpm_adaptive"), "dpmpp_2m"),
    **dict.fromkeys(("restart", "heunpp2"), "heun"),
}
"""Our sampler that is most like one that only other programs have, by its name in lower case."""


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


def unknown_sampler(name: str) -> SafelightError:
    """Return the error for a name that is no sampler's; it suggests what may be meant."""
    return SafelightError(
        f"there is no sampler {shown(name)}; {_meant(' '.join(name[:80].lower().split()))}",
        code="unknown_sampler",
        field="sampler",
    )


def _meant(wanted: str) -> str:
    """Return what a name that is no sampler's may mean, in words. wanted: in lower case."""
    if wanted in SCHEDULES:
        return f"{wanted} is a schedule: give it as schedule (--schedule {wanted})"
    if spacing := SPACINGS.get(wanted.replace(" ", "_")):
        return f"here it is the spacing {spacing}: give that as spacing (--spacing {spacing})"
    if wanted in MODELS_OWN:
        return "it is the model's own schedule, which is taken if none is given"
    joined, _, schedule = wanted.rpartition(" ")
    plain = joined if schedule in SCHEDULES else wanted
    names = {**_names(), **_LIKE}
    near = difflib.get_close_matches(plain.removeprefix("k_"), names, n=1)
    if not near:
        return f"known: {', '.join(SAMPLERS)}"
    ours = names[near[0]]
    if schedule in SAMPLERS[ours].schedules:
        ours += f" with schedule {schedule}"
    return f"the most like it is {ours}" if near[0] in _LIKE else f"did you mean {ours}?"


def in_our_names(given: dict[str, Any]) -> dict[str, Any]:
    """Return settings with our name of their sampler, and the schedule that its name includes.

    Raises SafelightError for an unknown name, and if the settings have another schedule than the
    sampler's name.
    """
    found = sampler_and_schedule(given["sampler"])
    if found is None:
        raise unknown_sampler(given["sampler"])
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
