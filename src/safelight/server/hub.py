"""The service behind the routes: jobs in the database, drawn by a supervised worker."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from safelight.defaults import model_defaults
from safelight.errors import SafelightError
from safelight.request import Request
from safelight.sampling import SAMPLERS, check
from safelight.server.events import Events
from safelight.server.files import Files
from safelight.server.jobs import (
    Event,
    Job,
    ModelInfo,
    Status,
    StoppingError,
    StorageError,
)
from safelight.server.process import Child, Settings
from safelight.server.store import Store, new_id
from safelight.server.supervisor import Supervisor
from safelight.weights.find import notes_of

log = logging.getLogger("safelight.server")

MAX_STEPS = 4000
"""Steps of all pictures of one request together."""

LOOK_AGAIN = 2.0
"""Seconds after which one who waits looks into the database: messages may be lost."""

T = TypeVar("T")


class Hub:
    """The jobs of a data folder and the worker that draws them; see `jobs.Service`.

    child: the first worker. bound: the most pictures that may wait. on_refusal: called if no
    worker can draw with these settings; `refusal` is then the reason.
    """

    def __init__(self, settings: Settings, child: Child, *, bound: int = 1000) -> None:
        self.settings, self._bound = settings, bound
        self.files = Files(Path(settings.root))
        self.store = Store(settings.url)
        self.store.release()  # what an earlier server left running
        self.files.sweep(*self.store.known_files())
        self.info = ModelInfo(name=settings.model)
        self.on_refusal: Callable[[], None] = lambda: None
        self.supervisor = Supervisor(
            settings,
            child,
            on_message=self._on_message,
            on_end=self._on_worker_end,
            on_refusal=lambda: self.on_refusal(),
            put_back=lambda worker: self.store.release(worker, told_to=self.stopping),
        )
        self._events = Events(self.supervisor.send)
        self._defaults: dict[str, Any] | None = None
        self._loaded = asyncio.Event()
        self._checks: list[asyncio.Future[bool]] = []
        self._database = ThreadPoolExecutor(4, thread_name_prefix="database")

    @property
    def stopping(self) -> bool:
        """Whether the server takes no more jobs."""
        return self.supervisor.stopping

    @property
    def refusal(self) -> SafelightError | None:
        """Why no worker can draw with these settings."""
        return self.supervisor.refusal

    @property
    def restarts(self) -> int:
        """How often the worker was replaced."""
        return self.supervisor.restarts

    # --- the worker ------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin, within the event loop. Requests are accepted while the model is loaded."""
        self._loop = asyncio.get_running_loop()
        self.supervisor.start()

    async def stop(self) -> None:
        """End the worker; what it has not finished waits for the next start."""
        self.drain()
        await self.supervisor.stop()
        with contextlib.suppress(StorageError):  # the next start does it
            await self._in_database(partial(self.store.release, told_to=True))
        self._database.shutdown()
        self.store.close()

    def drain(self) -> None:
        """Take no more jobs, and let go of those who wait."""
        self.supervisor.stopping = True
        self._loaded.set()
        self._events.stop()

    async def check(self, seconds: float = 30.0) -> bool:
        """Return whether the worker takes a real step."""
        if not self.info.ready or self.stopping:
            return False
        future = asyncio.get_running_loop().create_future()
        if not self._checks:  # one step answers all who wait for it
            self.supervisor.send("check")
        self._checks.append(future)
        try:
            return await asyncio.wait_for(future, seconds)
        except TimeoutError:
            return False
        finally:
            if future in self._checks:
                self._checks.remove(future)

    def _on_message(self, kind: str, rest: list[Any]) -> None:
        if kind == "ready":
            self.info = ModelInfo(**rest[0])
            self._loaded.set()
            log.info("ready: %s on %s", self.info.name, self.info.device)
            for job_id in self._events.watched:  # a new worker does not know
                self.supervisor.send("watch", job_id)
        elif kind == "checked":
            self._answer_checks(rest[0])
        else:
            self._events.publish(kind, rest[0], rest[1:])

    def _on_worker_end(self) -> None:
        self.info.ready = False
        self._events.forget_progress()
        self._answer_checks(False)

    def _answer_checks(self, well: bool) -> None:
        for future in self._checks:
            if not future.done():
                future.set_result(well)
        self._checks.clear()

    # --- jobs ------------------------------------------------------------------------------------

    async def submit(
        self, request: Request, *, client: str = "api", idempotency_key: str | None = None
    ) -> Job:
        """See `jobs.Service`."""
        if self.stopping:
            raise StoppingError
        request = request.with_defaults(await self.defaults())
        steps = request.steps or SAMPLERS[request.sampler].steps
        check(SAMPLERS[request.sampler], steps, request.schedule, request.spacing)
        if steps * request.count > MAX_STEPS:
            raise SafelightError(
                f"steps × count must be at most {MAX_STEPS}, not {steps * request.count}",
                field="steps",
            )
        if idempotency_key is not None and not 1 <= len(idempotency_key) <= 255:
            raise SafelightError("Idempotency-Key must have 1 to 255 characters")
        job_id = new_id()
        job, new = await self._in_database(
            self._keep, job_id, request, steps, client, idempotency_key
        )
        if new:
            log.info("job accepted", extra={"job": job.id, "client": client})
            self.supervisor.send("wake")
        return self._events.with_progress(job)

    def _keep(
        self, job_id: str, request: Request, steps: int, client: str, key: str | None
    ) -> tuple[Job, bool]:
        settings = request.to_dict()
        asked = dict(settings)
        if "seed" not in request.model_fields_set:
            asked.pop("seed")  # drawn anew for the same body
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        kept = False
        try:
            for name, image in (("image", request.image), ("mask", request.mask)):
                if image is not None:
                    self.files.keep_input(job_id, name, image)
            job, kept = self.store.submit(
                job_id,
                settings,
                client=client,
                cost=steps * request.count * (2 if request.guidance_scale > 1 else 1),
                bound=self._bound,
                key=key,
                digest=digest,
            )
        finally:
            if not kept:
                self.files.remove(job_id, [])
        return job, kept

    async def get(self, job_id: str) -> Job | None:
        """See `jobs.Service`."""
        job = await self._in_database(self.store.get, job_id)
        return None if job is None else self._events.with_progress(job)

    async def wait(self, job_id: str) -> Job:
        """See `jobs.Service`."""
        async for event in self.events(job_id, previews=False):
            if event.kind == "end":
                return event.job
        raise StoppingError

    async def events(self, job_id: str, *, previews: bool = True) -> AsyncIterator[Event]:
        """See `jobs.Service`. Ends without "end" if the server does."""
        with self._events.listen(job_id, previews=previews) as queue:
            job = await self.get(job_id)
            if job is None:
                raise SafelightError("there is no such job", code="not_found")
            told = {picture.index for picture in job.pictures}
            while not job.status.final:
                try:
                    kind, rest = await asyncio.wait_for(queue.get(), LOOK_AGAIN)
                except TimeoutError:
                    kind, rest = "look", []
                if kind == "stop":
                    return
                job = await self._refreshed(job, kind)
                if kind == "preview":
                    index, preview, noisy, at = rest
                    yield Event(
                        kind=kind, job=job, index=index, preview=preview, noisy=noisy, at=at
                    )
                elif kind == "progress" and not job.status.final:
                    yield Event(kind=kind, job=job)
                for picture in job.pictures:
                    if picture.index not in told:
                        told.add(picture.index)
                        yield Event(kind="picture", job=job, index=picture.index)
            yield Event(kind="end", job=job)

    async def _refreshed(self, job: Job, kind: str) -> Job:
        """Return the job as it stands; for mere progress the database is not asked."""
        if kind in ("progress", "preview") and job.status == Status.RUNNING:
            return self._events.with_progress(job)
        return await self.get(job.id) or job.model_copy(update={"status": Status.CANCELLED})

    async def cancel(self, job_id: str) -> Job | None:
        """See `jobs.Service`."""
        job = await self._in_database(self.store.cancel, job_id)
        if job is not None and job.status == Status.CANCELLED:
            self.supervisor.send("cancel", job_id)
            self._events.publish("end", job_id, [])
        return job

    async def retry(self, job_id: str) -> Job | None:
        """Let a job that failed or was cancelled wait again; return it as it stands."""
        if self.stopping:
            raise StoppingError
        job = await self._in_database(self.store.retry, job_id, self._bound)
        self.supervisor.send("wake")
        return job

    async def delete(self, job_id: str) -> bool:
        """Remove a job and its pictures. One that is not final is cancelled first."""
        await self.cancel(job_id)
        ids = await self._in_database(self.store.delete, job_id)
        if ids is None:
            return False
        await self._in_database(self.files.remove, job_id, ids)
        return True

    async def list(self, **how: Any) -> list[Job]:
        """Return jobs, newest first. how: as `Store.list` takes it."""
        jobs = await self._in_database(partial(self.store.list, **how))
        return [self._events.with_progress(job) for job in jobs]

    async def counts(self) -> dict[str, int]:
        """Return how many jobs there are of each status."""
        return await self._in_database(self.store.counts)

    def picture_file(self, picture_id: str) -> Path | None:
        """See `jobs.Service`."""
        return self.files.picture(picture_id)

    async def job_of(self, picture_id: str) -> Job | None:
        """Return the job that a picture belongs to."""
        return await self._in_database(self.store.job_of, picture_id)

    @property
    def native_size(self) -> tuple[int, int]:
        """The model's own width and height; Stable Diffusion's until it is known."""
        return self.info.width or 512, self.info.height or 512

    async def models(self) -> list[ModelInfo]:
        """See `jobs.Service`."""
        return [self.info]

    async def loaded(self) -> ModelInfo:
        """See `jobs.Service`."""
        await self._loaded.wait()
        if self.stopping:
            raise StoppingError
        return self.info

    async def defaults(self) -> dict[str, Any]:
        """See `jobs.Service`."""
        if self._defaults is None:  # not before somebody asks: it takes a while
            notes = await self._in_database(notes_of, self.settings.model)
            self._defaults = model_defaults(notes)
        return self._defaults

    async def _in_database(self, call: Callable[..., T], *given: Any) -> T:
        """Call in a thread: the database may wait for a lock."""
        try:
            return await self._loop.run_in_executor(self._database, call, *given)
        except OSError as error:
            raise StorageError(f"the data folder does not take it: {error.strerror}") from None
