"""A service that draws plain colours, behind the real application on a real socket.

The tests of the compatibility APIs share it. `running` serves; the routes ask `FakeService`, and a
test may replace it.
"""

from __future__ import annotations

import asyncio
import base64
import io
import socket
import threading
import time
from collections.abc import AsyncIterator, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvicorn
from PIL import Image

from safelight.families import SD
from safelight.picture import save_png
from safelight.recipe import png_texts
from safelight.request import Request
from safelight.result import Result
from safelight.server.app import application
from safelight.server.guard import Rules
from safelight.server.jobs import (
    BusyError,
    Event,
    Job,
    ModelInfo,
    Picture,
    Progress,
    Status,
    StoppingError,
)
from safelight.server.names import Names
from safelight.server.served import Served
from safelight.server.settings import WorkerSettings

PATIENCE = 30


def colour(seed: int) -> tuple[int, int, int]:
    return (seed % 256, 100, 200)


def encoded(image: Image.Image, form: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return base64.b64encode(buffer.getvalue()).decode()


def until(done: Any) -> Any:
    """Wait for a condition; return what it returned."""
    end = time.monotonic() + PATIENCE
    while not (found := done()):
        assert time.monotonic() < end, "nothing came of it"
        time.sleep(0.01)
    return found


class FakeService:
    """Draws a colour for each seed; a picture to start from stays where the mask keeps it.

    A job begins when somebody waits or listens. It pauses before the step `pause` of all its
    pictures until `resume`. paint: a picture drawn in place of the colours. error: how jobs fail.
    eager: whether a job is finished before anybody can listen.
    """

    def __init__(self, folder: Path, info: ModelInfo, steps: int) -> None:
        self.folder, self.info, self.steps = folder, info, steps
        self.requests: list[Request] = []
        self.clients: list[str] = []
        self.jobs: dict[str, Job] = {}
        self.owners: dict[str, str | None] = {}
        self.choices: dict[str | None, str] = {}
        self.files: dict[str, Path] = {}
        self.watched: list[str] = []
        self.cancelled: list[str] = []
        self.busy = self.stopping = self.loading = self.eager = False
        self.pause: int | None = None
        self.first_preview = 1
        self.paint: Image.Image | None = None
        self.error: str | None = None
        self.warnings: list[str] = []
        self.names = Names(WorkerSettings(model="embedded", url="", root=""))
        self.best: dict[str, Any] = {}
        self.submitted, self.held, self.was_cancelled = (threading.Event() for _ in range(3))
        self._go = threading.Event()
        self._begun: dict[str, asyncio.Event] = {}
        self._done: dict[str, asyncio.Event] = {}
        self._queues: dict[str, list[asyncio.Queue[Event]]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def resume(self) -> None:
        self._go.set()

    async def submit(
        self,
        request: Request,
        *,
        client: str = "api",
        idempotency_key: str | None = None,
        owner: str | None = None,
        model: str | None = None,
    ) -> Job:
        if self.busy:
            raise BusyError(4, 7)
        if self.stopping:
            raise StoppingError
        self.requests.append(request)
        self.clients.append(client)
        job = Job(
            id=f"job{len(self.jobs)}",
            status=Status.QUEUED,
            created_at=datetime.now(UTC),
            client=client,
            model=model or self.info.name,
            settings=request.to_dict(),
            progress=Progress(steps=self.steps * request.count),
            warnings=self.warnings + request.unused_settings(),
        )
        self.jobs[job.id], self._queues[job.id], self.owners[job.id] = job, [], owner
        self._begun[job.id], self._done[job.id] = asyncio.Event(), asyncio.Event()
        self._tasks[job.id] = asyncio.create_task(self._draw(job, request))
        self.submitted.set()
        if self.eager:
            self._begun[job.id].set()
            await self._done[job.id].wait()
        return job.model_copy(deep=True)

    async def _draw(self, job: Job, request: Request) -> None:
        await self._begun[job.id].wait()
        size = request.width or 64, request.height or 64
        job.status, job.started_at = Status.RUNNING, datetime.now(UTC)
        for done in range(self.steps * request.count):
            index, step = divmod(done, self.steps)
            while done == self.pause and not self._go.is_set():
                self.held.set()
                self._tell(job, "preview", index=index, preview=self._preview((64, 64), step))
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.002)
            job.progress = Progress(step=done + 1, steps=self.steps * request.count)
            self._tell(job, "progress")
            if job.id in self.watched and done + 1 >= self.first_preview:
                self._tell(job, "preview", index=index, preview=self._preview(size, step + 1))
            if self.error is not None and step == self.steps // 2:
                job.error = self.error
                self._end(job, Status.FAILED)
                return
            if step == self.steps - 1:
                job.pictures = [*job.pictures, self._finished(job, request, index, size)]
                self._tell(job, "picture", index=index)
        self._end(job, Status.SUCCEEDED)

    def _painted(self, seed: int, size: tuple[int, int]) -> Image.Image:
        return (
            Image.new("RGB", size, colour(seed)) if self.paint is None else self.paint.resize(size)
        )

    def _preview(self, size: tuple[int, int], step: int) -> str:
        """Return the picture of seed 0, with the step as the red value of its first pixel."""
        image = self._painted(0, size)
        image.putpixel((0, 0), (step, 0, 0))
        return encoded(image)

    def _finished(self, job: Job, request: Request, index: int, size: tuple[int, int]) -> Picture:
        seed = request.seed + index
        image = self._painted(seed, size)
        if request.mask is not None and request.image is not None:
            start, mask = request.image.resize(size, 0), request.mask.resize(size, 0)
            image = Image.composite(image, start, mask)
        settings = {**request.to_dict(), "width": size[0], "height": size[1]}
        settings["steps"] = request.steps or self.steps
        sha256 = self.info.sha256 or "0123456789abcdef" * 4
        made = Result([image], [seed], settings, self.info.name, sha256, "cpu", "float32")
        recipe = made.recipe()
        name = f"{job.id}-picture{index}"
        self.files[name] = self.folder / f"{name}.png"
        save_png(image, self.files[name], png_texts(recipe))
        return Picture(
            id=name, index=index, seed=seed, width=size[0], height=size[1], recipe=recipe
        )

    def _end(self, job: Job, status: Status) -> None:
        job.status, job.finished_at = status, datetime.now(UTC)
        self._tell(job, "end")
        self._done[job.id].set()

    def _tell(self, job: Job, kind: str, **more: Any) -> None:
        for queue in self._queues[job.id]:
            queue.put_nowait(Event(kind=kind, job=job.model_copy(), **more))

    async def get(self, job_id: str, *, owner: str | None = None) -> Job | None:
        job = self._seen(job_id, owner)
        return job and job.model_copy(deep=True)

    def _seen(self, job_id: str, owner: str | None) -> Job | None:
        """The job, if this owner sees it; None sees all."""
        own = owner is None or self.owners.get(job_id) == owner
        return self.jobs.get(job_id) if own else None

    async def wait(self, job_id: str) -> Job:
        self._begun[job_id].set()
        await self._done[job_id].wait()
        return self.jobs[job_id].model_copy(deep=True)

    async def events(self, job_id: str, *, previews: bool = True) -> AsyncIterator[Event]:
        assert job_id in self.jobs
        if previews:
            self.watched.append(job_id)
        queue: asyncio.Queue[Event] = asyncio.Queue()
        self._queues[job_id].append(queue)
        self._begun[job_id].set()
        if self.jobs[job_id].status.final:
            yield Event(kind="end", job=self.jobs[job_id])
            return
        while True:
            event = await queue.get()
            yield event
            if event.kind == "end":
                return

    async def cancel(self, job_id: str, *, owner: str | None = None) -> Job | None:
        job = self._seen(job_id, owner)
        if job is None:
            return None
        if not job.status.final:
            self.cancelled.append(job_id)
            self._tasks[job_id].cancel()
            self._end(job, Status.CANCELLED)
            self.was_cancelled.set()
        return job.model_copy(deep=True)

    def picture_bytes(self, picture_id: str) -> bytes | None:
        path = self.files.get(picture_id)
        return None if path is None else path.read_bytes()

    async def models(self) -> list[ModelInfo]:
        return [ModelInfo(name=self.info.name) if self.loading else self.info]

    async def find_model(self, asked: str | None, hidden: Container[str] = ()) -> str:
        served = Served(WorkerSettings(model=self.info.name, url="", root="", allowed=()))
        digests = {} if self.info.sha256 is None else {self.info.name: self.info.sha256}
        return served.find(asked, (), digests, hidden)

    async def chosen(self, owner: str | None) -> str | None:
        return self.choices.get(owner)

    async def choose(self, model: str, owner: str | None) -> None:
        self.choices[owner] = model

    async def facts(self, model: str | None = None) -> ModelInfo:
        assert model in (None, self.info.name)
        self.loading = False
        return self.info

    async def plan(self, model: str | None = None) -> Any:
        assert model in (None, self.info.name)
        size = self.info.width or 64, self.info.height or 64
        return SimpleNamespace(family=SD, notes={"draw_with": self.best}, native_size=size)

    async def native_size(self, model: str | None = None) -> tuple[int, int]:
        assert model in (None, self.info.name)
        self.loading = False
        return self.info.width or 64, self.info.height or 64


@dataclass
class Running:
    """The real application, and the service that it asks at the moment in place of a Hub."""

    port: int = 0
    app: Any = None
    service: Any = field(default=None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.service, name)


@contextmanager
def running() -> Iterator[Running]:
    """Serve on the loopback, in a thread."""
    served = Running()
    guard = application(served, Rules())  # pyright: ignore[reportArgumentType]
    served.app = guard.app
    config = uvicorn.Config(
        guard, log_config=None, lifespan="off", ws="none", timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        served.port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        until(lambda: server.started)
        yield served
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()
