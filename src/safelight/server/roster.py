"""The roster: which workers of a fleet there are, what they draw with, and when they were seen."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import ColumnElement, func, select

from safelight.server.database import Database
from safelight.server.jobs import ModelInfo, WorkerInfo
from safelight.server.tables import jobs, workers

BEAT = 10.0
"""Seconds between two times that a worker of the fleet says that it is well."""

GONE = 60.0
"""Seconds after which a worker that said nothing is taken for gone."""


class Roster(Database):
    """The database as workers of a fleet register with it."""

    def beat(self, worker: str, place: str, model: ModelInfo, memory: int | None) -> None:
        """Say that a worker is well; the first time it is put on the roster.

        place: its machine and process, for a person. memory: MiB of the device that it draws on.
        """
        now = self._now()
        with self._write() as db:
            mine = workers.update().where(workers.c.id == worker).values(seen=now)
            if db.execute(mine).rowcount:
                return
            told = {"place": place[:255], "model": model.model_dump_json(), "memory": memory}
            db.execute(workers.insert().values(id=worker, joined=now, seen=now, **told))

    def leave(self, worker: str) -> None:
        """Take a worker off the roster."""
        with self._write() as db:
            db.execute(workers.delete().where(workers.c.id == worker))

    def forget_gone(self) -> None:
        """Take the workers off the roster that are gone. Their jobs are free as leases run out."""
        with self._write() as db:
            db.execute(workers.delete().where(workers.c.seen < self._now() - GONE))

    def fleet(self) -> list[WorkerInfo]:
        """Return the workers that are well, the first to join first."""
        query = select(workers).where(workers.c.seen > self._now() - GONE)
        with self._read() as db:
            rows = db.execute(query.order_by(workers.c.joined)).mappings().all()
        return [
            WorkerInfo(
                id=row["id"],
                model=ModelInfo.model_validate_json(row["model"]),
                memory=row["memory"],
                joined_at=datetime.fromtimestamp(row["joined"], UTC),
                seen_at=datetime.fromtimestamp(row["seen"], UTC),
            )
            for row in rows
        ]

    def _of_fleet(self) -> ColumnElement[bool]:
        """Whether a job's token is one of a worker on the roster that is well."""
        mine = workers.c.id == func.substr(jobs.c.token, 1, 32)
        return select(workers.c.id).where(mine, workers.c.seen > self._now() - GONE).exists()
