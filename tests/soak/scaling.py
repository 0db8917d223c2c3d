"""A server that keeps its workers on Ray, under kills. `make soak` runs it.

    python tests/soak/scaling.py [--jobs 60] [--kills 6]

A server runs with `--ray local --workers 1:2` and a real PostgreSQL. Jobs come in faster than one
worker draws them. Meanwhile SIGKILL hits in turn an actor, the process that is connected to Ray,
and that process with the whole cluster. In the end every job has succeeded, each of its pictures is
there once, files match rows, and there is one worker again.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent / "server"))
from postgresql import Postgres
from serving import Serving, wait_for

SETTINGS: dict[str, Any] = {
    "steps": 150,
    "sampler": "euler",
    "prompt": "a cat",
    "width": 128,
    "height": 128,
}
IDLE = 8
KINDS = ("actor", "process", "cluster")
FAR = 300
"""The most seconds that anything may take here."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=60)
    parser.add_argument("--kills", type=int, default=6)
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1"}
    database = Postgres()
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = run(Path(folder), database, given.jobs, given.kills)
    finally:
        database.close()
    for name, value in report.items():
        sys.stdout.write(f"{name}: {value}\n")


def run(folder: Path, database: Postgres, jobs: int, kills: int) -> dict[str, Any]:
    how = ("--ray", "local", "--workers", "1:2", "--idle-timeout", str(IDLE))
    with Serving(folder, *how, "--database", database.url) as server:
        began = time.monotonic()
        wait_for(lambda: ready(server), FAR)
        report: dict[str, Any] = {"seconds to the first worker": since(began)}
        began = time.monotonic()
        ids = [server.submit(seed=i, **SETTINGS) for i in range(jobs)]
        wait_for(lambda: len(names(server)) == 2, FAR)
        report["seconds to the second worker"] = since(began)
        back: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for number in range(kills):
            kind = KINDS[number % len(KINDS)]
            ids += [server.submit(seed=i, **SETTINGS) for i in range(jobs)]
            before = names(server)
            kill(server, kind)
            began = time.monotonic()
            wait_for(lambda: names(server) != before, FAR)  # noqa: B023
            wait_for(lambda: ready(server) and len(names(server)) == 2, FAR)
            back[kind].append(since(began))
        report["seconds until there were two again"] = back
        began = time.monotonic()
        ended = [server.finished(each, FAR) for each in ids]
        wait_for(lambda: len(names(server)) == 1, FAR)
        report["seconds to the end of the queue, and to one worker"] = since(began)
        report["jobs"] = Counter(job["status"] for job in ended)
        drawn = [picture["id"] for job in ended for picture in job["pictures"]]
        files = {path.stem for path in (server.data / "pictures").rglob("*.png")}
        report["pictures, files, the same"] = len(drawn), len(files), set(drawn) == files
        report["lines of Ray's absence"] = server.log().count("Ray is away")
        process = server.process
        process.send_signal(signal.SIGTERM)
        report["exit code"] = process.wait(60)
    return report


def since(began: float) -> float:
    return round(time.monotonic() - began, 1)


def ready(server: Serving) -> bool:
    return server.client.get("/readyz").status_code == 200


def names(server: Serving) -> set[str]:
    """Return the names of the workers on the roster."""
    return {worker["id"] for worker in server.client.get("/api/workers").json()}


def kill(server: Serving, kind: str) -> None:
    """End an actor, the process that is connected to Ray, or the cluster."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    named = [(one, " ".join(one.cmdline())) for one in children]
    if kind == "actor":
        victims = [one for one, name in named if name.startswith("ray::Actor")][:1]
    elif kind == "process":
        victims = [one for one in children if one.ppid() == server.process.pid and one.children()]
    else:
        victims = [one for one, name in named if "gcs_server" in name or "raylet/raylet" in name]
    assert victims, [name for _, name in named]
    for victim in victims:
        victim.send_signal(signal.SIGKILL)


if __name__ == "__main__":
    main()
