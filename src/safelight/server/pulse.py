"""The worker's pulse: one byte to the server for each second in which its work gets on.

A thread sends it, so a process that is stopped, or in which no code runs, has no pulse. It looks at
each working thread, the one that steps and the one that decodes, and sends nothing if one of them
does not get on:

- The thread counts: calls of a network's blocks, messages, jobs. A new count is well.
- It computes in native code, as a large convolution does for minutes: it takes processor time and
  stays at one place in its Python code. That is well, for LONGEST at most.
- It waits in native code for something that does not come: it takes no processor time. Not well.
- It moves in its Python code, but counts nothing: an endless loop. Not well.
"""

from __future__ import annotations

import contextlib
import dis
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

from safelight.progress import listen

EVERY = 1.0
"""Seconds between two beats."""

LOOKS = 10
"""How often the threads' places are looked up for each beat."""

LONGEST = 600.0
"""The most seconds that one call of native code may take."""

BUSY = 0.05
"""The least share of a processor that a computing call of native code takes."""

_BETWEEN = ("RESUME", "BACKWARD")
"""Parts of names of instructions: a thread is found at these only between two calls."""


class Pulse:
    """Sends the worker's pulse. told: where beats are sent; None for a worker without a watcher."""

    def __init__(self, told: Connection | None = None) -> None:
        self._told = told
        self.well = True
        """Whether the work got on at the last look, and the server still receives beats."""
        self._patient = 1
        self._accelerated = False
        self._threads: dict[int, _Thread] = {}

    def __deepcopy__(self, memo: object) -> Pulse:
        return self  # a copied network keeps counting here

    def start(self) -> None:
        """Begin to beat. To be called in the main thread."""
        main = _Thread()
        self._threads[main.ident] = main
        if hasattr(signal, "pthread_kill"):
            signal.signal(signal.SIGUSR1, main.move)  # called between two instructions of Python
        threading.Thread(target=self._beat, name="pulse", daemon=True).start()

    def count(self, *_: object) -> None:
        """Count: the work of this thread gets on."""
        thread = self._threads.get(threading.get_ident())
        if thread is not None:
            thread.counted += 1

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Watch this thread, too, inside the `with` block. The main thread is always watched."""
        if threading.get_ident() in self._threads:
            self.count()
            yield
            return
        thread = self._threads[threading.get_ident()] = _Thread()
        try:
            yield
        finally:
            del self._threads[thread.ident]

    def loaded(self) -> None:
        """Look at the threads from now on: the worker has a model to draw with."""
        listen(self.count)
        self._patient -= 1

    def watch(self, model: Any) -> None:
        """Count the calls of a model's blocks."""
        self._accelerated |= str(model.device) != "cpu"  # waiting for it takes no processor time
        networks = [part for part in model.parts.values() if hasattr(part, "modules")]
        for net in networks:
            for block in net.modules():
                if next(block.children(), None) is not None:
                    block.register_forward_pre_hook(self.count)

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Beat as long as the process runs, inside the `with` block: the worker is loading."""
        self._patient += 1
        try:
            yield
        finally:
            self._patient -= 1
            self.count()

    def _beat(self) -> None:
        main = threading.main_thread().ident
        while True:
            for _ in range(LOOKS):
                time.sleep(EVERY / LOOKS)
                for thread in list(self._threads.values()):
                    thread.look()
            well = [thread.is_well(self._accelerated) for thread in list(self._threads.values())]
            if hasattr(signal, "pthread_kill") and main is not None:
                signal.pthread_kill(main, signal.SIGUSR1)
            self.well = all(well) or self._patient > 0
            if self.well and self._told is not None:
                try:
                    self._told.send_bytes(b".")
                except OSError:
                    self.well = False
                    return  # the server is gone, as the main thread finds out


class _Thread:
    """What is seen of a working thread; created by that thread itself."""

    def __init__(self) -> None:
        self.ident = threading.get_ident()
        self.counted = 1
        self._seen = 0
        self._moved = False
        self._place: tuple[int, int] | None = None
        self._clock = None
        if hasattr(time, "pthread_getcpuclockid"):
            self._clock = time.pthread_getcpuclockid(self.ident)
        self._taken, self._since = self._time(), time.monotonic()

    def move(self, *_: object) -> None:
        """Note that the thread went from one instruction to the next."""
        self._moved = True

    def look(self) -> None:
        """Look at which place in its code the thread is."""
        frame = sys._current_frames().get(self.ident)
        place = None if frame is None else (id(frame), frame.f_lasti)
        if place != self._place or (frame is not None and _between(frame)):
            self._moved = True
        self._place = place

    def is_well(self, accelerated: bool) -> bool:
        """Return whether the thread got on since the last call."""
        now, taken = time.monotonic(), self._time()
        if self.counted != self._seen:
            well, self._since = True, now
        else:
            computes = taken - self._taken > BUSY * EVERY or accelerated
            well = computes and not self._moved and now - self._since < LONGEST
        self._seen, self._taken, self._moved = self.counted, taken, False
        return well

    def _time(self) -> float:
        """Return the thread's processor time in seconds; where unknown, that of the process."""
        try:
            return time.process_time() if self._clock is None else time.clock_gettime(self._clock)
        except OSError:  # it has ended just now
            return 0.0


def _between(frame: FrameType) -> bool:
    name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
    return any(part in name for part in _BETWEEN)
