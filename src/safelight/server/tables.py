"""The tables of jobs and pictures; reading a row as a Job."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
)
from sqlalchemy.engine import RowMapping
from sqlalchemy.exc import OperationalError

from safelight.sampling import SAMPLERS
from safelight.server.jobs import Job, Picture, Progress, Status, StorageError

meta = MetaData()
jobs = Table(
    "jobs",
    meta,
    Column("id", String(32), primary_key=True),
    Column("status", String(16), nullable=False, index=True),
    Column("client", String(16), nullable=False),
    Column("created", Float, nullable=False, index=True),
    Column("started", Float),
    Column("finished", Float),
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
)
pictures = Table(
    "pictures",
    meta,
    Column("id", String(32), primary_key=True),
    Column("job", ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("number", Integer, nullable=False),
    Column("seed", String(20), nullable=False),  # 63 bits, which not all clients of JSON keep
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    Column("created", Float, nullable=False, index=True),
    Column("recipe", Text, nullable=False),
    UniqueConstraint("job", "number"),
)
UNFINISHED = (Status.QUEUED, Status.RUNNING)


def open_engine(url: str) -> Engine:
    """Return the engine of a database whose tables exist. Raises StorageError."""
    engine = create_engine(url)
    if engine.dialect.name == "sqlite":
        _set_up_sqlite(engine)
    try:
        meta.create_all(engine)
    except Exception as error:
        reason = str(error).splitlines()[0][:150]
        raise StorageError(f"the database of jobs cannot be opened: {reason}") from None
    return engine


@contextmanager
def storage_errors() -> Iterator[None]:
    """Raise StorageError where the database does not answer."""
    try:
        yield
    except OperationalError as error:
        reason = str(error.orig).splitlines()[0][:100]
        raise StorageError(f"the database of jobs does not take it: {reason}") from None


def timestamp() -> float:
    """Return the seconds since 1970, as fine as a date can say."""
    return round(time.time(), 6)


def read_job(row: RowMapping, drawn: Sequence[RowMapping]) -> Job:
    """Return the job of a row. drawn: the rows of its pictures, in order."""
    settings = json.loads(row["request"])
    status = Status(row["status"])
    return Job(
        id=row["id"],
        status=status,
        created_at=_date(row["created"]),
        started_at=row["started"] and _date(row["started"]),
        finished_at=row["finished"] and _date(row["finished"]),
        client=row["client"],
        settings=settings,
        progress=_progress(settings, row["pictures"], len(drawn)) if status.final else Progress(),
        warnings=json.loads(row["warnings"]),
        error=row["error"],
        attempts=row["attempts"],
        pictures=[
            Picture(
                id=p["id"],
                index=p["number"],
                seed=int(p["seed"]),
                width=p["width"],
                height=p["height"],
                recipe=json.loads(p["recipe"]),
            )
            for p in drawn
        ],
    )


def _progress(settings: dict[str, Any], count: int, done: int) -> Progress:
    """Return the progress of a job that is over: steps asked for, times its pictures."""
    sampler = SAMPLERS.get(settings.get("sampler", ""))
    steps = settings.get("steps") or (sampler.steps if sampler else 1)
    return Progress(step=steps * done, steps=steps * count)


def _set_up_sqlite(engine: Engine) -> None:
    # Before 3.51.3 a reset of the write-ahead log may lose what was committed.
    journal = "WAL" if sqlite3.sqlite_version_info >= (3, 51, 3) else "DELETE"

    @event.listens_for(engine, "connect")
    def _(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver would begin transactions of its own
        for pragma in (
            f"journal_mode={journal}",
            "synchronous=FULL",
            "busy_timeout=20000",
            "foreign_keys=ON",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _(connection: Connection) -> None:
        # Taken at once, a lock to write is waited for; taken on the way it may be refused.
        reads = connection.get_execution_options().get("reads")
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _date(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
