"""What retention asks of the database: the oldest finished jobs, and their deletion in steps.

A job's `expires` is NULL while the job stays, and the time of its deletion once it is marked. It
is 0 while the job is being deleted: then nobody sees it, and its files are deleted before its rows.
If the process ends in between, the next one goes on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from sqlalchemy import ColumnElement, Connection, func, select

from safelight.errors import StorageError
from safelight.server.claims import Claims
from safelight.server.tables import UNFINISHED, jobs, pictures, webhooks

GONE = 0.0
"""The value of `expires` for a job that is being deleted."""

BATCH = 500
"""Jobs per transaction: other writers wait for it."""


class Expiry(Claims):
    """Methods for the oldest jobs. Marks are set and removed in batches of short transactions."""

    def newest_finished(self, count: int) -> float | None:
        """Return when the count-th newest finished job ended; None if there are fewer."""
        query = select(jobs.c.finished).where(_finished()).order_by(jobs.c.finished.desc())
        with self._read() as db:
            return db.scalar(query.offset(count - 1).limit(1))

    def oldest_finished(self) -> Iterator[tuple[float, str, list[str]]]:
        """Yield the end time, the id and the picture ids of each finished job, the oldest first.

        Reads BATCH jobs at a time. Jobs that ended at the same time come in the order of their ids.
        """
        at, after = -math.inf, ""
        while True:
            later = (jobs.c.finished > at) | ((jobs.c.finished == at) & (jobs.c.id > after))
            query = select(jobs.c.finished, jobs.c.id).where(_finished(), later)
            query = query.order_by(jobs.c.finished, jobs.c.id).limit(BATCH)
            with self._read() as db:
                rows = db.execute(query).all()
                drawn = _drawn(db, [row.id for row in rows])
            for row in rows:
                yield row.finished, row.id, drawn[row.id]
            if len(rows) < BATCH:
                return
            at, after = rows[-1]

    def mark(self, horizon: float, expires: float) -> int:
        """Mark jobs that ended before `horizon` for deletion, and return how many there are.

        Jobs whose webhook has not been told yet are not marked.
        """
        untold = (webhooks.c.job == jobs.c.id) & webhooks.c.told.is_(None)
        old = _finished() & (jobs.c.finished < horizon) & jobs.c.expires.is_(None)
        old &= ~select(webhooks.c.job).where(untold).exists()
        return self._set_expires(old, expires)

    def spare(self, horizon: float) -> int:
        """Take away the marks of jobs that ended later, and return how many there are."""
        return self._set_expires((jobs.c.expires > GONE) & (jobs.c.finished >= horizon), None)

    def expire(self, now: float) -> int:
        """Begin to delete the marked jobs whose time has come, and return how many there are.

        From now on nobody sees them.
        """
        due = jobs.c.expires.is_not(None) & (jobs.c.expires != GONE) & (jobs.c.expires <= now)
        return self._set_expires(due & _finished(), GONE)

    def marked(self) -> int:
        """Return how many jobs are marked, and not yet being deleted."""
        query = select(func.count()).where(jobs.c.expires > GONE)
        with self._read() as db:
            return db.scalar(query) or 0

    def gone(self, job_ids: Sequence[str] | None = None) -> dict[str, list[str]]:
        """Return at most BATCH jobs that are being deleted, each with the ids of its pictures.

        job_ids: consider only these.
        """
        which = jobs.c.expires == GONE
        if job_ids is not None:
            which &= jobs.c.id.in_(job_ids)
        with self._read() as db:
            ids = db.execute(select(jobs.c.id).where(which).limit(BATCH)).scalars().all()
            return _drawn(db, ids)

    def forget(self, job_ids: Sequence[str]) -> None:
        """Delete the rows of jobs that are being deleted and whose files are gone."""
        with self._write() as db:
            ids = select(jobs.c.id).where(jobs.c.id.in_(job_ids), jobs.c.expires == GONE)
            going = db.execute(ids).scalars().all()
            db.execute(pictures.delete().where(pictures.c.job.in_(going)))
            db.execute(jobs.delete().where(jobs.c.id.in_(going)))

    def _set_expires(self, which: ColumnElement[bool], expires: float | None) -> int:
        # Once its job is being deleted, an idempotency key is free again.
        more = {"key": None} if expires == GONE else {}
        changed, most = 0, BATCH
        while True:
            try:
                with self._write() as db:
                    ids = db.execute(select(jobs.c.id).where(which).limit(most)).scalars().all()
                    new = jobs.update().where(jobs.c.id.in_(ids))
                    db.execute(new.values(expires=expires, **more))
            except StorageError:
                if most == 1:
                    raise
                most = max(1, most // 10)  # a full disk may have room for the journal of fewer
                continue
            changed += len(ids)
            if len(ids) < most:
                return changed


def seen() -> ColumnElement[bool]:
    """Return the SQL condition for jobs that are not being deleted."""
    return jobs.c.expires.is_distinct_from(GONE)


def _drawn(db: Connection, job_ids: Sequence[str]) -> dict[str, list[str]]:
    """Return the ids of the pictures of each of these jobs."""
    found: dict[str, list[str]] = {job_id: [] for job_id in job_ids}
    query = select(pictures.c.job, pictures.c.id).where(pictures.c.job.in_(job_ids))
    for job_id, picture_id in db.execute(query):
        found[job_id].append(picture_id)
    return found


def _finished() -> ColumnElement[bool]:
    return jobs.c.status.not_in(UNFINISHED) & jobs.c.finished.is_not(None) & seen()
