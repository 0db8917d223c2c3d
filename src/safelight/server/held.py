"""What a worker knows of a job that it draws."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from safelight.request import Request
from safelight.result import Result
from safelight.server.claims import Claim

if TYPE_CHECKING:
    from safelight.server.loaded import Loaded


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
