"""Run uvicorn, with limits of our own."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

import uvicorn

from safelight.server import tracing
from safelight.server.app import PageOf, application
from safelight.server.callers import Network
from safelight.server.connections import (
    ACCEPTED,
    H11WithTimeouts,
    on_exception,
    raise_open_files,
)
from safelight.server.guard import Rules
from safelight.server.hub import Hub
from safelight.server.keep import Keep
from safelight.server.listening import BACKLOG, everywhere, link, shown
from safelight.server.logs import log_to_stderr
from safelight.server.process import Child
from safelight.server.retention import Retention
from safelight.server.scaling import WorkerPlan
from safelight.server.settings import WorkerSettings
from safelight.server.threads import end_in_time

log = logging.getLogger("safelight.server")


class Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, hub: Hub) -> None:
        super().__init__(config)
        self._hub = hub

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(on_exception)
        await super().startup(sockets)
        for listening in sockets or ():
            listening.listen(BACKLOG)  # asyncio has set its own backlog, ACCEPTED

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        end_in_time(0 if self._hub.refusal is None else 1)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._hub.drain()
        super().handle_exit(sig, frame)


def return_large_blocks() -> None:
    """Make glibc return the memory of pictures to the system as soon as they are freed.

    After a block of up to 32 MB was freed, glibc keeps later blocks of that size for reuse;
    Pillow's blocks have 16 MB.
    """
    threshold = -3  # M_MMAP_THRESHOLD of <malloc.h>
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc here
        ctypes.CDLL(None).mallopt(threshold, 1 << 20)


def serve(
    settings: WorkerSettings,
    child: Child | WorkerPlan | None,
    listening: socket.socket,
    *,
    host: str,
    token: str | None,
    auto: bool = False,
    hosts: frozenset[str] = frozenset(),
    origins: frozenset[str] = frozenset(),
    proxies: Sequence[Network] = (),
    short_addresses: bool = False,
    webhooks_to_private: bool = False,
    bound: int = 1000,
    keep: Keep | None = None,
    page: PageOf | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C. child: as for `Hub`. page: as for `application`.

    Raises SafelightError if the server or the model cannot start.
    """
    log_to_stderr()
    return_large_blocks()
    tracing.start("safelight")
    hub = Hub(settings, child, bound=bound)
    hub.webhooks.private = webhooks_to_private
    retention = Retention(hub.files, hub.store, keep or Keep())
    names = hosts | ({host.lower().rstrip(".")} if not everywhere(host) else frozenset())
    rules = Rules(token, names, hub.keys, proxies, short_addresses, origins)
    if token is None and hub.keys.names:
        log.warning("everyone needs a key here, and without a token nobody sees all jobs")
    raise_open_files()
    config = uvicorn.Config(
        application(hub, rules, page=page, retention=retention),
        http=H11WithTimeouts,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=64 << 10,
        proxy_headers=False,  # the guard reads them, from trusted proxies only
        backlog=ACCEPTED,
    )
    server = Server(config, hub)

    def end() -> None:
        server.should_exit = True

    hub.on_refusal = end
    # uvicorn raises the signal that ended it again: ending on request is no failure.
    signal.signal(signal.SIGTERM, lambda *_: None)
    sys.stderr.write(f"Safelight is at {shown(listening)}\n")
    if auto:  # made for this run: only whoever started it sees this line
        sys.stderr.write(f"Open {link(listening, token)}\n")
    sys.stderr.flush()
    asyncio.run(server.serve(sockets=[listening]))
    tracing.stop()
    if hub.refusal is not None:
        raise hub.refusal
