"""Run uvicorn, with limits of our own."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import sys
import time
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from safelight.server import bodies
from safelight.server.app import PageOf, application
from safelight.server.guard import Rules
from safelight.server.hub import Hub
from safelight.server.listening import everywhere, shown
from safelight.server.process import Child, Settings

FIELDS = ("request_id", "method", "route", "status", "seconds", "job", "client")


class Lines(logging.Formatter):
    """Formats a log record as a line of JSON. None contains a prompt."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class H11WithTimeouts(H11Protocol):
    """Closes a connection that sends no request, or reads no answer, for bodies.SLOW seconds.

    uvicorn's own protocol waits for both for ever.
    """

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._late = self.loop.call_later(bodies.SLOW, self._close_if_silent)
        self._stuck: asyncio.TimerHandle | None = None

    def on_response_complete(self) -> None:
        self._late.cancel()
        self._late = self.loop.call_later(bodies.SLOW, self._close_if_silent)
        super().on_response_complete()

    def _close_if_silent(self) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete
        if not answering and not self.transport.is_closing():
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
            self.transport.abort()  # to close would wait until all of it is taken
        else:
            self._look_again(now)

    def connection_lost(self, exc: Exception | None) -> None:
        self._late.cancel()
        if self._stuck is not None:
            self._stuck.cancel()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, hub: Hub) -> None:
        super().__init__(config)
        self._hub = hub

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._hub.drain()
        super().handle_exit(sig, frame)


def serve(
    settings: Settings,
    child: Child,
    listening: socket.socket,
    *,
    host: str,
    token: str | None,
    hosts: frozenset[str] = frozenset(),
    bound: int = 1000,
    page: PageOf | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C. page: as `application` takes it.

    Raises SafelightError if the server or the model cannot start.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    hub = Hub(settings, child, bound=bound)
    names = hosts | ({host} if not everywhere(host) else frozenset())
    config = uvicorn.Config(
        application(hub, Rules(token, names), page=page),
        http=H11WithTimeouts,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=64 << 10,
        limit_concurrency=500,
    )
    server = Server(config, hub)

    def end() -> None:
        server.should_exit = True

    hub.on_refusal = end
    # uvicorn raises the signal again that ended it: to be told to end is no failure.
    signal.signal(signal.SIGTERM, lambda *_: None)
    sys.stderr.write(f"Safelight is at {shown(listening)}\n")
    sys.stderr.flush()
    asyncio.run(server.serve(sockets=[listening]))
    if hub.refusal is not None:
        raise hub.refusal
