"""How many workers a fleet needs, decided by numbers alone: without Ray and without a clock."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from safelight.errors import SafelightError
from safelight.ray_cluster import HERE

PATIENCE = 5.0
"""Seconds of waiting after which a job is late: workers that have room take jobs in at once."""

IDLE = 60.0
"""Seconds without a job after which a worker is surplus."""


@dataclass(frozen=True)
class WorkerPlan:
    """The workers that a server keeps on a Ray cluster.

    least, most: bounds of their number. address: of the cluster. cpus, gpus: of each worker, may be
    fractions; None for what `room` finds. patience, idle: as PATIENCE and IDLE, in seconds.
    """

    least: int
    most: int
    address: str = HERE
    cpus: float | None = None
    gpus: float | None = None
    patience: float = PATIENCE
    idle: float = IDLE


@dataclass(frozen=True)
class Load:
    """The present load.

    late: jobs that have waited longer than the plan's patience. drawn: jobs that the workers have
    taken in. ready: workers that draw or could draw. starting: workers that wait for room in the
    cluster or load their model. idle: for each worker that draws nothing, for how many seconds.
    """

    late: int = 0
    drawn: int = 0
    ready: int = 0
    starting: int = 0
    idle: Sequence[float] = ()


def change(load: Load, plan: WorkerPlan) -> int:
    """Return how many workers to start, or as a negative number, how many to end."""
    there = load.ready + load.starting
    if there < plan.least:
        return plan.least - there
    # An idle worker takes a job that it can draw within a second. So jobs that wait beside idle
    # workers are jobs that they cannot draw, and more workers could not draw them either.
    if load.late and not any(seconds >= plan.patience for seconds in load.idle):
        each = max(1, load.drawn // max(1, load.ready))
        short = math.ceil(load.late / each) - load.starting
        return max(0, min(short, plan.most - there))
    idle = sum(seconds >= plan.idle for seconds in load.idle)
    return -min(idle, there - plan.least)


def room(nodes: Sequence[dict[str, float]], plan: WorkerPlan, device: str) -> tuple[float, float]:
    """Return the CPUs and the GPUs of each worker, on nodes with these resources.

    A worker with a GPU takes one CPU. Workers without a GPU take as many CPUs as leave room for all
    of the plan's workers; all take the same number, which exact mode needs.
    """
    gpus = plan.gpus
    if gpus is None:
        there = any(node.get("GPU", 0) for node in nodes)
        gpus = float(there and device.startswith(("auto", "cuda")))
    if plan.cpus is not None or gpus:
        return plan.cpus or 1.0, gpus
    free = [int(node.get("CPU", 0)) for node in nodes]
    each = range(max(free, default=1), 1, -1)
    fit = (cpus for cpus in each if sum(node // cpus for node in free) >= plan.most)
    return float(next(fit, 1)), gpus


def bounds(text: str) -> tuple[int, int]:
    """Return the two numbers of "MIN:MAX", or one number twice. Raises SafelightError."""
    found = re.fullmatch(r"(\d{1,5})(?::(\d{1,5}))?", text.strip(), re.ASCII)
    if found is None:
        raise SafelightError(f"--workers {text!r:.40}: expected a number, or MIN:MAX as 1:8")
    least = int(found[1])
    most = least if found[2] is None else int(found[2])
    if most < least:
        raise SafelightError(f"--workers {text!r:.40}: MAX must be at least MIN")
    return least, most
