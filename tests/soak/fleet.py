"""A fleet under kills: nothing is lost, nothing doubled. `make soak` runs it at full size.

    python tests/soak/fleet.py [--jobs 1000] [--kills 100] [--seed 0] [--bucket]

A server without a worker of its own, a real PostgreSQL and three `safelight worker`s share a
folder. While jobs come in, these are killed in turn and started again: the server, the process that
draws in one of the workers, a whole worker, the whole pool, all by SIGKILL, and the database, by an
immediate shutdown. In the end every acknowledged job is in exactly one final state, each of its
pictures is there once, files match rows, and pixels equal those of an undisturbed run. Leases are 8
s here, so that a run takes minutes. With --bucket, pictures are in moto's S3 in place of the
folder. In its turn it is away for some seconds; every second time it accepts connections and does
not answer for 20 s, which is longer than a worker may be silent.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "server"))
from bucket import Bucket
from postgresql import Postgres
from serving import Serving, wait_for
from working import Working

from safelight.storage import Storage, storage_at

SETTINGS: dict[str, Any] = {"steps": 2, "sampler": "euler", "count": 2}
FLEET = 3
KINDS = ("server", "process that draws", "worker", "database", "pool")
AWAY = "store"
ANSWERS = {202, 429, 503, 507}
"""The statuses that a request may be answered with."""

HOUR = 3600.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bucket", action="store_true")
    given = parser.parse_args()
    hurried = str(Path(__file__).parent / "hurried")
    path = os.pathsep.join(filter(None, [hurried, os.environ.get("PYTHONPATH")]))
    # More threads add numbers in another order, which may change a pixel by one.
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "SAFELIGHT_TEST_LEASE": "8"}
    database = Postgres()
    try:
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            bucket = Bucket(patch) if given.bucket else None
            report = run(Path(folder), database, given.jobs, given.kills, given.seed, bucket)
    finally:
        database.close()
    for name, value in report.items():
        if name != "acknowledged":
            sys.stdout.write(f"{name}: {value}\n")


def run(
    folder: Path, database: Postgres, jobs: int, kills: int, seed: int, bucket: Bucket | None
) -> dict[str, Any]:
    place = bucket.url() if bucket else str(folder / "data")
    how = ("--workers", "0", "--queue", "100000", "--database", database.url)
    serving = Serving(folder, *how, *(("--storage", place) if bucket else ()))
    pool = [Working(database.url, place, folder / f"{i}.log") for i in range(FLEET)]
    with serving:
        for worker in pool:
            worker.start()
        try:
            serving.ready()
            began = time.monotonic()
            report = disturb(serving, pool, database, jobs, kills, random.Random(seed), bucket)
            report["seconds"] = round(time.monotonic() - began)
            ends = [worker.stop() for worker in pool]
            report["exit codes of the workers, told to end"] = ends
        finally:
            for worker in pool:
                worker.process.kill()
        # A start cleans up what killed processes left half written.
        kill(serving)
        serving.start()
    check(storage_at(place), database, report)
    return report


class Sender(threading.Thread):
    """Submits jobs, each repeatedly under one key until it is acknowledged."""

    def __init__(self, serving: Serving, jobs: int) -> None:
        super().__init__(daemon=True)
        self._serving, self._jobs = serving, jobs
        self.acknowledged: dict[str, int] = {}
        self.answers: Counter[str] = Counter()

    def run(self) -> None:
        for i in range(self._jobs):
            while not self._submit(i):
                time.sleep(0.02)

    def _submit(self, i: int) -> bool:
        try:
            answer = self._serving.client.post(
                "/api/jobs",
                json={"prompt": "a cat", "seed": i, **SETTINGS},
                headers={"Idempotency-Key": f"job-{i}"},
            )
        except (httpx.TransportError, RuntimeError):  # the server is down, or just coming back
            self.answers["none: the server was down"] += 1
            return False
        self.answers[str(answer.status_code)] += 1
        assert answer.status_code in ANSWERS, answer.text
        if answer.status_code == 202:
            self.acknowledged[answer.json()["id"]] = i
        return answer.status_code == 202


def disturb(
    serving: Serving,
    pool: list[Working],
    database: Postgres,
    jobs: int,
    kills: int,
    chance: random.Random,
    bucket: Bucket | None,
) -> dict[str, Any]:
    sender = Sender(serving, jobs)
    sender.start()
    back: dict[str, float] = {}
    kinds = (*KINDS, AWAY) if bucket else KINDS
    for number in range(kills):
        time.sleep(chance.random() * 4)
        kind = kinds[number % len(kinds)]
        began = time.monotonic()
        if kind == "server":
            kill(serving)
            serving.start()
        elif kind == "database":
            database.crash()
            database.start()
        elif bucket and kind == AWAY:
            silent = number // len(kinds) % 2 == 1
            bucket.leave(silent=silent)
            time.sleep(20 if silent else chance.random() * 10)  # longer than a worker may be silent
            bucket.come_back()
        elif kind == "process that draws":
            child = chance.choice(pool).child()
            if child:
                os.kill(child, signal.SIGKILL)
        else:
            for worker in pool if kind == "pool" else [chance.choice(pool)]:
                kill(worker)
                worker.start()
        back[kind] = max(back.get(kind, 0.0), time.monotonic() - began)
    wait_for(lambda: not sender.is_alive(), seconds=HOUR)
    assert len(sender.acknowledged) == jobs
    wait_for(lambda: unfinished(serving) == 0, seconds=HOUR)
    return {
        "acknowledged": sender.acknowledged,
        "jobs": jobs,
        "kills": {kind: len(range(i, kills, len(kinds))) for i, kind in enumerate(kinds)},
        "answers to submissions": dict(sender.answers),
        "slowest server to serve again, seconds": round(back.get("server", 0.0), 1),
        "slowest database to answer again, seconds": round(back.get("database", 0.0), 1),
    }


def kill(one: Serving | Working) -> None:
    one.process.kill()
    one.process.wait()


def unfinished(serving: Serving) -> int:
    found = 0
    for status in ("queued", "running"):
        answer = serving.client.get("/api/jobs", params={"status": status, "limit": 1})
        found += len(answer.json()) if answer.status_code == 200 else 1
    return found


def check(storage: Storage, database: Postgres, report: dict[str, Any]) -> None:
    """Raise AssertionError if a promise is broken."""
    import psycopg

    import safelight

    acknowledged: dict[str, int] = report["acknowledged"]
    assert len(set(acknowledged.values())) == len(acknowledged), "a job was doubled"
    with psycopg.connect(database.plain) as db:
        db.execute("CREATE EXTENSION amcheck")
        db.execute(
            "SELECT bt_index_check(indexrelid, true) FROM pg_index JOIN pg_class c"
            " ON c.oid = indrelid WHERE c.relnamespace = 'public'::regnamespace"
        )
        rows = db.execute("SELECT id, status, attempts, error FROM jobs").fetchall()
        drawn = db.execute("SELECT job, number, id, seed FROM pictures").fetchall()
    statuses = {row[0]: row[1] for row in rows}
    assert acknowledged.keys() == statuses.keys(), "a job was lost, or is there twice"
    assert set(statuses.values()) <= {"succeeded", "failed"}
    report["failed after three attempts"] = sum(s == "failed" for s in statuses.values())
    report["begun more than once"] = sum(row[2] > 1 for row in rows)
    assert len({(job, number) for job, number, _, _ in drawn}) == len(drawn), "a picture is doubled"
    count = Counter(row[0] for row in drawn)
    for job, status in statuses.items():
        assert count[job] == SETTINGS["count"] or status == "failed", "a picture was lost"
    files = storage.names("pictures")
    assert files == {f"{row[2]}.png" for row in drawn}, "files and rows differ"
    days = [f"quarantine/{day}/pictures" for day in storage.folders("quarantine")]
    report["files in quarantine"] = sum(len(storage.names(day)) for day in days)
    model = safelight.load(dtype="float32")
    looked_at = drawn[:: max(1, len(drawn) // 50)]
    for job, _, picture, seed in looked_at:
        alone = model.generate("a cat", seed=int(seed), steps=2, sampler="euler").images[0]
        data = storage.read(f"pictures/{picture}.png")
        assert data is not None
        with Image.open(io.BytesIO(data)) as image:
            assert image.tobytes() == alone.tobytes(), f"job {job} has other pixels"
    report["pictures"] = len(drawn)
    report["of them compared with an undisturbed run"] = len(looked_at)


if __name__ == "__main__":
    main()
