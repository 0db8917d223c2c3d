"""Pass messages about jobs to listeners. Messages may be lost; the database loses nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from safelight.server.jobs import Job, Progress, Status

MAX_WAITING = 100
"""The most messages kept for a listener that does not read; later ones but the end are dropped."""


class Events:
    """Listeners, previews asked for, and the progress of each running job. For the event loop.

    send: sends a message to the workers: "watch" and "unwatch", as previews are requested or not.
    on_end: called with the id of a job that may have ended.
    """

    def __init__(self, send: Callable[..., None], on_end: Callable[[str], None]) -> None:
        self._send, self._on_end = send, on_end
        self._progress: dict[str, Progress] = {}
        self._listeners: dict[str, set[asyncio.Queue[tuple[str, Any]]]] = {}
        self._watchers: dict[str, int] = {}

    def watch_again(self) -> None:
        """Tell the workers again whose previews are requested: a new worker does not know."""
        for job_id in self._watchers:
            self._send("watch", job_id)

    def publish(self, kind: str, job_id: str, rest: list[Any]) -> None:
        """Pass a worker's message about a job to its listeners."""
        if kind in ("progress", "picture"):
            self._progress[job_id] = Progress(step=rest[0], steps=rest[1])
        if kind == "end":
            self._progress.pop(job_id, None)
            self._on_end(job_id)
        for queue in self._listeners.get(job_id, ()):
            if kind == "end" or queue.qsize() < MAX_WAITING:
                queue.put_nowait((kind, rest))

    @contextmanager
    def listen(self, job_id: str, *, previews: bool) -> Iterator[asyncio.Queue[tuple[str, Any]]]:
        """Yield a queue of what is published about a job from now on."""
        queue: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._listeners.setdefault(job_id, set()).add(queue)
        if previews:
            self._watch(job_id, 1)
        try:
            yield queue
        finally:
            self._listeners[job_id].discard(queue)
            if not self._listeners[job_id]:
                del self._listeners[job_id]
            if previews:
                self._watch(job_id, -1)

    def stop(self) -> None:
        """Tell all listeners that the server ends."""
        for queues in self._listeners.values():
            for queue in queues:
                queue.put_nowait(("stop", []))

    def forget_progress(self) -> None:
        """Forget the progress of all jobs: the worker ended, and they begin anew."""
        self._progress.clear()

    def with_progress(self, job: Job) -> Job:
        """Return the job with its progress, if it runs and a worker has reported any."""
        if job.status.final:  # later reports are of no use
            self._progress.pop(job.id, None)
        progress = self._progress.get(job.id)
        if progress is None or job.status != Status.RUNNING:
            return job
        return job.model_copy(update={"progress": progress})

    def _watch(self, job_id: str, more: int) -> None:
        before = self._watchers.get(job_id, 0)
        self._watchers[job_id] = before + more
        if before + more == 0:
            del self._watchers[job_id]
            self._send("unwatch", job_id)
        elif before == 0:
            self._send("watch", job_id)
