"""The service behind the routes: jobs in the database, drawn by a supervised worker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Container
from functools import partial
from pathlib import Path
from typing import Any

from safelight.defaults import defaults_of, with_level
from safelight.errors import SafelightError, StorageError
from safelight.request import Request
from safelight.server import tracing
from safelight.server.catalogue import Catalogue
from safelight.server.costs import cost, pixel_steps, steps_of
from safelight.server.enlargements import Enlargements
from safelight.server.events import Events
from safelight.server.files import Files
from safelight.server.fleet import Elsewhere, Fleet
from safelight.server.intake import accept
from safelight.server.jobs import Event, Job, ModelInfo, Status, StoppingError
from safelight.server.keyring import Keyring
from safelight.server.names import Names
from safelight.server.on_ray import OnRay
from safelight.server.process import Child
from safelight.server.recovery import put_back, recover
from safelight.server.retention import clear
from safelight.server.scaling import WorkerPlan
from safelight.server.settings import WorkerSettings
from safelight.server.steps import Steps
from safelight.server.store import Store, new_id
from safelight.server.supervisor import Supervisor
from safelight.server.threads import Threads
from safelight.server.webhooks import Webhooks
from safelight.weights.plan import Plan

log = logging.getLogger("safelight.server")

LOOK_AGAIN = 2.0
"""Seconds after which a waiting call looks into the database, since messages may be lost."""

STEP = 30.0
"""Seconds within which the worker should end a step; see `Hub.trouble`."""


class Hub:
    """The jobs of a data folder and the workers that draw them: what the routes ask.

    In its methods, owner is who asks, by the name of a key or a client: jobs of other owners are
    treated as missing; None may see and do all.

    child: the server's first worker, or the plan of its workers on Ray; None leaves all jobs to
    workers elsewhere. bound: the most pictures that may wait. on_refusal: called if no worker can
    draw with these settings, or another server has the database; then `refusal` is the reason.
    files: those of the jobs, in the data folder or elsewhere. root: the data folder.
    """

    def __init__(
        self, settings: WorkerSettings, child: Child | WorkerPlan | None, *, bound: int = 1000
    ) -> None:
        self.settings, self._bound = settings, bound
        self.files, self.root = Files(settings.place), Path(settings.root)
        self._threads = Threads(local=self.files.local)
        self._in_database = self._threads.in_database
        self.store = Store(settings.url)
        recover(self.files, self.store)
        self.keys = Keyring(self.store.all_keys)
        self.names = Names(settings)
        self.on_refusal: Callable[[], None] = lambda: None
        self.webhooks = Webhooks(self.store)
        self._events = Events(self._send, self.webhooks.ended)
        self.fleet = Fleet(
            *(self.store, settings.url),
            on_message=lambda kind, rest: self._on_message(kind, rest, fleet=True),
            on_change=self._on_fleet,
            on_lost=lambda: self.on_refusal(),
        )
        self.supervisor = self._supervise(child)
        own = isinstance(self.supervisor, Supervisor)
        self.catalogue = Catalogue(settings, self._send, self._in_database, own_worker=own)
        self.enlargements = Enlargements(self.root, self.supervisor)
        self._steps = Steps()
        self._stuck: str | None = None

    @property
    def stopping(self) -> bool:
        """Whether the server takes no more jobs."""
        return self.supervisor.stopping

    @property
    def refusal(self) -> SafelightError | None:
        """Why no worker can draw with these settings, or with this database."""
        return self.supervisor.refusal or self.fleet.refusal

    @property
    def restarts(self) -> int:
        """How often the worker was replaced."""
        return self.supervisor.restarts

    @property
    def alive(self) -> bool:
        """Whether a worker is kept running; False once none could be started."""
        return self.supervisor.alive or self.stopping

    @property
    def ready(self) -> bool:
        """Whether the worker draws, as far as is known without asking."""
        return self.catalogue.info.ready and self.supervisor.trouble is None and self._stuck is None

    # --- the worker ------------------------------------------------------------------------------

    def _supervise(self, child: Child | WorkerPlan | None) -> Supervisor | Elsewhere:
        if isinstance(child, WorkerPlan):
            return OnRay(self.settings, child, self.fleet, self._put_back)
        if child is None:
            return Elsewhere(self.fleet)
        how: dict[str, Any] = {"on_message": self._on_message, "on_end": self._on_worker_end}
        how |= {"on_refusal": lambda: self.on_refusal(), "put_back": self._put_back}
        return Supervisor(self.settings, child, **how)

    def start(self) -> None:
        """Begin, within the event loop. Requests are accepted while the model is loading."""
        self.supervisor.start()
        self.fleet.start()
        self.webhooks.start()

    async def stop(self) -> None:
        """End the worker; its unfinished jobs wait for the next start."""
        self.drain()
        await self.supervisor.stop()
        await self.fleet.stop()
        await self.webhooks.stop()
        with contextlib.suppress(StorageError):  # the next start does it
            if self.refusal is None:  # else they may be another server's
                await self._in_database(partial(self.store.release, told_to=True))
        self._threads.close()
        self.store.close()

    def drain(self) -> None:
        """Take no more jobs, and release all calls that wait."""
        self.supervisor.stopping = True
        self.catalogue.stop()
        self._events.stop()

    async def trouble(self) -> str | None:
        """Return what keeps jobs from being taken or drawn right now, None if nothing does.

        The worker takes a real step for this, unless one ends by itself within STEP seconds.
        """
        if self.stopping:
            return "the server is stopping"
        found = self.fleet.trouble or self.supervisor.trouble or self._stuck
        if found is None:
            try:
                await self._threads.with_files(self.files.make_sure)
                await self._in_database(self.store.counts)
            except StorageError as error:
                return str(error)
            if isinstance(self.supervisor, Supervisor):  # the fleet's workers report it themselves
                well = await self._steps.taken(lambda: self.supervisor.send("check"), STEP)
                if well is None:  # in a longer step, or hung: the pulse tells which
                    return self.supervisor.trouble
                found = None if well else "the worker could not take a step"
        return found

    def _on_message(self, kind: str, rest: list[Any], *, fleet: bool = False) -> None:
        if self.catalogue.on_message(kind, rest):
            if kind == "ready":
                self._events.watch_again()
        elif kind == "checked":
            self._steps.answer(rest[0])
        elif kind == "stuck":
            self._stuck = rest[0]
        elif kind == "upscaled":
            self.enlargements.answer(*rest)
        else:
            if kind == "progress" and rest[1] and not fleet:
                self._steps.answer(True)
            self._events.publish(kind, rest[0], rest[1:])

    def _send(self, *message: Any) -> None:
        self.supervisor.send(*message)
        self.fleet.send(*message)

    def _on_fleet(self) -> None:
        """Take over the fleet's models as the server's own, if it draws nothing itself."""
        self._events.watch_again()
        if isinstance(self.supervisor, Elsewhere):
            self.catalogue.on_fleet(self.fleet.workers)

    def _on_worker_end(self) -> None:
        self.catalogue.on_worker_end()
        self._stuck = None
        self._events.forget_progress()
        self._steps.answer(False)

    def _put_back(self, worker: str, killed: bool) -> None:
        put_back(self.files, self.store, worker, killed=killed, stopping=self.stopping)

    # --- jobs ------------------------------------------------------------------------------------

    async def submit(
        self,
        request: Request,
        *,
        client: str = "api",
        idempotency_key: str | None = None,
        owner: str | None = None,
        model: str | None = None,
        webhook: str | None = None,
    ) -> Job:
        """Return the job once it is durable; for a known idempotency key, the owner's earlier job.

        model: what `find_model` takes. webhook: a URL that is told when the job ends.

        Raises BusyError when the queue is full.
        """
        if self.stopping:
            raise StoppingError
        name, asked = await self.find_model(model), request.model_fields_set
        plan = await self.plan(name)
        if plan is not None:
            request = with_level(request, plan.family, plan.notes)
        request = request.with_defaults(self._defaults(plan))
        steps = steps_of(request, plan)
        if idempotency_key is not None and not 1 <= len(idempotency_key) <= 255:
            raise SafelightError("Idempotency-Key must have 1 to 255 characters")
        await asyncio.to_thread(self.names.check, request, name)
        request = await asyncio.to_thread(request.fitted)  # only what is drawn from is kept
        sized = request.sized_by is not None or (request.width and request.height)
        if plan is None and not sized and "pixel_steps" in self.keys.limits(owner):
            await self.facts(name)  # without them it would count as 512 × 512 pixels
        native = self.catalogue.size(name) if plan is None else plan.native_size
        # Large pictures take a while to write, and must not hold up jobs without pictures.
        submitting = self._threads.with_inputs if request.pictures else self._in_database
        job, new = await submitting(
            partial(
                accept,
                *(self.files, self.store, new_id(), request, asked),
                known=plan is not None,
                client=client,
                cost=cost(request, steps, native, plan),
                bound=self._bound,
                key=idempotency_key,
                named=model and name,
                owner=owner,
                model=name,
                webhook=webhook,
                pixel_steps=pixel_steps(request, steps, native, plan),
                trace=tracing.here(),
            )
        )
        await self.keys.spent(owner)
        if new:
            log.info("job accepted", extra={"job": job.id, "client": client})
            self._send("wake")
        return self._events.with_progress(job)

    async def get(self, job_id: str, *, owner: str | None = None) -> Job | None:
        """Return a job as it stands, None if there is none."""
        job = await self._in_database(self.store.get, job_id, owner)
        return None if job is None else self._events.with_progress(job)

    async def wait(self, job_id: str) -> Job:
        """Return the job when its status is final."""
        async for event in self.events(job_id, previews=False):
            if event.kind == "end":
                return event.job
        raise StoppingError

    async def events(self, job_id: str, *, previews: bool = True) -> AsyncIterator[Event]:
        """Yield what happens to a job, up to its event "end"; stops before if the server ends."""
        with self._events.listen(job_id, previews=previews) as queue:
            job = await self.get(job_id)
            if job is None:
                raise SafelightError("there is no such job", code="not_found")
            told = {picture.index for picture in job.pictures}
            while not job.status.final:
                try:
                    async with asyncio.timeout(LOOK_AGAIN):
                        kind, rest = await queue.get()
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
        """Return the job as it stands. For mere progress the database is not read."""
        if kind in ("progress", "preview") and job.status == Status.RUNNING:
            return self._events.with_progress(job)
        try:
            found = await self.get(job.id)
        except StorageError:  # the caller looks again later
            return job
        return found or job.model_copy(update={"status": Status.CANCELLED})

    async def cancel(self, job_id: str, *, owner: str | None = None) -> Job | None:
        """Cancel a job; return it. One that runs ends within one step."""
        job = await self._in_database(self.store.cancel, job_id, owner)
        if job is not None and job.status == Status.CANCELLED:
            self._send("cancel", job_id)
            self._events.publish("end", job_id, [])
        return job

    async def retry(self, job_id: str, *, owner: str | None = None) -> Job | None:
        """Let a job that failed or was cancelled wait again; return it as it stands."""
        if self.stopping:
            raise StoppingError
        job = await self._in_database(self.store.retry, job_id, self._bound, owner)
        self._send("wake")
        return job

    async def delete(self, job_id: str, *, owner: str | None = None) -> bool:
        """Remove a job and its pictures. One that is not final is cancelled first."""
        await self._threads.with_files(self.files.make_sure)  # else its files would stay
        await self.cancel(job_id, owner=owner)
        if not await self._in_database(self.store.delete, job_id, owner):
            return False
        await self._threads.with_files(clear, self.files, self.store, [job_id])
        return True

    async def list(self, **how: Any) -> tuple[list[Job], bool]:
        """Return jobs, newest first, and whether there may be more; see `Store.list`."""
        jobs, more = await self._in_database(partial(self.store.list, **how))
        return [self._events.with_progress(job) for job in jobs], more

    async def counts(self) -> dict[str, dict[str, int]]:
        """Return how many jobs there are of each status, by model."""
        return await self._in_database(self.store.counts_by_model)

    def picture_bytes(self, picture_id: str) -> bytes | None:
        """Return the PNG of a finished picture, with its recipe. To be called in a thread."""
        return self.files.picture_bytes(picture_id)

    async def job_of(self, picture_id: str, *, owner: str | None = None) -> Job | None:
        """Return the job that a picture belongs to."""
        return await self._in_database(self.store.job_of, picture_id, owner)

    # --- models ----------------------------------------------------------------------------------

    async def models(self) -> list[ModelInfo]:
        """Return the models that are served, the server's own first; see `ModelInfo`."""
        return await self.catalogue.all()

    async def find_model(self, asked: str | None, hidden: Container[str] = ()) -> str:
        """Return the name of the served model that a request means; None means the server's own.

        Raises SafelightError with the code "no_model". hidden: names that it leaves out.
        """
        return await self.catalogue.find(asked, hidden)

    async def chosen(self, owner: str | None) -> str | None:
        """Return an owner's model for requests that name none; None if it chose none."""
        return await self._in_database(self.store.chosen, owner or "")

    async def choose(self, model: str, owner: str | None) -> None:
        """Store an owner's choice of a model, by its name."""
        await self._in_database(self.store.choose, owner or "", model)

    async def facts(self, model: str | None = None) -> ModelInfo:
        """Return the facts of a model by its name, once its size is known; None is the default."""
        return await self.catalogue.facts(model)

    async def native_size(self, model: str | None = None) -> tuple[int, int]:
        """Return the width and height that a model draws best, from its headers or a worker."""
        if (plan := await self.plan(model)) is not None:
            return plan.native_size
        await self.facts(model)
        return self.catalogue.size(model or self.catalogue.info.name)

    async def defaults(self, model: str | None = None) -> dict[str, Any]:
        """Return a model's best settings (`defaults_of`); none of its own if it is not here."""
        return self._defaults(await self.plan(model))

    async def plan(self, model: str | None = None) -> Plan | None:
        """Return what a model is by its headers; None if it is not on this machine."""
        try:
            return await asyncio.to_thread(self.names.plan, model or self.catalogue.info.name)
        except (OSError, SafelightError):
            return None

    def _defaults(self, plan: Plan | None) -> dict[str, Any]:
        found = {} if plan is None else defaults_of(plan.family, plan.notes)
        return found | ({"dynamic_prompts": True} if self.names.has_wildcards else {})
