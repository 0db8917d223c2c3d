"""Keep a worker process running, and pass messages between it and the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from safelight.errors import SafelightError
from safelight.server.jobs import StorageError
from safelight.server.process import Child, Settings, spawn

log = logging.getLogger("safelight.server")

GRACE = 10.0
"""Seconds that the worker has to end, when told to."""


class Supervisor:
    """One worker process, replaced when it ends.

    child: the first worker. on_message(kind, rest), on_end() and on_refusal() are called in the
    event loop: for a message of the worker, after the worker ended, and if no worker can draw with
    these settings. put_back(worker) is called in a thread: it lets the jobs of a worker that ended
    wait again, and may raise StorageError.
    """

    def __init__(
        self,
        settings: Settings,
        child: Child,
        *,
        on_message: Callable[[str, list[Any]], None],
        on_end: Callable[[], None],
        on_refusal: Callable[[], None],
        put_back: Callable[[str], None],
    ) -> None:
        self.child, self._settings = child, settings
        self._on_message, self._on_end, self._on_refusal = on_message, on_end, on_refusal
        self._put_back = put_back
        self.refusal: SafelightError | None = None
        self.restarts = 0
        self.stopping = False
        self._outbox: SimpleQueue[Any] = SimpleQueue()

    def start(self) -> None:
        """Begin, within the event loop."""
        self._loop = asyncio.get_running_loop()
        self._keeper = threading.Thread(target=self._keep_worker, name="worker", daemon=True)
        self._keeper.start()
        threading.Thread(target=self._send_loop, name="to the worker", daemon=True).start()

    def send(self, *message: Any) -> None:
        """Send a message to the worker; one that is not there never gets it."""
        self._outbox.put(message)

    async def stop(self) -> None:
        """Let the worker put back what it has not finished, and end."""
        self.stopping = True
        while self._keeper.is_alive():  # it may have started another worker just before
            self.send("stop")
            process = self.child.process
            await asyncio.to_thread(process.join, GRACE)
            if process.is_alive():
                process.kill()
            await asyncio.to_thread(self._keeper.join, GRACE)

    def release(self, worker: str) -> None:
        """Let the jobs of a worker that ended wait again, as soon as the database takes that."""
        while True:
            try:
                self._put_back(worker)
                return
            except StorageError as error:
                log.warning("%s", error)
                if self.stopping:  # the next start does it
                    return
                time.sleep(1)

    def _keep_worker(self) -> None:
        """Listen to the worker, and start another when it ends. Runs in a thread."""
        pause = 0.0
        while True:
            began = time.monotonic()
            child = self.child
            self.send("start")
            name = self._listen(child.pipe)
            child.process.join()
            self._loop.call_soon_threadsafe(self._on_end)
            if name is not None:
                self.release(name)
            if self.refusal is not None:
                self._loop.call_soon_threadsafe(self._on_refusal)
                return
            if not self.stopping:
                log.warning("the worker ended (%s): starting it again", child.process.exitcode)
                # The pause grows while workers end at once.
                pause = 0.0 if time.monotonic() - began > 10 else min(pause * 2 + 0.2, 5.0)
                time.sleep(pause)
            if self.stopping:
                return
            self.child = self._another()
            self.restarts += 1

    def _another(self) -> Child:
        while True:
            try:
                return spawn(self._settings)
            except OSError as error:  # no memory for a process, say
                log.warning("a worker cannot be started: %s", error.strerror)
                time.sleep(1)

    def _listen(self, pipe: Any) -> str | None:
        """Pass on the worker's messages until it ends; return its name."""
        name = None
        while True:
            try:
                kind, *rest = pipe.recv()
            except (EOFError, OSError):
                return name
            if kind == "worker":
                name = rest[0]
            elif kind == "refused":
                self.refusal = SafelightError(rest[0], code=rest[1])
            else:
                self._loop.call_soon_threadsafe(self._on_message, kind, rest)

    def _send_loop(self) -> None:
        """Send in a thread: the pipe holds a few hundred messages, and a step may take minutes."""
        while True:
            message = self._outbox.get()
            # A worker that is not there asks the database when it comes.
            with contextlib.suppress(OSError, ValueError):
                self.child.pipe.send(message)
