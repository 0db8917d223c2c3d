"""Start the worker's process before anything heavy is imported.

The worker then loads its model while the server is still starting.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from safelight.errors import SafelightError, StorageError
from safelight.server.settings import WorkerSettings
from safelight.threads import before_torch

FIRST = 500
"""A worker's `oom_score_adj` (proc(5)): Linux adds this many thousandths of the machine's memory to
its memory when it looks for a process to end.
"""


@dataclass(frozen=True)
class Child:
    """A worker, and the server's ends of the pipes to it.

    pipe: messages, both ways. pulse: receives one byte for each second in which the worker is well;
    a worker without it is not watched.
    """

    process: BaseProcess
    pipe: Connection
    pulse: Connection | None = None


def spawn(settings: WorkerSettings) -> Child:
    """Start a worker. Raises OSError."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    heard, told = context.Pipe(duplex=False)
    # A daemon process ends with the server, however the server ends.
    process = context.Process(
        target=_run, args=(theirs, told, settings), name="safelight-worker", daemon=True
    )
    process.start()
    theirs.close()
    told.close()
    return Child(process, ours, heard)


def _be_ended_first() -> None:
    """Let Linux end this process rather than the server if memory runs out.

    A worker is replaced, and the job that took the memory is known.
    """
    score = Path("/proc/self/oom_score_adj")
    with contextlib.suppress(OSError, ValueError):
        score.write_text(str(max(int(score.read_text()), FIRST)))


def _run(pipe: Connection, told: Connection, settings: WorkerSettings) -> None:
    """Draw until told to stop, or until the server is gone."""
    before_torch()  # before the worker's import of PyTorch
    _be_ended_first()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server says when to end
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    from safelight.server.pulse import Pulse

    pulse = Pulse(told)
    pulse.start()
    from safelight.server import tracing
    from safelight.server.logs import without_words
    from safelight.server.worker import Worker

    code = 0
    tracing.start("safelight-worker")
    try:
        try:
            worker = Worker(pipe, settings, pulse)
        except StorageError:
            raise  # another worker may succeed
        except SafelightError as error:
            pipe.send(("refused", str(error), error.code))
        else:
            worker.run()
    except (EOFError, BrokenPipeError, ConnectionError):
        pass  # the server is gone
    except Exception as error:  # its text may quote a prompt
        sys.stderr.write(f"the worker failed: {without_words(error)}\n")
        code = 1
    tracing.stop()
    os._exit(code)
