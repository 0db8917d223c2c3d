"""How many threads compute fastest on this machine. This module imports nothing heavy.

PyTorch takes a thread for each core. That is too many in a container that may use less time than
its machine has cores (Docker's `--cpus`, a CPU limit of Kubernetes): all threads stop together
until the next period, a tenth of a second later. It is often too many where cores differ, as the
work is divided evenly and the fastest cores wait for the slowest.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from safelight import containers
from safelight.containers import ROOT, read

EFFICIENCY = 0.5
"""Speed of an Intel efficiency core beside a performance core, where Linux does not tell. With
AVX2, Gracemont multiplies half as many numbers in a cycle as Golden Cove, in slower cycles."""


@dataclass(frozen=True)
class Choice:
    """A number of threads that is lower than PyTorch's own, and the reason in words."""

    threads: int
    why: str


def cores() -> int:
    """Return how many processors this process may use. Two threads of a core count as two."""
    return len(_allowed()) or os.cpu_count() or 1


def best(root: Path = ROOT) -> int | None:
    """Return the best number of threads: that of `choose`, or one for each core; None if unknown.

    root: the folder that holds `/sys` and `/proc`.
    """
    choice = choose(root)
    return choice.threads if choice is not None else len(speeds(root)) or None


def choose(root: Path = ROOT) -> Choice | None:
    """Return how many threads are best, or None if that is PyTorch's own number or unknown.

    As work is divided evenly, n threads are as fast as n times the slowest of the n fastest cores.
    root: the folder that holds `/sys` and `/proc`.
    """
    fast = sorted(speeds(root), reverse=True)
    count, why = len(fast) or cores(), ""
    worth = max(range(1, len(fast) + 1), key=lambda n: n * fast[n - 1], default=count)
    if worth < count:
        why = f"one for each of the {worth} fastest cores; the other {count - worth} are slower"
        count = worth
    time = containers.processor_time(root)
    if time is not None and math.ceil(time) < count:
        count = math.ceil(time)
        why = f"the container may use {time:g} of {cores()} processors"
    return Choice(count, why) if why else None


def speeds(root: Path = ROOT) -> list[float]:
    """Return the speed of each core that this process may use, on a scale that they share.

    Two threads of a core are one core. Empty where Linux does not tell.
    """
    folder = root / "sys/devices/system/cpu"
    slow = _numbers(read(root / "sys/devices/cpu_atom/cpus"))
    found: dict[str, float] = {}
    for number in _allowed():
        cpu = folder / f"cpu{number}"
        core = read(cpu / "topology/thread_siblings_list")
        if not core:
            return []
        capacity = read(cpu / "cpu_capacity")
        speed = EFFICIENCY if number in slow else 1.0
        # Kernels before 6.12 give all cores of an Intel processor the same capacity.
        if capacity.isdecimal():
            speed = min(int(capacity) / 1024, speed) if number in slow else int(capacity) / 1024
        found[core] = max(speed, found.get(core, 0.0))
    return list(found.values())


def _allowed() -> list[int]:
    """Return the numbers of the processors this process may use; none where it is unknown."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return []


def _numbers(text: str) -> set[int]:
    """Return the numbers of a list such as 0-7,16."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            found.update(range(int(first), int(last or first) + 1))
    return found
