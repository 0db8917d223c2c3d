"""The worker's pulse: a byte to the server each second in which it gets on with its work.

A thread sends it, so that a process which is stopped, or in which nothing runs, has none. The
thread also looks at what the main thread does, and keeps still if that is nothing good:

- It counts: calls of the network's blocks, messages, jobs. More than a second ago is well.
- It computes in native code, as a large convolution does for minutes: the process takes time of a
  processor, and no signal reaches Python. That is well, for LONGEST at most.
- It waits in native code for what does not come: no time is taken.
- Python runs and nothing is counted: an endless loop.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

EVERY = 1.0
"""Seconds between two beats."""

LONGEST = 600.0
"""Seconds that one call of native code may take."""

BUSY = 0.05
"""The share of a processor that a call of native code takes at least."""


class Pulse:
    """told: where the beats go to; None for a worker that nobody watches."""

    def __init__(self, told: Connection | None = None) -> None:
        self._told = told
        self._count = self._python = 0
        self._patient = 1
        self._accelerated = False

    def start(self) -> None:
        """Begin to beat. For the main thread."""
        if hasattr(signal, "pthread_kill"):
            signal.signal(signal.SIGUSR1, self._in_python)
        threading.Thread(target=self._beat, name="pulse", daemon=True).start()

    def count(self, *_: object) -> None:
        """Say that the work gets on."""
        self._count += 1

    def loaded(self, model: Any) -> None:
        """From now on look at what the main thread does. model: what it draws with."""
        self.watch(model)
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

    def _in_python(self, *_: object) -> None:
        self._python += 1  # Python calls it between two of its instructions

    def _beat(self) -> None:
        main = threading.main_thread().ident
        counted = python = 0
        taken, since = time.process_time(), time.monotonic()
        while True:
            time.sleep(EVERY)
            now, used = time.monotonic(), time.process_time()
            if self._patient or self._count != counted:
                well, since = True, now
            elif self._python != python:
                well = False
            else:
                computes = used - taken > BUSY * EVERY or self._accelerated
                well = computes and now - since < LONGEST
            counted, python, taken = self._count, self._python, used
            if hasattr(signal, "pthread_kill") and main is not None:
                signal.pthread_kill(main, signal.SIGUSR1)
            if well and self._told is not None:
                try:
                    self._told.send_bytes(b".")
                except OSError:
                    return  # the server is gone, as the main thread finds out
