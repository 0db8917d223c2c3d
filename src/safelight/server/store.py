"""The database of jobs and pictures: SQLite by default, PostgreSQL by a URL."""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, func, select, true
from sqlalchemy.engine import RowMapping
from sqlalchemy.exc import SQLAlchemyError

from safelight.errors import SafelightError, StorageError
from safelight.server import schema, shares
from safelight.server.allowances import spend
from safelight.server.callers import key_of
from safelight.server.claims import uncommitted
from safelight.server.database import LOCK, PATIENCE, storage_errors
from safelight.server.expiry import GONE, Expiry, seen
from safelight.server.jobs import BusyError, Job, Status
from safelight.server.outbox import Outbox, expect, expect_again
from safelight.server.people import People
from safelight.server.tables import UNFINISHED, choices, facts, jobs, pictures, read_job

MAX_LISTED = 4 << 20
"""The most bytes of one list of jobs, roughly: one job of 64 pictures can take 2 MiB."""

TAKEN = "another server draws the jobs of this --database already"

FOLDER = "folder"
"""The name of the fact that says which data folder has the pictures."""


def new_id() -> str:
    """Return a new id, opaque and unguessable."""
    return secrets.token_hex(16)


class Store(Expiry, People, Outbox):
    """The database as the server uses it; `Claims` serves workers, `Expiry` retention.

    owner: who asks. A job exists for the owner that made it, and for None, who sees all jobs.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._holding: Connection | None = None
        self._held = False

    @property
    def shared(self) -> bool:
        """Whether workers on other machines can reach this database."""
        return not self._lite

    def migrate(self) -> None:
        """Make the tables, or bring them to this version; see `schema.migrate`."""
        schema.migrate(self.engine)

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
        earlier: str | None = None,
        owner: str | None = None,
        model: str | None = None,
        pixel_steps: float = 0.0,
        trace: str | None = None,
        webhook: str | None = None,
    ) -> tuple[Job, bool]:
        """Add a job; return it and whether it is new. For a known key, return the earlier job.

        cost: rows of the network that it will take. bound: the most pictures that may wait. key:
        the idempotency key; digest: of the request; earlier: its digest in rows of earlier
        versions, with defaults. model: name of the model that draws it. trace: its place in a
        trace. webhook: the URL that is told of its end. Raises BusyError beyond the bound,
        SpentError if the owner has less left, SafelightError for a key that came with another
        request.
        """
        count = int(settings["count"])
        if key is not None and owner is not None:  # two owners may use the same key
            key = hashlib.sha256(f"{owner}\0{key}".encode()).hexdigest()
        with self._write() as db:
            if key is not None:
                old = db.execute(select(jobs).where(jobs.c.key == key)).mappings().first()
                if old is not None:
                    if old["digest"] not in (digest, earlier):
                        raise SafelightError(
                            "this Idempotency-Key came with another request before: use a new one"
                        )
                    return self._job(db, old), False
            _make_sure_of_room(db, count, bound)
            self._count(db, owner or "", count, pixel_steps)
            db.execute(
                jobs.insert().values(
                    id=job_id,
                    status=Status.QUEUED,
                    client=client,
                    created=self.now(),
                    request=json.dumps(settings),
                    prompt=str(settings.get("prompt", "")),
                    pictures=count,
                    cost=cost,
                    key=key,
                    digest=digest,
                    owner=owner or "",
                    model=model,
                    pixel_steps=pixel_steps,
                    trace=trace,
                )
            )
            if webhook is not None:
                expect(db, job_id, owner or "", webhook)
            row = db.execute(select(jobs).where(jobs.c.id == job_id)).mappings().one()
            return self._job(db, row), True

    def _count(self, db: Connection, owner: str, count: float, pixel_steps: float) -> None:
        """Count what a job asks for. Raises SpentError if the owner's key has less left."""
        asked = {"pictures": float(count), "pixel_steps": pixel_steps}
        if (name := key_of(owner)) is not None:
            spend(db, name, asked, self.now())
        shares.count(db, owner, asked)

    def cancel(self, job_id: str, owner: str | None = None) -> Job | None:
        """Cancel a job and return it; its finished pictures stay."""
        with self._write() as db:
            db.execute(
                jobs.update()
                .where(jobs.c.id == job_id, _of(owner), jobs.c.status.in_(UNFINISHED))
                .values(status=Status.CANCELLED, finished=self.now())
            )
            return self._one(db, job_id, owner)

    def retry(self, job_id: str, bound: int, owner: str | None = None) -> Job | None:
        """Put a job that failed or was cancelled back into the queue, with its attempts at 0.

        It counts like a new job. Raises BusyError if more than `bound` pictures would wait,
        SpentError if the owner has less left.
        """
        with self._write() as db:
            job = self._one(db, job_id, owner)
            if job is None or job.status not in (Status.FAILED, Status.CANCELLED):
                return job
            count = int(job.settings.get("count", 1))
            _make_sure_of_room(db, count, bound)
            row = db.execute(select(jobs).where(jobs.c.id == job_id)).mappings().one()
            self._count(db, row["owner"] or "", count, row["pixel_steps"])
            expect_again(db, job_id)
            db.execute(
                jobs.update()
                .where(jobs.c.id == job_id)
                .values(
                    status=Status.QUEUED,
                    attempts=0,
                    kills=0,
                    ends=0,
                    error=None,
                    warnings="[]",
                    started=None,
                    finished=None,
                    expires=None,
                    token=None,
                    created=self.now(),
                )
            )
            return self._one(db, job_id, owner)

    def delete(self, job_id: str, owner: str | None = None) -> bool:
        """Begin to delete a finished job: nobody sees it from now on, and `clear` does the rest.

        Returns False if there is no such job.
        """
        with self._write() as db:
            changed = db.execute(
                jobs.update()
                .where(jobs.c.id == job_id, _of(owner), jobs.c.status.not_in(UNFINISHED))
                .values(expires=GONE, key=None)
            )
            return changed.rowcount > 0

    def get(self, job_id: str, owner: str | None = None) -> Job | None:
        with self._read() as db:
            return self._one(db, job_id, owner)

    def job_of(self, picture_id: str, owner: str | None = None) -> Job | None:
        with self._read() as db:
            found = db.scalar(select(pictures.c.job).where(pictures.c.id == picture_id))
            return None if found is None else self._one(db, found, owner)

    def list(
        self,
        *,
        status: Status | None = None,
        search: str = "",
        before: float | None = None,
        limit: int = 50,
        owner: str | None = None,
    ) -> tuple[list[Job], bool]:
        """Return jobs, newest first, and whether there may be more.

        There are at most `limit` jobs of about MAX_LISTED bytes in all, but at least one.

        search: words that the prompt must contain. before: seconds since 1970; only jobs made
        earlier.
        """
        query = select(jobs).where(_of(owner)).order_by(jobs.c.created.desc(), jobs.c.id)
        query = query.limit(limit)
        if status is not None:
            query = query.where(jobs.c.status == status)
        if before is not None:
            query = query.where(jobs.c.created < before)
        for word in search.split():
            query = query.where(jobs.c.prompt.icontains(word, autoescape=True))
        found: list[Job] = []
        size = 0
        with self._read() as db:
            for row in db.execute(query).mappings():
                drawn = self._pictures(db, row)
                size += len(row["request"]) + sum(len(one["recipe"]) for one in drawn)
                if found and size > MAX_LISTED:
                    return found, True
                found.append(read_job(row, drawn))
        return found, len(found) == limit

    def counts(self) -> dict[str, int]:
        """Return how many jobs there are of each status."""
        query = select(jobs.c.status, func.count()).where(seen()).group_by(jobs.c.status)
        with self._read() as db:
            return {row[0]: row[1] for row in db.execute(query)}

    def counts_by_model(self) -> dict[str, dict[str, int]]:
        """Return how many jobs there are of each status, by the model's name.

        Jobs from before servers had several models are listed under "".
        """
        query = select(jobs.c.model, jobs.c.status, func.count()).where(seen())
        found: dict[str, dict[str, int]] = {}
        with self._read() as db:
            for model, status, count in db.execute(query.group_by(jobs.c.model, jobs.c.status)):
                found.setdefault(model or "", {})[status] = count
        return found

    def has_picture(self, picture_id: str) -> bool:
        with self._read() as db:
            query = select(pictures.c.id).where(pictures.c.id == picture_id)
            return db.execute(query).first() is not None

    def known_files(self) -> tuple[set[str], set[str]]:
        """Return the ids of all pictures, and of all jobs, which may need their inputs."""
        with self._read() as db:
            known = set(db.execute(select(pictures.c.id)).scalars())
            return known, set(db.execute(select(jobs.c.id)).scalars())

    def known_or_coming(self) -> tuple[set[str], set[str]]:
        """Return `known_files`, with the ids of pictures that workers may be writing now."""
        coming = set(self.leftovers())  # read first: one that gets its row meanwhile is in both
        known, ids = self.known_files()
        return known | coming, ids

    def hold(self) -> None:
        """Lock a PostgreSQL database against other servers until this one closes it.

        Raises StorageError if another server has it. A SQLite file is locked by its data folder.
        """
        if self._lite:
            return
        until = time.monotonic() + PATIENCE  # a killed server's lock lasts a little longer
        while not self.held():
            if time.monotonic() > until:
                raise StorageError(TAKEN)
            time.sleep(0.5)

    def held(self) -> bool:
        """Return whether this server has the lock on its database; take it if it is free.

        The lock ends with its connection, as when PostgreSQL restarts. For one thread at a time.
        Raises StorageError.
        """
        with storage_errors():
            try:
                if self._holding is None:
                    made = self.engine.connect()
                    self._holding = made.execution_options(isolation_level="AUTOCOMMIT")
                    self._held = False
                lock = func.pg_try_advisory_lock(LOCK + 1)
                self._held = bool(self._holding.scalar(select(true() if self._held else lock)))
            except SQLAlchemyError:
                self._let_go()
                raise
        return self._held

    def _let_go(self) -> None:
        if self._holding is not None:
            with contextlib.suppress(SQLAlchemyError):
                self._holding.invalidate()
                self._holding.close()
            self._holding = None

    def close(self) -> None:
        self._let_go()
        super().close()

    def leftovers(self) -> list[str]:
        """Return the ids of pictures that workers may have written without a row."""
        held = select(jobs).where(jobs.c.token.is_not(None))
        with self._read() as db:
            return uncommitted(db, db.execute(held).mappings())

    def folder(self) -> str | None:
        """Return the mark of the data folder that has the pictures; None before one is set."""
        with self._read() as db:
            return db.scalar(select(facts.c.value).where(facts.c.name == FOLDER))

    def set_folder(self, mark: str) -> None:
        """Store which data folder has the pictures. Raises StorageError if it is another one."""
        with self._write() as db:
            found = db.scalar(select(facts.c.value).where(facts.c.name == FOLDER))
            if found is None:
                db.execute(facts.insert().values(name=FOLDER, value=mark))
            elif found != mark:
                raise StorageError("the database of jobs belongs to another --data-dir")

    def choose(self, owner: str, model: str) -> None:
        """Store the model that an owner chose for requests that name none."""
        with self._write() as db:
            db.execute(choices.delete().where(choices.c.owner == owner))
            db.execute(choices.insert().values(owner=owner, model=model))

    def chosen(self, owner: str) -> str | None:
        """Return the model that an owner chose; None if it chose none."""
        with self._read() as db:
            return db.scalar(select(choices.c.model).where(choices.c.owner == owner))

    def _one(self, db: Connection, job_id: str, owner: str | None) -> Job | None:
        query = select(jobs).where(jobs.c.id == job_id, _of(owner))
        row = db.execute(query).mappings().first()
        return None if row is None else self._job(db, row)

    def _job(self, db: Connection, row: RowMapping) -> Job:
        return read_job(row, self._pictures(db, row))

    def _pictures(self, db: Connection, row: RowMapping) -> Sequence[RowMapping]:
        query = select(pictures).where(pictures.c.job == row["id"]).order_by(pictures.c.number)
        return db.execute(query).mappings().all()


def _of(owner: str | None) -> ColumnElement[bool]:
    return seen() if owner is None else seen() & (jobs.c.owner == owner)


def _make_sure_of_room(db: Connection, count: int, bound: int) -> None:
    if count > bound:
        raise SafelightError(
            f"count must be at most {bound}, as many pictures as may wait here, not {count}",
            field="count",
        )
    query = select(func.coalesce(func.sum(jobs.c.pictures), 0))
    waiting = db.execute(query.where(jobs.c.status.in_(UNFINISHED))).scalar_one()
    if waiting + count > bound:
        raise BusyError(bound, retry_after=5)
