"""AUTOMATIC1111's names of samplers, schedulers and models."""

from __future__ import annotations

from fastapi import HTTPException

from safelight.sampler_names import sampler_and_schedule
from safelight.sampling import SAMPLERS
from safelight.sampling.schedule import SCHEDULES
from safelight.server.jobs import ModelInfo

_SCHEDULERS = {"automatic": None, "uniform": None} | {name: name for name in SCHEDULES}


def sampler_label(name: str) -> str:
    """Return AUTOMATIC1111's name of a sampler, or ours if it has none."""
    return SAMPLERS[name].a1111 or name


def find_sampler(label: str) -> tuple[str, str | None]:
    """Return our names of a sampler, and of the schedule that its name includes."""
    known = sampler_and_schedule(label)
    if known is None:
        raise HTTPException(404, f"Sampler not found: {label!r:.60}; GET samplers lists them")
    return known


def find_scheduler(label: str | None) -> str | None:
    """Return our name of a scheduler; None for the model's own."""
    wanted = (label or "automatic").strip().lower()
    if wanted not in _SCHEDULERS:
        raise HTTPException(404, f"Scheduler not found: {label!r:.60}; GET schedulers lists them")
    return _SCHEDULERS[wanted]


def model_hash(model: ModelInfo) -> str | None:
    """Return the short hash of a model, None while it is not known."""
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
"""That API's options that are settings here."""
