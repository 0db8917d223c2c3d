"""Connections: slow and idle ones are closed, and there are never more than the open-file limit."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
from typing import Any, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

from safelight.server import bodies
from safelight.server.guard import OPEN
from safelight.server.limits import MOST, OWN_FILES, RESERVE, most
from safelight.server.wording import problem

log = logging.getLogger("safelight.http")

ACCEPTED = 16
"""Connections accepted at a time. asyncio also tries this often when no file can be opened."""

_SHORT = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


def raise_open_files() -> None:
    """Raise this process's limit of open files, up to what MOST connections need."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = MOST + 4 * OWN_FILES
        wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def on_exception(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what a task or a callback raised.

    If no file can be opened, one line is logged; asyncio tries again after a second. asyncio's own
    handler would log the text of exceptions, which may quote a prompt.
    """
    error = context.get("exception")
    if isinstance(error, OSError) and error.errno in _SHORT:
        log.warning("no file can be opened: new connections wait")
    else:
        log.error("%s", context.get("message", "a task failed"), exc_info=error)


class H11WithTimeouts(H11Protocol):
    """Closes a connection that sends no request, or reads no answer, for bodies.SLOW seconds.

    uvicorn's own protocol waits for both without limit.
    """

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._admit()
        self._late = self.loop.call_later(bodies.SLOW, self._close_if_silent)
        self.since = self.loop.time()
        self._stuck: asyncio.TimerHandle | None = None

    def on_response_complete(self) -> None:
        self._late.cancel()
        self.since = self.loop.time()
        self._late = self.loop.call_later(bodies.SLOW, self._close_if_silent)
        super().on_response_complete()

    @property
    def answering(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _close_if_silent(self) -> None:
        if not self.answering and not self.transport.is_closing():
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look_again(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stuck is not None:
            self._stuck.cancel()

    def _look_again(self, unsent: int) -> None:
        self._stuck = self.loop.call_later(bodies.SLOW, self._abort_if_stuck, unsent)

    def _abort_if_stuck(self, unsent: int) -> None:
        now = self.transport.get_write_buffer_size()
        if now > unsent - bodies.MIN_BYTES:
            self.transport.abort()  # close() would wait until the client has read it all
        else:
            self._look_again(now)

    def connection_lost(self, exc: Exception | None) -> None:
        self._late.cancel()
        if self._stuck is not None:
            self._stuck.cancel()
        super().connection_lost(exc)

    def _admit(self) -> None:
        """Make room for this connection, or let it ask for the server's health only."""
        limit = most()
        if len(self.connections) <= limit:
            return
        held: dict[str, list[H11WithTimeouts]] = {}
        for one in cast("set[H11WithTimeouts]", self.connections):
            held.setdefault((one.client or ("",))[0], []).append(one)
        for owned in sorted(held.values(), key=len, reverse=True):
            idle = [one for one in owned if one is not self and not one.answering]
            if idle:
                min(idle, key=lambda one: one.since).transport.abort()
                return
        if len(self.connections) > limit + RESERVE:
            self.transport.abort()
        else:
            self.app = _health_alone(self.app)


def _health_alone(app: Any) -> Any:
    """Return an application that answers only whether the server lives."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] in OPEN:
            await app(scope, receive, send)
            return
        body = json.dumps(problem(503, "too many connections: try again")).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
            (b"retry-after", b"2"),
        ]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return answer
