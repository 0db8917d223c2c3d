"""The keys of people in the database: names, hashes, and what each key may ask for."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, select

from safelight.errors import SafelightError
from safelight.server import schema
from safelight.server.allowances import Allowance, read
from safelight.server.callers import ADMIN
from safelight.server.database import Database
from safelight.server.entrance import cookie_of
from safelight.server.tables import UNFINISHED, allowances, jobs, keys, shares, timestamp

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")

PREFIX = "slk_"
"""The beginning of each key, so that one is recognised where it must not be, as in a log."""

MOST_TOLD = 200
"""The most keys with figures of their own, the oldest first: each is one line of the metrics."""


@dataclass(frozen=True)
class Key:
    """A key, by its name. token, cookie: the hashes of the key and of a browser's cookie for it."""

    name: str
    token: str
    cookie: str
    created: float
    allowances: tuple[Allowance, ...] = ()


def digest(secret: bytes) -> str:
    """Return the hash that a secret is kept as.

    A fast one is enough: what has 256 random bits cannot be guessed, however fast one tries.
    """
    return hashlib.sha256(secret).hexdigest()


class People(Database):
    """The database as used for handing out keys."""

    def prepare(self) -> None:
        """Make the tables of an empty database. Raises StorageError for another version's."""
        schema.migrate(self.engine, only_new=True)

    def all_keys(self) -> list[Key]:
        """Return all keys, ordered by name."""
        with self._read() as db:
            mine: dict[str, list[Allowance]] = {}
            for row in db.execute(select(allowances).order_by(allowances.c.kind)):
                mine.setdefault(row.key, []).append(read(row))
            return [
                Key(row.name, row.token, row.cookie, row.created, tuple(mine.get(row.name, ())))
                for row in db.execute(select(keys).order_by(keys.c.name))
            ]

    def asked(self) -> dict[str, dict[str, float]]:
        """Return how much each key has asked for in all, by name and kind."""
        query = select(keys.c.name, shares).join(shares, shares.c.owner == "key:" + keys.c.name)
        with self._read() as db:
            return {
                row.name: {"pictures": row.pictures, "pixel_steps": row.pixel_steps}
                for row in db.execute(query.order_by(keys.c.created).limit(MOST_TOLD))
            }

    def unfinished(self) -> dict[str, int]:
        """Return how many jobs of each key are unfinished, for keys that have any."""
        query = select(keys.c.name, func.count()).join(jobs, jobs.c.owner == "key:" + keys.c.name)
        query = query.where(jobs.c.status.in_(UNFINISHED)).group_by(keys.c.name)
        with self._read() as db:
            rows = db.execute(query.order_by(func.count().desc()).limit(MOST_TOLD))
            return {row[0]: row[1] for row in rows}

    def add_key(self, name: str, secret: str | None = None) -> str:
        """Add a key and return its secret, which is not stored. secret: instead of a random one."""
        if not NAME.fullmatch(name) or name.lower() == ADMIN:
            raise SafelightError(
                f"{name[:60]!r} is no name of a key: expected 1 to 40 letters, digits, dots, "
                f"hyphens and underscores, and not {ADMIN}"
            )
        secret = secret or f"{PREFIX}{secrets.token_urlsafe(32)}"
        with self._write() as db:
            if db.scalar(select(keys.c.name).where(keys.c.name == name)) is not None:
                raise SafelightError(f"there is a key {name} already: remove it to make a new one")
            db.execute(
                keys.insert().values(
                    name=name,
                    token=digest(secret.encode()),
                    cookie=digest(cookie_of(secret).encode()),
                    created=timestamp(),
                )
            )
        return secret

    def remove_key(self, name: str) -> None:
        """Remove a key. Its jobs stay, and belong to a later key of the same name."""
        with self._write() as db:
            db.execute(allowances.delete().where(allowances.c.key == name))
            if not db.execute(keys.delete().where(keys.c.name == name)).rowcount:
                raise _missing(name)

    def allow(self, name: str, given: Sequence[tuple[str, Allowance | None]]) -> None:
        """Set what a key may ask for; None for no limit. What was used already stays counted."""
        with self._write() as db:
            if db.scalar(select(keys.c.name).where(keys.c.name == name)) is None:
                raise _missing(name)
            for kind, one in given:
                mine = (allowances.c.key == name) & (allowances.c.kind == kind)
                if one is None:
                    db.execute(allowances.delete().where(mine))
                    continue
                values = {"amount": one.amount, "period": one.period}
                if not db.execute(allowances.update().where(mine).values(values)).rowcount:
                    db.execute(
                        allowances.insert().values(
                            key=name, kind=kind, since=0.0, used=0.0, **values
                        )
                    )


def _missing(name: str) -> SafelightError:
    return SafelightError(f"there is no key {name[:60]!r}: safelight keys list shows them")
