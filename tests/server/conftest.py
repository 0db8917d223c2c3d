"""Databases to test against: SQLite in a file, and a PostgreSQL of Debian's package."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _programs() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return None if on_path is None else Path(on_path).parent


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a server of our own, which ends with the session."""
    programs = _programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    # Not in pytest's folder, which each other run of pytest closes to the user that this runs as.
    folder = Path(tempfile.mkdtemp(prefix="safelight-postgres-"))
    user = None
    if os.geteuid() == 0:  # it refuses to run as root
        user = "postgres"
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
    port = free_port()
    data = folder / "data"
    quiet = {"check": True, "capture_output": True, "user": user, "cwd": "/"}
    subprocess.run(
        [programs / "initdb", "-D", data, "-U", "safelight", "--auth=trust", "-E", "UTF8"], **quiet
    )
    server = subprocess.Popen(
        [programs / "postgres", "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", folder],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        user=user,
        cwd="/",
    )
    url = f"postgresql+psycopg://safelight@127.0.0.1:{port}/postgres"
    import psycopg

    for _ in range(200):
        try:
            psycopg.connect(url.replace("+psycopg", "")).close()
            break
        except psycopg.OperationalError:
            time.sleep(0.1)
    yield url
    server.terminate()
    server.wait(20)
    shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.sqlite3'}"
    url: str = request.getfixturevalue("postgres")
    import psycopg

    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    return url
