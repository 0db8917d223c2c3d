"""Whose turn the next step is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safelight.engine.ticket import Ticket


class Turns:
    """Gives all shares (owners) of an engine the same time, however many pictures each has.

    Within a share, half of the time goes to the picture with the least work left, half to the
    oldest request. A new share starts with as much time as the share that has had the least.
    """

    def __init__(self) -> None:
        self._had: dict[Any, float] = {}  # seconds, by share
        self._owing = 0.0
        self._owed = 0.0  # seconds that the shortest had more than the oldest

    def first(self, tickets: Sequence[Ticket]) -> Ticket:
        """Return the ticket whose turn it is."""
        present = dict.fromkeys(ticket.share for ticket in tickets)
        least = min((self._had[share] for share in present if share in self._had), default=0.0)
        self._had = {share: self._had.get(share, least) for share in present}
        share = min(self._had, key=self._had.__getitem__)
        mine = [ticket for ticket in tickets if ticket.share == share]
        shortest = min(mine, key=lambda ticket: ticket.work_left)
        oldest = min(mine, key=lambda ticket: (ticket.arrived, ticket.work_left))
        if shortest.tag == oldest.tag:
            self._owing = 0.0
        else:
            self._owing = -1.0 if self._owed > 0 else 1.0
        return oldest if self._owing < 0 else shortest

    def note(self, loads: Sequence[tuple[Any, float]], seconds: float) -> None:
        """Add the seconds of a step to the shares of its tickets.

        loads: the share and the load of each ticket, the one from `first` among them.
        """
        self._owed += self._owing * seconds
        total = sum(load for _, load in loads)
        for share, load in loads:
            self._had[share] = self.had(share) + seconds * load / total

    def had(self, share: Any) -> float:
        """Return the seconds that a share has had, 0 if it is unknown."""
        return self._had.get(share, 0.0)
