"""What a worker does to jobs: claim, renew, give back, add a picture, finish.

A job is run at least once and committed once. It is claimed with a lease and a token that no other
claim has; what is done for a job counts only while it still has this token.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, func, select
from sqlalchemy.exc import IntegrityError

from safelight.server import shares
from safelight.server.jobs import Picture, Status
from safelight.server.roster import Roster
from safelight.server.shares import Preference
from safelight.server.tables import jobs, loads, pictures

LEASE = 60.0
"""Seconds after which a silent worker's job is free again."""

ATTEMPTS = 3
"""The most attempts at a job; if no worker finishes it, the job is at fault."""

KILLS = 3
"""How often a worker may be killed from outside while it draws a job in company, and as often again
while it draws the job alone, before the job is at fault. Mostly the job is not the cause.
"""


ENDS = 10
"""How often the whole server, or the machine of a worker, may end while a job is drawn alone, after
KILLS times in company, and without a finished picture in between. Power cuts and restarts are no
job's fault, but a job that takes down the machine would do so after every start.
"""


class LostError(Exception):
    """The job is no longer this worker's."""


@dataclass(frozen=True)
class Claim:
    """A job to draw.

    done: indexes of its finished pictures. cost: as given to `submit`. suspect: whether it must be
    drawn alone, since workers ended while they drew it. model: name of the model that draws it;
    None for the server's own. left: ids of pictures that a worker whose lease ran out may have
    written without a row. waited: seconds since the job was made. trace: its place in a trace.
    """

    id: str
    token: str
    settings: dict[str, Any]
    done: frozenset[int]
    suspect: bool
    cost: int = 0
    model: str | None = None
    owner: str = ""
    left: tuple[str, ...] = ()
    waited: float = 0.0
    trace: str | None = None

    def picture_id(self, index: int) -> str:
        """Return the id that a picture of this claim gets."""
        return _picture_id(self.token, index)


def _picture_id(token: str, index: int) -> str:
    """Return a picture's id: opaque, and computable again after a worker ended midway."""
    return hashlib.blake2b(f"{token}:{index}".encode(), digest_size=16).hexdigest()


class Claims(Roster):
    """The database as workers use it."""

    def claim(
        self,
        worker: str,
        *,
        alone: bool = False,
        ageing: float = 0.0,
        cheaper_than: float | None = None,
        held: Collection[str] = (),
        known: Collection[str] | None = None,
        loaded: Collection[str] = (),
        patience: float = 0.0,
        models: Collection[str] | None = None,
    ) -> Claim | None:
        """Return the next job for this worker and count the attempt; None if there is none.

        Owners take turns, as in `shares`; of each, short jobs come first. ageing: the cost that a
        second of waiting makes up for. cheaper_than: take only a job that costs less, or one of an
        owner who is not in `held`, the owners of the worker's jobs. known: the tokens of all claims
        that the worker knows of; its other claims wait again. It is given after a call that raised:
        a database can go away between its commit and its answer. loaded: the models in the worker's
        memory; jobs of other models wait `patience` seconds longer, so that models are not
        exchanged at each job. models: the models that it can load; None for all. A suspect job is
        claimed only by a worker that is `alone` with it, so that it takes down no other job; when
        its turn comes, other jobs wait. A job that was begun too often fails. Raises StorageError
        if the server has another version.
        """
        now = self.now()
        preference = Preference(ageing, loaded, ageing * patience, models)
        with self._read() as db:  # blocks nobody, unlike a transaction that writes
            self._make_sure_of_version(db)
            if known is None and not _waits(db, now, preference, held, cheaper_than):
                return None
        with self._write() as db:
            now = self.now()  # the transaction may have waited for others
            if known is not None:
                strays = jobs.c.token.startswith(worker + ":") & jobs.c.token.not_in(known)
                _put_back(db, strays)
            self._renew(db, worker, now)  # it is late if the database was away
            first = None
            if cheaper_than is not None:
                first = _first(db, now, preference, excluding=held)
            if first is None:
                first = _first(db, now, preference)
                if first is None or first["cost"] >= (cheaper_than or math.inf):
                    return None
            suspect = bool(first["attempts"] or max(first["kills"], first["ends"]) >= KILLS)
            if suspect and not alone:
                return None
            left = () if first["token"] is None else tuple(uncommitted(db, [first]))
            token = f"{worker}:{secrets.token_hex(8)}"
            db.execute(
                jobs.update()
                .where(jobs.c.id == first["id"])
                .values(
                    status=Status.RUNNING,
                    token=token,
                    lease=now + LEASE,
                    attempts=first["attempts"] + 1,
                    ends=first["ends"],
                    started=func.coalesce(jobs.c.started, now),
                )
            )
            shares.charge(db, first["owner"], first["cost"])
            query = select(pictures.c.number).where(pictures.c.job == first["id"])
            done = frozenset(db.execute(query).scalars())
            settings = loads(first["request"])
            return Claim(
                *(first["id"], token, settings, done, suspect, first["cost"], first["model"]),
                owner=first["owner"],
                left=left,
                waited=now - first["created"],
                trace=first["trace"],
            )

    def renew(self, worker: str) -> None:
        """Extend the leases of this worker's jobs."""
        with self._write() as db:
            self._renew(db, worker, self.now())

    def holds(self, job_id: str, token: str) -> bool:
        """Return whether a job still has this token."""
        with self._read() as db:
            return _held(db, job_id, token)

    def release(
        self,
        worker: str | None = None,
        *,
        told_to: bool = False,
        killed: bool = False,
        ended: bool = False,
    ) -> list[str]:
        """Let the jobs of a worker that ended wait again; without a name, all jobs but the fleet's.

        told_to: the worker was told to end, so this was no attempt. killed: it was killed from
        outside. ended: the whole server ended; leases of the fleet begin anew. Kills and ends have
        counters of their own. Returns the ids of pictures that the worker may have written without
        a row.
        """
        mine = jobs.c.status == Status.RUNNING
        claimed = jobs.c.token.is_not(None)
        its = ~self._of_fleet() if worker is None else jobs.c.token.startswith(worker + ":")
        mine, claimed = mine & its, claimed & its
        now = self.now()
        with self._write() as db:
            left = uncommitted(db, db.execute(select(jobs).where(claimed)).mappings())
            db.execute(
                jobs.update()
                .where(mine)
                .values(
                    status=Status.QUEUED,
                    lease=0.0,
                    attempts=jobs.c.attempts - int(told_to or killed or ended),
                    kills=jobs.c.kills + int(killed),
                    ends=jobs.c.ends + int(ended),
                )
            )
            db.execute(jobs.update().where(claimed).values(token=None))
            if ended:  # the fleet may have renewed no lease: the database was away, too
                fleet = (jobs.c.status == Status.RUNNING) & self._of_fleet()
                db.execute(jobs.update().where(fleet).values(lease=now + LEASE))
            for why, which in _worn_out(jobs.c):
                _fail(db, which & (jobs.c.status == Status.QUEUED), now, why)
        return left

    def put_back(self, job_id: str, token: str) -> None:
        """Let a claimed job wait again, as if it had not been claimed."""
        with self._write() as db:
            _put_back(db, (jobs.c.id == job_id) & (jobs.c.token == token))

    def add_picture(self, job_id: str, token: str, picture: Picture) -> None:
        """Add a finished picture, unless an earlier call has added it.

        Raises LostError if the job is not this token's, or has another picture at this index.
        """
        try:
            with self._write() as db:
                if db.scalar(select(pictures.c.job).where(pictures.c.id == picture.id)) == job_id:
                    return
                if not _held(db, job_id, token):
                    raise LostError(job_id)
                db.execute(
                    pictures.insert().values(
                        id=picture.id,
                        job=job_id,
                        number=picture.index,
                        seed=str(picture.seed),
                        width=picture.width,
                        height=picture.height,
                        created=self.now(),
                        recipe=json.dumps(picture.recipe),
                    )
                )
                # The job gets on: earlier ends of workers and servers were not its fault.
                new = {"attempts": 1, "kills": 0, "ends": 0}
                db.execute(jobs.update().where(jobs.c.id == job_id).values(new))
        except IntegrityError:
            raise LostError(job_id) from None

    def finish(
        self, job_id: str, token: str, *, warnings: list[str], error: str | None = None
    ) -> None:
        """Make a job final. Raises LostError if the job is not this token's."""
        with self._write() as db:
            if not _held(db, job_id, token):
                raise LostError(job_id)
            db.execute(
                jobs.update()
                .where(jobs.c.id == job_id)
                .values(
                    status=Status.SUCCEEDED if error is None else Status.FAILED,
                    finished=self.now(),
                    warnings=json.dumps(warnings),
                    error=error,
                    token=None,
                )
            )

    def _renew(self, db: Connection, worker: str, now: float) -> None:
        db.execute(
            jobs.update()
            .where(jobs.c.status == Status.RUNNING, jobs.c.token.startswith(worker + ":"))
            .values(lease=now + LEASE)
        )


def _put_back(db: Connection, which: ColumnElement[bool]) -> None:
    db.execute(
        jobs.update()
        .where(which, jobs.c.status == Status.RUNNING)
        .values(status=Status.QUEUED, token=None, lease=0.0, attempts=jobs.c.attempts - 1)
    )


def _held(db: Connection, job_id: str, token: str) -> bool:
    query = select(jobs.c.id).where(
        jobs.c.id == job_id, jobs.c.token == token, jobs.c.status == Status.RUNNING
    )
    return db.execute(query).first() is not None


def _waits(
    db: Connection,
    now: float,
    preference: Preference,
    excluding: Collection[str],
    below: float | None,
) -> bool:
    """Return whether `claim` may find a job."""
    owner = shares.next_owner(db, now, models=preference.models)
    if below is None or owner is None:
        return owner is not None
    first = shares.next_job(db, now, owner, preference)
    cheap = first is not None and first["cost"] < below
    return cheap or shares.next_owner(db, now, excluding, preference.models) is not None


def _first(
    db: Connection,
    now: float,
    preference: Preference,
    excluding: Collection[str] = (),
) -> dict[str, Any] | None:
    """Return the job whose turn it is. Jobs before it that cannot be drawn any more fail.

    If its lease ran out, the machine of its worker ended, and this is counted in place of the
    attempt: a worker that fails alone is noticed by the process that keeps it.
    """
    while (owner := shares.next_owner(db, now, excluding, preference.models)) is not None:
        found = shares.next_job(db, now, owner, preference)
        if found is None:
            return None
        first = dict(found)
        if first["status"] == Status.RUNNING:
            first |= {"attempts": first["attempts"] - 1, "ends": first["ends"] + 1}
        whys = [why for why, so in _worn_out(first) if so]
        if not loads(first["request"]):
            whys.append("its request was damaged on the disk")
        if not whys:
            return first
        _fail(db, jobs.c.id == first["id"], now, whys[0])
    return None


def uncommitted(db: Connection, rows: Iterable[Mapping[Any, Any]]) -> list[str]:
    """Return the ids that pictures of these claims would have, without those that have a row."""
    ids = [_picture_id(row["token"], i) for row in rows for i in range(row["pictures"])]
    known: set[str] = set()
    for start in range(0, len(ids), 500):  # databases limit the parameters of a statement
        query = select(pictures.c.id).where(pictures.c.id.in_(ids[start : start + 500]))
        known |= set(db.execute(query).scalars())
    return [picture_id for picture_id in ids if picture_id not in known]


def _worn_out(job: Any) -> list[tuple[str, Any]]:
    """Return the reasons not to try a job again, each with whether it holds.

    job: a row, or the columns of the table, which give SQL conditions.
    """
    stopped = f"the worker stopped {ATTEMPTS} times while it drew this"
    killed = f"the worker was killed {2 * KILLS} times while it drew this, {KILLS} times alone"
    machine = "the server or the worker's machine ended"
    ended = f"{machine} {KILLS + ENDS} times while it drew this, {ENDS} times alone"
    return [
        (stopped, job["attempts"] >= ATTEMPTS),
        (killed, job["kills"] >= 2 * KILLS),
        (ended, job["ends"] >= KILLS + ENDS),
    ]


def _fail(db: Connection, which: ColumnElement[bool], now: float, why: str) -> None:
    db.execute(
        jobs.update().where(which).values(status=Status.FAILED, finished=now, token=None, error=why)
    )
