"""AUTOMATIC1111's names of samplers, schedulers and models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import HTTPException

from safelight.request import Request
from safelight.sampler_names import SPACINGS, sampler_and_schedule
from safelight.sampling import SAMPLERS
from safelight.sampling.schedule import SCHEDULES
from safelight.server.jobs import ModelInfo
from safelight.settings import settings_of

SCHEDULERS = ("automatic", "uniform", "normal", *SCHEDULES, *SPACINGS)
"""A1111's names of its schedulers that are here. "uniform" and "normal" are the model's own
schedule, "automatic" is the sampler's.
"""

AUTOMATIC: Mapping[str, str] = {
    "dpm2": "karras",
    "dpm2_a": "karras",
    "dpmpp_2m": "karras",
    "dpmpp_2m_sde": "exponential",
}
"""The default schedule in A1111, by our sampler's name, if it is not the model's own."""


def sampler_label(name: str) -> str:
    """Return AUTOMATIC1111's name of a sampler, or ours if it has none."""
    return SAMPLERS[name].a1111 or name


def find_sampler(label: str) -> tuple[str, str | None]:
    """Return our name of a sampler, and of the schedule that the label includes or None."""
    known = sampler_and_schedule(label)
    if known is None:
        raise HTTPException(404, f"Sampler not found: {label!r:.60}; GET samplers lists them")
    return known


def scheduler_label(name: str) -> str:
    """Return AUTOMATIC1111's label of one of SCHEDULERS."""
    return {"sgm_uniform": "SGM Uniform", "ddim": "DDIM"}.get(name, name.capitalize())


def find_scheduler(label: str | None) -> str | None:
    """Return the one of SCHEDULERS that a label or name means; None if there is none.

    Without a label it is "automatic".
    """
    wanted = "_".join((label or "").lower().split()) or "automatic"
    return wanted if wanted in SCHEDULERS else None


def automatic_schedule(label: str, name: str) -> str | None:
    """Return A1111's default schedule of a sampler, if its label is A1111's; otherwise None.

    label: as in the body. name: our name; with our own name as label a sampler uses the model's own
    schedule.
    """
    theirs = " ".join(label.lower().split()) == sampler_label(name).lower()
    return AUTOMATIC.get(name) if theirs and label != name else None


def model_hash(model: ModelInfo) -> str | None:
    """Return the short hash of a model, None until it is known."""
    return model.sha256[:10] if model.sha256 else None


def model_title(model: ModelInfo) -> str:
    """Return the name of a model with its short hash."""
    short = model_hash(model)
    return f"{model.name} [{short}]" if short else model.name


OVERRIDES = {
    "CLIP_stop_at_last_layers": "clip_skip",
    "sdxl_crop_left": "crop_left",
    "sdxl_crop_top": "crop_top",
    "sdxl_refiner_high_aesthetic_score": "aesthetic_score",
    "sdxl_refiner_low_aesthetic_score": "negative_aesthetic_score",
}
"""A1111's options that are settings here, with our names."""

_THEIRS = {ours: theirs for theirs, ours in OVERRIDES.items()}
_THEIRS["refiner_start"] = "refiner_switch_at"


def their_name(setting: str, sent: Mapping[str, Any]) -> str:
    """Return the name of a setting in a body. sent: the body, which may use our name."""
    known = settings_of(Request).get(setting)
    if known is not None and known.about.a1111:
        return known.about.a1111
    return setting if setting in sent else _THEIRS.get(setting, setting)
