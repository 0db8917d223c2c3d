"""What a worker knows of a job that it draws."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from safelight.request import Request
from safelight.result import Result
from safelight.server.claims import Claim

JOBS = 48
INPUTS = 1 << 30
"""The most jobs in the making at once, and bytes of pictures that they start from. Beyond it only
jobs that are shorter than all of those are taken in, and up to as many again of owners who have
none; others wait in the database.
"""


@dataclass
class Held:
    """A claimed job. result: what its pictures' recipes are made of; left: pictures to come;
    taken, total: steps of all its pictures.
    """

    claim: Claim
    request: Request
    result: Result
    left: int
    total: int
    taken: int
    input_bytes: int = 0
    warnings: list[str] = field(default_factory=list)
    previewed: float = 0.0


def bound(held: Collection[Held]) -> float | None:
    """Return the cost that a job must stay below to be taken in as well; None for any."""
    if not _beyond(held, 1):
        return None
    return min(one.claim.cost * one.left / one.request.count for one in held)


def full(held: Collection[Held]) -> bool:
    """Return whether no job of anybody is to be taken in."""
    return _beyond(held, 2)


def _beyond(held: Collection[Held], times: int) -> bool:
    size = sum(one.input_bytes for one in held)
    return len(held) >= times * JOBS or size >= times * INPUTS
