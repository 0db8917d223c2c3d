"""A PostgreSQL server from Debian's package, for the tests."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
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


class Postgres:
    """A PostgreSQL server of our own."""

    def __init__(self) -> None:
        programs = _programs()
        if programs is None:
            pytest.skip("PostgreSQL is not installed")
        # Not in pytest's folder: every other run of pytest closes that to the user that this server
        # runs as.
        self._folder = Path(tempfile.mkdtemp(prefix="safelight-postgres-"))
        self._user, self._port = None, free_port()
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            self._user = "postgres"
            os.chown(self._folder, pwd.getpwnam(self._user).pw_uid, -1)
        self._data = self._folder / "data"
        self._program = programs / "postgres"
        subprocess.run(
            [
                *(programs / "initdb", "-D", self._data, "-U", "safelight"),
                *("--auth=trust", "-E", "UTF8", "--no-sync"),
            ],
            check=True,
            capture_output=True,
            user=self._user,
            cwd="/",
        )
        self.plain = f"postgresql://safelight@127.0.0.1:{self._port}/postgres"
        self.url = self.plain.replace("postgresql:", "postgresql+psycopg:")
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [
                *(self._program, "-D", self._data, "-p", str(self._port)),
                *("-h", "127.0.0.1", "-k", self._folder),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            user=self._user,
            cwd="/",
        )
        import psycopg

        for _ in range(200):
            try:
                psycopg.connect(self.plain).close()
                break
            except psycopg.OperationalError:
                time.sleep(0.1)

    def crash(self) -> None:
        """End the server as a crash would: every connection is cut."""
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait(20)

    def signal_all(self, number: int) -> None:
        """Send a signal to all of its processes."""
        found = subprocess.run(
            ["pgrep", "-P", str(self._process.pid)], capture_output=True, text=True
        )
        for pid in (self._process.pid, *map(int, found.stdout.split())):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder)
