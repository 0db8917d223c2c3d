"""Serving contacts no other host: it works without a network."""

import subprocess
import sys
from pathlib import Path

import pytest

CUT_OFF = Path(__file__).with_name("cut_off.py")


def test_all_works_with_the_network_cut(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        pytest.skip("a network of one's own is for root alone")
    done = subprocess.run(
        ["unshare", "--net", sys.executable, CUT_OFF, tmp_path],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert "all of it worked" in done.stdout, done.stderr[-3000:]
