"""Tell what a checkpoint holds, from its headers and configs alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safelight.weights.find import find, parts_finder
from safelight.weights.lender import listed
from safelight.weights.names import Weight
from safelight.weights.plan import read_plan
from safelight.weights.stored import stored_bytes


def inspect(name: str | Path, *, models_dir: str | Path | None = None) -> dict[str, Any]:
    """Return what a checkpoint is, without reading its weights. Nothing is downloaded.

    Returns name, path, kind, family, components (parameters, stored dtypes and bytes of each
    network), parameters and dtypes of all, size_on_disk (bytes), prediction_type, native_size
    (width, height), and warnings. Raises SafelightError as `load_model` does for a malformed one.
    """
    source = find(name, download=False, models_dir=models_dir)
    installed = parts_finder(None, download=False, models_dir=models_dir)
    plan = read_plan(source, parts=installed, partial=True)
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


def _summary(weights: Mapping[str, Weight]) -> dict[str, Any]:
    return {
        "parameters": sum(math.prod(w.shape) for w in weights.values()),
        "dtypes": sorted({w.dtype for w in weights.values()}),
        "bytes": sum(stored_bytes(w) for w in weights.values()),
    }
