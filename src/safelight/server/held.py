"""What a worker knows of a job that it draws."""

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
"""The most jobs in the making at once, and bytes of pictures that they start from. Beyond it only
jobs that are shorter than all of those are taken in, and up to as many again of owners who have
none; others wait in the database.
"""

FEWEST = 2
"""A worker of a fleet takes in as many jobs as fill a call of the network, this many at least: one
is drawn while another one is decoded. More would wait here while other workers are idle.
"""


@dataclass
class Held:
    """A claimed job. result: what its pictures' recipes are made of; loaded: the model that draws
    it; left: pictures to come; taken, total: steps of all its pictures.
    """

    claim: Claim
    request: Request
    result: Result
    loaded: Loaded
    left: int
    total: int
    taken: int
    input_bytes: int = 0
    warnings: list[str] = field(default_factory=list)
    previewed: float = 0.0


def bound(held: Collection[Held], most: int) -> float | None:
    """Return the cost that a job must stay below to be taken in as well; None for any.

    most: jobs in the making, of which there may be more.
    """
    if not _beyond(held, most):
        return None
    return min(one.claim.cost * one.left / one.request.count for one in held)


def full(held: Collection[Held], most: int) -> bool:
    """Return whether no job of anybody is to be taken in."""
    return _beyond(held, most, 2)


def _beyond(held: Collection[Held], most: int, times: int = 1) -> bool:
    size = sum(one.input_bytes for one in held)
    return len(held) >= times * most or size >= times * INPUTS
