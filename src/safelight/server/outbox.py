"""The webhooks of jobs, in the database: whom to tell of a job's end, and when to try next."""

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
"""The fact that the secrets of all owners are derived from."""

BATCH = 500
"""Jobs that are looked at in one transaction."""


@dataclass(frozen=True)
class Notice:
    """What is to be sent. tries: how often, this time included."""

    job: Job
    owner: str
    url: str
    tries: int


class Outbox(Database):
    """Methods for the webhooks of jobs.

    A row's `due` is NULL until its job has ended, and once its notice was taken or given up.
    """

    def ended(self, now: float, job_ids: Collection[str] | None = None) -> int:
        """Let the notices of jobs that have ended be sent, at most BATCH; return how many.

        job_ids: only those of them.
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
        """Return the next notice to be sent, counted as a try; None if none is due.

        busy: owners that are left out. until: when it is due again, if nobody says how it went.
        """
        query = select(webhooks).where(webhooks.c.due <= now, webhooks.c.owner.not_in(busy))
        query = query.order_by(webhooks.c.due).limit(1)
        with self._read() as db:  # there is seldom one: others need not wait for that
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
        return Notice(job, row["owner"], row["url"], row["tries"] + 1)

    def noticed(self, job_id: str, now: float, due: float | None) -> None:
        """Keep how a try went. due: when the next one is; None for no other."""
        with self._write() as db:
            values = {"due": due} if due is not None else {"due": None, "told": now}
            db.execute(webhooks.update().where(webhooks.c.job == job_id).values(values))

    def webhook_secret(self, owner: str) -> str:
        """Return the secret that an owner's notices are signed with, as Standard Webhooks has it.

        All are derived from one, which is made now if there is none.
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
    """Keep whom to tell of a job's end, with the job."""
    db.execute(webhooks.insert().values(job=job_id, owner=owner, url=url, tries=0))


def expect_again(db: Connection, job_id: str) -> None:
    """Let a job's end be told anew: it is tried again."""
    values = {"due": None, "told": None, "tries": 0}
    db.execute(webhooks.update().where(webhooks.c.job == job_id).values(values))
