"""Tables of tests, of which the suite runs a part and the long run everything."""

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest


def crossed(*axes: Sequence[Any]) -> list[Any]:
    """Return every combination of some lists, for parametrize.

    The suite runs as many as the longest list has; they contain each value of each list, and the
    values of a shorter list equally often. The others are marked `soak`; tests/soak/run.sh runs
    them.
    """
    many = max(len(axis) for axis in axes)
    columns = []
    for seed, axis in enumerate(axes):
        column = [i % len(axis) for i in range(many)]
        random.Random(seed).shuffle(column)
        columns.append(column)
    chosen = set(zip(*columns, strict=True))
    return [
        pytest.param(
            *(axis[i] for axis, i in zip(axes, places, strict=True)),
            marks=() if places in chosen else pytest.mark.soak,
        )
        for places in itertools.product(*(range(len(axis)) for axis in axes))
    ]
