"""A thousand workers on a queue of a million jobs: the real store on a real PostgreSQL, no drawing.

    python tests/soak/claims.py [--jobs 1000000] [--workers 1000] [--drawing 10] [--seconds 120]

Each worker is a thread with its own name. It claims a job, sleeps for as long as drawing takes,
adds a picture and finishes; meanwhile it renews its lease and reports that it is well, as a real
worker does. The threads are spread over a few processes, and share their connections. Prints claims
per second, how long a claim took, what else was written, and how the database finds the next job
(EXPLAIN).
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

from sqlalchemy import event, text

sys.path.insert(0, str(Path(__file__).parent.parent / "server"))
from postgresql import Postgres

from safelight.errors import StorageError
from safelight.server import shares
from safelight.server.claims import LEASE
from safelight.server.jobs import ModelInfo, Picture
from safelight.server.roster import BEAT
from safelight.server.store import Store, new_id

AGEING = 0.25
OWNERS = 20
RECIPE = {"prompt": "a red apple", "steps": 20, "seed": 1}
MODEL = ModelInfo(name="embedded", family="sd", sha256="0" * 64, ready=True)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def fill(store: Store, jobs: int) -> float:
    """Submit a job for each owner, copy them in the database to `jobs` jobs; return the seconds."""
    began = time.monotonic()
    for owner in range(OWNERS):
        settings = {"prompt": "a red apple", "steps": 20, "count": 1}
        store.submit(new_id(), settings, client="web", cost=40, bound=10**9, owner=f"key:{owner}")
    for owner in range(OWNERS, 2 * OWNERS):  # owners without a waiting job
        job, _ = store.submit(
            new_id(), {"count": 1}, client="web", cost=1, bound=10**9, owner=f"key:{owner}"
        )
        store.cancel(job.id)
    columns = "status, client, request, prompt, pictures, owner, attempts, lease, warnings, kills"
    columns += ", ends, pixel_steps"
    copy = f"""
        INSERT INTO jobs (id, created, cost, {columns})
        SELECT
            md5(random()::text || n), created - random() * 86400, 1 + (random() * 99)::int,
            {columns}
        FROM jobs, generate_series(1, {jobs // OWNERS - 1}) AS n WHERE status = 'queued'
    """
    with store.engine.begin() as db:
        db.execute(text(copy))
    with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as db:
        db.execute(text("VACUUM ANALYZE jobs"))
    return time.monotonic() - began


class Worker(threading.Thread):
    """A worker that draws nothing. noted: name and seconds of each transaction."""

    def __init__(self, store: Store, drawing: float, until: float, wait: float) -> None:
        super().__init__(daemon=True)
        self.store, self.drawing, self.until, self.wait = store, drawing, until, wait
        self.noted: list[tuple[str, float]] = []
        self.failed = 0
        self.worker = new_id()

    def run(self) -> None:
        time.sleep(self.wait)
        self._beat_at = self._renew_at = 0.0
        while time.monotonic() < self.until:
            self._tend()
            claim = self._call("claim", self.store.claim, self.worker, ageing=AGEING)
            if claim is None:
                time.sleep(1)
                continue
            ready = time.monotonic() + random.uniform(0.5, 1.5) * self.drawing
            while (left := min(ready, self.until) - time.monotonic()) > 0:
                time.sleep(min(left, BEAT / 2))
                self._tend()
            if time.monotonic() >= self.until:
                return
            drawn = Picture(
                id=claim.picture_id(0), index=0, seed=1, width=512, height=512, recipe=RECIPE
            )
            self._call("picture", self.store.add_picture, claim.id, claim.token, drawn)
            self._call("finish", self.store.finish, claim.id, claim.token, warnings=[])

    def _tend(self) -> None:
        now = time.monotonic()
        if now >= self._beat_at:
            self._beat_at = now + BEAT
            self._call("beat", self.store.beat, self.worker, "here", MODEL, None)
        if now >= self._renew_at:
            self._renew_at = now + LEASE / 3
            self._call("renew", self.store.renew, self.worker)

    def _call(self, name: str, call: Any, *args: Any, **kwargs: Any) -> Any:
        began = time.monotonic()
        try:
            return call(*args, **kwargs)
        except StorageError:
            self.failed += 1
            return None
        finally:
            self.noted.append((name, time.monotonic() - began))


def work(url: str, threads: int, drawing: float, seconds: float, results: Any) -> None:
    store = Store(url)
    until = time.monotonic() + seconds
    # They join during the time of one drawing, as the workers of a starting fleet do.
    crew = [Worker(store, drawing, until, random.uniform(0, drawing)) for _ in range(threads)]
    for one in crew:
        one.start()
    for one in crew:
        one.join()
    results.put(([note for one in crew for note in one.noted], sum(one.failed for one in crew)))


def explained(store: Store) -> str:
    """Return the database's plan for finding the owner and the job whose turn it is."""
    told: list[str] = []

    def before(_conn: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith("SELECT"):
            cursor.execute("EXPLAIN (ANALYZE, COSTS OFF) " + statement, parameters)
            told.append("\n".join(row[0] for row in cursor.fetchall()))

    event.listen(store.engine, "before_cursor_execute", before)
    with store.engine.begin() as db:
        owner = shares.next_owner(db, time.time())
        assert owner is not None
        shares.next_job(db, time.time(), owner, shares.Preference(AGEING))
    event.remove(store.engine, "before_cursor_execute", before)
    return "\n\n".join(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--drawing", type=float, default=10.0, help="seconds, in the mean")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--processes", type=int, default=4)
    given = parser.parse_args()
    database = Postgres()
    try:
        store = Store(database.url)
        store.migrate()
        say(f"{given.jobs} jobs put in within {fill(store, given.jobs):.0f} s")
        say(explained(store))
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        how = (database.url, given.workers // given.processes, given.drawing, given.seconds)
        crews = [context.Process(target=work, args=(*how, results)) for _ in range(given.processes)]
        for one in crews:
            one.start()
        found = [results.get() for _ in crews]
        for one in crews:
            one.join()
        for name in ("claim", "picture", "finish", "renew", "beat"):
            took = sorted(seconds for notes, _ in found for n, seconds in notes if n == name)
            middle, late = statistics.median(took), took[int(0.99 * len(took))]
            rate = len(took) / given.seconds
            say(
                f"{name}: {len(took)}, {rate:.0f} a second; median {1000 * middle:.0f} ms, "
                f"99th percentile {1000 * late:.0f} ms"
            )
        say(f"refused for want of a connection or a lock: {sum(failed for _, failed in found)}")
        with store.engine.connect() as db:
            twice = text("SELECT count(*) - count(DISTINCT (job, number)) FROM pictures")
            states = db.execute(text("SELECT status, count(*) FROM jobs GROUP BY status")).all()
            say(f"states: {dict(map(tuple, states))}; pictures twice: {db.scalar(twice)}")
            say(explained(store))
        store.close()
    finally:
        database.close()


if __name__ == "__main__":
    main()
