"""`safelight worker`: a worker process that draws the jobs of a server elsewhere.

This process keeps a drawing process running as a server does, puts it on the roster, reports that
it is well, and passes messages on. The truth is in the database and the storage, which all share.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import signal
import threading
from collections.abc import Callable
from typing import Any

from safelight.errors import StorageError
from safelight.server.files import Files
from safelight.server.jobs import ModelInfo
from safelight.server.logs import log_to_stderr
from safelight.server.process import Child
from safelight.server.recovery import belongs, put_back
from safelight.server.roster import BEAT
from safelight.server.served import Served
from safelight.server.settings import WorkerSettings
from safelight.server.store import Store
from safelight.server.supervisor import Supervisor
from safelight.server.threads import end_in_time
from safelight.server.wire import TO_SERVER, TO_WORKERS, Wire

log = logging.getLogger("safelight.server")

NEWS = ("progress", "preview", "picture", "end", "described")
ORDERS = ("wake", "cancel", "watch", "unwatch", "describe")

DRAINING = 2.0
"""Seconds between two reports of a draining worker, at which it is also told again to finish.
"""


def work(settings: WorkerSettings, child: Child) -> None:
    """Draw until SIGTERM or Ctrl-C. Raises SafelightError if it cannot draw with these settings."""
    log_to_stderr()
    station = Station(settings, child)
    asyncio.run(station.run())
    if station.supervisor.refusal is not None:
        raise station.supervisor.refusal


class Station:
    """A worker of the fleet. child: the first drawing process."""

    def __init__(self, settings: WorkerSettings, child: Child) -> None:
        self._settings = settings
        self._files, self._store = Files(settings.place), Store(settings.url)
        self._place = f"{platform.node()}:{os.getpid()}"
        self._served = Served(settings)
        self._began = False
        self._told: str | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop, self._now = asyncio.Event(), asyncio.Event()
        self._draining = False
        self._model: ModelInfo | None = None
        self._memory: int | None = None
        self.supervisor = Supervisor(
            settings,
            child,
            on_message=self._on_message,
            on_end=self._on_end,
            on_refusal=lambda: self._stop.set(),
            put_back=self._put_back,
        )
        self._wire = Wire(
            settings.url,
            hears=TO_WORKERS,
            tells=TO_SERVER,
            on_message=self._on_order,
            on_open=self._on_open,
        )

    async def run(self) -> None:
        """Join the fleet, draw, and leave it when told to: by a signal or by `end`."""
        self._loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                _on_signal(self._loop, number, self._on_told)
        try:
            if not await self._joined():
                self.supervisor.child.process.kill()
                return
            self._began = True
            self.supervisor.start()
            self._wire.start()
            while not self._stop.is_set():
                await self._beat()
                await self._either(BEAT)
            while self._draining:
                self.supervisor.drain()
                if await asyncio.to_thread(self.supervisor.ended, DRAINING):
                    break
                await self._beat()
        finally:
            if self._began:
                await self.supervisor.stop()
            await asyncio.to_thread(self._wire.close)
            self._store.close()

    def end(self, *, drain: bool) -> None:
        """Stop drawing. drain: finish the jobs that are begun; otherwise they wait for other
        workers.

        May be called from any thread, and again without `drain` to stop at once.
        """
        self._draining = drain
        if self._loop is None:
            self._stop.set()
        else:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._stop.set)

    @property
    def draws(self) -> bool:
        """Whether its worker is on the roster, or about to be."""
        return self._model is not None

    async def _joined(self) -> bool:
        """Wait until a server has made database and storage ready; return False if told to end.

        Raises SafelightError if the storage belongs to another database, or the database is newer.
        """
        while not self._stop.is_set():
            try:
                if await asyncio.to_thread(belongs, self._files, self._store):
                    log.info("joined: drawing jobs of the database with %s", self._settings.model)
                    return True
                self._note("no server has made this database ready yet")
            except StorageError as error:
                self._note(str(error))
            await self._either(2.0)
        return False

    async def _either(self, seconds: float) -> None:
        """Wait for `seconds`, or until there is something to do."""
        waits = [asyncio.create_task(event.wait()) for event in (self._stop, self._now)]
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()
        self._now.clear()

    def _note(self, why: str | None) -> None:
        if why is not None and why != self._told:
            log.warning("waiting: %s", why)
        self._told = why

    async def _beat(self) -> None:
        """Report that the worker is well, if it is."""
        name, model = self.supervisor.name, self._model
        if name is None or model is None or self.supervisor.trouble is not None:
            return
        try:
            models = await asyncio.to_thread(self._served.sources)  # so that new files are reported
            told = (name, self._place, model, self._memory, [*models])
            await asyncio.to_thread(self._store.beat, *told)
            self._note(None)
        except StorageError as error:
            self._note(str(error))

    def _on_message(self, kind: str, rest: list[Any]) -> None:
        if kind == "ready":
            self._model, self._memory = ModelInfo(**rest[0]), rest[1]
            log.info("ready: %s on %s", self._model.name, self._model.device)
            self._now.set()
            self._wire.send("ready")
        elif kind == "stuck":
            self._note(rest[0])
        elif kind == "described" and rest[1] is None:
            pass  # another worker may have that model
        elif kind in NEWS:
            self._wire.send(kind, *rest)

    def _on_end(self) -> None:
        self._model = None

    def _on_order(self, kind: str, rest: list[Any]) -> None:
        if kind in ORDERS:
            self.supervisor.send(kind, *rest)

    def _on_open(self) -> None:
        self._wire.send("ready")  # the server tells again which previews are requested
        self.supervisor.send("wake")

    def _on_told(self) -> None:
        end_in_time()
        self._stop.set()

    def _put_back(self, worker: str, killed: bool) -> None:
        stopping = self.supervisor.stopping
        put_back(self._files, self._store, worker, killed=killed, stopping=stopping)


def _on_signal(
    loop: asyncio.AbstractEventLoop, number: signal.Signals, call: Callable[[], None]
) -> None:
    """Let a signal call a function in the event loop."""
    try:
        loop.add_signal_handler(number, call)
    except NotImplementedError:  # on Windows
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(call))
