"""The server's side of workers on Ray: the process that keeps them, and its reports."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from safelight.errors import SafelightError
from safelight.server.fleet import Elsewhere, Fleet
from safelight.server.scaling import WorkerPlan
from safelight.server.settings import BESIDE, WorkerSettings
from safelight.server.supervisor import ending
from safelight.weights.find import BUILT_IN

log = logging.getLogger("safelight.server")

GRACE = 20.0
"""Seconds that the process has to end when told to; its workers put back their jobs."""

LONGEST_PAUSE = 60.0
"""The most seconds between two tries to reach Ray."""


class OnRay(Elsewhere):
    """Takes the place of a `Supervisor`: keeps a `crew.Crew` in a process of its own.

    put_back(worker, killed): lets the jobs of a worker that is gone wait again.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        plan: WorkerPlan,
        fleet: Fleet,
        put_back: Callable[[str, bool], None],
    ) -> None:
        super().__init__(fleet)
        self._settings, self._plan, self._put_back = on_nodes(settings), plan, put_back
        self._workers: set[str] = set()
        self._told: str | None = "the workers on Ray are starting"
        self._away: str | None = None
        self._pipe: Connection | None = None
        self._ended = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="ray", daemon=True)

    @property
    def trouble(self) -> str | None:
        """What is wrong with all workers, in words; None if a worker of the fleet is well."""
        return super().trouble and (self._away or self._told or "no worker has joined yet")

    @property
    def alive(self) -> bool:
        return self._keeper.is_alive()

    def start(self) -> None:
        """Begin to keep workers."""
        self._keeper.start()

    async def stop(self) -> None:
        """Let the workers put back their unfinished jobs, and end."""
        import asyncio

        self.stopping = True
        self._ended.set()
        self._tell_to_end()
        if self._keeper.is_alive():
            await asyncio.to_thread(self._keeper.join, GRACE + 5)

    def _tell_to_end(self) -> None:
        if self._pipe is not None:
            with contextlib.suppress(OSError):  # it has ended
                self._pipe.send("stop")

    def _keep(self) -> None:
        """Start the process, listen to it, and start another when it ends. Runs in a thread."""
        pause = 0.0
        while not self.stopping:
            began = time.monotonic()
            try:
                why = self._serve()
            except OSError as error:
                why = f"its process cannot be started: {error.strerror}"
            self._lose(set())
            if self.stopping:
                return
            away = f"Ray is away: {why}"
            if away != self._away:
                log.warning("%s; it is tried again", away)
            self._away = away
            lived = time.monotonic() - began > LONGEST_PAUSE
            pause = 1.0 if lived else min(2 * pause + 1, LONGEST_PAUSE)
            self._ended.wait(pause)

    def _serve(self) -> str:
        """Start the process and listen to it until it ends; return why. Raises OSError."""
        process, self._pipe = start(self._plan, self._settings)
        if self.stopping:  # it was told to end before it had started
            self._tell_to_end()
        refused = self._listen(self._pipe)
        process.join(GRACE)
        if process.is_alive():
            process.kill()
            process.join()
        self._pipe.close()
        ended = ending(process.exitcode)
        return refused or f"the process that keeps its workers has ended ({ended})"

    def _listen(self, pipe: Connection) -> str | None:
        """Take in the process's messages until it ends; return why it ended, if it said so."""
        while True:
            try:
                kind, what = pipe.recv()
            except (EOFError, OSError):
                return None
            if kind == "refused":
                return str(what)
            if kind == "workers":
                self._lose(set(what))
            elif kind == "trouble":
                if self._away is not None:
                    log.info("Ray is there again")
                self._away, self._told = None, what

    def _lose(self, there: Collection[str]) -> None:
        """Let the jobs of workers that are gone wait again, at once. there: workers left."""
        for worker in self._workers - set(there):
            while not self.stopping:
                try:
                    self._put_back(worker, True)  # a worker that left by itself has no jobs
                    break
                except Exception as error:  # jobs wait meanwhile; the next try may work
                    log.warning("jobs cannot be put back yet: %s", type(error).__name__)
                    self._ended.wait(1.0)
        self._workers = set(there)


def on_nodes(settings: WorkerSettings) -> WorkerSettings:
    """Return the settings of a worker on any node: absolute paths, as the nodes have them too."""
    names = ("model", "models_dir", *BESIDE, "wildcards_dir", "styles_file")
    given = {name: getattr(settings, name) for name in names}
    paths = {name: _absolute(value) for name, value in given.items() if value is not None}
    allowed = settings.allowed and tuple(_absolute(value) for value in settings.allowed)
    return replace(settings, elsewhere=True, allowed=allowed, **paths)


def _absolute(value: Any) -> Any:
    """Return an existing path in its absolute form, any other text unchanged; of a list, each."""
    if isinstance(value, list):
        return [_absolute(one) for one in value]
    path = Path(value).expanduser()
    return str(path.absolute()) if value not in BUILT_IN and path.exists() else value


def start(plan: WorkerPlan, settings: WorkerSettings) -> tuple[Any, Connection]:
    """Start the process; return it and our end of a pipe to it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_run, args=(theirs, plan, settings), name="safelight-ray", daemon=True
    )
    process.start()
    theirs.close()
    return process, ours


def _run(pipe: Connection, plan: WorkerPlan, settings: WorkerSettings) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server tells when to end
    from safelight.ray_cluster import connect
    from safelight.server.crew import Crew
    from safelight.server.logs import log_to_stderr

    log_to_stderr()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Ray would print our log there again
    with contextlib.suppress(BrokenPipeError, ConnectionError):  # the server is gone
        try:
            ray = connect(plan.address)
            try:
                Crew(ray, plan, settings, lambda *told: pipe.send(told)).run(pipe)
            finally:
                ray.shutdown()
        except SafelightError as error:
            pipe.send(("refused", str(error)))
        except Exception as error:  # Ray fails in many ways
            told = (str(error).splitlines() or [""])[0]
            pipe.send(("refused", f"{type(error).__name__}: {told:.150}"))
