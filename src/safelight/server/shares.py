"""Fair shares of the queue: whose job comes next, and which of theirs.

Start-time fair queueing (Goyal, Vin and Cheng, 1996): the queue has a clock of work that was handed
out. A job begins at the clock, or where its owner's job before it ended, whichever is later, and
ends its cost after that. The owner whose last job ended first comes next. Who was away for long has
nothing saved up, and a thousand jobs of one owner do not hold up another's one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from sqlalchemy import ColumnElement, Connection, Select, func, or_, select
from sqlalchemy.engine import RowMapping

from safelight.server.jobs import Status
from safelight.server.tables import jobs, shares


def count(db: Connection, owner: str, asked: Mapping[str, float]) -> None:
    """Count what an owner asks for, which makes them known to the queue.

    asked: how much of each kind that `allowances` knows.
    """
    more = {shares.c[kind]: shares.c[kind] + much for kind, much in asked.items()}
    if not db.execute(shares.update().where(shares.c.owner == owner).values(more)).rowcount:
        db.execute(shares.insert().values(owner=owner, began=0.0, ended=0.0, **asked))


def charge(db: Connection, owner: str, cost: float) -> None:
    """Note that a job of an owner was handed out."""
    clock = db.scalar(select(func.max(shares.c.began))) or 0.0
    ended = db.scalar(select(shares.c.ended).where(shares.c.owner == owner)) or 0.0
    began = max(clock, ended)
    db.execute(
        shares.update().where(shares.c.owner == owner).values(began=began, ended=began + cost)
    )


def next_owner(db: Connection, now: float, but: Collection[str] = ()) -> str | None:
    """Return the owner whose turn it is, None if no job waits. but: owners that are left out."""
    # A scalar subquery asks the index once for each owner, until one is found who waits.
    waits = or_(*(_one(which, shares.c.owner).is_not(None) for which in (_queued(), _late(now))))
    query = select(shares.c.owner).where(waits, shares.c.owner.not_in(but))
    return db.scalar(query.order_by(shares.c.ended, shares.c.owner).limit(1))


def next_job(db: Connection, now: float, owner: str, ageing: float) -> RowMapping | None:
    """Return the job of an owner whose turn it is.

    It is the shortest one, or the one that has waited longest if that makes up for its cost: the
    two ends of the queue, which indexes find at once however long it is. Of jobs whose worker is
    silent there are few: all are looked at.

    ageing: the cost that a second of waiting makes up for.
    """
    ends = [
        _one(_queued(), owner, jobs.c.cost, jobs.c.created),
        _one(_queued(), owner, jobs.c.created, jobs.c.cost),
        _one(_late(now), owner, jobs.c.cost - ageing * (now - jobs.c.created)),
    ]
    urgency = jobs.c.cost - ageing * (now - jobs.c.created)
    query = select(jobs).where(jobs.c.id.in_(ends)).order_by(urgency, jobs.c.created).limit(1)
    return db.execute(query).mappings().first()


def _one(
    which: ColumnElement[bool], owner: ColumnElement[str] | str, *order: ColumnElement[float]
) -> ColumnElement[str]:
    found: Select[tuple[str]] = select(jobs.c.id).where(which, jobs.c.owner == owner)
    return found.order_by(*order).limit(1).scalar_subquery()


def _queued() -> ColumnElement[bool]:
    return jobs.c.status == Status.QUEUED


def _late(now: float) -> ColumnElement[bool]:
    return (jobs.c.status == Status.RUNNING) & (jobs.c.lease < now)
