"""A fleet of a thousand workers that sleep in the place of drawing, on a million jobs.

    python tests/soak/claims.py [--jobs 1000000] [--workers 1000] [--seconds 300] [--draws 10]

The store is the real one, on a PostgreSQL of our own. The jobs are put in at once, those of 20
owners in equal parts. Then the workers, threads of a few processes, claim, sleep as long as a
picture takes, and commit, for so many seconds. Prints claims a second, how long a claim took, and
the plans of its statements.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "server"))
from postgresql import Postgres

OWNERS = 20
CONNECTIONS = 8
"""Of each process, which its workers share, as through a pooler."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--draws", type=float, default=10, help="seconds that a picture takes")
    given = parser.parse_args()
    database = Postgres()
    try:
        began = time.monotonic()
        fill(database, given.jobs)
        say(f"jobs: {given.jobs}, put in within {time.monotonic() - began:.0f} s")
        measure(database, given)
        explain(database)
    finally:
        database.close()


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def fill(database: Postgres, count: int) -> None:
    """Put jobs in as if they had been submitted within the last hour; the indexes come after."""
    import psycopg

    from safelight.server.store import Store

    store = Store(database.url)
    store.migrate()
    store.close()
    with psycopg.connect(database.plain, autocommit=True) as db:
        indexes = db.execute(
            "SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'jobs'"
            " AND indexname LIKE 'ix_%'"
        ).fetchall()
        for name, _ in indexes:
            db.execute(f"DROP INDEX {name}")
        db.execute(
            f"""INSERT INTO jobs (id, status, client, created, request, prompt, pictures, cost,
                attempts, lease, warnings, owner)
            SELECT lpad(to_hex(i), 32, '0'), 'queued', 'api',
                extract(epoch FROM now()) - 3600 + i * 3600.0 / {count},
                format('{{"prompt": "a cat", "seed": %s, "count": 1}}', i), 'a cat', 1,
                (ARRAY[4, 8, 20, 30, 50])[1 + (i / 20) % 5], 0, 0, '[]', 'owner' || i % {OWNERS}
            FROM generate_series(1, {count}) AS i"""
        )
        db.execute(
            "INSERT INTO shares (owner, began, ended)"
            f" SELECT 'owner' || i, 0, 0 FROM generate_series(0, {OWNERS - 1}) AS i"
        )
        for _, definition in indexes:
            db.execute(definition)
        db.execute("VACUUM ANALYZE")


def measure(database: Postgres, given: argparse.Namespace) -> None:
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    share = given.workers // given.processes
    how = (database.url, share, given.seconds, given.draws, results)
    processes = [context.Process(target=fleet, args=how) for _ in range(given.processes)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    claims = sorted(itertools.chain.from_iterable(one["claims"] for one in found))
    waits = sorted(itertools.chain.from_iterable(one["waits"] for one in found))
    commits = sorted(itertools.chain.from_iterable(one["commits"] for one in found))
    errors = sum(one["errors"] for one in found)
    say(f"workers: {share * given.processes} in {given.processes} processes, {given.draws} s each")
    say(f"claims: {len(claims)}, {len(claims) / given.seconds:.1f} a second; errors: {errors}")
    for name, times in (("claim", claims), ("its wait before", waits), ("commit", commits)):
        shown = ", ".join(f"p{p} {1000 * at(times, p / 100):.1f} ms" for p in (50, 90, 99))
        say(f"{name}: {shown}")
    check(database, len(claims))


def at(times: list[float], share: float) -> float:
    return times[min(len(times) - 1, int(share * len(times)))] if times else 0.0


def fleet(url: str, workers: int, seconds: float, draws: float, results: Any) -> None:
    """The workers of one process."""
    from safelight.server.claims import LostError
    from safelight.server.jobs import Picture, StorageError
    from safelight.server.store import Store, new_id

    store, turn = Store(url), threading.BoundedSemaphore(CONNECTIONS)
    found: dict[str, Any] = {"claims": [], "waits": [], "commits": [], "errors": 0}
    end = time.monotonic() + seconds

    def work(number: int) -> None:
        name, chance = new_id(), random.Random(number)
        time.sleep(chance.random() * draws)  # they have not all come at once
        while (asked := time.monotonic()) < end:
            try:
                with turn:
                    began = time.monotonic()
                    claim = store.claim(name, alone=True, ageing=1.0)
                    found["claims"].append(time.monotonic() - began)
                    found["waits"].append(began - asked)
                if claim is None:
                    return
                time.sleep(draws * (0.5 + chance.random()))
                picture = Picture(
                    id=claim.picture_id(0), index=0, seed=1, width=64, height=64, recipe={}
                )
                with turn:
                    began = time.monotonic()
                    store.add_picture(claim.id, claim.token, picture)
                    store.finish(claim.id, claim.token, warnings=[])
                    found["commits"].append(time.monotonic() - began)
            except (StorageError, LostError):
                found["errors"] += 1

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))
    store.close()
    results.put(found)


def check(database: Postgres, claims: int) -> None:
    """Each claim was of another job, and each that was drawn has its picture."""
    import psycopg

    with psycopg.connect(database.plain) as db:
        begun, most, ended = db.execute(
            "SELECT count(*) FILTER (WHERE attempts > 0), max(attempts),"
            " count(*) FILTER (WHERE status = 'succeeded') FROM jobs"
        ).fetchone() or (0, 0, 0)
        drawn = (db.execute("SELECT count(DISTINCT job) FROM pictures").fetchone() or (0,))[0]
        owners = db.execute(
            "SELECT count(*) FROM jobs WHERE attempts > 0 GROUP BY owner ORDER BY 1"
        ).fetchall()
    assert begun == claims, (begun, claims)
    assert most == 1, "a job was claimed twice"
    assert ended == drawn, (ended, drawn)
    say(
        f"jobs begun: {begun}, each once; succeeded: {ended}; of an owner: {owners[0]}-{owners[-1]}"
    )


def explain(database: Postgres) -> None:
    """Print the plans of what a claim reads, on the tables as they are now."""
    import psycopg
    from sqlalchemy import event

    from safelight.server.store import Store

    store = Store(database.url)
    seen: list[tuple[str, Any]] = []

    @event.listens_for(store.engine, "before_cursor_execute")
    def _(_c: Any, _cursor: Any, statement: str, given: Any, *_: Any) -> None:
        seen.append((statement, given))

    claim = store.claim("e" * 32, alone=True, ageing=1.0)
    assert claim is not None
    store.close()
    say(f"statements of a claim: {len(seen)}")
    with psycopg.connect(database.plain) as db:
        for statement, given in seen:
            if "pg_advisory" in statement or statement.startswith("SELECT extract"):
                continue
            say("")
            say(" ".join(statement.split())[:160])
            for (line,) in db.execute(
                f"EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF) {statement}", given
            ):
                say(f"    {line}")
        db.rollback()


if __name__ == "__main__":
    main()
