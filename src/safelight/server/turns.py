"""A few places for work that takes processor time or memory; clients take turns at them."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from safelight.processors import cores


def usual_count() -> int:
    """Return the usual number of places on this machine."""
    return max(2, min(4, cores()))


class Turns:
    """Places for one event loop. No client ever has all, so none holds up all the others."""

    def __init__(self, count: int | None = None) -> None:
        self.count = count or usual_count()
        self._running: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """Hold a place inside the `with` block."""
        await self.take(client)
        try:
            yield
        finally:
            self.leave(client)

    async def take(self, client: str) -> None:
        """Wait for a place; give it back with `leave`."""
        if self._free(client):
            self._running[client] += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave(client)
            raise

    def leave(self, client: str) -> None:
        """Give a place back, and pass free places to waiting clients in turn."""
        self._running[client] -= 1
        if not self._running[client]:
            del self._running[client]
        for name in list(self._waiting):
            if not self._free(name):
                continue
            queue = self._waiting[name]
            while queue and queue[0].done():  # its caller gave up
                queue.popleft()
            if queue:
                self._running[name] += 1
                queue.popleft().set_result(None)
            self._waiting.pop(name)
            if queue:
                self._waiting[name] = queue  # behind the others

    def _free(self, client: str) -> bool:
        own = self._running[client] < self.count - 1
        return own and self._running.total() < self.count
