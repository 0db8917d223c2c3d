"""Invent scenes on all processors: Python alone invents some thousand a second."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path
from typing import Any

import numpy as np

from recipes.embedded.scenes import Scene, Scenes, Thing

PART = 512
"""Scenes that share a random generator: a part depends on the seed, its number and its length
alone. All but the last have so many."""

FEWEST = 4
"""Workers that are worth starting: each reads all cut-outs first."""

Part = tuple[list[Scene], list[list[Thing]], np.random.Generator]


def parts(
    scenes: Scenes, path: Path, count: int, seed: int, workers: int | None = None, **given: Any
) -> Iterator[Part]:
    """Yield `count` scenes, PART at a time: the scenes, their things, and the generator, to go on
    from there.

    path: of cutouts.npz, for the workers. workers: processes; by default as many as there are
    processors, or none where they are few. They change nothing of what is invented. given: as
    for `Scenes.invent`.
    """
    lengths = [min(PART, count - begin) for begin in range(0, count, PART)]
    if workers is None:
        workers = min(len(lengths), cpu_count() or 1)
        workers = workers if workers >= FEWEST else 0
    if not workers:
        yield from (_part(scenes, seed, *part, given) for part in enumerate(lengths))
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin, (path, scenes.alone)) as pool:
        jobs = [pool.submit(_part_of_worker, seed, *part, given) for part in enumerate(lengths)]
        for job in jobs:
            yield job.result()


_scenes: Scenes | None = None


def _begin(path: Path, alone: bool) -> None:
    global _scenes
    _scenes = Scenes(path, alone=alone)


def _part_of_worker(seed: int, number: int, length: int, given: dict[str, Any]) -> Part:
    assert _scenes is not None
    return _part(_scenes, seed, number, length, given)


def _part(scenes: Scenes, seed: int, number: int, length: int, given: dict[str, Any]) -> Part:
    rng = np.random.default_rng([seed, number])
    invented = [scenes.invent(rng, **given) for _ in range(length)]
    return invented, [scenes.arrange(rng, scene) for scene in invented], rng
