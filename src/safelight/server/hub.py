"""The service behind the routes: jobs in the database, a worker that is watched, and who waits."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from safelight.errors import SafelightError
from safelight.request import Request, taught
from safelight.sampling import SAMPLERS, check
from safelight.server.files import Files
from safelight.server.jobs import (
    Event,
    Job,
    ModelInfo,
    Progress,
    Status,
    StoppingError,
    StorageError,
)
from safelight.server.process import Child, Settings, spawn
from safelight.server.store import Store, new_id
from safelight.weights.find import notes_of

log = logging.getLogger("safelight.server")

MOST_STEPS = 4000
"""Of all pictures of one request together."""

GRACE = 10.0
"""Seconds that the worker has to end, when told to."""

LOOK_AGAIN = 2.0
"""Seconds after which one who waits looks into the database: messages may be lost."""

T = TypeVar("T")


class Hub:
    """See jobs.Service. child: the first worker; bound: most pictures that may wait."""

    def __init__(self, settings: Settings, child: Child, *, bound: int = 1000) -> None:
        self.settings, self._child, self._bound = settings, child, bound
        self.files = Files(Path(settings.root))
        self.store = Store(settings.url)
        self.store.release()  # what an earlier server left running
        self.files.sweep(*self.store.known_files())
        self.info = ModelInfo(name=settings.model)
        self._taught: dict[str, Any] | None = None
        self.refusal: str | None = None
        self.restarts = 0
        self.stopping = False
        self.on_refusal: Callable[[], None] = lambda: None
        self._progress: dict[str, Progress] = {}
        self._listeners: dict[str, set[asyncio.Queue[tuple[str, Any]]]] = {}
        self._watchers: dict[str, int] = {}
        self._checks: list[asyncio.Future[bool]] = []
        self._unsaid: SimpleQueue[Any] = SimpleQueue()
        self._database = ThreadPoolExecutor(4, thread_name_prefix="database")

    # --- the worker ------------------------------------------------------------------------------

    def start(self) -> None:
        """Within the event loop; the worker loads its model while requests are accepted."""
        self._loop = asyncio.get_running_loop()
        self._keeper = threading.Thread(target=self._keep_worker, name="worker", daemon=True)
        self._keeper.start()
        threading.Thread(target=self._speak, name="to the worker", daemon=True).start()

    def _keep_worker(self) -> None:
        """Listen to the worker, and start another when it ends."""
        pause = 0.0
        while True:
            began = time.monotonic()
            child = self._child
            self._say("start")
            name = self._listen(child.pipe)
            child.process.join()
            self.info.ready = False
            if name is not None:
                self._release(name)
            self._loop.call_soon_threadsafe(self._forget_worker)
            if self.refusal is not None:
                self._loop.call_soon_threadsafe(self.on_refusal)
                return
            if not self.stopping:
                log.warning("the worker ended (%s): starting it again", child.process.exitcode)
                # One that dies at once is given more and more time.
                pause = 0.0 if time.monotonic() - began > 10 else min(pause * 2 + 0.2, 5.0)
                time.sleep(pause)
            if self.stopping:
                return
            self._child = self._another()
            self.restarts += 1

    def _release(self, worker: str) -> None:
        """Put its jobs back, as soon as the database takes that."""
        while True:
            try:
                self.store.release(worker, told_to=self.stopping)
                return
            except StorageError as error:
                log.warning("%s", error)
                if self.stopping:  # the next start does it
                    return
                time.sleep(1)

    def _another(self) -> Child:
        while True:
            try:
                return spawn(self.settings)
            except OSError as error:  # no memory for a process, say
                log.warning("a worker cannot be started: %s", error.strerror)
                time.sleep(1)

    def _listen(self, pipe: Any) -> str | None:
        """Pass on what the worker says until it ends; returns its name."""
        name = None
        while True:
            try:
                kind, *rest = pipe.recv()
            except (EOFError, OSError):
                return name
            if kind == "worker":
                name = rest[0]
            elif kind == "refused":
                self.refusal = rest[0]
            else:
                self._loop.call_soon_threadsafe(self._hear, kind, rest)

    def _hear(self, kind: str, rest: list[Any]) -> None:
        if kind == "ready":
            self.info = ModelInfo(**rest[0])
            log.info("ready: %s on %s", self.info.name, self.info.device)
            for job_id in self._watchers:  # by whom, it does not know
                self._say("watch", job_id)
            return
        if kind == "checked":
            for future in self._checks:
                if not future.done():
                    future.set_result(rest[0])
            self._checks.clear()
            return
        job_id = rest[0]
        if kind in ("progress", "picture"):
            self._progress[job_id] = Progress(step=rest[1], steps=rest[2])
        if kind == "end":
            self._progress.pop(job_id, None)
        for queue in self._listeners.get(job_id, ()):
            if kind == "end" or queue.qsize() < 100:  # one who does not read misses progress only
                queue.put_nowait((kind, rest[1:]))

    def _say(self, *message: Any) -> None:
        self._unsaid.put(message)

    def _speak(self) -> None:
        """In a thread: the pipe holds a few hundred messages, and a step may take minutes."""
        while True:
            message = self._unsaid.get()
            # A worker that is not there asks the database when it comes.
            with contextlib.suppress(OSError, ValueError):
                self._child.pipe.send(message)

    def _forget_worker(self) -> None:
        self._progress.clear()
        for future in self._checks:
            if not future.done():
                future.set_result(False)
        self._checks.clear()

    async def stop(self) -> None:
        """Let the worker put back what it has not finished, and end."""
        self.drain()
        while self._keeper.is_alive():  # it may have begun another worker just before
            self._say("stop")
            process = self._child.process
            await asyncio.to_thread(process.join, GRACE)
            if process.is_alive():
                process.kill()
            await asyncio.to_thread(self._keeper.join, GRACE)
        with contextlib.suppress(StorageError):  # the next start does it
            await self._in_database(partial(self.store.release, told_to=True))
        self._database.shutdown()
        self.store.close()

    def drain(self) -> None:
        """Take no more jobs, and let go of those who wait."""
        self.stopping = True
        for queues in self._listeners.values():
            for queue in queues:
                queue.put_nowait(("stop", []))

    async def check(self, seconds: float = 30.0) -> bool:
        """Whether the worker takes a real step."""
        if not self.info.ready or self.stopping:
            return False
        future = asyncio.get_running_loop().create_future()
        if not self._checks:  # one step answers all who wait for it
            self._say("check")
        self._checks.append(future)
        try:
            return await asyncio.wait_for(future, seconds)
        except TimeoutError:
            return False
        finally:
            if future in self._checks:
                self._checks.remove(future)

    # --- jobs ------------------------------------------------------------------------------------

    async def submit(
        self, request: Request, *, client: str = "api", idempotency_key: str | None = None
    ) -> Job:
        if self.stopping:
            raise StoppingError
        request = request.where_silent(await self.taught())
        sampler = SAMPLERS[request.sampler]
        steps = request.steps or sampler.steps
        check(sampler, steps, request.schedule, request.spacing)
        if steps * request.count > MOST_STEPS:
            raise SafelightError(
                f"steps × count must be at most {MOST_STEPS}, not {steps * request.count}"
            )
        if idempotency_key is not None and not 1 <= len(idempotency_key) <= 255:
            raise SafelightError("Idempotency-Key must have 1 to 255 characters")
        job_id = new_id()
        job, new = await self._in_database(
            self._keep, job_id, request, steps, client, idempotency_key
        )
        if new:
            log.info("job accepted", extra={"job": job.id, "client": client})
            self._say("wake")
        return self._with_progress(job)

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
        job = await self._in_database(self.store.get, job_id)
        return None if job is None else self._with_progress(job)

    async def wait(self, job_id: str) -> Job:
        async for event in self.events(job_id, previews=False):
            if event.kind == "end":
                return event.job
        raise StoppingError

    async def events(self, job_id: str, *, previews: bool = True) -> AsyncIterator[Event]:
        """Ends without "end" if the server does."""
        queue: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._listeners.setdefault(job_id, set()).add(queue)
        if previews:
            self._watch(job_id, 1)
        try:
            job = await self.get(job_id)
            if job is None:
                raise SafelightError("there is no such job")
            while not job.status.final:
                try:
                    kind, rest = await asyncio.wait_for(queue.get(), LOOK_AGAIN)
                except TimeoutError:
                    kind, rest = "look", []
                if kind == "stop":
                    return
                job = await self._seen(job, kind)
                if kind == "preview":
                    index, preview, noisy, at = rest
                    yield Event(
                        kind=kind, job=job, index=index, preview=preview, noisy=noisy, at=at
                    )
                elif kind in ("progress", "picture") and not job.status.final:
                    yield Event(kind=kind, job=job)
            yield Event(kind="end", job=job)
        finally:
            self._listeners[job_id].discard(queue)
            if not self._listeners[job_id]:
                del self._listeners[job_id]
            if previews:
                self._watch(job_id, -1)

    async def _seen(self, job: Job, kind: str) -> Job:
        """The job as it stands; of mere progress the database need not be asked."""
        if kind in ("progress", "preview") and job.status == Status.RUNNING:
            return self._with_progress(job)
        return await self.get(job.id) or job.model_copy(update={"status": Status.CANCELLED})

    def _watch(self, job_id: str, more: int) -> None:
        before = self._watchers.get(job_id, 0)
        self._watchers[job_id] = before + more
        if before + more == 0:
            del self._watchers[job_id]
            self._say("unwatch", job_id)
        elif before == 0:
            self._say("watch", job_id)

    async def cancel(self, job_id: str) -> Job | None:
        job = await self._in_database(self.store.cancel, job_id)
        if job is not None and job.status == Status.CANCELLED:
            self._say("cancel", job_id)
            self._hear("end", [job_id])
        return job

    async def retry(self, job_id: str) -> Job | None:
        if self.stopping:
            raise StoppingError
        job = await self._in_database(self.store.retry, job_id, self._bound)
        self._say("wake")
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
        jobs = await self._in_database(partial(self.store.list, **how))
        return [self._with_progress(job) for job in jobs]

    async def counts(self) -> dict[str, int]:
        return await self._in_database(self.store.waiting)

    def picture_file(self, picture_id: str) -> Path | None:
        return self.files.picture(picture_id)

    async def job_of(self, picture_id: str) -> Job | None:
        """The job that a picture is of."""
        return await self._in_database(self.store.job_of, picture_id)

    @property
    def native_size(self) -> tuple[int, int]:
        """The model's own width and height; Stable Diffusion's until it is known."""
        return self.info.width or 512, self.info.height or 512

    async def model(self) -> ModelInfo:
        return self.info

    async def taught(self) -> dict[str, Any]:
        """The settings that a distilled model draws with, where nothing else is asked for."""
        if self._taught is None:  # looked up once, but not before somebody asks: it takes a while
            self._taught = taught(await self._in_database(notes_of, self.settings.model))
        return self._taught

    def _with_progress(self, job: Job) -> Job:
        progress = self._progress.get(job.id)
        return job if progress is None else job.model_copy(update={"progress": progress})

    async def _in_database(self, call: Callable[..., T], *given: Any) -> T:
        """In a thread: the database may wait for a lock."""
        try:
            return await self._loop.run_in_executor(self._database, call, *given)
        except OSError as error:
            raise StorageError(f"the data folder does not take it: {error.strerror}") from None
