"""Sums of what networks beside the UNet add to its states."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from safelight.nets.layers import rows


def plus(x: Tensor, added: Tensor) -> Tensor:
    """Return the sum of two maps, of which one may have a row for several of the other."""
    n = max(len(x), len(added))
    return rows(x, n) + rows(added, n)


def total(parts: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """Return the sums of what several networks add in the same places, in their order."""
    found: list[Tensor] = []
    for part in parts:
        found = [plus(*both) for both in zip(found, part, strict=True)] if found else [*part]
    return found
