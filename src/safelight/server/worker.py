"""The worker: a process that holds the model, claims jobs, draws, and commits pictures.

It may be killed at any moment. The next one draws again what it had not committed.
"""

from __future__ import annotations

import time
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from safelight.errors import SafelightError
from safelight.request import Request
from safelight.server.claims import Claim, LostError
from safelight.server.held import Held, bound, full
from safelight.server.holder import Holder
from safelight.server.jobs import ModelInfo, StorageError
from safelight.server.previews import encoded_preview
from safelight.server.pulse import Pulse
from safelight.server.settings import Settings

PREVIEW_EVERY = 0.2
"""Seconds between two previews of a picture."""


class Worker(Holder):
    def __init__(self, pipe: Connection, settings: Settings, pulse: Pulse | None = None) -> None:
        from safelight.engine import Engine
        from safelight.machine import device_memory
        from safelight.weights import load_model

        super().__init__(pipe, settings, pulse or Pulse())
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
        self._spoilt: str | None = None
        self._unsure = False
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

    def _drop(self, job_id: str) -> None:
        self._engine.drop(job_id)

    def _claim(self) -> None:
        while not (self._alone or self._stopping or full(self._held.values())):
            try:
                claim = self._store.claim(
                    self._id,
                    alone=not self._held,
                    # A second makes up for the rows that it takes to run.
                    ageing=self._engine.rows_a_second,
                    cheaper_than=bound(self._held.values()),
                    held={held.claim.owner for held in self._held.values()},
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

    def _begin(self, claim: Claim) -> bool:
        """Take a job in. Returns False if it has to wait, since it cannot be read now."""
        try:
            self._files.remove_pictures(claim.left)
            image, mask = (self._files.input(claim.id, name) for name in ("image", "mask"))
            request = Request.from_dict(claim.settings, image=image, mask=mask, fitted=True)
            result = self._engine.add(request, claim.id, claim.done, claim.owner)
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
            self._end(claim, result.warnings, None)
        return True

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
            self._end(held.claim, held.warnings, None)

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
