"""Limits by client: wrong tokens, requests and streams at once, bytes under way, lines of log.

All of it takes bounded memory, however many addresses there are. For use in the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from safelight.server.bodies import RefusedError

MOST = 4000
"""The most connections, if the system lets this many files be open. At most half may be streams.
"""

OWN_FILES = 64
"""Files that the server needs beside connections: the database, pictures, pipes."""

RESERVE = 16
"""Connections beyond the most, which may only ask for the server's health."""

MAX_REQUESTS = 128
"""The most requests of one client at once; at most half of them may be streams."""

MAX_STREAMS = 64

MAX_BYTES = 160 << 20
"""The most bytes of one client's bodies under way at once: room for two of the largest."""

MAX_BYTES_OF_ALL = 640 << 20

FREE_GUESSES = 10
"""Wrong tokens that an address may send within FORGET seconds without having to wait."""

FORGET = 60.0
PAUSE = 1.0
"""Seconds between two guesses of an address after that."""

MAX_WAITING = 8
MAX_KNOWN = 4096
"""The most addresses that are remembered, and the most pairs of address and right token."""

LINES = 100
"""The most lines of one kind that are logged in a second."""


@cache
def most() -> int:
    """Return the most connections that may be open."""
    with contextlib.suppress(ImportError, OSError):
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY:
            return max(RESERVE, min(MOST, soft - OWN_FILES - RESERVE))
    return MOST


class Guesses:
    """Slows down guesses at tokens. A right token known from an address is never slowed."""

    def __init__(self) -> None:
        self._wrong: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._good: OrderedDict[bytes, None] = OrderedDict()
        self._waiting: Counter[str] = Counter()
        self._next: dict[str, float] = {}

    async def wait(self, address: str, given: bytes) -> None:
        """Wait until this address may try a token. Raises RefusedError, 429, if too many wait."""
        if self._mark(address, given) in self._good or self._count(address) < FREE_GUESSES:
            return
        if self._waiting[address] >= MAX_WAITING:
            raise RefusedError(429, "too many wrong tokens", {"retry-after": "10"})
        self._waiting[address] += 1
        now = time.monotonic()
        due = max(now, self._next.get(address, 0.0)) + PAUSE
        self._next[address] = due
        try:
            await asyncio.sleep(due - now)
        finally:
            self._waiting[address] -= 1
            if not self._waiting[address]:
                del self._waiting[address]
                self._next.pop(address, None)

    def right(self, address: str, given: bytes) -> None:
        _remember(self._good, self._mark(address, given), None)

    def wrong(self, address: str) -> None:
        _remember(self._wrong, address, (self._count(address) + 1, time.monotonic()))

    def _count(self, address: str) -> int:
        count, at = self._wrong.get(address, (0, 0.0))
        return count if time.monotonic() - at < FORGET else 0

    def _mark(self, address: str, given: bytes) -> bytes:
        return hashlib.sha256(address.encode() + b"\0" + given).digest()


class Share:
    """Counts what each client has in progress."""

    def __init__(self) -> None:
        self._requests: Counter[str] = Counter()
        self._streams: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()

    @contextmanager
    def request(self, client: str, *, stream: bool) -> Iterator[None]:
        """Count a request while it is answered. Raises RefusedError, 429, for one too many.

        Streams stay open, so the streams of all clients leave room for other connections.
        """
        if stream and self._streams.total() >= most() // 2:
            raise RefusedError(429, "too many streams at once", {"retry-after": "5"})
        counts = [(self._requests, MAX_REQUESTS), (self._streams, MAX_STREAMS)]
        counts = counts if stream else counts[:1]
        for counter, limit in counts:
            if counter[client] >= limit:
                what = "streams" if counter is self._streams else "requests"
                raise RefusedError(
                    429, f"at most {limit} {what} at once for one client", {"retry-after": "1"}
                )
        for counter, _ in counts:
            counter[client] += 1
        try:
            yield
        finally:
            for counter, _ in counts:
                _take(counter, client, 1)

    def add(self, client: str, size: int) -> None:
        """Count bytes of a body. Raises RefusedError, 429, if they are too many."""
        self._bytes[client] += size
        if self._bytes[client] > MAX_BYTES or self._bytes.total() > MAX_BYTES_OF_ALL:
            raise RefusedError(
                429, "too many large bodies at once: send them one by one", {"retry-after": "2"}
            )

    def release(self, client: str, size: int) -> None:
        _take(self._bytes, client, size)


class Sparing(logging.Filter):
    """Lets through LINES lines of a kind in a second, and says how many were left out."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[tuple[str, str], tuple[int, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        second, kind = int(record.created), (record.name, str(record.msg)[:80])
        at, count = self._seen.get(kind, (second, 0))
        left_out = max(0, count - LINES) if at != second else 0
        if at != second:
            count = 0
        if len(self._seen) > MAX_KNOWN:
            self._seen.clear()
        self._seen[kind] = second, count + 1
        if left_out:
            record.left_out = left_out
        return count < LINES


def _take(counter: Counter[str], client: str, size: int) -> None:
    counter[client] -= size
    if counter[client] <= 0:
        del counter[client]


def _remember(known: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    known[key] = value
    known.move_to_end(key)
    if len(known) > MAX_KNOWN:
        known.popitem(last=False)
