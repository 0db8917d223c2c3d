"""Keep a worker process running, and pass messages between it and the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from safelight.containers import out_of_memory_kills
from safelight.errors import SafelightError, first_line
from safelight.server.process import Child, spawn
from safelight.server.settings import WorkerSettings

log = logging.getLogger("safelight.server")

GRACE = 10.0
"""Seconds that the worker has to end when told to."""

SILENCE = 12.0
"""Seconds without a pulse after which a worker is replaced. Before it is ready it has LOADING
seconds, since Python reads large libraries in one go.
"""
LOADING = 120.0

LONGEST_PAUSE = 5.0
"""The most seconds between two workers that end at once."""

LONGEST_WAIT = 60.0
"""The most seconds between two workers while the model that is there cannot be loaded."""

DOUBT = 5.0
"""Seconds without a pulse after which the server reports that it is not ready."""


class Supervisor:
    """One worker process, replaced when it ends or hangs.

    child: the first worker. name: of the present worker, once it has told it. on_message(kind,
    rest), on_end() and on_refusal() are called in the event loop: for a message of the worker,
    after a worker ended, and if the first worker cannot draw with these settings. If a later worker
    cannot, because the model's files have changed, another one is tried from time to time.
    put_back(worker, killed) is called in a thread, again until it raises no error: it lets the jobs
    of a worker that ended wait again.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        child: Child,
        *,
        on_message: Callable[[str, list[Any]], None],
        on_end: Callable[[], None],
        on_refusal: Callable[[], None],
        put_back: Callable[[str, bool], None],
    ) -> None:
        self.child, self._settings = child, settings
        self.name: str | None = None
        self._on_message, self._on_end, self._on_refusal = on_message, on_end, on_refusal
        self._put_back = put_back
        self.refusal: SafelightError | None = None
        self.restarts = 0
        self.stopping = False
        self.silent = 0.0
        self._ready = self._stopped = self._drew = False
        self._ended = threading.Event()
        self._spoilt: str | None = None
        self._refused: SafelightError | None = None
        self._outbox: SimpleQueue[Any] = SimpleQueue()

    def start(self) -> None:
        """Begin, within the event loop."""
        self._loop = asyncio.get_running_loop()
        self._keeper = threading.Thread(target=self._keep_worker, name="worker", daemon=True)
        self._keeper.start()
        threading.Thread(target=self._send_loop, name="to the worker", daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether the thread that keeps a worker is running."""
        return self._keeper.is_alive()

    @property
    def trouble(self) -> str | None:
        """What is wrong with the worker, in words; None if nothing is."""
        if not self.alive:
            return "the thread that keeps the worker has ended"
        if self._spoilt is not None:
            return self._spoilt
        if not self._ready:
            return "the worker is loading its model"
        if self.silent > DOUBT:
            return f"the worker has been silent for {self.silent:.0f} s"
        return None

    def send(self, *message: Any) -> None:
        """Send a message to the worker; it is lost if there is no worker now."""
        self._outbox.put(message)

    def drain(self) -> None:
        """Let the worker finish its jobs and end; no other worker is started.

        Call it until the worker has ended: a worker that is just starting does not receive it.
        """
        self.stopping = True
        self._ended.set()
        self.send("drain")

    def ended(self, seconds: float) -> bool:
        """Wait up to `seconds` and return whether no worker is kept any more."""
        self._keeper.join(seconds)
        return not self.alive

    async def stop(self) -> None:
        """Let the worker put back its unfinished jobs, and end."""
        self.stopping = True
        self._ended.set()
        while self._keeper.is_alive():  # it may have started another worker just before
            self.send("stop")
            process = self.child.process
            await asyncio.to_thread(process.join, GRACE)
            if process.is_alive():
                process.kill()
            await asyncio.to_thread(self._keeper.join, GRACE)

    def release(self, worker: str, *, killed: bool = False) -> None:
        """Let the jobs of a worker that ended wait again, once the database accepts that."""
        while True:
            try:
                self._put_back(worker, killed)
                return
            except Exception as error:  # jobs wait meanwhile; the next try may work
                log.warning("jobs cannot be put back yet: %s", first_line(error, 200))
                if self.stopping:  # the server's next start does it
                    return
                time.sleep(1)

    def _keep_worker(self) -> None:
        """Listen to the worker, and start another when it ends. Runs in a thread."""
        pause = 0.0
        while True:
            began = time.monotonic()
            try:
                self._serve_worker()
            except Exception:  # this thread is the only one that starts workers
                log.exception("keeping the worker failed")
                self.child.process.kill()
            if self._refused is not None and not self._drew:
                self.refusal = self._refused
                self._in_loop(self._on_refusal)
                return
            if not self.stopping:
                # The pause grows while workers end at once.
                longest = LONGEST_WAIT if self._refused is not None else LONGEST_PAUSE
                lived = time.monotonic() - began > 10 and self._refused is None
                pause = 0.0 if lived else min(pause * 2 + 0.2, longest)
                why = self._spoilt or ending(self.child.process.exitcode)
                log.warning("the worker ended (%s): starting it again in %.0f s", why, pause)
                self._ended.wait(pause)
            if self.stopping:
                return
            self.child = self._another()
            self.restarts += 1

    def _serve_worker(self) -> None:
        child, short = self.child, out_of_memory_kills()
        self._ready = self._stopped = False
        self._refused = None
        self.silent = 0.0
        if child.pulse is not None:
            watch = threading.Thread(target=self._watch, args=(child,), daemon=True)
            watch.start()
        self.send("start")
        self._listen(child.pipe)
        self._ready = False
        child.process.join(GRACE)  # one stuck on a disk may take longer; it does no harm
        self._in_loop(self._on_end)
        if self.name is not None:
            self.release(self.name, killed=self._killed(child, short))

    def _another(self) -> Child:
        while True:
            try:
                return spawn(self._settings)
            except Exception as error:  # such as no memory for a process
                log.warning("a worker cannot be started: %s", first_line(error, 200))
                time.sleep(1)

    def _watch(self, child: Child) -> None:
        """Kill a silent worker. Runs in a thread until the worker ends."""
        assert child.pulse is not None
        while True:
            try:
                if child.pulse.poll(1.0):
                    child.pulse.recv_bytes()
                    self.silent = 0.0
                    continue
            except (EOFError, OSError):
                return
            # Seconds are counted, not measured: a pause of this process is no silence of the
            # worker.
            self.silent += 1.0
            if self.silent >= (SILENCE if self._ready else LOADING):
                self._stopped = _is_stopped(child.process.pid)
                log.warning("the worker is silent: ending it")
                child.process.kill()
                return

    def _killed(self, child: Child, short: int) -> bool:
        """Return whether others ended the worker from outside, as far as can be told.

        short: out-of-memory kills before the worker started.
        """
        code = child.process.exitcode
        if self._stopped:
            return True
        if self.silent >= SILENCE or code is None or code >= 0:
            return False
        outside = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        return -code in outside and out_of_memory_kills() == short

    def _listen(self, pipe: Any) -> None:
        """Pass on the worker's messages until it ends."""
        self.name = None
        while True:
            try:
                kind, *rest = pipe.recv()
            except (EOFError, OSError):
                return
            if kind == "worker":
                self.name = rest[0]
            elif kind == "refused":
                self._refused = SafelightError(rest[0], code=rest[1])
                self._spoilt = f"the model cannot be loaded any more: {rest[0]}"
            elif kind == "spoilt":
                self._spoilt = rest[0]
            else:
                if kind == "ready":
                    self._ready = self._drew = True
                    self._spoilt = None
                self._in_loop(self._on_message, kind, rest)

    def _in_loop(self, call: Callable[..., None], *given: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(call, *given)

    def _send_loop(self) -> None:
        """Send messages, in a thread: the pipe holds a few hundred, and a step may take minutes."""
        while True:
            message = self._outbox.get()
            # A missed message is no harm: a new worker asks the database.
            with contextlib.suppress(OSError, ValueError):
                self.child.pipe.send(message)


def ending(code: int | None) -> str:
    """Return a description of how a process ended."""
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    if name == "SIGBUS":
        return "SIGBUS: a file that it reads was cut short, or its disk fails"
    return name


def _is_stopped(pid: int | None) -> bool:
    """Return whether a process is stopped, as by SIGSTOP. Known on Linux only; otherwise False."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] in "Tt"
