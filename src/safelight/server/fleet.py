"""The fleet as a server sees it: workers that joined its database from elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable
from typing import Any

from safelight.errors import SafelightError, StorageError
from safelight.server.jobs import WorkerInfo
from safelight.server.store import TAKEN, Store
from safelight.server.wire import TO_SERVER, TO_WORKERS, Wire

log = logging.getLogger("safelight.server")

LOOK = 2.0
"""Seconds between two looks at the roster."""

GIVE_UP = 30.0
"""Seconds after which a server ends while another session has the lock on its database. For about
12 s that may be our own lost connection.
"""


class Fleet:
    """The workers on the roster, and messages to and from them. A database in a file has no fleet.

    on_message(kind, rest) is called in the event loop for a message about a job; on_change() is
    called there after each look at the roster and when a worker has started, on_lost() when another
    server has the database; then `refusal` says so.
    """

    def __init__(
        self,
        store: Store,
        url: str,
        *,
        on_message: Callable[[str, list[Any]], None],
        on_change: Callable[[], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._store = store
        self._on_message, self._on_change, self._on_lost = on_message, on_change, on_lost
        self.trouble: str | None = None
        self.refusal: SafelightError | None = None
        self.workers: list[WorkerInfo] = []
        self._wire: Wire | None = None
        self._task: asyncio.Task[None] | None = None
        if store.shared:
            self._wire = Wire(url, hears=TO_SERVER, tells=TO_WORKERS, on_message=self._heard)

    def start(self) -> None:
        """Begin, within the event loop."""
        self._loop = asyncio.get_running_loop()
        if self._wire is not None:
            self._wire.start()
            self._task = self._loop.create_task(self._keep_looking())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
        if self._wire is not None:
            await asyncio.to_thread(self._wire.close)

    def send(self, *message: Any) -> None:
        """Send a message to all workers of the fleet; it may be lost."""
        if self._wire is not None and self.workers:
            self._wire.send(*message)

    def _heard(self, kind: str, rest: list[Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            if kind == "ready":
                self._loop.call_soon_threadsafe(self._loop.create_task, self._look())
            else:
                self._loop.call_soon_threadsafe(self._on_message, kind, rest)

    async def _keep_looking(self) -> None:
        lost = math.inf
        while True:
            await self._look()
            self.trouble = await self._foreign()
            now = time.monotonic()
            lost = math.inf if self.trouble is None else min(lost, now)
            if now - lost >= GIVE_UP:
                break
            await asyncio.sleep(LOOK)
        self.refusal = StorageError(TAKEN)
        log.error("the server ends: %s", self.refusal)
        self._on_lost()

    async def _foreign(self) -> str | None:
        """Return a line if another session has the lock on the database, else None."""
        try:
            return None if await asyncio.to_thread(self._store.held) else TAKEN
        except StorageError:  # the database is away for all servers
            return None

    async def _look(self) -> None:
        try:
            found = await asyncio.to_thread(self._store.fleet)
        except StorageError:  # tried again; the last known roster counts meanwhile
            return
        before, self.workers = {worker.id for worker in self.workers}, found
        now = {worker.id for worker in found}
        if now != before:
            log.info("the fleet has %d workers", len(now))
        if before - now:
            with contextlib.suppress(StorageError):
                await asyncio.to_thread(self._store.forget_gone)
        self._on_change()


class Elsewhere:
    """Takes the place of a `Supervisor` in a server that draws nothing itself."""

    restarts = 0
    refusal: SafelightError | None = None
    alive = True

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.stopping = False

    @property
    def trouble(self) -> str | None:
        """What is wrong with all workers, in words; None if nothing is."""
        return None if self._fleet.workers else "no worker has joined: start `safelight worker`"

    def start(self) -> None:
        """Begin: there is nothing to do."""

    def send(self, *message: Any) -> None:
        """Send a message to the worker of this server: there is none."""

    async def stop(self) -> None:
        self.stopping = True
