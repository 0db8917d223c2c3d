"""Jobs under kills: nothing is lost, nothing doubled. `make soak` runs it at full size.

    python tests/soak/kills.py [--jobs 1000] [--kills 200] [--seed 0]

Server and worker are killed by SIGKILL at random moments while jobs come in. In the end every
acknowledged job is in exactly one final state, each of its pictures is there once, files match
rows, and pixels equal those of an undisturbed run.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

# As in the tests' servers (serving.py): more threads add numbers in another order, which may change
# a pixel by one.
os.environ["OMP_NUM_THREADS"] = "1"

import httpx2 as httpx
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "server"))
from serving import Serving, wait_for

SETTINGS: dict[str, Any] = {"steps": 2, "sampler": "euler", "count": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        serving = Serving(Path(folder), "--dtype", "float32", "--exact", "--queue", "100000")
        with serving:
            serving.ready()
            report = disturb(serving, given.jobs, given.kills, random.Random(given.seed))
        check(serving, report)
    for name, value in report.items():
        if name != "acknowledged":
            sys.stdout.write(f"{name}: {value}\n")


def disturb(serving: Serving, jobs: int, kills: int, chance: random.Random) -> dict[str, Any]:
    acknowledged: dict[str, int] = {}
    done = threading.Event()

    def submit() -> None:
        """Submit a job repeatedly under one key until it is acknowledged."""
        for i in range(jobs):
            while True:
                try:
                    answer = serving.client.post(
                        "/api/jobs",
                        json={"prompt": "a cat", "seed": i, **SETTINGS},
                        headers={"Idempotency-Key": f"job-{i}"},
                    )
                    if answer.status_code == 202:
                        acknowledged[answer.json()["id"]] = i
                        break
                except (httpx.TransportError, RuntimeError):  # it is down, or just coming back
                    pass
                time.sleep(0.02)
        done.set()

    sender = threading.Thread(target=submit, daemon=True)
    sender.start()
    server_kills, back = 0, []
    for _ in range(kills):
        time.sleep(chance.random() * 3)
        if chance.random() < 0.3:
            serving.process.kill()
            serving.process.wait()
            began = time.monotonic()
            serving.start()
            back.append(time.monotonic() - began)
            server_kills += 1
        else:
            worker = serving.worker()
            if worker:
                os.kill(worker, signal.SIGKILL)
    wait_for(done.is_set, seconds=3600)
    wait_for(lambda: unfinished(serving) == 0, seconds=3600)
    return {
        "acknowledged": acknowledged,
        "jobs": len(acknowledged),
        "kills": kills,
        "of them the server": server_kills,
        "slowest to serve again, seconds": round(max(back, default=0.0), 2),
    }


def unfinished(serving: Serving) -> int:
    found = 0
    for status in ("queued", "running"):
        answer = serving.client.get("/api/jobs", params={"status": status, "limit": 1})
        found += len(answer.json())
    return found


def check(serving: Serving, report: dict[str, Any]) -> None:
    """Raise AssertionError if a promise is broken."""
    import safelight

    acknowledged: dict[str, int] = report["acknowledged"]
    assert len(set(acknowledged.values())) == len(acknowledged), "a job was doubled"
    database = sqlite3.connect(serving.data / "jobs.sqlite3")
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    statuses = dict(database.execute("SELECT id, status FROM jobs"))
    assert acknowledged.keys() <= statuses.keys(), "a job was lost"
    report["failed after three attempts"] = sum(s == "failed" for s in statuses.values())
    assert set(statuses.values()) <= {"succeeded", "failed"}
    rows = list(database.execute("SELECT job, number, id, seed FROM pictures"))
    database.close()
    assert len({(job, number) for job, number, _, _ in rows}) == len(rows), "a picture was doubled"
    for job, status in statuses.items():
        count = sum(row[0] == job for row in rows)
        assert count == SETTINGS["count"] or status == "failed", "a picture was lost"
    files = {path.name for path in (serving.data / "pictures").iterdir()}
    assert files == {f"{row[2]}.png" for row in rows}, "files and rows differ"
    for name in ("*.part", "*-journal", "*-wal"):
        assert not list(serving.data.rglob(name)), "a temporary file stays"
    model = safelight.load(dtype="float32")
    for job, _, picture, seed in rows[:: max(1, len(rows) // 50)]:
        alone = model.generate("a cat", seed=int(seed), steps=2, sampler="euler").images[0]
        with Image.open(serving.data / "pictures" / f"{picture}.png") as drawn:
            assert drawn.tobytes() == alone.tobytes(), f"job {job} has other pixels"
    report["pictures"] = len(rows)
    report["of them compared with an undisturbed run"] = len(rows[:: max(1, len(rows) // 50)])


if __name__ == "__main__":
    main()
