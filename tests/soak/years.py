"""Retention and backups under load and kills: nothing that should stay is lost.

    python tests/soak/years.py [--jobs 400] [--kills 15] [--keep 40] [--seed 0]

Jobs come in, half of them with a picture to start from, while a server keeps only the newest,
deletes the others after a second, and is killed by SIGKILL at random moments. Backups are made one
after the other, each sharing unchanged files with the last. In the end the newest jobs are there,
each with its pictures; and each backup is restored, opened as a server opens it, and complete.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import httpx2 as httpx
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "server"))
from load import BETWEEN
from serving import Serving, wait_for
from test_storage import png

from safelight.errors import StorageError
from safelight.server.backup import back_up, restore
from safelight.server.files import Files
from safelight.server.recovery import recover
from safelight.server.store import Store

LISTED = 200
"""The most jobs that the server lists at once."""

SETTINGS: dict[str, Any] = {"prompt": "a cat", "steps": 2, "sampler": "euler"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=400)
    parser.add_argument("--kills", type=int, default=15)
    parser.add_argument("--keep", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        serving = Serving(base, "--keep", str(given.keep), "--queue", "100000")
        serving._command = ["-c", BETWEEN.replace("10.0, 1.0", "1.0, 0.5")]
        with serving:
            serving.ready()
            made, backups = work(serving, base, given, random.Random(given.seed))
            jobs = settled(serving, given.keep)
        check(serving.data, jobs, made)
        for number, (place, waiting, ended) in enumerate(backups):
            check_backup(place, base / f"again{number}", waiting, min(given.keep, ended))
        files = [path for place, _, _ in backups for path in place.rglob("*.png")]
        linked = sum(path.stat().st_nlink > 1 for path in files)
        sys.stdout.write(
            f"jobs: {len(made)}\nkills of the server: {given.kills}\nkept: {len(jobs)}\n"
            f"backups made, restored and whole: {len(backups)}\n"
            f"files of the backups: {len(files)}, of them shared with others: {linked}\n"
        )


def work(
    serving: Serving, base: Path, given: Any, chance: random.Random
) -> tuple[list[str], list[tuple[Path, set[str], int]]]:
    """Submit, kill and back up at the same time; return the jobs and the backups.

    Each backup comes with the jobs that waited when it began, and how many had ended then.
    """
    made: list[str] = []
    backups: list[tuple[Path, set[str], int]] = []
    done = threading.Event()
    problems: list[BaseException] = []

    def submit() -> None:
        for i in range(given.jobs):
            body = {**SETTINGS, "seed": i, **({"image": png()} if i % 2 else {})}
            while True:
                try:
                    key = {"Idempotency-Key": f"job-{i}"}
                    answer = serving.client.post("/api/jobs", json=body, headers=key)
                    if answer.status_code == 202:
                        made.append(answer.json()["id"])
                        break
                except (httpx.TransportError, RuntimeError):  # it is down, or just coming back
                    pass
                time.sleep(0.05)

    def back_up_again() -> None:
        url = f"sqlite:///{serving.data / 'jobs.sqlite3'}"
        while not done.is_set():
            place = base / f"backup{len(backups)}"
            last = backups[-1][0] if backups else None
            before, waiting = len(made), unfinished(serving)
            ended = before - len(waiting) if 0 < len(waiting) < LISTED else 0
            try:
                back_up(serving.data, url, place, earlier=last)
            except StorageError as error:
                problems.append(error)
                return
            backups.append((place, waiting, ended))
            time.sleep(1)

    threads = [threading.Thread(target=target) for target in (submit, back_up_again)]
    for thread in threads:
        thread.start()
    for _ in range(given.kills):
        time.sleep(2 + chance.random() * 6)
        serving.process.kill()
        serving.process.wait()
        serving.start()
    done.set()
    for thread in threads:
        thread.join()
    assert not problems, problems
    assert len(backups) > 1
    return made, backups


def unfinished(serving: Serving) -> set[str]:
    """Return the jobs that wait or are drawn; none if the server is down."""
    found: set[str] = set()
    try:
        for status in ("queued", "running"):
            answer = serving.client.get("/api/jobs", params={"status": status, "limit": LISTED})
            found |= {job["id"] for job in answer.json()}
    except (httpx.TransportError, RuntimeError, ValueError):
        return set()
    return found


def settled(serving: Serving, keep: int) -> list[Any]:
    """Return the jobs that are left once all have ended and the others are deleted."""
    wait_for(lambda: serving.client.get("/readyz").status_code == 200, seconds=300)
    wait_for(lambda: not unfinished(serving), seconds=3600)
    wait_for(lambda: len(serving.client.get("/api/jobs?limit=200").json()) == keep, seconds=60)
    return serving.client.get("/api/jobs?limit=200").json()


def check(data: Path, jobs: list[Any], made: list[str]) -> None:
    assert {job["id"] for job in jobs} <= set(made)
    assert all(job["status"] == "succeeded" for job in jobs), "a job failed"
    drawn = {picture["id"] for job in jobs for picture in job["pictures"]}
    assert len(drawn) == len(jobs)
    assert Files(data).pictures() == drawn, "files and rows differ"


def check_backup(place: Path, again: Path, waiting: set[str], ended: int) -> None:
    restore(place, again)
    files, store = Files(again), Store(f"sqlite:///{again / 'jobs.sqlite3'}")
    recover(files, store)
    jobs = store.list(limit=10**6)[0]
    known, _ = store.known_files()
    assert files.pictures() == known, "a picture of the backup is lost"
    assert waiting <= {job.id for job in jobs}, "a job that waited is lost"
    assert sum(job.status.final for job in jobs) >= ended, "too much was deleted"
    for job in jobs:
        if "image_sha256" in job.settings:
            assert files.input(job.id, "image") is not None, "an input is lost"
        for picture in job.pictures:
            path = files.picture(picture.id)
            assert path is not None
            with Image.open(path) as image:
                image.load()
    store.close()


if __name__ == "__main__":
    main()
