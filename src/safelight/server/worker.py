"""The worker: a process that holds the model, claims jobs, draws, and commits pictures.

It may be killed at any moment. The next one draws again what it had not committed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from safelight.errors import SafelightError
from safelight.fast import memory
from safelight.request import Request
from safelight.server.claims import LEASE, Claim, LostError
from safelight.server.files import Files
from safelight.server.held import Held
from safelight.server.jobs import ModelInfo, Picture, StorageError
from safelight.server.previews import encoded_preview
from safelight.server.pulse import Pulse
from safelight.server.settings import Settings
from safelight.server.store import Store, new_id

T = TypeVar("T")

JOBS = 48
INPUTS = 1 << 30
"""The most jobs in the making at once, and bytes of pictures that they start from. Beyond it only
jobs that are shorter than all of those are taken in; others wait in the database.
"""

PREVIEW_EVERY = 0.2
"""Seconds between two previews of a picture."""


class Worker:
    def __init__(self, pipe: Connection, settings: Settings, pulse: Pulse | None = None) -> None:
        from safelight.engine import Engine
        from safelight.machine import device_memory
        from safelight.weights import load_model

        self._pipe, self._settings = pipe, settings
        self._pulse = pulse or Pulse()
        self._id = new_id()
        pipe.send(("worker", self._id))
        self._load = partial(load_model, settings.model, **settings.loading)
        self._model = self._load(dtype=settings.dtype)
        self._precise: Any = None
        self._engine = Engine(
            self._model,
            exact=settings.exact,
            rows=settings.rows,
            background=True,
            working=self._pulse.working,
        )
        self._store, self._files = Store(settings.url), Files(Path(settings.root))
        self._held: dict[str, Held] = {}
        self._alone = False
        self._watched: set[str] = set()
        self._cancelled: set[str] = set()
        self._unclaimed: list[Claim] = []
        self._stuck: str | None = None
        self._spoilt: str | None = None
        self._unsure = False
        self._started = self._stopping = False
        self._renewed = time.monotonic()
        width, height = self._model.native_size
        info = ModelInfo(
            name=self._model.name,
            sha256=self._model.sha256,
            kind=self._model.kind,
            uses_prompt=self._model.family.uses_prompt,
            family=self._model.family.name,
            width=width,
            height=height,
            vae=(self._model.other_vae or {}).get("name"),
            device=str(self._model.device),
            dtype=self._model.precision,
            ready=True,
        )
        pipe.send(("ready", info.model_dump(), device_memory(self._model.device)))
        self._pulse.loaded(self._model)

    def run(self) -> None:
        """Draw until told to stop, or until the weights are not those that were loaded."""
        while not (self._started or self._stopping):  # until the server has tidied up
            self._on_messages(1.0)
        while not (self._stopping or self._spoilt):
            self._on_messages(0 if self._engine.busy else 1.0)
            self._forget_cancelled()
            if self._unclaimed:
                self._put_back(self._unclaimed)
            else:
                self._claim()
            if self._engine.busy:
                self._step()
            self._renew()
        # What cannot be put back the server does, now or when it starts again.
        self._put_back(self._unclaimed + [held.claim for held in self._held.values()])
        self._store.close()
        if self._spoilt:
            self._pipe.send(("spoilt", self._spoilt))

    def _on_messages(self, seconds: float) -> None:
        """Act on the server's messages; wait for the first so long."""
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
            elif kind == "start":
                self._started = True
            elif kind == "stop":
                self._stopping = True
        self._pulse.count()

    def _check(self) -> bool:
        try:
            return self._engine.check()
        except SafelightError as error:
            self._note(error)
            return False

    def _note(self, error: Exception | None) -> None:
        """Remember an error that no other job would be spared by this worker."""
        if getattr(error, "code", None) == "weights_changed":
            self._spoilt = str(error)

    def _forget_cancelled(self) -> None:
        """Drop the jobs that were cancelled. One that was also retried is claimed anew."""
        for job_id in list(self._cancelled):
            held = self._held.get(job_id)
            try:
                if held is not None and not self._store.holds(job_id, held.claim.token):
                    self._forget(job_id)
            except StorageError:  # asked again after the next step
                return
            self._cancelled.discard(job_id)

    def _claim(self) -> None:
        while not (self._alone or self._stopping):
            try:
                claim = self._store.claim(
                    self._id,
                    alone=not self._held,
                    # A second makes up for the rows that it takes to run.
                    ageing=self._engine.rows_a_second,
                    cheaper_than=self._bound(),
                    known=[held.claim.token for held in self._held.values()]
                    if self._unsure
                    else None,
                )
                self._unsure = False
            except StorageError as error:  # tried again after the next step, or in a second
                self._unsure = True
                self._tell_stuck(error)
                return
            self._tell_stuck(None)
            if claim is None:
                return
            self._forget(claim.id)  # of before it was cancelled and retried
            self._alone = claim.suspect
            if not self._begin(claim):
                return

    def _bound(self) -> float | None:
        """Return the cost that a job must stay below to be taken in as well; None for any.

        A worker with its hands full takes shorter jobs than those it has.
        """
        many = len(self._held) >= JOBS
        large = sum(held.input_bytes for held in self._held.values()) >= INPUTS
        if not (many or large):
            return None
        return min(held.claim.cost * held.left / held.request.count for held in self._held.values())

    def _tell_stuck(self, error: Exception | None) -> None:
        """Tell the server that nothing can be kept or read, or that it can again."""
        told = None if error is None else str(error)
        if told != self._stuck:
            self._stuck = told
            self._pipe.send(("stuck", told))

    def _patiently(self, claim: Claim, call: Callable[[], T]) -> T:
        """Return what a call returns that reads or writes, once it can: jobs wait meanwhile.

        Raises LostError if the job is cancelled or the worker told to stop before.
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
            self._renew()
            self._forget_cancelled()
            self._pulse.count()
            if self._stopping or claim.id not in self._held:
                raise LostError(claim.id)

    def _begin(self, claim: Claim) -> bool:
        """Take a job in. Returns False if it has to wait, since it cannot be read now."""
        try:
            self._files.remove_pictures(claim.left)
            image, mask = (self._files.input(claim.id, name) for name in ("image", "mask"))
            request = Request.from_dict(claim.settings, image=image, mask=mask)
            result = self._engine.add(request, claim.id, claim.done)
        except StorageError as error:
            self._tell_stuck(error)
            self._unclaimed.append(claim)
            return False
        except SafelightError as error:
            self._end(claim, [], error)
            return True
        mine = [ticket for ticket in self._engine.tickets if ticket.tag == claim.id]
        each = mine[0].steps if mine else 0
        given = [picture for picture in (image, mask) if picture is not None]
        self._held[claim.id] = Held(
            claim,
            request,
            result,
            left=len(mine),
            total=each * request.count,
            taken=each * len(claim.done),
            warnings=list(result.warnings),
            input_bytes=sum(3 * picture.width * picture.height for picture in given),
        )
        self._tell("progress", self._held[claim.id])
        if not mine:
            self._complete(self._held[claim.id])
        return True

    def _put_back(self, claims: list[Claim]) -> None:
        """Let claimed jobs wait again; those that cannot yet are tried again."""
        for claim in list(claims):
            try:
                self._store.put_back(claim.id, claim.token)
            except StorageError:
                return
            claims.remove(claim)

    def _step(self) -> None:
        stepped, finished = self._engine.step()
        moved = {}
        for ticket in stepped:
            held = self._held[ticket.tag]
            held.taken += 1
            moved[ticket.tag] = held
            if ticket.tag in self._watched:
                self._preview(held, ticket)
        for held in moved.values():
            self._tell("progress", held)
        for ticket in finished:
            # Its job may have ended by another picture's error.
            if ticket.tag in self._held:
                self._picture(self._held[ticket.tag], ticket)

    def _picture(self, held: Held, ticket: Any) -> None:
        image, error, dtype = ticket.image, ticket.error, ticket.dtype
        if getattr(error, "code", None) == "not_finite":
            image, error = self._again(held, ticket.seed, error)
            dtype = "float32"
        if error is None:
            try:
                self._commit(held, image, ticket.index, ticket.seed, dtype)
            except LostError:
                self._forget(held.claim.id)
                return
        if error is not None:
            self._engine.drop(held.claim.id)
            self._end(held.claim, held.warnings, error)
            return
        held.left -= 1
        self._tell("picture", held)
        if not held.left:
            self._complete(held)

    def _again(self, held: Held, seed: int, error: Exception) -> tuple[Any, Exception | None]:
        """Draw a picture that came out as NaN once more, in float32."""
        from safelight.engine.capacity import out_of_memory

        if self._model.precision == "float32":
            return None, error
        try:
            if self._precise is None:
                with self._pulse.patient():
                    self._precise = self._load(dtype="float32")
                self._pulse.watch(self._precise)
            made = self._precise.generate(held.request.replace(seed=seed, count=1))
        except SafelightError as problem:
            return None, error if problem.code == "out_of_memory" else problem
        except (MemoryError, RuntimeError) as problem:  # of loading
            if not out_of_memory(problem):
                raise
            return None, error
        held.warnings.append(
            f"seed {seed} gave NaN in {self._model.precision} and was drawn in float32"
        )
        return made.images[0], None

    def _commit(self, held: Held, image: Any, index: int, seed: int, dtype: str) -> None:
        """Write the file first, then the row: what has a row has a file.

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
            self._patiently(claim, lambda: self._files.keep(image, picture.id, texts))
            self._patiently(claim, lambda: self._store.add_picture(claim.id, claim.token, picture))
        except LostError:
            # A database that went away in the middle may have it nevertheless.
            with contextlib.suppress(StorageError, OSError):
                if not self._store.has_picture(picture.id):
                    self._files.remove_pictures([picture.id])
            raise

    def _complete(self, held: Held) -> None:
        self._end(held.claim, held.warnings, None)

    def _end(self, claim: Claim, warnings: list[str], error: Exception | None) -> None:
        self._note(error)
        with contextlib.suppress(LostError):  # cancelled meanwhile
            self._finish(claim, warnings, None if error is None else str(error))
        held = self._held.pop(claim.id, None)
        if held is not None and held.input_bytes:
            del held
            memory.give_back()  # else the process keeps what large pictures took
        self._alone = False
        self._pipe.send(("end", claim.id, getattr(error, "code", None)))

    def _finish(self, claim: Claim, warnings: list[str], error: str | None) -> None:
        while True:
            try:
                self._store.finish(claim.id, claim.token, warnings=warnings, error=error)
                self._tell_stuck(None)
                return
            except StorageError as problem:  # nothing else could be kept either: wait
                self._tell_stuck(problem)
                if self._stopping:
                    return
                self._on_messages(1.0)
                self._renew()

    def _forget(self, job_id: str) -> None:
        if self._held.pop(job_id, None) is not None:
            self._engine.drop(job_id)
            self._alone = False
            self._pipe.send(("end", job_id, None))

    def _preview(self, held: Held, ticket: Any) -> None:
        now = time.monotonic()
        if now - held.previewed < PREVIEW_EVERY or ticket.job.done:
            return
        held.previewed = now
        job, ended = ticket.job, time.time()
        try:
            shown = [encoded_preview(self._model, latents) for latents in (job.clean, job.view)]
        except (SafelightError, MemoryError, RuntimeError):
            return  # NaN, or too large: whether there is a picture is seen in the end
        self._pipe.send(("preview", held.claim.id, ticket.index, *shown, ended))

    def _tell(self, kind: str, held: Held) -> None:
        self._pipe.send((kind, held.claim.id, held.taken, held.total))

    def _renew(self) -> None:
        if self._held and time.monotonic() - self._renewed > LEASE / 4:
            with contextlib.suppress(StorageError):
                self._store.renew(self._id)
            self._renewed = time.monotonic()
            self._pulse.count()
