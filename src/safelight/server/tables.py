"""The tables of jobs and pictures; reading a row as a Job."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.engine import RowMapping

from safelight.hires import second_steps
from safelight.sampling import SAMPLERS
from safelight.server.jobs import Job, Picture, Progress, Status
from safelight.server.wording import public

meta = MetaData()
jobs = Table(
    "jobs",
    meta,
    Column("id", String(32), primary_key=True),
    Column("status", String(16), nullable=False, index=True),
    Column("client", String(16), nullable=False),
    Column("created", Float, nullable=False, index=True),
    Column("started", Float),
    Column("finished", Float, index=True),
    Column("request", Text, nullable=False),
    Column("prompt", Text, nullable=False),
    Column("pictures", Integer, nullable=False),
    Column("cost", Integer, nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("token", String(64)),
    Column("lease", Float, nullable=False, default=0.0),
    Column("warnings", Text, nullable=False, default="[]"),
    Column("error", Text),
    Column("key", String(255), unique=True),
    Column("digest", String(64)),
    Column("owner", String(64), index=True),  # who made it; empty without an owner
    Column("kills", Integer, nullable=False, server_default="0"),  # of its worker, from outside
    Column("ends", Integer, nullable=False, server_default="0"),  # of the server, midway
    Column("expires", Float, index=True),  # when it is deleted; see expiry.py
    Column("model", Text),  # name; None in old rows: the server's own
    Column("pixel_steps", Float, nullable=False, server_default="0"),  # see allowances.py
    Column("trace", String(55)),  # W3C's traceparent of its request: see tracing.py
    # The two ends of an owner's queue: the shortest job, and the job that has waited longest.
    Index("ix_jobs_shortest", "status", "owner", "cost", "created"),
    Index("ix_jobs_oldest", "status", "owner", "created", "cost"),
    Index("ix_jobs_model", "status", "owner", "model", "created"),  # the oldest job of a model
)
shares = Table(
    "shares",
    meta,
    Column("owner", String(64), primary_key=True),
    Column("began", Float, nullable=False),  # of the last job handed out: see shares.py
    Column("ended", Float, nullable=False),
    Column("pictures", Float, nullable=False, server_default="0"),  # asked for in all
    Column("pixel_steps", Float, nullable=False, server_default="0"),
)
keys = Table(
    "keys",
    meta,
    Column("name", String(40), primary_key=True),
    Column("token", String(64), nullable=False, unique=True),  # hashes: see people.py
    Column("cookie", String(64), nullable=False, unique=True),
    Column("created", Float, nullable=False),
)
allowances = Table(
    "allowances",
    meta,
    Column("key", ForeignKey("keys.name"), primary_key=True),
    Column("kind", String(16), primary_key=True),
    Column("amount", Float, nullable=False),  # for each window
    Column("period", Integer, nullable=False),  # of a window, in seconds
    Column("since", Float, nullable=False),  # start of the window; used: the amount in it
    Column("used", Float, nullable=False),
)
pictures = Table(
    "pictures",
    meta,
    Column("id", String(32), primary_key=True),
    Column("job", ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("number", Integer, nullable=False),
    Column("seed", String(20), nullable=False),  # 63 bits: more than a number in JSON keeps
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    Column("created", Float, nullable=False, index=True),
    Column("recipe", Text, nullable=False),
    UniqueConstraint("job", "number"),
)
choices = Table(  # the model that an owner chose for requests that name none
    "choices",
    meta,
    Column("owner", String(64), primary_key=True),
    Column("model", Text, nullable=False),
)
webhooks = Table(
    "webhooks",
    meta,
    Column("job", ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("url", Text, nullable=False),
    Column("tries", Integer, nullable=False),
    Column("due", Float, index=True),  # see outbox.py
    Column("told", Float),
)
facts = Table(
    "facts",
    meta,
    Column("name", String(32), primary_key=True),
    Column("value", Text, nullable=False),
)
workers = Table(
    "workers",
    meta,
    Column("id", String(32), primary_key=True),
    Column("place", String(255), nullable=False),  # its machine and process
    Column("model", Text, nullable=False),  # what it draws with, as JSON
    Column("memory", Integer),  # MiB, of the device that it draws on
    Column("joined", Float, nullable=False),
    Column("seen", Float, nullable=False, index=True),
)
UNFINISHED = (Status.QUEUED, Status.RUNNING)


def timestamp() -> float:
    """Return the seconds since 1970, in whole microseconds as a datetime has them."""
    return round(time.time(), 6)


def read_job(row: RowMapping, drawn: Sequence[RowMapping]) -> Job:
    """Return the job of a row. drawn: the rows of its pictures, in order of their numbers."""
    settings = loads(row["request"])
    status = Status(row["status"])
    return Job(
        id=row["id"],
        status=status,
        created_at=_date(row["created"]),
        started_at=row["started"] and _date(row["started"]),
        finished_at=row["finished"] and _date(row["finished"]),
        client=row["client"],
        model=row["model"],
        settings=settings,
        progress=_progress(settings, row["pictures"], len(drawn)) if status.final else Progress(),
        warnings=_list(row["warnings"]),
        error=row["error"] and public(row["error"]),
        attempts=row["attempts"],
        expires_at=row["expires"] and _date(row["expires"]),
        pictures=[
            Picture(
                id=p["id"],
                index=p["number"],
                seed=int(p["seed"]),
                width=p["width"],
                height=p["height"],
                recipe=loads(p["recipe"]),
            )
            for p in drawn
        ],
    )


def loads(text: str) -> dict[str, Any]:
    """Return a JSON object that we wrote; an empty one if the text is damaged."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


def _list(text: str) -> list[str]:
    try:
        return list(json.loads(text))
    except (ValueError, TypeError):
        return []


def _progress(settings: dict[str, Any], count: int, done: int) -> Progress:
    """Return the progress of a job that is over, in steps of all its pictures."""
    sampler = SAMPLERS.get(settings.get("sampler", ""))
    steps = settings.get("steps") or (sampler.steps if sampler else 1)
    steps += second_steps(settings, steps)
    return Progress(step=steps * done, steps=steps * count)


def _date(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
