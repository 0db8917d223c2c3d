"""Cancel the job of a client that goes away while it waits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from safelight.server.hub import Hub

T = TypeVar("T")


async def attended(receive: Receive, hub: Hub, job_id: str, work: Awaitable[T]) -> T:
    """Return the result of `work`, as long as the client stays connected.

    If the client leaves, or `work` fails, the job is cancelled, and ClientDisconnect or the
    exception is raised. receive: of a request whose body has been read.
    """

    try:
        return await while_there(receive, work)
    except BaseException:
        await asyncio.shield(hub.cancel(job_id))
        raise


async def while_there(receive: Receive, work: Awaitable[T]) -> T:
    """Return the result of `work`; cancel it and raise ClientDisconnect if the client leaves.

    receive: of a request whose body has been read.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
