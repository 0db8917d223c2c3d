"""The database of jobs and pictures: SQLite by default, PostgreSQL by a URL.

A job is run at least once and committed once: it is claimed with a lease and a token that no one
else has, and what is done for a job counts only while its token is still the same.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, func, select, text
from sqlalchemy.engine import RowMapping
from sqlalchemy.exc import IntegrityError

from safelight.errors import SafelightError
from safelight.server.jobs import BusyError, Job, Picture, Status
from safelight.server.tables import (
    UNFINISHED,
    jobs,
    open_engine,
    pictures,
    read_job,
    storage_errors,
    timestamp,
)

LEASE = 60.0
"""Seconds after which a silent worker's job is free again."""

ATTEMPTS = 3
"""The most attempts at a job; if no worker finishes it, the job is at fault."""

LOCK = 0x5AFE
"""The number of our advisory lock in PostgreSQL."""


class LostError(Exception):
    """The job is no longer this worker's."""


@dataclass(frozen=True)
class Claim:
    """A job to draw. done: its finished pictures. suspect: a worker ended while drawing it."""

    id: str
    token: str
    settings: dict[str, Any]
    done: frozenset[int]
    suspect: bool


def new_id() -> str:
    """Return a new id: opaque, and not to be guessed."""
    return secrets.token_hex(16)


class Store:
    """The jobs and pictures of a database. url: as SQLAlchemy has it.

    Methods block. Those that write are one transaction each. All raise StorageError if the
    database does not answer.
    """

    def __init__(self, url: str) -> None:
        self._engine = open_engine(url)
        self._lite = self._engine.dialect.name == "sqlite"

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        """Begin a transaction that excludes our other ones."""
        with storage_errors(), self._engine.begin() as connection:
            if not self._lite:  # SQLite's begins with BEGIN IMMEDIATE
                connection.execute(select(func.pg_advisory_xact_lock(LOCK)))
            yield connection

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with storage_errors(), self._engine.connect() as connection:
            yield connection.execution_options(reads=True)

    def submit(
        self,
        job_id: str,
        settings: dict[str, Any],
        *,
        client: str,
        cost: int,
        bound: int,
        key: str | None = None,
        digest: str | None = None,
    ) -> tuple[Job, bool]:
        """Add a job; return it and whether it is new. A key seen before returns the job of then.

        cost: rows of the network it will take; bound: most pictures that may wait. Raises
        BusyError beyond it, SafelightError for a key that came with another request.
        """
        count = int(settings["count"])
        with self._write() as db:
            if key is not None:
                old = db.execute(select(jobs).where(jobs.c.key == key)).mappings().first()
                if old is not None:
                    if old["digest"] != digest:
                        raise SafelightError(
                            "this Idempotency-Key came with another request before: use a new one"
                        )
                    return self._job(db, old), False
            _make_sure_of_room(db, count, bound)
            db.execute(
                jobs.insert().values(
                    id=job_id,
                    status=Status.QUEUED,
                    client=client,
                    created=timestamp(),
                    request=json.dumps(settings),
                    prompt=str(settings.get("prompt", "")),
                    pictures=count,
                    cost=cost,
                    key=key,
                    digest=digest,
                )
            )
            row = db.execute(select(jobs).where(jobs.c.id == job_id)).mappings().one()
            return self._job(db, row), True

    def claim(self, worker: str, *, alone: bool = False, ageing: float = 0.0) -> Claim | None:
        """Return the next job for a worker, with its attempt counted; None if there is none.

        Short ones first; `ageing` is the cost that a second of waiting makes up for. A job that
        was begun before is given out only to a worker that is `alone` with it, so that it takes no
        other down; when its turn comes, others wait. One that was begun too often fails.
        """
        now = timestamp()
        with self._write() as db:
            _give_up(db, now)
            free = (jobs.c.status == Status.QUEUED) | (
                (jobs.c.status == Status.RUNNING) & (jobs.c.lease < now)
            )
            urgency = jobs.c.cost - ageing * (now - jobs.c.created)
            first = db.execute(
                select(jobs.c.id, jobs.c.attempts)
                .where(free)
                .order_by(urgency, jobs.c.created)
                .limit(1)
            ).first()
            if first is None or (first.attempts and not alone):
                return None
            job_id = first.id
            token = f"{worker}:{secrets.token_hex(8)}"
            row = (
                db.execute(
                    jobs.update()
                    .where(jobs.c.id == job_id)
                    .values(
                        status=Status.RUNNING,
                        token=token,
                        lease=now + LEASE,
                        attempts=jobs.c.attempts + 1,
                        started=func.coalesce(jobs.c.started, now),
                    )
                    .returning(*jobs.c)
                )
                .mappings()
                .one()
            )
            done = db.execute(select(pictures.c.number).where(pictures.c.job == job_id)).scalars()
            return Claim(
                job_id, token, json.loads(row["request"]), frozenset(done), row["attempts"] > 1
            )

    def renew(self, worker: str) -> None:
        """Renew the leases of a worker's jobs."""
        with self._write() as db:
            db.execute(
                jobs.update()
                .where(jobs.c.status == Status.RUNNING, jobs.c.token.startswith(worker + ":"))
                .values(lease=timestamp() + LEASE)
            )

    def release(self, worker: str | None = None, *, told_to: bool = False) -> None:
        """Put the jobs of a worker that ended, or of all, back into the queue.

        told_to: whether we ended it, so that this counts as no attempt.
        """
        mine = jobs.c.status == Status.RUNNING
        if worker is not None:
            mine &= jobs.c.token.startswith(worker + ":")
        with self._write() as db:
            db.execute(
                jobs.update()
                .where(mine)
                .values(
                    status=Status.QUEUED,
                    token=None,
                    lease=0.0,
                    attempts=jobs.c.attempts - int(told_to),
                )
            )
            _give_up(db, timestamp())

    def put_back(self, job_id: str, token: str) -> None:
        """Put a claimed job back into the queue, as if it had not been claimed."""
        with self._write() as db:
            db.execute(
                jobs.update()
                .where(jobs.c.id == job_id, jobs.c.token == token)
                .values(
                    status=Status.QUEUED,
                    token=None,
                    lease=0.0,
                    attempts=jobs.c.attempts - 1,
                )
            )

    def add_picture(self, job_id: str, token: str, picture: Picture) -> None:
        """Add a picture. Raises LostError if the token is not the job's, or the picture exists."""
        try:
            with self._write() as db:
                self._hold(db, job_id, token)
                db.execute(
                    pictures.insert().values(
                        id=picture.id,
                        job=job_id,
                        number=picture.index,
                        seed=str(picture.seed),
                        width=picture.width,
                        height=picture.height,
                        created=timestamp(),
                        recipe=json.dumps(picture.recipe),
                    )
                )
        except IntegrityError:
            raise LostError(job_id) from None

    def finish(
        self, job_id: str, token: str, *, warnings: list[str], error: str | None = None
    ) -> None:
        """End a job. Raises LostError if the token is no longer the job's."""
        with self._write() as db:
            self._hold(db, job_id, token)
            db.execute(
                jobs.update()
                .where(jobs.c.id == job_id)
                .values(
                    status=Status.SUCCEEDED if error is None else Status.FAILED,
                    finished=timestamp(),
                    warnings=json.dumps(warnings),
                    error=error,
                    token=None,
                )
            )

    def cancel(self, job_id: str) -> Job | None:
        """Cancel a job and return it; its finished pictures stay."""
        with self._write() as db:
            db.execute(
                jobs.update()
                .where(jobs.c.id == job_id, jobs.c.status.in_(UNFINISHED))
                .values(status=Status.CANCELLED, finished=timestamp(), token=None)
            )
            return self._one(db, job_id)

    def retry(self, job_id: str, bound: int) -> Job | None:
        """Put a job that failed or was cancelled back into the queue, from its first attempt.

        Raises BusyError if more than `bound` pictures would wait.
        """
        with self._write() as db:
            job = self._one(db, job_id)
            if job is None or job.status not in (Status.FAILED, Status.CANCELLED):
                return job
            _make_sure_of_room(db, int(job.settings["count"]), bound)
            db.execute(
                jobs.update()
                .where(jobs.c.id == job_id)
                .values(
                    status=Status.QUEUED, attempts=0, error=None, finished=None, created=timestamp()
                )
            )
            return self._one(db, job_id)

    def delete(self, job_id: str) -> list[str] | None:
        """Delete a job; return the ids of its pictures, whose files are to go, or None."""
        with self._write() as db:
            ids = list(db.execute(select(pictures.c.id).where(pictures.c.job == job_id)).scalars())
            db.execute(pictures.delete().where(pictures.c.job == job_id))
            gone = db.execute(jobs.delete().where(jobs.c.id == job_id)).rowcount
            return ids if gone else None

    def get(self, job_id: str) -> Job | None:
        with self._read() as db:
            return self._one(db, job_id)

    def job_of(self, picture_id: str) -> Job | None:
        with self._read() as db:
            found = db.scalar(select(pictures.c.job).where(pictures.c.id == picture_id))
            return None if found is None else self._one(db, found)

    def list(
        self,
        *,
        status: Status | None = None,
        search: str = "",
        before: float | None = None,
        limit: int = 50,
    ) -> list[Job]:
        """Return jobs, newest first. search: words of the prompt. before: created earlier."""
        query = select(jobs).order_by(jobs.c.created.desc(), jobs.c.id).limit(limit)
        if status is not None:
            query = query.where(jobs.c.status == status)
        if before is not None:
            query = query.where(jobs.c.created < before)
        for word in search.lower().split():
            query = query.where(func.lower(jobs.c.prompt).contains(word, autoescape=True))
        with self._read() as db:
            return [self._job(db, row) for row in db.execute(query).mappings().all()]

    def counts(self) -> dict[str, int]:
        """Return how many jobs there are of each status."""
        query = select(jobs.c.status, func.count()).group_by(jobs.c.status)
        with self._read() as db:
            return {row[0]: row[1] for row in db.execute(query)}

    def has_picture(self, picture_id: str) -> bool:
        with self._read() as db:
            query = select(pictures.c.id).where(pictures.c.id == picture_id)
            return db.execute(query).first() is not None

    def known_files(self) -> tuple[set[str], set[str]]:
        """Return the ids of all pictures, and of all jobs."""
        with self._read() as db:
            known = set(db.execute(select(pictures.c.id)).scalars())
            return known, set(db.execute(select(jobs.c.id)).scalars())

    def check(self) -> str:
        """Return "ok", or what the database finds wrong with itself."""
        if not self._lite:
            return "ok"
        with self._read() as db:
            return str(db.execute(text("PRAGMA integrity_check")).scalar_one())

    def _hold(self, db: Connection, job_id: str, token: str) -> None:
        query = select(jobs.c.id).where(
            jobs.c.id == job_id, jobs.c.token == token, jobs.c.status == Status.RUNNING
        )
        if db.execute(query).first() is None:
            raise LostError(job_id)

    def _one(self, db: Connection, job_id: str) -> Job | None:
        row = db.execute(select(jobs).where(jobs.c.id == job_id)).mappings().first()
        return None if row is None else self._job(db, row)

    def _job(self, db: Connection, row: RowMapping) -> Job:
        query = select(pictures).where(pictures.c.job == row["id"]).order_by(pictures.c.number)
        return read_job(row, db.execute(query).mappings().all())


def _make_sure_of_room(db: Connection, count: int, bound: int) -> None:
    query = select(func.coalesce(func.sum(jobs.c.pictures), 0))
    waiting = db.execute(query.where(jobs.c.status.in_(UNFINISHED))).scalar_one()
    if waiting + count > bound:
        raise BusyError(bound, retry_after=5)


def _give_up(db: Connection, now: float) -> None:
    """Fail the jobs that were begun as often as may be, and are nobody's."""
    free = (jobs.c.status == Status.QUEUED) | (
        (jobs.c.status == Status.RUNNING) & (jobs.c.lease < now)
    )
    db.execute(
        jobs.update()
        .where(free, jobs.c.attempts >= ATTEMPTS)
        .values(
            status=Status.FAILED,
            finished=now,
            token=None,
            error=f"the worker stopped {ATTEMPTS} times while it drew this",
        )
    )
