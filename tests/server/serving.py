"""A real server in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

import httpx2 as httpx

from safelight.weights.estimate import estimate

IMPATIENT = """
from safelight.server import bodies, supervisor
bodies.SLOW = {slow} or bodies.SLOW
supervisor.SILENCE = {silence} or supervisor.SILENCE
from safelight.__main__ import main
main()
"""

INJECTED = Path(__file__).parent / "injected"
"""A folder with a sitecustomize that every process of a server runs first."""


class Serving:
    """`safelight serve` on a free port, with further `arguments`.

    log: the log file [folder/server.log]. slow, silence: seconds that the guard and the supervisor
    wait in place of their own values. hang: a file that says where the worker hangs; see
    injected/sitecustomize.py.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        token: str | None = None,
        log: Path | None = None,
        slow: float | None = None,
        silence: float | None = None,
        hang: Path | None = None,
    ) -> None:
        self.data = folder / "data"
        self._command = ["-m", "safelight"]
        if slow is not None or silence is not None:
            self._command = ["-c", IMPATIENT.format(slow=slow, silence=silence)]
        self._environment = {"OMP_NUM_THREADS": "1"}
        if hang is not None:
            path = f"{INJECTED}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
            self._environment |= {"SAFELIGHT_TEST_HANG": str(hang), "PYTHONPATH": path}
        self._log = log or folder / "server.log"
        self._arguments = [*arguments, *(("--token", token) if token else ())]
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.process: Any = None
        self.client: Any = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise
        self.client.close()

    def start(self, port: str = "0") -> None:
        before = len(self.log())
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, *self._command, "serve", "--port", port),
                    *("--data-dir", str(self.data), *self._arguments),
                ],
                stdout=log,
                stderr=log,
                env=os.environ | self._environment,
            )
        wait_for(
            lambda: "Safelight is at " in self.log()[before:] or self.process.poll() is not None
        )
        if self.client is not None:
            self.client.close()
        self.url = self.log()[before:].split("Safelight is at ")[1].split()[0]
        self.client = httpx.Client(base_url=self.url, headers=self._headers, timeout=60)
        wait_for(self._alive)

    def _alive(self) -> bool:
        try:
            return self.client.get("/healthz").status_code == 200
        except httpx.TransportError:
            return False

    def ready(self) -> None:
        wait_for(lambda: self.client.get("/readyz").status_code == 200)

    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def worker(self) -> int:
        """The process id of the worker that runs now."""
        found = subprocess.run(
            ["pgrep", "-P", str(self.process.pid), "-f", "spawn_main"],
            capture_output=True,
            text=True,
        )
        return int(found.stdout.split()[0]) if found.stdout.split() else 0

    def submit(self, **settings: Any) -> str:
        answer = self.client.post("/api/jobs", json=settings)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def job(self, job_id: str) -> Any:
        answer = self.client.get(f"/api/jobs/{job_id}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def finished(self, job_id: str, seconds: float = 120) -> Any:
        wait_for(lambda: self.job(job_id)["status"] not in ("queued", "running"), seconds=seconds)
        return self.job(job_id)


def room_for_one(model: str, dtype: str = "auto") -> str:
    """Return a --model-memory that is too small for two models of this size."""
    needs = estimate(model, device="cpu", dtype=dtype)
    return f"{(needs.weights * 3 // 2 + needs.work) // 10**6}MB"


def wait_for(condition: Any, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.05)
