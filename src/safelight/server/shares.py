"""Fair shares of the queue: which owner's job comes next, and which of the owner's jobs.

Start-time fair queueing (Goyal, Vin and Cheng, 1996): the queue has a virtual clock, in units of
cost: the latest begin of a job that was handed out. A job begins at the clock's time or when its
owner's previous job ended, whichever is later, and ends its cost after that. The owner whose last
job ended first comes next. An owner that was away saves nothing up, and a thousand jobs of one
owner do not hold up another owner's single job.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from sqlalchemy import ColumnElement, Connection, Select, case, func, or_, select, true
from sqlalchemy.engine import RowMapping

from safelight.server.jobs import Status
from safelight.server.tables import jobs, shares


def count(db: Connection, owner: str, asked: Mapping[str, float]) -> None:
    """Count what an owner asks for; this also makes the owner known to the queue.

    asked: the amount of each kind of `allowances`.
    """
    more = {shares.c[kind]: shares.c[kind] + much for kind, much in asked.items()}
    if not db.execute(shares.update().where(shares.c.owner == owner).values(more)).rowcount:
        db.execute(shares.insert().values(owner=owner, began=0.0, ended=0.0, **asked))


def charge(db: Connection, owner: str, cost: float) -> None:
    """Charge an owner for a job that was handed out."""
    clock = db.scalar(select(func.max(shares.c.began))) or 0.0
    ended = db.scalar(select(shares.c.ended).where(shares.c.owner == owner)) or 0.0
    began = max(clock, ended)
    db.execute(
        shares.update().where(shares.c.owner == owner).values(began=began, ended=began + cost)
    )


def next_owner(
    db: Connection,
    now: float,
    but: Collection[str] = (),
    able: Collection[str] | None = None,
) -> str | None:
    """Return the owner whose turn it is; None if no job waits.

    but: owners that are left out. able: models whose jobs are considered; None for all.
    """
    # A scalar subquery needs one index look-up for each owner. Without its order, PostgreSQL would
    # read the whole table for each owner without a waiting job.
    shortest = jobs.c.cost, jobs.c.created
    waits = or_(
        _one(_queued(able), shares.c.owner, *shortest).is_not(None),
        _one(_late(now, able), shares.c.owner).is_not(None),
    )
    query = select(shares.c.owner).where(waits, shares.c.owner.not_in(but))
    return db.scalar(query.order_by(shares.c.ended, shares.c.owner).limit(1))


def next_job(
    db: Connection,
    now: float,
    owner: str,
    ageing: float,
    loaded: Collection[str] = (),
    more: float = 0.0,
    able: Collection[str] | None = None,
) -> RowMapping | None:
    """Return the job whose turn it is among an owner's jobs.

    It is the shortest job, or the one that has waited longest if that makes up for its cost. These
    are the two ends of the queue, which indexes find at once however long it is. Jobs whose worker
    is silent are few: all of them are considered.

    ageing: the cost that a second of waiting makes up for. loaded: models that are in memory: the
    oldest job of each is considered too; jobs of other models cost `more`. able: as in
    `next_owner`.
    """
    ends = [
        _one(_queued(able), owner, jobs.c.cost, jobs.c.created),
        _one(_queued(able), owner, jobs.c.created, jobs.c.cost),
        _one(_late(now, able), owner, jobs.c.cost - ageing * (now - jobs.c.created)),
    ]
    ends += [_one(_queued(able) & (jobs.c.model == name), owner, jobs.c.created) for name in loaded]
    urgency = jobs.c.cost - ageing * (now - jobs.c.created)
    if loaded:
        urgency += case((jobs.c.model.in_(loaded), 0.0), else_=more)
    query = select(jobs).where(jobs.c.id.in_(ends)).order_by(urgency, jobs.c.created).limit(1)
    return db.execute(query).mappings().first()


def _one(
    which: ColumnElement[bool], owner: ColumnElement[str] | str, *order: ColumnElement[float]
) -> ColumnElement[str]:
    found: Select[tuple[str]] = select(jobs.c.id).where(which, jobs.c.owner == owner)
    return found.order_by(*order).limit(1).scalar_subquery()


def _queued(able: Collection[str] | None) -> ColumnElement[bool]:
    return (jobs.c.status == Status.QUEUED) & _of_models(able)


def _late(now: float, able: Collection[str] | None) -> ColumnElement[bool]:
    return (jobs.c.status == Status.RUNNING) & (jobs.c.lease < now) & _of_models(able)


def _of_models(able: Collection[str] | None) -> ColumnElement[bool]:
    return true() if able is None else jobs.c.model.in_(able)
