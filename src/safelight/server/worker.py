"""The worker: a process that holds models, claims jobs, draws, and commits pictures.

It may be killed at any moment. The next worker draws again what was not committed.
"""

from __future__ import annotations

import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from safelight.engine.capacity import out_of_memory
from safelight.engine.preview import decodes_previews
from safelight.errors import SafelightError, StorageError
from safelight.request import Request
from safelight.request_pictures import by_setting, inputs_in
from safelight.server.claims import Claim, LostError
from safelight.server.held import FEWEST, JOBS, Held, bound, full
from safelight.server.holder import Holder
from safelight.server.loaded import LoadedModels
from safelight.server.logs import without_words
from safelight.server.previews import encoded_preview
from safelight.server.pulse import Pulse
from safelight.server.settings import WorkerSettings

PREVIEW_EVERY = 0.2
"""Seconds between two previews of a picture."""

LOOK = 0.05
"""While it draws: the most seconds for taking in jobs between two steps, and seconds until the next
look into a queue that had no job to take in."""

LOADING = 0.05
"""Seconds between two checks whether a model was loaded, while nothing is drawn."""

FAULT = "this request met a fault of Safelight; the worker's log says where: try another prompt"
"""The error of a job that none of our checks refuses, and that cannot be begun."""


class Worker(Holder):
    def __init__(
        self, pipe: Connection, settings: WorkerSettings, pulse: Pulse | None = None
    ) -> None:
        super().__init__(pipe, settings, pulse or Pulse())
        self._models = LoadedModels(
            settings, self._pulse, lambda kind, name, info: pipe.send((kind, name, info))
        )
        self._blocked_on: str | None = None
        self._changed: set[str] = set()
        self._spoilt: str | None = None
        self._elsewhere = settings.elsewhere
        self._last_claim_unknown = False
        self._looked = 0.0
        info = self._models.load_first().model_dump()
        pipe.send(("ready", info, self._models.memory))
        self._pulse.loaded()

    def run(self) -> None:
        """Draw until told to stop, or until the files of the server's own model have changed."""
        while not (self._started or self._stopping):  # wait until the server has tidied up
            self._on_messages(1.0)
        threading.Thread(target=self._keep_claims, name="leases", daemon=True).start()
        while not (self._stopping or self._spoilt or self._drained):
            idle = LOADING if self._awaiting_model or self._upscaling.busy else 1.0
            self._on_messages(0 if self._models.busy else idle)
            self._forget_cancelled()
            self._drop_changed()
            self._load()
            if self._to_put_back:
                self._put_back(self._to_put_back)
            else:
                self._claim()
            self._step()
        self._over.set()
        # What cannot be put back here the server puts back, now or at its next start.
        self._put_back(self._to_put_back + self._claims)
        self._models.close()
        self._upscaling.close()
        self._store.close()
        self._spans.close()
        if self._spoilt:
            self._pipe.send(("spoilt", self._spoilt))

    # --- models ----------------------------------------------------------------------------------

    def _check(self) -> bool:
        loaded = self._models.latest
        if loaded is None:  # there is no model to step with yet
            return True
        try:
            return loaded.engine.check()
        except SafelightError as error:
            self._note(loaded.name, error)
            return False

    def _describe(self, name: str) -> tuple[dict[str, Any] | None, str | None]:
        try:
            return self._models.describe(name).model_dump(), None
        except SafelightError as error:
            return None, str(error)

    def _note(self, model: str | None, error: Exception | None) -> None:
        """Remember if a model's files have changed: all of its jobs would fail."""
        if getattr(error, "code", None) != "weights_changed":
            return
        name = self._name(model)
        if name == self._models.default:
            self._spoilt = str(error)
        elif self._models.get(name) is not None:
            self._changed.add(name)

    def _drop_changed(self) -> None:
        """Drop models whose files have changed; their jobs wait until they are loaded again."""
        for name in self._changed:
            for held in [one for one in self._held.values() if one.loaded.name == name]:
                self._drop(held.claim.id)
                del self._held[held.claim.id]
                self._to_put_back.append(held.claim)
                self._alone = False
            self._models.drop(name)
        self._changed.clear()

    def _load(self) -> None:
        """Begin the jobs whose model is loaded now, then begin to load the next model needed."""
        arrived = self._models.arrived()
        if arrived is not None:
            self._begin_awaiting(*arrived)
        if not self._awaiting_model or self._models.loading is not None:
            return
        name, drawing = self._name(self._awaiting_model[0].model), self._drawing
        if self._models.get(name) is not None:
            self._begin_awaiting(name, None)
        elif self._models.room_for(name, drawing):  # LoRAs may have taken the room
            try:
                self._models.begin(name, drawing)
            except SafelightError as error:
                self._begin_awaiting(name, error)

    def _begin_awaiting(self, name: str, error: SafelightError | None) -> None:
        """Begin the jobs that waited for a model, or fail them if it could not be loaded."""
        mine = [claim for claim in self._awaiting_model if self._name(claim.model) == name]
        self._awaiting_model = [claim for claim in self._awaiting_model if claim not in mine]
        for claim in mine:
            if error is not None:
                self._end(claim, [], error)
            else:
                self._begin(claim)

    def _name(self, model: str | None) -> str:
        return model or self._models.default

    @property
    def _in_use(self) -> set[str]:
        """The models of all jobs that are being drawn, or wait for their model."""
        return self._drawing | {self._name(claim.model) for claim in self._awaiting_model}

    @property
    def _drawing(self) -> set[str]:
        """The models that draw, or still decode a picture of a cancelled job."""
        return {held.loaded.name for held in self._held.values()} | {
            loaded.name for loaded in self._models.busy
        }

    # --- jobs ------------------------------------------------------------------------------------

    def _drop(self, job_id: str) -> None:
        if (held := self._held.get(job_id)) is not None:
            held.loaded.engine.drop(job_id)

    def _claim(self) -> None:
        """Take in jobs until none is left to take in, or the next one has to wait."""
        models, began = self._models, time.monotonic()
        if models.busy and not self._woken and began - self._looked < LOOK:
            return
        while not (self._alone or self._stopping or self._draining or self._full):
            if models.busy and time.monotonic() - began > LOOK:
                return
            # If the next job's model has no room, all others wait until it has.
            if self._blocked_on and not models.room_for(self._blocked_on, self._in_use):
                return
            self._blocked_on = None
            claim = self._next()
            if claim is None:
                return
            name = self._name(claim.model)
            if not models.room_for(name, self._in_use):
                self._blocked_on = name
                self._to_put_back.append(claim)
                return
            self._forget(claim.id)  # left from before it was cancelled and retried
            self._spans.claimed(claim)
            self._alone = claim.suspect
            if models.get(name) is None:
                self._awaiting_model.append(claim)
            elif not self._begin(claim):
                return

    @property
    def _full(self) -> bool:
        return full(self._held.values(), self._most) or len(self._awaiting_model) >= self._most

    @property
    def _most(self) -> int:
        """The most jobs taken in at once, not counting shorter jobs and jobs of other owners."""
        latest = self._models.latest
        if not self._elsewhere or latest is None:
            return JOBS
        return min(JOBS, max(FEWEST, latest.engine.rows))

    def _next(self) -> Claim | None:
        """Return the next job; None if there is none, or the database cannot be read now."""
        models, held = self._models, self._held.values()
        try:
            claim = self._in_database(
                self._store.claim,
                self._id,
                alone=not self._claims,
                # A second of waiting makes up for the rows that the network computes in it.
                ageing=models.rows_a_second,
                cheaper_than=bound(held, self._most),
                held={claim.owner for claim in self._claims},
                known=[claim.token for claim in self._claims] if self._last_claim_unknown else None,
                loaded=models.names,
                patience=models.patience,
                models=models.loadable,
            )
        except StorageError as error:  # tried again after the next step, or in a second
            self._last_claim_unknown = True
            self._tell_stuck(error)
            return None
        self._last_claim_unknown = False
        self._tell_stuck(None)
        if claim is None:
            self._looked, self._woken = time.monotonic(), False
        return claim

    def _begin(self, claim: Claim) -> bool:
        """Take in a job. Returns False if it has to wait because it cannot be read now."""
        loaded = self._models.get(self._name(claim.model))
        assert loaded is not None
        self._beginning = True
        try:
            pictures = self._stored(lambda: self._inputs(claim))
            request = Request.from_dict(claim.settings, fitted=True, **by_setting(pictures))
            with self._spans.measured("encode", claim.id):
                result = loaded.engine.add(request, claim.id, claim.done, claim.owner)
        except StorageError as error:
            self._tell_stuck(error)
            self._to_put_back.append(claim)
            self._alone = False
            return False
        except SafelightError as error:
            self._end(claim, [], error)
            return True
        except (MemoryError, OSError, RuntimeError):
            raise  # memory, disk or device is at fault: another worker may be able to
        except Exception as error:  # a fault of ours, which would also end the next worker
            sys.stderr.write(f"a job failed: {without_words(error)}\n")
            self._end(claim, [], SafelightError(FAULT, code="failed"))
            return True
        finally:
            self._beginning = False
        mine = [ticket for ticket in loaded.engine.tickets if ticket.tag == claim.id]
        each = mine[0].steps if mine else 0
        self._held[claim.id] = Held(
            claim,
            request,
            result,
            loaded,
            pictures_left=len(mine),
            steps_total=each * request.count,
            steps_done=each * len(claim.done),
            warnings=list(result.warnings),
            input_bytes=sum(3 * one.width * one.height for one in pictures.values()),
        )
        self._tell("progress", self._held[claim.id])
        if not mine:
            self._end(claim, result.warnings, None)
        return True

    def _inputs(self, claim: Claim) -> dict[str, Any]:
        """Return a job's pictures, by the names that they are stored under.

        Pictures of it that another worker wrote without a row are removed first.
        """
        if claim.left:
            self._files.remove_pictures(claim.left)
        names = inputs_in(claim.settings)
        return {name: self._files.input(claim.id, name) for name in names}

    # --- drawing ---------------------------------------------------------------------------------

    def _step(self) -> None:
        """Let the model whose turn it is take a step, and collect finished pictures."""
        first = self._models.turn()
        for loaded in self._models.busy:
            began = time.monotonic()
            if loaded is first:
                moved = loaded.engine.step()
                loaded.used = time.monotonic()
                loaded.step_seconds += loaded.used - began
            elif not loaded.engine.tickets:  # it only decodes, beside the steps of others
                moved = loaded.engine.step() if first is None else loaded.engine.step(listen=0)
            else:
                continue
            self._see(*moved, seconds=time.monotonic() - began)

    def _see(self, stepped: list[Any], finished: list[Any], *, seconds: float) -> None:
        """Report steps that took `seconds`, and store the pictures that are finished."""
        moved: dict[str, Held] = {}
        for ticket in stepped:
            self._spans.stepped(ticket.tag, ticket.index, seconds)
            held = self._held[ticket.tag]
            held.steps_done += 1
            moved[ticket.tag] = held
            if ticket.tag in self._watched:
                self._preview(held, ticket)
        for held in moved.values():
            self._tell("progress", held)
        for ticket in finished:
            self._spans.decoded(ticket.tag, ticket.index)
            # The error of another picture may have ended its job.
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
            self._drop(held.claim.id)
            self._end(held.claim, held.warnings, error)
            return
        held.pictures_left -= 1
        self._tell("picture", held)
        if not held.pictures_left:
            self._end(held.claim, held.warnings, None)

    def _again(self, held: Held, seed: int, error: Exception) -> tuple[Any, Exception | None]:
        """Draw a picture once more, in float32, because it came out as NaN."""
        precision = held.loaded.model.precision
        if precision == "float32":
            return None, error
        try:
            precise = self._models.precise(held.loaded)
            made = precise.generate(held.request.replace(seed=seed, count=1))
        except SafelightError as problem:
            return None, error if problem.code == "out_of_memory" else problem
        except (MemoryError, RuntimeError) as problem:  # raised by loading
            if not out_of_memory(problem):
                raise
            return None, error
        held.warnings.append(f"seed {seed} gave NaN in {precision} and was drawn in float32")
        return made.images[0], None

    def _preview(self, held: Held, ticket: Any) -> None:
        now = time.monotonic()
        if now - held.previewed < PREVIEW_EVERY or ticket.job.done:
            return
        if decodes_previews(held.loaded.model) and held.loaded.engine.decoding:
            return  # both would pack layers of the same autoencoder
        held.previewed = now
        job, model, ended = ticket.job, held.loaded.model, time.time()
        try:
            both = job.clean, job.view
            shown = [encoded_preview(model, latents, job.size) for latents in both]
        except (SafelightError, MemoryError, RuntimeError):
            return  # NaN, or out of memory: the end shows whether there is a picture
        self._pipe.send(("preview", held.claim.id, ticket.index, *shown, ended))
