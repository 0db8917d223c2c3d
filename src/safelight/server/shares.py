"""Fair shares of the queue: which owner's job comes next, and which of the owner's jobs.

Start-time fair queueing (Goyal, Vin and Cheng, 1996): the queue has a virtual clock, in units of
cost: the latest begin of a job that was handed out. A job begins at the clock's time or when its
owner's previous job ended, whichever is later, and ends its cost after that. The owner whose last
job ended first comes next. An owner that was away saves nothing up, and a thousand jobs of one
owner do not hold up another owner's single job.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, Select, case, func, or_, select, true
from sqlalchemy.engine import RowMapping

from safelight.server.jobs import Status
from safelight.server.tables import jobs, shares


@dataclass(frozen=True)
class Preference:
    """Which of an owner's jobs a worker prefers.

    ageing: the cost that a second of waiting makes up for. loaded: models that are in memory: the
    oldest job of each is considered too; jobs of other models cost `penalty` more. models: those
    whose jobs are considered; None for all.
    """

    ageing: float = 0.0
    loaded: Collection[str] = ()
    penalty: float = 0.0
    models: Collection[str] | None = None


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
    excluding: Collection[str] = (),
    models: Collection[str] | None = None,
) -> str | None:
    """Return the owner whose turn it is; None if no job waits.

    excluding: owners that are left out. models: as in `Preference`.
    """
    # A scalar subquery needs one index look-up for each owner. Without its order, PostgreSQL would
    # read the whole table for each owner without a waiting job.
    shortest = jobs.c.cost, jobs.c.created
    waits = or_(
        _first_id(_queued(models), shares.c.owner, *shortest).is_not(None),
        _first_id(_late(now, models), shares.c.owner).is_not(None),
    )
    query = select(shares.c.owner).where(waits, shares.c.owner.not_in(excluding))
    return db.scalar(query.order_by(shares.c.ended, shares.c.owner).limit(1))


def next_job(db: Connection, now: float, owner: str, preference: Preference) -> RowMapping | None:
    """Return the job whose turn it is among an owner's jobs.

    It is the shortest job, or the one that has waited longest if that makes up for its cost. These
    are the two ends of the queue, which indexes find at once however long it is. Jobs whose worker
    is silent are few: all of them are considered.
    """
    queued, loaded = _queued(preference.models), preference.loaded
    urgency = jobs.c.cost - preference.ageing * (now - jobs.c.created)
    ends = [
        _first_id(queued, owner, jobs.c.cost, jobs.c.created),
        _first_id(queued, owner, jobs.c.created, jobs.c.cost),
        _first_id(_late(now, preference.models), owner, urgency),
    ]
    ends += [_first_id(queued & (jobs.c.model == name), owner, jobs.c.created) for name in loaded]
    if loaded:
        urgency += case((jobs.c.model.in_(loaded), 0.0), else_=preference.penalty)
    query = select(jobs).where(jobs.c.id.in_(ends)).order_by(urgency, jobs.c.created).limit(1)
    return db.execute(query).mappings().first()


def _first_id(
    which: ColumnElement[bool], owner: ColumnElement[str] | str, *order: ColumnElement[float]
) -> ColumnElement[str]:
    found: Select[tuple[str]] = select(jobs.c.id).where(which, jobs.c.owner == owner)
    return found.order_by(*order).limit(1).scalar_subquery()


def _queued(models: Collection[str] | None) -> ColumnElement[bool]:
    return (jobs.c.status == Status.QUEUED) & _of_models(models)


def _late(now: float, models: Collection[str] | None) -> ColumnElement[bool]:
    return (jobs.c.status == Status.RUNNING) & (jobs.c.lease < now) & _of_models(models)


def _of_models(models: Collection[str] | None) -> ColumnElement[bool]:
    return true() if models is None else jobs.c.model.in_(models)
