"""The worker's pulse: a byte to the server each second in which it gets on with its work.

A thread sends it, so that a process which is stopped, or in which nothing runs, has none. It looks
at each thread that works, which are the one that steps and the one that decodes, and keeps still if
one of them does not get on:

- It counts: calls of a network's blocks, messages, jobs. More than a second ago is well.
- It computes in native code, as a large convolution does for minutes: it takes time of a processor
  and stays where it is in its Python code. That is well, for LONGEST at most.
- It waits in native code for what does not come: no time is taken.
- It moves in its Python code and nothing is counted: an endless loop.
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
"""How often a beat looks where the threads are."""

LONGEST = 600.0
"""Seconds that one call of native code may take."""

BUSY = 0.05
"""The share of a processor that a call of native code takes at least."""

_BETWEEN = ("RESUME", "BACKWARD")
"""In the names of instructions at which a thread is found only between two calls."""


class Pulse:
    """told: where the beats go to; None for a worker that nobody watches."""

    def __init__(self, told: Connection | None = None) -> None:
        self._told = told
        self.well = True
        """Whether the work got on when it was last looked at, and the server still hears of it."""
        self._patient = 1
        self._accelerated = False
        self._threads: dict[int, _Thread] = {}

    def __deepcopy__(self, memo: object) -> Pulse:
        return self  # a network that is copied goes on counting here

    def start(self) -> None:
        """Begin to beat. For the main thread."""
        main = _Thread()
        self._threads[main.ident] = main
        if hasattr(signal, "pthread_kill"):
            signal.signal(signal.SIGUSR1, main.move)  # called between two instructions of Python
        threading.Thread(target=self._beat, name="pulse", daemon=True).start()

    def count(self, *_: object) -> None:
        """Say that the work of this thread gets on."""
        thread = self._threads.get(threading.get_ident())
        if thread is not None:
            thread.counted += 1

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Within it this thread works, too; the main one does anyway."""
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
        """From now on look at what the threads do: the worker has a model to draw with."""
        listen(self.count)
        self._patient -= 1

    def watch(self, model: Any) -> None:
        """Count the calls of a model's blocks."""
        self._accelerated |= str(model.device) != "cpu"  # it waits without taking time
        networks = [part for part in model.parts.values() if hasattr(part, "modules")]
        for net in networks:
            for block in net.modules():
                if next(block.children(), None) is not None:
                    block.register_forward_pre_hook(self.count)

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Within it the worker loads: it beats as long as the thread runs."""
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
    """What is seen of a thread that works; made by the thread itself."""

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
        """Say that it went from one instruction to the next."""
        self._moved = True

    def look(self) -> None:
        """Look where it is."""
        frame = sys._current_frames().get(self.ident)
        place = None if frame is None else (id(frame), frame.f_lasti)
        if place != self._place or (frame is not None and _between(frame)):
            self._moved = True
        self._place = place

    def is_well(self, accelerated: bool) -> bool:
        """Return whether it got on since it was asked before."""
        now, taken = time.monotonic(), self._time()
        if self.counted != self._seen:
            well, self._since = True, now
        else:
            computes = taken - self._taken > BUSY * EVERY or accelerated
            well = computes and not self._moved and now - self._since < LONGEST
        self._seen, self._taken, self._moved = self.counted, taken, False
        return well

    def _time(self) -> float:
        """Return the seconds of a processor that it took; of the process where that is not told."""
        try:
            return time.process_time() if self._clock is None else time.clock_gettime(self._clock)
        except OSError:  # it has ended just now
            return 0.0


def _between(frame: FrameType) -> bool:
    name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
    return any(part in name for part in _BETWEEN)
