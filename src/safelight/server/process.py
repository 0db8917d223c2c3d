"""Start the worker's process before anything heavy is imported.

It loads its model while the server is still starting.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess


@dataclass(frozen=True)
class Settings:
    """The settings of a worker."""

    model: str
    url: str
    root: str
    device: str = "auto"
    dtype: str = "auto"
    low_memory: bool = False
    exact: bool = False
    rows: int | None = None


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
    from safelight.server.worker import main

    main(pipe, settings)
