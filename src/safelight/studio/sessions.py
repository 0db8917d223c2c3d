"""Limits of the page's sessions and events: by owner, by client, and in all.

Gradio identifies a session by a name that its page made up, keeps the messages of the last 2,000
sessions, and has one queue of events for all clients.
"""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from typing import Any

from safelight.server.bodies import RefusedError
from safelight.server.callers import caller_of

MAX_SESSIONS = 200
"""The most sessions of one owner; the owner's oldest one is dropped first."""

MAX_KNOWN = 1900
"""The most sessions in all: fewer than Gradio keeps, so that Gradio never drops one itself."""

MAX_EVENTS = 16
"""The most events of one client, waiting or running; all clients together may run MAX_RUNNING."""

MAX_RUNNING = 256

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Sessions:
    """Checks sessions and events. queue: Gradio's queue of events."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue
        self._owners: OrderedDict[str, str] = OrderedDict()

    def check(self, session: Any, owner: str) -> None:
        """Raise RefusedError if a session is another owner's; drop the oldest ones beyond the
        limits.

        owner: `Caller.owner`, so that a page with a key may change its address.
        """
        if not isinstance(session, str) or not _NAME.fullmatch(session):
            raise RefusedError(422, "session_hash must be up to 64 letters and digits")
        if self._owners.setdefault(session, owner) != owner:
            raise RefusedError(403, "this session is another client's")
        self._owners.move_to_end(session)
        while (oldest := self._one_too_many(owner)) is not None:
            del self._owners[oldest]
            self._queue.pending_messages_per_session.pop(oldest, None)
            self._queue.pending_event_ids_session.pop(oldest, None)

    def check_event(self, client: str) -> None:
        """Raise RefusedError if the client (`Caller.name`) has as many events as it may."""
        lists = [*self._queue.active_jobs, *self._waiting()]
        events = [event for one in lists if one for event in one]
        if sum(caller_of(event.request.scope).name == client for event in events) >= MAX_EVENTS:
            raise RefusedError(503, f"at most {MAX_EVENTS} events at once for one client")

    def _waiting(self) -> list[list[Any]]:
        return [one.queue for one in self._queue.event_queue_per_concurrency_id.values()]

    def _one_too_many(self, owner: str) -> str | None:
        if sum(name == owner for name in self._owners.values()) > MAX_SESSIONS:
            return next(one for one, name in self._owners.items() if name == owner)
        if len(self._owners) > MAX_KNOWN:  # drop one of the owner with the most sessions
            most = Counter(self._owners.values()).most_common(1)[0][0]
            return next(one for one, name in self._owners.items() if name == most)
        return None
