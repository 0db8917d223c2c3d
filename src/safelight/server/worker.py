"""The worker: a process that holds the model, claims jobs, draws, and commits pictures.

It may be killed at any moment. The next one draws again what it had not committed.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import signal
import time
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from safelight.errors import SafelightError
from safelight.request import Request
from safelight.result import Result
from safelight.server.files import Files
from safelight.server.jobs import ModelInfo, Picture, StorageError
from safelight.server.settings import Settings
from safelight.server.store import LEASE, Claim, LostError, Store, new_id

PICTURES = 48
"""The most pictures in the making at once; beyond it jobs wait in the database."""

PREVIEW_EVERY = 0.2
"""Seconds between two previews of a picture."""

PREVIEW_LATENTS = 24
"""Longest side of the latents that a preview is decoded from: larger ones are averaged down."""


@dataclass
class _Held:
    """A claimed job. result: what its pictures' recipes are made of; left: pictures to come;
    taken, total: steps of all its pictures.
    """

    claim: Claim
    request: Request
    result: Result
    left: int
    total: int
    taken: int
    warnings: list[str] = field(default_factory=list)
    previewed: float = 0.0


def main(pipe: Connection, settings: Settings) -> None:
    """Draw until told to stop, or until the server is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server tells when to end
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code = 0
    try:
        worker = _new_worker(pipe, settings)
        if worker is None:
            code = 2
        else:
            worker.run()
    except (EOFError, BrokenPipeError, ConnectionError):
        pass  # the server is gone
    os._exit(code)


def _new_worker(pipe: Connection, settings: Settings) -> Worker | None:
    """Return a worker; None if none could draw with these settings, which ends the server."""
    try:
        return Worker(pipe, settings)
    except StorageError:
        raise  # another one may have more luck
    except SafelightError as error:
        pipe.send(("refused", str(error), error.code))
        return None


class Worker:
    def __init__(self, pipe: Connection, settings: Settings) -> None:
        from safelight.engine import Engine
        from safelight.weights import load_model

        self._pipe, self._settings = pipe, settings
        self._id = new_id()
        pipe.send(("worker", self._id))
        self._load = lambda **how: load_model(
            settings.model, device=settings.device, low_memory=settings.low_memory, **how
        )
        self._model = self._load(dtype=settings.dtype)
        self._precise: Any = None
        self._engine = Engine(
            self._model, exact=settings.exact, rows=settings.rows, background=True
        )
        self._store, self._files = Store(settings.url), Files(Path(settings.root))
        self._held: dict[str, _Held] = {}
        self._alone = False
        self._watched: set[str] = set()
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
            device=str(self._model.device),
            dtype=self._model.precision,
            ready=True,
        )
        pipe.send(("ready", info.model_dump()))

    def run(self) -> None:
        while not (self._started or self._stopping):  # until the server has tidied up
            self._on_messages(None)
        while not self._stopping:
            self._on_messages(0 if self._engine.busy else 1.0)
            self._claim()
            if self._engine.busy:
                self._step()
            self._renew()
        with contextlib.suppress(StorageError):  # the server does it, now or when it starts again
            for held in self._held.values():
                self._store.put_back(held.claim.id, held.claim.token)
        self._store.close()

    def _on_messages(self, seconds: float | None) -> None:
        """Act on the server's messages; wait for the first so long, or for ever for None."""
        while self._pipe.poll(seconds):
            seconds = 0
            kind, *rest = self._pipe.recv()
            if kind == "cancel":
                self._forget(rest[0])
            elif kind == "watch":
                self._watched.add(rest[0])
            elif kind == "unwatch":
                self._watched.discard(rest[0])
            elif kind == "check":
                self._pipe.send(("checked", self._engine.check()))
            elif kind == "start":
                self._started = True
            elif kind == "stop":
                self._stopping = True

    def _claim(self) -> None:
        while not (self._alone or self._stopping):
            if sum(held.left for held in self._held.values()) >= PICTURES:
                return
            # A second makes up for the rows that it takes to run.
            try:
                claim = self._store.claim(
                    self._id, alone=not self._held, ageing=self._engine.rows_a_second
                )
            except StorageError:  # tried again after the next step, or in a second
                return
            if claim is None:
                return
            self._alone = claim.suspect
            self._begin(claim)

    def _begin(self, claim: Claim) -> None:
        try:
            request = Request.from_dict(
                claim.settings,
                image=self._files.input(claim.id, "image"),
                mask=self._files.input(claim.id, "mask"),
            )
            result = self._engine.add(request, claim.id, claim.done)
        except SafelightError as error:
            self._end(claim, [], error)
            return
        mine = [ticket for ticket in self._engine.tickets if ticket.tag == claim.id]
        each = mine[0].steps if mine else 0
        self._held[claim.id] = _Held(
            claim,
            request,
            result,
            left=len(mine),
            total=each * request.count,
            taken=each * len(claim.done),
            warnings=list(result.warnings),
        )
        self._tell("progress", self._held[claim.id])
        if not mine:
            self._complete(self._held[claim.id])

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

    def _picture(self, held: _Held, ticket: Any) -> None:
        image, error, dtype = ticket.image, ticket.error, ticket.dtype
        if getattr(error, "code", None) == "not_finite":
            image, error = self._again(held, ticket.seed, error)
            dtype = "float32"
        if error is None:
            try:
                self._commit(held, image, ticket.index, ticket.seed, dtype)
            except StorageError as problem:
                error = problem
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

    def _again(self, held: _Held, seed: int, error: Exception) -> tuple[Any, Exception | None]:
        """Draw a picture that came out as NaN once more, in float32."""
        from safelight.engine.capacity import out_of_memory

        if self._model.precision == "float32":
            return None, error
        try:
            if self._precise is None:
                self._precise = self._load(dtype="float32")
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

    def _commit(self, held: _Held, image: Any, index: int, seed: int, dtype: str) -> None:
        """Write the file first, then the row: what has a row has a file.

        dtype: the precision that this picture was drawn in.
        """
        from safelight.recipe import png_texts

        made = replace(
            held.result, images=[image], seeds=[seed], warnings=held.warnings, dtype=dtype
        )
        recipe = made.recipe(0)
        picture = Picture(
            id=new_id(),
            index=index,
            seed=seed,
            width=image.width,
            height=image.height,
            recipe=recipe,
        )
        self._files.keep(image, picture.id, png_texts(recipe))
        try:
            self._store.add_picture(held.claim.id, held.claim.token, picture)
        except (LostError, StorageError):
            # A database that went away in the middle may have it nevertheless.
            with contextlib.suppress(StorageError):
                if not self._store.has_picture(picture.id):
                    self._files.remove(held.claim.id, [picture.id])
            raise

    def _complete(self, held: _Held) -> None:
        self._end(held.claim, held.warnings, None)

    def _end(self, claim: Claim, warnings: list[str], error: Exception | None) -> None:
        with contextlib.suppress(LostError):  # cancelled meanwhile
            self._finish(claim, warnings, None if error is None else str(error))
        self._held.pop(claim.id, None)
        self._alone = False
        self._pipe.send(("end", claim.id, getattr(error, "code", None)))

    def _finish(self, claim: Claim, warnings: list[str], error: str | None) -> None:
        while True:
            try:
                self._store.finish(claim.id, claim.token, warnings=warnings, error=error)
                return
            except StorageError:  # nothing else could be kept either: wait for space
                if self._stopping:
                    return
                self._on_messages(1.0)

    def _forget(self, job_id: str) -> None:
        if self._held.pop(job_id, None) is not None:
            self._engine.drop(job_id)
            self._alone = False
            self._pipe.send(("end", job_id, None))

    def _preview(self, held: _Held, ticket: Any) -> None:
        now = time.monotonic()
        if now - held.previewed < PREVIEW_EVERY or ticket.job.done:
            return
        held.previewed = now
        job, ended = ticket.job, time.time()
        try:
            shown = [_encoded(preview(self._model, latents)) for latents in (job.clean, job.view)]
        except (SafelightError, MemoryError, RuntimeError):
            return  # NaN, or too large: whether there is a picture is seen in the end
        self._pipe.send(("preview", held.claim.id, ticket.index, *shown, ended))

    def _tell(self, kind: str, held: _Held) -> None:
        self._pipe.send((kind, held.claim.id, held.taken, held.total))

    def _renew(self) -> None:
        if self._held and time.monotonic() - self._renewed > LEASE / 4:
            with contextlib.suppress(StorageError):
                self._store.renew(self._id)
            self._renewed = time.monotonic()


def _encoded(image: Any) -> str:
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)
    return base64.b64encode(out.getvalue()).decode()


def preview(model: Any, latents: Any) -> Any:
    """Return latents as a small picture; large ones are averaged down first."""
    import torch
    import torch.nn.functional as F

    from safelight.engine.job import decode

    with torch.inference_mode():
        largest = max(latents.shape[-2:])
        if model.vae is not None and largest > PREVIEW_LATENTS:
            latents = F.avg_pool2d(latents, -(-largest // PREVIEW_LATENTS), ceil_mode=True)
        return decode(model, latents)
