"""What a worker knows about a job that it draws."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from safelight.request import Request
from safelight.result import Result
from safelight.server.claims import Claim

if TYPE_CHECKING:
    from safelight.server.loaded import Loaded

JOBS = 48
INPUTS = 1 << 30
"""The most jobs in the making at once, and the most bytes of their input pictures. Beyond that, up
to twice as many, only jobs shorter than all of these are taken in, and jobs of owners who have
none; others wait in the database.
"""

FEWEST = 2
"""A worker of a fleet takes in as many jobs as fill a call of the network, and at least this many:
one is drawn while another is decoded. More jobs would wait here while other workers are idle.
"""


@dataclass
class Held:
    """A claimed job.

    result: what its pictures' recipes are made of. loaded: the model that draws it. pictures_left:
    pictures still to come. steps_done, steps_total: steps over all its pictures.
    """

    claim: Claim
    request: Request
    result: Result
    loaded: Loaded
    pictures_left: int
    steps_total: int
    steps_done: int
    input_bytes: int = 0
    warnings: list[str] = field(default_factory=list)
    previewed: float = 0.0


def bound(held: Collection[Held], most: int) -> float | None:
    """Return the cost that another job must stay below to be taken in; None for any cost.

    most: jobs in the making from which on there is such a bound.
    """
    if not _beyond(held, most):
        return None
    return min(one.claim.cost * one.pictures_left / one.request.count for one in held)


def full(held: Collection[Held], most: int) -> bool:
    """Return whether no further job may be taken in, whoever owns it."""
    return _beyond(held, most, 2)


def _beyond(held: Collection[Held], most: int, times: int = 1) -> bool:
    size = sum(one.input_bytes for one in held)
    return len(held) >= times * most or size >= times * INPUTS
