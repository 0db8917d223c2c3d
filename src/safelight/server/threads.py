"""Threads that wait for the database and for files while the server serves others."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from safelight.errors import StorageError
from safelight.server.database import reason

log = logging.getLogger("safelight.server")

UNANSWERED = 20.0
"""Seconds after which a caller is told that the database does not answer."""

ENDING = 25.0
"""Seconds that a process has to end when told to; service managers are told to allow 30."""

T = TypeVar("T")


class Threads:
    """Runs functions in threads.

    The methods raise StorageError if the database or the files cannot be used, or if the function
    takes longer than UNANSWERED seconds. local: whether files are on this machine.
    """

    def __init__(self, *, local: bool) -> None:
        self._database = ThreadPoolExecutor(4, thread_name_prefix="database")
        self._inputs = ThreadPoolExecutor(2, thread_name_prefix="inputs")
        self._local = local

    async def in_database(self, call: Callable[..., T], *given: Any) -> T:
        """Call a function that asks the database, which may wait for a lock."""
        return await _called(self._database, call, *given)

    async def with_files(self, call: Callable[..., T], *given: Any) -> T:
        """Call a function that also looks at files, which may take long if they are elsewhere."""
        return await _called(self._database if self._local else self._inputs, call, *given)

    async def with_inputs(self, call: Callable[..., T], *given: Any) -> T:
        """Call a function that also writes pictures."""
        return await _called(self._inputs, call, *given)

    def close(self) -> None:
        self._inputs.shutdown()
        self._database.shutdown()


def end_in_time(code: int = 0) -> None:
    """End this process, with its children, in ENDING seconds if it still runs then.

    Python waits for its threads, and one that waits for a frozen database cannot be interrupted.
    """
    timer = threading.Timer(ENDING, _end, (code,))
    timer.daemon = True
    timer.start()


def _end(code: int) -> None:
    log.warning("the database or the storage does not answer: ending without it")
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


async def _called(threads: Executor, call: Callable[..., T], *given: Any) -> T:
    try:
        async with asyncio.timeout(UNANSWERED):
            return await asyncio.get_running_loop().run_in_executor(threads, call, *given)
    except TimeoutError:  # such as a stopped database with open connections
        raise StorageError("the database of jobs does not answer") from None
    except OSError as error:
        raise StorageError(f"the data folder does not take it: {error.strerror}") from None
    except SQLAlchemyError as error:
        raise StorageError(f"the database of jobs does not take it: {reason(error)}") from None
