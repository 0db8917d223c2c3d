"""Estimate how long a batch would take and how much memory, from a few rows."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from safelight.batch.drawing import Drawer
from safelight.batch.run import How
from safelight.batch.worklist import WorkList
from safelight.engine.requests import resolve_request
from safelight.errors import SafelightError
from safelight.families.references import pixels_read
from safelight.hires import HIRES, final_size, second_pass
from safelight.model import Model
from safelight.picture import opened
from safelight.request import Request
from safelight.request_pictures import REFERENCES

SAMPLES = 3
SHAPE = (
    *("width", "height", "steps", "sampler", "guidance_scale", "strength", "count"),
    *HIRES,
    REFERENCES,
)
"""Settings that the time of a row depends on."""


@dataclass(frozen=True)
class Estimate:
    """An estimate for one model.

    rows: to be drawn. seconds: for all of them, in one process. failing: rows that the model
    refuses, such as for their sampler; they are not in `rows`.
    """

    model: str
    rows: int
    seconds: float
    failing: int = 0


def estimate(work: WorkList, model: str, how: How, tell: Callable[[str], object]) -> Estimate:
    """Draw three rows of a model and return how long all of its rows would take.

    Time is assumed to be proportional to pixels, steps and network calls. Loading is not included.
    Raises SafelightError if the model, or each of the three rows, cannot be drawn.
    """
    drawer = Drawer(model, how, tell=tell)
    sample = work.sample(model, SAMPLES)
    list(drawer.draw(sample[:1]))  # packs weights, fills caches
    began = time.perf_counter()
    outcomes = list(drawer.draw(sample))
    seconds = time.perf_counter() - began
    drawn = {outcome.row_id for outcome in outcomes if outcome.error is None}
    if not drawn:
        raise SafelightError(f"{model}: {(outcomes[0].error or ('', ''))[1]}")
    each = [_cost(drawer.model, row.settings) for row in sample if row.id in drawn]
    cost, rows, failing = 0.0, 0, 0
    for shape, number in work.shapes(model, SHAPE):
        try:
            cost += number * _cost(drawer.model, shape)
        except SafelightError:
            failing += number
        else:
            rows += number
    return Estimate(model, rows, cost * seconds / sum(each), failing)


def memory() -> str:
    """Return the most memory that this process and its GPU have used so far, in words."""
    told = []
    try:
        import resource
    except ImportError:  # Windows
        pass
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        told.append(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.1f} GB")
    if torch.cuda.is_available():
        told.append(f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB on the GPU")
    return ", ".join(told) or "not known"


def _cost(model: Model, settings: Mapping[str, Any]) -> float:
    """Return pixels times steps times calls of the network, for all pictures of a row.

    Reference pictures are read at each step, and count as what is drawn does.
    """
    known = {name: settings[name] for name in SHAPE if settings.get(name) is not None}
    # With a picture to start from, only the share of the steps given by `strength` is taken.
    strength, files = known.pop("strength", None), known.pop(REFERENCES, ())
    files = json.loads(files) if isinstance(files, str) else files  # as SQLite has a list
    # Only their size counts: they are not decoded.
    pictures = tuple(opened(file, "reference_images") for file in files)
    request = Request(**known).with_pictures(reference_images=pictures)
    request = resolve_request(model, request).model_copy(update={"strength": strength})
    native, taken = model.native_size, model.family.steps_taken
    pixels = (request.width or native[0]) * (request.height or native[1])
    once = request.guidance_scale <= 1 or model.family.takes_guidance(model)
    beside = pixels_read(request, model)
    work = (pixels + beside) * taken(request)
    if request.hires_scale > 1:
        whole = math.prod(final_size(request, native))
        work += (whole + beside) * taken(second_pass(request, native))
    return work * (1 if once else 2) * request.count
