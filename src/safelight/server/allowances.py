"""Allowances: how many pictures and pixel-steps a key may ask for in a window of time.

A window begins with the first request after the last window ended. Usage is kept in the database,
so a restart forgets nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, select

from safelight.errors import SafelightError
from safelight.server.jobs import TooMuchError
from safelight.server.tables import allowances

KINDS = {"pictures": "pictures", "pixel_steps": "pixel-steps"}
"""The kinds that are counted, with their names. Pixel-steps: width × height × steps × pictures."""

HEADERS = {"pictures": "requests", "pixel_steps": "pixel-steps"}
"""The names in the headers. OpenAI's clients look for `requests`."""

PERIODS = {"minute": 60, "hour": 3600, "day": 86400, "week": 604800, "month": 30 * 86400}


@dataclass(frozen=True)
class Allowance:
    """How much of one kind a key may ask for in each window.

    amount: the most in `period` seconds. since: when the current window began, in seconds since
    1970. used: what was asked for in that window.
    """

    kind: str
    amount: float
    period: int
    since: float = 0.0
    used: float = 0.0

    def __str__(self) -> str:
        name = next(name for name, seconds in PERIODS.items() if seconds == self.period)
        return f"{self.amount:.12g}/{name}"

    def wait(self, now: float) -> float:
        """Return the seconds until the full amount is available again; 0 if it is now."""
        return max(0.0, self.since + self.period - now) if self.used else 0.0

    def left(self, now: float) -> float:
        """Return how much may be asked for now."""
        return self.amount - (self.used if self.wait(now) else 0.0)


class SpentError(TooMuchError):
    """A key has used up what it may ask for."""

    def __init__(self, told: str, retry_after: int) -> None:
        super().__init__(told, code="limit_reached", retry_after=retry_after)


def parse(kind: str, text: str) -> Allowance | None:
    """Return the allowance of a text such as 100/day; None for "none".

    Raises SafelightError for any other text.
    """
    if text == "none":
        return None
    number, _, name = text.partition("/")
    try:
        amount = float(number)
    except ValueError:
        amount = math.nan
    if not 0 <= amount <= 1e18 or name not in PERIODS:
        raise SafelightError(
            f"{text[:40]!r} is no limit of {KINDS[kind]}: expected a number and one of "
            f"{', '.join(PERIODS)}, as in 100/day or 2e9/hour; or none"
        )
    return Allowance(kind, amount, PERIODS[name])


def read(row: Any) -> Allowance:
    """Return the allowance of a row."""
    return Allowance(row.kind, row.amount, row.period, row.since, row.used)


def spend(db: Connection, key: str, wanted: Mapping[str, float], now: float) -> None:
    """Count a request against the allowances of a key: all of it, or nothing.

    wanted: the amount of each kind. Raises SpentError if less is left now, SafelightError if it is
    more than a whole window allows.
    """
    query = select(allowances).where(allowances.c.key == key)
    mine = [read(row) for row in db.execute(query)]
    for one in mine:
        asked, what = wanted[one.kind], KINDS[one.kind]
        if asked > one.amount:
            raise SafelightError(
                f"this takes {asked:.12g} {what}, and the key {key} has {one}: ask for less",
                code="over_limit",
            )
        if asked > one.left(now):
            wait = math.ceil(one.wait(now))
            raise SpentError(
                f"this takes {asked:.12g} {what}, and the key {key} has {one.left(now):.12g} of "
                f"{one} left: ask for less, or again in {duration(wait)}",
                wait,
            )
    for one in mine:
        fresh = not one.wait(now)
        db.execute(
            allowances.update()
            .where(allowances.c.key == key, allowances.c.kind == one.kind)
            .values(
                since=now if fresh else one.since,
                used=wanted[one.kind] + (0.0 if fresh else one.used),
            )
        )


def headers(mine: Iterable[Allowance], now: float) -> list[tuple[str, str]]:
    """Return the headers that say what is left, in OpenAI's form."""
    found: list[tuple[str, str]] = []
    for one in mine:
        what = HEADERS[one.kind]
        found += [
            (f"x-ratelimit-limit-{what}", f"{one.amount:.0f}"),
            (f"x-ratelimit-remaining-{what}", f"{max(0.0, one.left(now)):.0f}"),
            (f"x-ratelimit-reset-{what}", duration(math.ceil(one.wait(now)))),
        ]
    return found


def duration(seconds: int) -> str:
    """Return seconds in the form of OpenAI's headers: 1s, 6m0s, 23h59m59s."""
    minutes, left = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{left}s"
    return f"{minutes}m{left}s" if minutes else f"{left}s"
