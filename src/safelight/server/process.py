"""Start the worker's process before anything heavy is imported.

It loads its model while the server is still starting.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from safelight.server.settings import Settings

__all__ = ["Child", "Settings", "spawn"]

from safelight.threads import wait_asleep


@dataclass(frozen=True)
class Child:
    """A worker, and the server's end of the pipe to it."""

    process: BaseProcess
    pipe: Connection


def spawn(settings: Settings) -> Child:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    # A daemon: it ends with the server, whatever that ends of.
    process = context.Process(
        target=_run, args=(theirs, settings), name="safelight-worker", daemon=True
    )
    process.start()
    theirs.close()
    return Child(process, ours)


def _run(pipe: Connection, settings: Settings) -> None:
    wait_asleep()  # before the worker's import of PyTorch
    from safelight.server.worker import main

    main(pipe, settings)
