"""The roster: the workers of a fleet, what they draw with, and when they were last seen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime

from sqlalchemy import ColumnElement, Connection, func, select

from safelight import __version__
from safelight.errors import StorageError
from safelight.server.database import Database
from safelight.server.jobs import ModelInfo, Status, WorkerInfo
from safelight.server.tables import facts, jobs, workers

BEAT = 10.0
"""Seconds between two reports of a worker that it is well."""

GONE = 60.0
"""Seconds without a report after which a worker counts as gone."""

VERSION = __version__.rpartition(".")[0]
"""This program's version without its last number, which brings no new settings or names."""

COUNTED = 1000
"""The most late jobs that are counted. Workers for more are not started at once."""


class Roster(Database):
    """The database as used by workers of a fleet to register."""

    def beat(
        self,
        worker: str,
        place: str,
        model: ModelInfo,
        memory: int | None,
        models: Sequence[str] = (),
    ) -> None:
        """Report that a worker is well; the first report puts it on the roster.

        place: its machine and process, for a person. memory: MiB of the device that it draws on.
        models: names of all models that it draws with, besides `model`. Raises StorageError if the
        server has another version.
        """
        now, names = self.now(), [*dict.fromkeys((model.name, *models))]
        told = {"seen": now, "model": json.dumps({**model.model_dump(), "models": names})}
        with self._write(alone=False) as db:  # only this worker writes this row
            self._make_sure_of_version(db)
            if db.execute(workers.update().where(workers.c.id == worker).values(**told)).rowcount:
                return
            told |= {"joined": now, "place": place[:255], "memory": memory}
            db.execute(workers.insert().values(id=worker, **told))

    def leave(self, worker: str) -> None:
        """Take a worker off the roster."""
        with self._write() as db:
            db.execute(workers.delete().where(workers.c.id == worker))

    def forget_gone(self) -> None:
        """Take workers that are gone off the roster. Their jobs become free as leases run out."""
        with self._write() as db:
            db.execute(workers.delete().where(workers.c.seen < self.now() - GONE))

    def fleet(self) -> list[WorkerInfo]:
        """Return the workers that are well, in the order in which they joined."""
        query = select(workers).where(workers.c.seen > self.now() - GONE)
        with self._read() as db:
            rows = db.execute(query.order_by(workers.c.joined)).mappings().all()
        return [
            WorkerInfo(
                id=row["id"],
                model=(model := ModelInfo.model_validate_json(row["model"])),
                models=json.loads(row["model"]).get("models", [model.name]),
                memory=row["memory"],
                joined_at=datetime.fromtimestamp(row["joined"], UTC),
                seen_at=datetime.fromtimestamp(row["seen"], UTC),
            )
            for row in rows
        ]

    def load(self, patience: float) -> tuple[int, dict[str, int]]:
        """Return how many jobs are late, and how many jobs each worker has taken in.

        patience: seconds of waiting after which a job is late. At most COUNTED late jobs are
        counted.
        """
        now, name = self.now(), func.substr(jobs.c.token, 1, 32)
        late = (jobs.c.status == Status.QUEUED) & (jobs.c.created < now - patience)
        some = select(jobs.c.id).where(late).limit(COUNTED).subquery()
        taken = (jobs.c.status == Status.RUNNING) & (jobs.c.lease >= now)
        with self._read() as db:
            count = db.scalar(select(func.count()).select_from(some)) or 0
            rows = db.execute(select(name, func.count()).where(taken).group_by(name))
            return count, {row[0]: row[1] for row in rows}

    def set_version(self) -> None:
        """Store this server's version: workers of another one take no jobs."""
        with self._write() as db:
            db.execute(facts.delete().where(facts.c.name == "version"))
            db.execute(facts.insert().values(name="version", value=VERSION))

    def _make_sure_of_version(self, db: Connection) -> None:
        """Raise StorageError if the server of this database has another version than this worker.

        A worker would fail jobs for good whose settings it does not know.
        """
        found = db.scalar(select(facts.c.value).where(facts.c.name == "version"))
        if found not in (VERSION, None):
            raise StorageError(
                f"the server has Safelight {found}, and this worker {VERSION}: install the "
                "server's version here, and start the worker again"
            )

    def _of_fleet(self) -> ColumnElement[bool]:
        """Return the SQL condition for jobs of workers on the roster.

        Nobody can report while the database is away, so the time of the last report does not count.
        """
        mine = workers.c.id == func.substr(jobs.c.token, 1, 32)
        return select(workers.c.id).where(mine).exists()
