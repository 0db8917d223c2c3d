"""Delete the oldest finished jobs beyond what is kept, and never a job that waits or is drawn.

Deletion has two steps, each of which survives the end of the process at any point: a job is marked,
and after a grace period its files and then its rows are deleted. A mark is taken away if the job
is retried, or is within the limits again, as after a start with wider limits.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from safelight.errors import AwayError, SafelightError, StorageError
from safelight.server.expiry import BATCH
from safelight.server.files import Files
from safelight.server.keep import Keep
from safelight.server.store import Store

log = logging.getLogger("safelight.server")

GRACE = 3600.0
"""Seconds from the mark of a job to its deletion: somebody may be looking at it, and a person who
starts a server may have meant another limit.
"""

PAUSE = 300.0
"""Seconds between two looks at what is beyond the limits."""

SLOW_PAUSE = 3600.0
"""The same for a limit of size with a storage elsewhere: each thousand names take a request."""


PATIENCE = 5.0
"""The most seconds that the end of the server waits for a look, such as one at a large bucket."""


@dataclass
class Freed:
    """What was deleted."""

    jobs: int = 0
    pictures: int = 0
    size: int = 0

    def __iadd__(self, other: Freed) -> Freed:
        self.jobs += other.jobs
        self.pictures += other.pictures
        self.size += other.size
        return self


class Retention:
    """Keeps to the limits while a server serves, in a thread of its own.

    freed: what was deleted since the start. marked: number of jobs marked for deletion. size: bytes
    of all files of jobs at the last count; None if they were never counted.
    """

    def __init__(self, files: Files, store: Store, keep: Keep) -> None:
        self._files, self._store, self._keep = files, store, keep
        self.freed = Freed()
        self.marked = 0
        self.size: int | None = None
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin. Without limits it looks once, and removes the marks of an earlier start."""
        self._thread = threading.Thread(target=self._run, name="retention", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the current batch, or with the process if that takes longer than PATIENCE."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(PATIENCE)

    def look(self) -> None:
        """Delete what was marked long enough ago, and mark what is beyond the limits.

        Raises StorageError.
        """
        self._files.make_sure()
        now = self._store.now()
        horizon = self._horizon(now)
        try:
            if spared := self._store.spare(horizon):
                log.info("%d jobs are within --keep again, and stay", spared)
            self._store.expire(now)
        finally:  # a full disk may have taken only some of it, and deleting these makes room
            freed = self._clear()
            self.freed += freed
            if freed.jobs:
                log.info(
                    "deleted %d jobs beyond --keep: %d pictures, %.1f MB",
                    *(freed.jobs, freed.pictures, freed.size / 1e6),
                )
        # Last, since a full disk may have room for it only now.
        if marked := self._store.mark(horizon, now + GRACE):
            log.info(
                "%d jobs are beyond --keep, and are deleted in %d minutes",
                *(marked, math.ceil(GRACE / 60)),
            )
        self.marked = self._store.marked()

    def _clear(self) -> Freed:
        freed = Freed()
        while not self._stopped.is_set():
            part = clear(self._files, self._store)
            freed += part
            if part.jobs < BATCH:  # no more jobs, or the disk refuses the rest now
                break
        return freed

    def _horizon(self, now: float) -> float:
        """Return a time: jobs that ended before it are beyond the limits.

        Jobs that ended at the same moment as one that stays stay as well.
        """
        keep, horizon = self._keep, -math.inf
        if keep.seconds is not None:
            horizon = now - keep.seconds
        if keep.jobs is not None:
            horizon = max(horizon, self._store.newest_finished(keep.jobs) or -math.inf)
        if keep.size is not None:
            self.size = self._files.total_size()
            horizon = max(horizon, self._until_small_enough(self.size - keep.size))
        return horizon

    def _until_small_enough(self, excess: int) -> float:
        """Return the end time of the oldest job that may stay if `excess` bytes have to go."""
        if excess <= 0:
            return -math.inf
        last = -math.inf
        for finished, job_id, drawn in self._store.oldest_finished():
            if excess <= 0:
                return finished
            excess -= self._files.size_of(job_id, drawn)
            last = finished
        return math.nextafter(last, math.inf)

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self.look()
                if not self._keep:
                    return
            except SafelightError as error:
                log.warning("--keep waits: %s", error)
            except Exception:  # the next look may succeed
                log.exception("--keep failed")
            slow = self._keep.size is not None and not self._files.local
            self._stopped.wait(SLOW_PAUSE if slow else PAUSE)


def clear(files: Files, store: Store, job_ids: Sequence[str] | None = None) -> Freed:
    """Delete files and rows of at most BATCH jobs that are being deleted; return how much was
    freed.

    job_ids: consider only these. A job whose files cannot be deleted keeps its rows, so that the
    next call tries again. Raises StorageError.
    """
    freed, done = Freed(), []
    files.make_sure()  # delete no rows while the disk is away
    for job_id, drawn in store.gone(job_ids).items():
        try:
            size = files.size_of(job_id, drawn)
            files.remove_inputs(job_id)
            files.remove_pictures(drawn)
        except StorageError as error:
            log.warning("files of a deleted job cannot be removed yet: %s", error)
            if isinstance(error, AwayError):  # the other files are away as well
                break
            continue
        done.append(job_id)
        freed += Freed(1, len(drawn), size)
    store.forget(done)
    return freed
