"""Tell what a checkpoint holds, from its headers and configs alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safelight.errors import SafelightError
from safelight.weights.find import Source, find, find_upscaler, on_disk, parts_finder
from safelight.weights.headers import header_of
from safelight.weights.lender import listed
from safelight.weights.library import facts_of, open_library
from safelight.weights.names import Weight
from safelight.weights.plan import read_plan
from safelight.weights.stored import stored_bytes

LARGEST_UPSCALER = 2**28
"""The most bytes of a file that is loaded to see whether it is an upscaler."""


def inspect(name: str | Path, *, models_dir: str | Path | None = None) -> dict[str, Any]:
    """Return what a checkpoint is, without reading its weights. Nothing is downloaded.

    Returns name, path, kind, family, components (parameters, stored dtypes and bytes of each
    network), parameters and dtypes of all, size_on_disk (bytes), prediction_type, native_size
    (width, height), and warnings. Of an upscaler, which is small and is loaded: name, path, kind,
    family (its architecture), scale, parameters, dtypes, size_on_disk and warnings.

    Raises SafelightError as `load_model` does for a malformed one.
    """
    if (upscaler := _upscaler(name, models_dir)) is not None:
        return _upscaler_summary(upscaler)
    source = find(name, download=False, models_dir=models_dir)
    installed = parts_finder(None, download=False, models_dir=models_dir)
    try:
        plan = read_plan(source, parts=installed, partial=True)
    except SafelightError:
        # Not all architectures of upscalers are known by their names alone.
        if (told := _perhaps_upscaler(source)) is None:
            raise
        return told
    components = {part: _summary(weights) for part, weights in plan.weights.items() if weights}
    bare: list[str] = []
    if plan.lacking:
        way = "--vae" if plan.lacking == ("vae",) else "--parts"
        bare.append(f"it has no {listed(plan.lacking)}: give one with {way}")
    return {
        "name": plan.source.name,
        "path": str(plan.source.path),
        "kind": plan.family.kind,
        "family": plan.family.name,
        "components": components,
        "parameters": sum(c["parameters"] for c in components.values()),
        "dtypes": sorted({d for c in components.values() for d in c["dtypes"]}),
        "size_on_disk": sum(path.stat().st_size for path in plan.files.values()),
        "prediction_type": plan.scheduler.prediction_type,
        "native_size": plan.native_size,
        "warnings": [*plan.warnings, *bare],
    }


def _upscaler(name: str | Path, models_dir: str | Path | None) -> Source | None:
    """Return the upscaler that a name means, None if it means none."""
    found, library = on_disk(str(name)), open_library(models_dir)
    if found is not None:
        is_one = found.path.is_file() and facts_of(found.path).get("kind") == "upscaler"
        return found if is_one else None
    if library is None or library.matches(str(name), "model"):
        return None
    return (
        find_upscaler(name, models_dir=models_dir)
        if library.matches(str(name), "upscaler")
        else None
    )


def _perhaps_upscaler(source: Source) -> dict[str, Any] | None:
    """Return what a file that is no checkpoint is as an upscaler; None if it is none."""
    path = source.path
    if not path.is_file() or path.stat().st_size > LARGEST_UPSCALER:
        return None
    if facts_of(path).get("kind") != "model":
        return None
    try:
        told = _upscaler_summary(source)
    except SafelightError:
        return None
    return told if "family" in told else None


def _upscaler_summary(source: Source) -> dict[str, Any]:
    from safelight.upscaling.names import MISSING, installed

    tensors = header_of(source.path).tensors.values()
    found: dict[str, Any] = {
        "name": source.name,
        "path": str(source.path),
        "kind": "upscaler",
        "parameters": sum(math.prod(info.shape) for info in tensors),
        "dtypes": sorted({info.dtype for info in tensors}),
        "size_on_disk": source.path.stat().st_size,
        "warnings": [],
    }
    if not installed():
        return {**found, "warnings": [MISSING]}
    from safelight.upscaling.upscaler import load_upscaler

    loaded = load_upscaler(source.path, device="cpu")
    own = {"family": loaded.architecture, "scale": loaded.scale, "parameters": loaded.parameters}
    return {**found, **own}


def _summary(weights: Mapping[str, Weight]) -> dict[str, Any]:
    return {
        "parameters": sum(math.prod(w.shape) for w in weights.values()),
        "dtypes": sorted({w.dtype for w in weights.values()}),
        "bytes": sum(stored_bytes(w) for w in weights.values()),
    }
