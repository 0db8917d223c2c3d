"""Answers of server-sent events: with a sign of life, and passed on by proxies at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fastapi.responses import StreamingResponse

KEEP_ALIVE = 15.0
"""Seconds without an event after which a stream sends a sign of life. Proxies close a connection
that is silent for a minute.
"""


class EventStream(StreamingResponse):
    """Server-sent events, each as its bytes."""

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        # The second is nginx's: it would hold events back until a block is full.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(kept_alive(events), headers=headers, media_type="text/event-stream")


async def kept_alive(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the events, and a comment after each KEEP_ALIVE seconds without one."""
    coming: asyncio.Future[bytes] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait({coming}, timeout=KEEP_ALIVE)
            if not done:
                yield b": still here\n\n"
                continue
            try:
                event = coming.result()
            except StopAsyncIteration:
                return
            coming = None
            yield event
    finally:
        if coming is not None:
            coming.cancel()
