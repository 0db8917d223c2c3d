"""Invent scenes on all processors: one process invents only about a thousand a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipes.embedded.scenes import Scene, Scenes, Thing

PART = 512
"""Scenes of a part, except the last one. They share a random generator: a part depends only on the
seed, its number and its length."""

FEWEST = 4
"""Workers that are worth starting: each reads all cut-outs first."""

Part = tuple[list[Scene], list[list[Thing]], np.random.Generator]
"""Scenes, the things of each, and the generator as it is after them."""

Then = Callable[[Scenes, Part], Any]


def whole(scenes: Scenes, part: Part) -> Part:
    """Return the part as it is."""
    return part


def parts(
    scenes: Scenes,
    path: Path,
    count: int,
    seed: int,
    workers: int | None = None,
    then: Then = whole,
    **given: Any,
) -> Iterator[Any]:
    """Yield `count` scenes, PART at a time, or what `then` makes of each part.

    path: of cutouts.npz, for the workers. workers: processes; by default as many as there are
    processors, or none if there are few. The scenes are the same for any number of them. then: is
    pickled for the workers and called there; what it returns must be picklable. given: as for
    `Scenes.invent`.
    """
    lengths = [min(PART, count - begin) for begin in range(0, count, PART)]
    if workers is None:
        workers = min(len(lengths), cpu_count() or 1)
        workers = workers if workers >= FEWEST else 0
    if not workers:
        for number, length in enumerate(lengths):
            yield then(scenes, _part(scenes, seed, number, length, given))
        return
    told = path, scenes.alone, scenes.steady, then
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin, told) as pool:
        jobs = [pool.submit(_of_worker, seed, *part, given) for part in enumerate(lengths)]
        for job in jobs:
            yield job.result()


_scenes: Scenes | None = None
_then: Then = whole


def _begin(path: Path, alone: bool, steady: bool, then: Then) -> None:
    global _scenes, _then
    torch.set_num_threads(1)  # the others have the other processors
    _scenes, _then = Scenes(path, alone=alone, steady=steady), then


def _of_worker(seed: int, number: int, length: int, given: dict[str, Any]) -> Any:
    assert _scenes is not None
    return _then(_scenes, _part(_scenes, seed, number, length, given))


def _part(scenes: Scenes, seed: int, number: int, length: int, given: dict[str, Any]) -> Part:
    rng = np.random.default_rng([seed, number])
    invented = [scenes.invent(rng, **given) for _ in range(length)]
    return invented, [scenes.arrange(rng, scene) for scene in invented], rng
