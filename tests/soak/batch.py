"""A batch with Ray under kills: each row once, equal to the byte. `make soak` runs it in full.

    python tests/soak/batch.py [--rows 2000] [--kills 50] [--drivers 2] [--seed 0]

Draws the same rows with one worker and without Ray, with two bare engines, with two workers of Ray,
again while workers and the driver are killed by SIGKILL, and on a cluster of three nodes that loses
one. Prints rows per second, and raises AssertionError for what docs/batch.md forbids.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}

WORDS = ("a red apple", "a cat", "two owls", "a blue car on a yellow background", "a pizza")
SAMPLERS = ("euler", "ddim", "euler_a", "dpmpp_2m")
WORKERS = 2
LOADING = {"device": "cpu", "dtype": "float32"}
STORE = 200 << 20
"""Bytes of Ray's object store on each node."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--drivers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4, help="the most of a row")
    parser.add_argument("--parts", nargs="+", default=["speed", "killed", "lost"])
    parser.add_argument("--bare", metavar="PART", help="draw a part of the rows: used by itself")
    given = parser.parse_args()
    if given.bare:
        bare(Path("rows.jsonl"), int(given.bare))
        return
    with tempfile.TemporaryDirectory(prefix="safelight-soak-") as folder:
        os.chdir(folder)
        write_rows(Path("rows.jsonl"), given.rows, random.Random(given.seed), given.steps)
        assert batch("alone").wait() == 0
        if "speed" in given.parts:
            speed(given.rows)
        if "killed" in given.parts:
            disturbed(given.rows, given.kills, given.drivers, random.Random(given.seed))
        if "lost" in given.parts:
            lost_node(given.rows)


def write_rows(path: Path, count: int, chance: random.Random, steps: int) -> None:
    rows = [
        {
            "id": f"row-{i}",
            "prompt": chance.choice(WORDS),
            "sampler": chance.choice(SAMPLERS),
            "steps": chance.randint(1, steps),
            "guidance_scale": chance.choice([1.0, 4.0]),
            "width": chance.choice([64, 64, 72]),
        }
        for i in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))


def bare(path: Path, part: int) -> None:
    """Draw every second row with the engine alone; print the seconds."""
    import torch

    from safelight import load
    from safelight.batch.check import Rules
    from safelight.batch.rows import read_rows
    from safelight.engine import Engine

    torch.set_num_threads(1)
    engine = Engine(load(**LOADING))
    rows = [Rules().row(i, columns) for i, columns in enumerate(read_rows(str(path)), 1)]
    rows = sorted(rows[part::WORKERS], key=lambda row: (row.settings["width"], row.number))
    began, used = time.monotonic(), time.process_time()
    for row in rows:
        engine.add(row.request())
        while engine.busy:
            engine.step()
    told(f"{time.monotonic() - began} {time.process_time() - used}")


def speed(rows: int) -> None:
    """Compare two workers of Ray with two bare engines, by the clock and by processor time.

    While other programs run, the clock says little. Processor time counts all processes of Ray and
    the driver, which writes. The bare engines draw before and after, since a shared machine changes
    its speed.
    """
    before = bare_engines(rows)
    cluster = start_cluster(1, WORKERS)
    try:
        driver = batch("ray", cluster.address)
        wait_for(lambda: count("ray") > 0 or ended(driver))
        first, began, had = count("ray"), time.monotonic(), processor_time()
        wait_for(lambda: count("ray") >= rows or ended(driver))
        took, by_ray = time.monotonic() - began, processor_time() - had
        assert driver.wait() == 0
    finally:
        cluster.shutdown()
    check("ray", rows)
    after = bare_engines(rows)
    seconds, used = ((one + two) / 2 for one, two in zip(before, after, strict=True))
    bare_rate, ray_rate = rows / seconds, (rows - first) / took
    told(f"two bare engines: {bare_rate:.1f} rows a second, {1000 * used:.0f} ms of a core a row")
    each = by_ray / (rows - first)
    told(f"two workers of Ray: {ray_rate:.1f} rows a second, {1000 * each:.0f} ms of a core a row")
    told(f"Ray beside bare: {ray_rate / bare_rate:.2f} by the clock, {used / each:.2f} by the core")


def bare_engines(rows: int) -> tuple[float, float]:
    """Return the seconds of two bare engines for all rows, and those of a core for each row."""
    parts = [
        subprocess.Popen([sys.executable, __file__, "--bare", str(i)], stdout=subprocess.PIPE)
        for i in range(WORKERS)
    ]
    printed = [part.communicate()[0].split() for part in parts]
    assert not any(part.returncode for part in parts), [part.returncode for part in parts]
    return max(float(one[0]) for one in printed), sum(float(one[1]) for one in printed) / rows


def disturbed(rows: int, kills: int, restarts: int, chance: random.Random) -> None:
    """Kill workers and drivers at random moments, given as numbers of rows done."""
    cluster = start_cluster(1, WORKERS)
    moments = [(chance.random() * rows * 0.95, "worker") for _ in range(kills)]
    moments += [(chance.uniform(0.2, 0.8) * rows, "driver") for _ in range(restarts)]
    done = {"worker": 0, "driver": 0}
    drivers = [batch("killed", cluster.address)]
    try:
        for moment, kind in sorted(moments):
            wait_for(lambda at=moment: count("killed") >= at or ended(drivers[-1]))
            if kind == "driver":
                drivers[-1].kill()
                drivers[-1].wait()
                drivers.append(batch("killed", cluster.address))
                done[kind] += 1
                continue
            wait_for(lambda: bool(actors(cluster)) or ended(drivers[-1]))
            for pid in actors(cluster)[:: chance.choice([1, -1])][:1]:
                os.kill(pid, signal.SIGKILL)
                done[kind] += 1
        assert drivers[-1].wait() == 0
    finally:
        cluster.shutdown()
    check("killed", rows)
    told(f"killed: {done['worker']} workers and {done['driver']} drivers; {rows} rows, each once, "
         "all equal to the byte to those of one worker")  # fmt: skip


def lost_node(rows: int) -> None:
    """Draw on three nodes with a worker each; lose one node when a third of the rows is done."""
    cluster = start_cluster(3, 1)
    try:
        driver = batch("lost", cluster.address, workers=3)
        wait_for(lambda: count("lost") >= rows / 3 or ended(driver))
        at = count("lost")
        cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
        assert driver.wait() == 0
    finally:
        cluster.shutdown()
    check("lost", rows)
    told(f"lost one of three nodes after {at} rows: {rows} rows, each once, equal to the byte")


def batch(out: str, address: str | None = None, workers: int = WORKERS) -> subprocess.Popen[bytes]:
    asked = [sys.executable, "-m", "safelight", "batch", "rows.jsonl", "--out", out, "--exact"]
    asked += ["--dtype", "float32", "--device", "cpu", "--threads", "1"]
    if address is not None:
        asked += ["--ray", address, "--workers", str(workers)]
    with Path(f"{out}.log").open("ab") as log:
        return subprocess.Popen(asked, stdout=log, stderr=log)


def start_cluster(nodes: int, cpus: int) -> Any:
    from ray.cluster_utils import Cluster

    node = {"num_cpus": cpus, "object_store_memory": STORE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    for _ in range(nodes - 1):
        cluster.add_node(num_cpus=cpus, object_store_memory=STORE)
    cluster.wait_for_nodes()
    return cluster


def actors(cluster: Any) -> list[int]:
    """Return the process ids of the workers, which are children of the nodes' raylets."""
    nodes = [cluster.head_node, *cluster.worker_nodes]
    parents = {node.all_processes["raylet"][0].process.pid for node in nodes}
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent in parents and b"DrawingActor" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:  # it ended meanwhile
            pass
    return sorted(found)


def processor_time() -> float:
    """Return the processor time in seconds of all processes below this one."""
    parents, times = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            cells = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        pid = int(path.parent.name)
        parents[pid], times[pid] = int(cells[1]), int(cells[11]) + int(cells[12])
    below, found = {os.getpid()}, set[int]()
    while below:
        below = {pid for pid, parent in parents.items() if parent in below}
        found |= below
    return sum(times[pid] for pid in found) / os.sysconf("SC_CLK_TCK")


def count(out: str) -> int:
    """Return how many rows are done."""
    try:
        return Path(out, "index.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.02)


def ended(process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is not None


def check(out: str, rows: int) -> None:
    """Raise AssertionError unless each row is there once, as one worker drew it."""
    records = [json.loads(line) for line in Path(out, "index.jsonl").read_bytes().splitlines()]
    assert sorted(r["id"] for r in records) == sorted(f"row-{i}" for i in range(rows))
    assert not Path(out, "errors.jsonl").read_bytes()
    files = {file for record in records for file in record["files"]}
    assert {f"pictures/{path.name}" for path in Path(out, "pictures").iterdir()} == files
    for file in files:
        assert Path(out, file).read_bytes() == Path("alone", file).read_bytes(), file


def told(line: object) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
