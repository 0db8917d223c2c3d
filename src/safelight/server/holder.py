"""The jobs that a worker holds: leases are renewed; each is committed, finished or put back."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from safelight.errors import StorageError
from safelight.fast import memory
from safelight.server.claims import LEASE, Claim, LostError
from safelight.server.files import Files
from safelight.server.held import Held
from safelight.server.jobs import Picture
from safelight.server.pulse import Pulse
from safelight.server.settings import WorkerSettings
from safelight.server.store import Store, new_id
from safelight.server.tracing import JobSpans
from safelight.server.upscaling import Upscaling

T = TypeVar("T")

BEAT = 0.25
"""Seconds between two signs of life while the worker waits for another machine."""


class Holder:
    """What a worker does with its jobs besides drawing them; `Worker` adds the drawing.

    Its jobs are those in the making (`_held`), those that wait until their model is loaded
    (`_awaiting_model`), and the one that is being taken in (`_beginning`). Claimed jobs that must
    wait in the database again are in `_to_put_back`.
    """

    def __init__(self, pipe: Connection, settings: WorkerSettings, pulse: Pulse) -> None:
        self._pipe, self._pulse = pipe, pulse
        self._id = new_id()
        pipe.send(("worker", self._id))
        self._store, self._files = Store(settings.url), Files(settings.place)
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="storage")
        self._held: dict[str, Held] = {}
        self._alone = False
        self._watched: set[str] = set()
        self._cancelled: set[str] = set()
        self._awaiting_model: list[Claim] = []
        self._beginning = False
        self._to_put_back: list[Claim] = []
        self._stuck: str | None = None
        self._spans = JobSpans(self._id)
        self._started = self._stopping = self._draining = self._woken = False
        self._over = threading.Event()
        self._upscaling = Upscaling(settings, pulse)

    # --- what a Worker has -----------------------------------------------------------------------

    def _check(self) -> bool:
        """Return whether a step can be taken."""
        raise NotImplementedError

    def _describe(self, name: str) -> tuple[dict[str, Any] | None, str | None]:
        """Return the facts of a model, or why there are none."""
        raise NotImplementedError

    def _note(self, model: str | None, error: Exception | None) -> None:
        """Handle the error that a job of a model ended with."""
        raise NotImplementedError

    def _drop(self, job_id: str) -> None:
        """Stop drawing a job."""
        raise NotImplementedError

    # --- messages --------------------------------------------------------------------------------

    def _on_messages(self, seconds: float) -> None:
        """Act on the server's messages; wait up to `seconds` for the first."""
        self._pulse.count()
        while self._pipe.poll(seconds):
            seconds = 0
            kind, *rest = self._pipe.recv()
            if kind == "cancel":
                self._cancelled.add(rest[0])
            elif kind == "watch":
                self._watched.add(rest[0])
            elif kind == "unwatch":
                self._watched.discard(rest[0])
            elif kind == "check":
                self._pipe.send(("checked", self._check()))
            elif kind == "describe":
                self._pipe.send(("described", rest[0], *self._describe(rest[0])))
            elif kind == "start":
                self._started = True
            elif kind == "wake":
                self._woken = True
            elif kind == "drain":
                self._draining = True
            elif kind in ("upscale", "stop upscaling"):
                self._upscaling.on_message(kind, rest)
            elif kind == "stop":
                self._stopping = True
        for answer in self._upscaling.answers():
            self._pipe.send(answer)
        self._pulse.count()

    def _tell(self, kind: str, held: Held) -> None:
        self._pipe.send((kind, held.claim.id, held.steps_done, held.steps_total))

    def _tell_stuck(self, error: Exception | None) -> None:
        """Tell the server that the storage cannot be read or written, or that it can again."""
        told = None if error is None else str(error)
        if told != self._stuck:
            self._stuck = told
            self._pipe.send(("stuck", told))

    # --- the jobs --------------------------------------------------------------------------------

    def _forget_cancelled(self) -> None:
        """Drop jobs that were cancelled. A job that was then retried is claimed anew."""
        for job_id in list(self._cancelled):
            mine = [claim for claim in self._claims if claim.id == job_id]
            try:
                if mine and not self._in_database(self._store.holds, job_id, mine[0].token):
                    self._forget(job_id)
            except StorageError:  # asked again after the next step
                return
            self._cancelled.discard(job_id)

    @property
    def _claims(self) -> list[Claim]:
        """The claims of all its jobs: those being drawn, and those that wait for a model."""
        return [*(held.claim for held in self._held.values()), *self._awaiting_model]

    @property
    def _drained(self) -> bool:
        """Whether the worker was told to take no more jobs, and has none left."""
        return self._draining and not (self._claims or self._to_put_back)

    def _forget(self, job_id: str) -> None:
        if any(claim.id == job_id for claim in self._claims):
            self._drop(job_id)
            self._held.pop(job_id, None)
            self._awaiting_model = [claim for claim in self._awaiting_model if claim.id != job_id]
            self._alone = False
            self._spans.ended(job_id, "lost")
            self._pipe.send(("end", job_id, None))

    def _put_back(self, claims: list[Claim]) -> None:
        """Let claimed jobs wait again. Those that cannot be put back now are tried again later."""
        for claim in list(claims):
            try:
                self._in_database(self._store.put_back, claim.id, claim.token)
            except StorageError:
                return
            claims.remove(claim)
            self._spans.ended(claim.id, "put_back")

    def _keep_claims(self) -> None:
        """Renew the leases of the jobs until the worker ends. Runs in a thread.

        A step may take longer than a lease lasts. If the worker hangs, its leases run out.
        """
        while not self._over.wait(LEASE / 4):
            if (self._held or self._awaiting_model or self._beginning) and self._pulse.well:
                with contextlib.suppress(StorageError):
                    self._store.renew(self._id)

    def _patiently(self, claim: Claim, call: Callable[[], T]) -> T:
        """Return the result of a call that reads or writes; repeat it until it succeeds.

        Jobs wait meanwhile. Raises LostError if the job is cancelled or the worker is told to stop.
        """
        while True:
            try:
                found = call()
            except StorageError as error:
                self._tell_stuck(error)
            else:
                self._tell_stuck(None)
                return found
            self._on_messages(1.0)
            self._forget_cancelled()
            self._pulse.count()
            if self._stopping or claim.id not in self._held:
                raise LostError(claim.id)

    def _stored(self, call: Callable[[], T]) -> T:
        """Return the result of a call that reads or writes files."""
        return call() if self._files.local else self._awaited(call)

    def _in_database(self, call: Callable[..., T], *given: Any, **how: Any) -> T:
        """Return the result of a call that asks the database."""
        call = partial(call, *given, **how)
        return self._awaited(call) if self._store.shared else call()

    def _awaited(self, call: Callable[[], T]) -> T:
        """Return the result of a call that waits for another machine.

        That may take longer than a worker may be silent, so signs of life go on.
        """
        coming = self._threads.submit(call)
        while not wait([coming], BEAT).done:
            self._pulse.count()
        return coming.result()

    def _commit(self, held: Held, image: Any, index: int, seed: int, dtype: str) -> None:
        """Write the file first, then the row: every row has its file.

        dtype: the precision that this picture was drawn in.
        """
        from safelight.recipe import png_texts

        made = replace(
            held.result, images=[image], seeds=[seed], warnings=held.warnings, dtype=dtype
        )
        recipe = made.recipe(0)
        claim = held.claim
        picture = Picture(
            id=claim.picture_id(index),
            index=index,
            seed=seed,
            width=image.width,
            height=image.height,
            recipe=recipe,
        )
        texts = png_texts(recipe)
        try:
            with self._spans.measured("save", claim.id, index):
                self._patiently(
                    claim, lambda: self._stored(lambda: self._files.keep(image, picture.id, texts))
                )
                add = partial(self._store.add_picture, claim.id, claim.token, picture)
                self._patiently(claim, lambda: self._in_database(add))
        except LostError:
            # If the database went away midway, it may have the row all the same.
            with contextlib.suppress(StorageError, OSError):
                if not self._in_database(self._store.has_picture, picture.id):
                    self._stored(lambda: self._files.remove_pictures([picture.id]))
            raise

    def _end(self, claim: Claim, warnings: list[str], error: Exception | None) -> None:
        """Make a job final. error: why it failed, None if it succeeded."""
        self._note(claim.model, error)
        with contextlib.suppress(LostError):  # cancelled meanwhile
            self._finish(claim, warnings, None if error is None else str(error))
        held = self._held.pop(claim.id, None)
        if held is not None and held.input_bytes:
            del held
            memory.give_back()  # else the process keeps the memory of large pictures
        self._alone = False
        self._spans.ended(claim.id, None if error is None else getattr(error, "code", "failed"))
        self._pipe.send(("end", claim.id, getattr(error, "code", None)))

    def _finish(self, claim: Claim, warnings: list[str], error: str | None) -> None:
        while True:
            try:
                how = {"warnings": warnings, "error": error}
                self._in_database(self._store.finish, claim.id, claim.token, **how)
                self._tell_stuck(None)
                return
            except StorageError as problem:  # no other job could be stored either: wait
                self._tell_stuck(problem)
                if self._stopping:
                    return
                self._on_messages(1.0)
