"""The keys as a running server knows them: read again each second, so that removals take effect."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable

from safelight.errors import StorageError
from safelight.server import allowances
from safelight.server.callers import key_of
from safelight.server.people import Key, digest

log = logging.getLogger("safelight.server")

FRESH = 1.0
"""Seconds for which the keys that were read are used: a removed key works for as long."""

PATIENCE = 2.0
"""Seconds that a request waits for the keys. After that the last ones read are used; without the
database no job is taken in any case.
"""


class Keyring:
    """The keys of people. For use in the event loop. read: returns all keys; runs in a thread."""

    def __init__(self, read: Callable[[], list[Key]]) -> None:
        self._read = read
        self._reading: asyncio.Future[None] | None = None
        self._keep(read())

    def _keep(self, keys: Iterable[Key]) -> None:
        self._named = {key.name: key for key in keys}
        self._tokens = {key.token: key.name for key in self._named.values()}
        self._cookies = {key.cookie: key.name for key in self._named.values()}
        self._at = time.monotonic()

    async def refresh(self) -> None:
        """Read the keys again. Calls at the same time share one reading."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.ensure_future(self._refresh())
        await asyncio.wait({self._reading}, timeout=PATIENCE)

    async def _refresh(self) -> None:
        try:
            self._keep(await asyncio.to_thread(self._read))
        except StorageError:
            log.warning("the keys cannot be read: those of before count")

    async def _fresh(self) -> None:
        if time.monotonic() - self._at >= FRESH:
            await self.refresh()

    @property
    def names(self) -> list[str]:
        """The names of the keys that were read last."""
        return list(self._named)

    async def some(self) -> bool:
        """Return whether there are keys: then everyone needs one."""
        await self._fresh()
        return bool(self._named)

    async def of_token(self, given: bytes) -> str | None:
        """Return the name of the key that was given; None if there is no such key."""
        await self._fresh()
        return self._tokens.get(digest(given))

    async def of_cookies(self, given: Iterable[bytes]) -> str | None:
        """Return the name of the key that one of these cookies stands for; None if none does."""
        await self._fresh()
        names = (self._cookies.get(digest(cookie)) for cookie in given)
        return next((name for name in names if name is not None), None)

    def limits(self, owner: str | None) -> set[str]:
        """Return the kinds of limits that an owner's key has."""
        key = self._named.get(key_of(owner) or "")
        return set() if key is None else {one.kind for one in key.allowances}

    async def spent(self, owner: str | None) -> None:
        """Read again what an owner's key has left, for the headers of the answer."""
        if self.limits(owner):
            await self.refresh()

    def headers(self, name: str) -> list[tuple[bytes, bytes]]:
        """Return the headers that say what a key has left."""
        key = self._named.get(name)
        found = allowances.headers(() if key is None else key.allowances, time.time())
        return [(header.encode(), value.encode()) for header, value in found]
