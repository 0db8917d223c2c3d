"""A server killed at each of its writes: acknowledged jobs are there once, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from inside import Inside, figure, size
from serving import wait_for
from test_storage import SITES, whole

pytestmark = pytest.mark.xdist_group("storage")
KILLED_AT = Path(__file__).with_name("killed_at.py")


def test_killed_at_each_write(tmp_path: Path) -> None:
    """SIGKILL ends one server after the other, on one folder."""
    sites = SITES if size(0, 1) else ["keep: rename", "finish: commit"]
    for site in sites:
        done = subprocess.run([sys.executable, KILLED_AT, tmp_path, site], timeout=120)
        assert done.returncode == -9, site
    said = tmp_path / "acknowledged"
    acknowledged = said.read_text().split()
    said.unlink()
    began = time.monotonic()
    with Inside(tmp_path, dtype="float32", exact=True) as server:
        back = time.monotonic() - began
        wait_for(lambda: not server.ask("GET", "/api/jobs?status=queued").json())
        jobs = {
            job["id"]: server.finished(job["id"]) for job in server.ask("GET", "/api/jobs").json()
        }
    assert set(acknowledged) <= set(jobs)
    # Killed before the answer, a job may be there; never without its picture.
    assert len(jobs) <= len(sites)
    assert {job["status"] for job in jobs.values()} == {"succeeded"}
    assert all(len(job["pictures"]) == 1 for job in jobs.values())
    whole(tmp_path)
    assert not list(tmp_path.rglob("*.part"))
    assert not list(tmp_path.rglob("*-journal"))
    figure(
        f"4: killed at each of {len(sites)} writes: {len(acknowledged)} acknowledged jobs of "
        f"{len(jobs)} there, once; drawing again after {back:.1f} s"
    )
