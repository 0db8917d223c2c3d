"""A real `safelight worker` in processes of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

from serving import wait_for


class Working:
    """A `safelight worker`. url: of the database. storage: a folder. arguments: further ones."""

    def __init__(self, url: str, storage: Path | str, log: Path, *arguments: str) -> None:
        self._log = log
        self._command = [sys.executable, "-m", "safelight", "worker", "--queue", url]
        self._command += ["--storage", str(storage), "--exact", "--dtype", "float32", *arguments]
        self.process: Any = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )

    def stop(self) -> int:
        """Tell the worker to end; return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return int(self.process.wait(30))

    def said(self, words: str) -> None:
        """Wait until the worker's log has this text."""
        wait_for(lambda: words in self.log() or self.process.poll() is not None)
        assert words in self.log(), self.log()

    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def child(self) -> int:
        """The process id of the process that draws; 0 if there is none now."""
        found = subprocess.run(
            ["pgrep", "-P", str(self.process.pid), "-f", "spawn_main"],
            capture_output=True,
            text=True,
        )
        return int(found.stdout.split()[0]) if found.stdout.split() else 0
