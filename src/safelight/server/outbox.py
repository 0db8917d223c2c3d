"""The webhooks of jobs in the database: where to send the end of a job, and when to try next."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import Connection, select

from safelight.server.database import Database
from safelight.server.jobs import Job
from safelight.server.tables import UNFINISHED, facts, jobs, pictures, read_job, webhooks

SECRET = "webhooks"
"""The name of the fact from which all owners' secrets are derived."""

BATCH = 500
"""The most jobs in one transaction."""


@dataclass(frozen=True)
class Notice:
    """A webhook to send now.

    tries: the number of this try, from 1. until: when it is due again without an answer.
    """

    job: Job
    owner: str
    url: str
    tries: int
    until: float


class Outbox(Database):
    """Methods for the webhooks of jobs.

    A row's `due` is NULL until its job has ended, and again once the webhook was taken or given up.
    """

    def ended(self, now: float, job_ids: Collection[str] | None = None) -> int:
        """Make the webhooks of ended jobs due, at most BATCH; return how many.

        job_ids: consider only these.
        """
        query = select(webhooks.c.job).join(jobs, jobs.c.id == webhooks.c.job)
        query = query.where(
            webhooks.c.due.is_(None), webhooks.c.told.is_(None), jobs.c.status.not_in(UNFINISHED)
        )
        if job_ids is not None:
            query = query.where(webhooks.c.job.in_(job_ids))
        with self._write() as db:
            found = list(db.scalars(query.limit(BATCH)))
            if found:
                db.execute(webhooks.update().where(webhooks.c.job.in_(found)).values(due=now))
        return len(found)

    def next_notice(self, now: float, busy: Collection[str], until: float) -> Notice | None:
        """Return the next webhook that is due and count the try; None if none is due.

        busy: owners that are left out. until: when it is due again if `noticed` is not called.
        """
        query = select(webhooks).where(webhooks.c.due <= now, webhooks.c.owner.not_in(busy))
        query = query.order_by(webhooks.c.due).limit(1)
        with self._read() as db:  # mostly none is due: do not hold up writers
            if db.execute(query).first() is None:
                return None
        with self._write() as db:
            row = db.execute(query).mappings().first()
            if row is None:
                return None
            mine = webhooks.update().where(webhooks.c.job == row["job"])
            db.execute(mine.values(due=until, tries=row["tries"] + 1))
            found = db.execute(select(jobs).where(jobs.c.id == row["job"])).mappings().one()
            drawn = select(pictures).where(pictures.c.job == row["job"])
            drawn = drawn.order_by(pictures.c.number)
            job = read_job(found, db.execute(drawn).mappings().all())
        return Notice(job, row["owner"], row["url"], row["tries"] + 1, until)

    def noticed(self, notice: Notice, now: float, due: float | None) -> None:
        """Store the result of a try. due: time of the next try; None if there is none.

        It does nothing if the job was retried meanwhile: the job's second end is still to be told.
        """
        with self._write() as db:
            values = {"due": due} if due is not None else {"due": None, "told": now}
            mine = (webhooks.c.job == notice.job.id) & (webhooks.c.due == notice.until)
            db.execute(webhooks.update().where(mine).values(values))

    def webhook_secret(self, owner: str) -> str:
        """Return the secret that signs an owner's webhooks, in the form of Standard Webhooks.

        All secrets are derived from one, which is made on the first call.
        """
        with self._read() as db:
            key = db.scalar(select(facts.c.value).where(facts.c.name == SECRET))
        if key is None:
            with self._write() as db:
                key = db.scalar(select(facts.c.value).where(facts.c.name == SECRET))
                if key is None:
                    key = secrets.token_hex(32)
                    db.execute(facts.insert().values(name=SECRET, value=key))
        derived = hmac.new(bytes.fromhex(key), owner.encode(), hashlib.sha256).digest()
        return f"whsec_{base64.b64encode(derived).decode()}"


def expect(db: Connection, job_id: str, owner: str, url: str) -> None:
    """Store the URL that is told of a job's end, in the transaction that stores the job."""
    db.execute(webhooks.insert().values(job=job_id, owner=owner, url=url, tries=0))


def expect_again(db: Connection, job_id: str) -> None:
    """Let the end of a job that is tried again be sent again."""
    values = {"due": None, "told": None, "tries": 0}
    db.execute(webhooks.update().where(webhooks.c.job == job_id).values(values))
