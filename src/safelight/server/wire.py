"""Messages between a server and the workers of a fleet, by PostgreSQL's LISTEN and NOTIFY.

Messages may be lost: jobs and pictures are in the database, and waiting callers look there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from safelight.errors import first_line
from safelight.server.database import CONNECTING, open_engine

log = logging.getLogger("safelight.server")

TO_SERVER, TO_WORKERS = "safelight_server", "safelight_workers"
"""The names of the two channels."""

PIECE = 7000
"""The most bytes of a piece. PostgreSQL's limit is 8,000; longer messages are cut to pieces."""

MOST = 1 << 20
"""The most bytes of a message. None of ours is longer."""

SLOWLY = 0.25
"""Seconds between two times that progress and previews are sent. Other messages go at once."""

SLOW = ("progress", "preview")


class Wire:
    """One end of the connection. url: in SQLAlchemy's form. hears, tells: the channels.

    on_message(kind, rest) and on_open() are called in a thread: for a message of the other end, and
    each time the connection is made anew, before which messages may have been lost.
    """

    def __init__(
        self,
        url: str,
        *,
        hears: str,
        tells: str,
        on_message: Callable[[str, list[Any]], None],
        on_open: Callable[[], None] = lambda: None,
    ) -> None:
        engine = open_engine(url)
        self._url = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
        self._hears, self._tells = hears, tells
        self._on_message, self._on_open = on_message, on_open
        self._pieces = _Pieces()
        self._name, self._sent = secrets.token_hex(4), 0
        self._lock = threading.Lock()
        self._outbox: dict[Any, tuple[Any, ...]] = {}
        self._urgent = self._open = self._closed = False
        self._bell, self._button = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="wire", daemon=True)

    def start(self) -> None:
        """Connect, and reconnect until closed."""
        self._thread.start()

    def send(self, *message: Any) -> None:
        """Send a message soon; it is lost if the database is away.

        Of several messages of one slow kind about one job, only the last is sent.
        """
        kind = message[0]
        slow = kind in SLOW
        with self._lock:
            if not self._open:
                return
            key = message[:2] if slow or kind == "wake" else len(self._outbox)
            self._outbox.pop(key, None)
            self._outbox[key] = message
            self._urgent |= not slow
        if not slow:
            self._ring()

    def close(self) -> None:
        """Send the messages that are left, and end."""
        self._closed = True
        self._ring()
        if self._thread.is_alive():
            self._thread.join(2.0)
        self._bell.close()
        self._button.close()

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # closed
            self._button.send(b".")

    def _run(self) -> None:
        import psycopg

        told = None
        while not self._closed:
            try:
                with psycopg.connect(self._url, autocommit=True, **CONNECTING) as connection:
                    connection.execute(f"LISTEN {self._hears}".encode())
                    self._open, told = True, None
                    self._on_open()
                    self._exchange(connection)
            except (psycopg.Error, OSError) as error:
                why = first_line(error)
                if why != told:
                    log.warning("news of the fleet do not come: %s", why)
                told = why
            with self._lock:
                self._open = False
                self._outbox.clear()
            if not self._closed:
                time.sleep(1)

    def _exchange(self, connection: Any) -> None:
        last = 0.0
        with selectors.DefaultSelector() as selector:
            selector.register(connection.fileno(), selectors.EVENT_READ)
            selector.register(self._bell, selectors.EVENT_READ)
            while True:
                closing = self._closed
                for key, _ in selector.select(0 if closing else SLOWLY):
                    if key.fileobj is self._bell:
                        self._bell.recv(4096)
                for found in connection.notifies(timeout=0):
                    self._heard(found.payload)
                now = time.monotonic()
                if self._urgent or closing or now - last >= SLOWLY:
                    last = now
                    self._flush(connection)
                if closing:
                    return

    def _flush(self, connection: Any) -> None:
        with self._lock:
            messages, self._outbox = list(self._outbox.values()), {}
            self._urgent = False
        payloads = [piece for message in messages for piece in self._cut(message)]
        if payloads:
            told = "SELECT pg_notify(%s, piece) FROM unnest(%s::text[]) AS piece"
            connection.execute(told, (self._tells, payloads))

    def _cut(self, message: tuple[Any, ...]) -> list[str]:
        text = json.dumps(message)
        if len(text) > MOST:
            return []
        self._sent += 1
        cut = [text[at : at + PIECE] for at in range(0, len(text), PIECE)]
        head = f"{self._name}.{self._sent}"
        return [f"{head} {i} {len(cut)} {piece}" for i, piece in enumerate(cut)]

    def _heard(self, payload: str) -> None:
        text = self._pieces.whole(payload)
        if text is not None:
            kind, *rest = json.loads(text)
            self._on_message(kind, rest)


class _Pieces:
    """Joins pieces to messages. The pieces of one message come in order, with none in between."""

    def __init__(self) -> None:
        self._head = ""
        self._got: list[str] = []

    def whole(self, payload: str) -> str | None:
        """Return a message with its last piece, and None for earlier pieces."""
        head, number, count, piece = payload.split(" ", 3)
        if int(number) == 0:
            self._head, self._got = head, []
        if head != self._head or len(self._got) != int(number):
            return None  # the connection was made in the middle of a message
        self._got.append(piece)
        return "".join(self._got) if len(self._got) == int(count) else None
