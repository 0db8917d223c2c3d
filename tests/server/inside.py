"""The whole server in this process: its application called without a socket, its worker a thread.

What a test patches here takes effect in the server. The same tests run small in the suite and at
full size in `make soak`, which writes down the figures.
"""

from __future__ import annotations

import asyncio
import faulthandler
import json
import os
import threading
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, Self, cast

from serving import wait_for

from safelight.server.app import application
from safelight.server.guard import Rules
from safelight.server.hub import Hub
from safelight.server.keyring import Keyring
from safelight.server.process import Child
from safelight.server.settings import WorkerSettings
from safelight.server.worker import Worker

SOAK = os.environ.get("SAFELIGHT_SOAK")
"""The file for the figures of a full-size run."""


SHARE = float(os.environ.get("SAFELIGHT_SOAK_SHARE", "1"))
"""The share of the full numbers that is run; numbers below 100 are not reduced."""


def size(small: int, full: int) -> int:
    if not SOAK:
        return small
    return full if full < 100 else max(small, round(full * SHARE))


def share(cases: list[Any]) -> list[Any]:
    """Return the cases of a full run: all of them, or a share of SHARE, evenly spread."""
    count = max(min(len(cases), 5), round(len(cases) * SHARE))
    return [cases[i * len(cases) // count] for i in range(count)]


def figure(line: str) -> None:
    if SOAK:
        with Path(SOAK).open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d')} {line}\n")


class Thread(threading.Thread):
    """A thread with the attributes of a worker's process that the hub uses."""

    pid = exitcode = 0

    def kill(self) -> None: ...


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes = field(repr=False)

    def json(self) -> Any:
        return json.loads(self.body)


class Inside:
    """A server in this process. draws: whether it has a worker; without one, jobs wait."""

    def __init__(
        self,
        folder: Path,
        *,
        draws: bool = True,
        model: str = "embedded",
        bound: int = 1000,
        token: str | None = None,
        keys: Mapping[str, str] | None = None,
        **how: Any,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.data = folder
        settings = WorkerSettings(
            model, f"sqlite:///{folder / 'jobs.sqlite3'}", str(folder), device="cpu", **how
        )
        ours, theirs = Pipe()
        self.worker = Worker(theirs, settings) if draws else None
        thread = Thread(target=self._draw, args=(theirs,), daemon=True)
        child = Child(cast(Any, thread), ours)
        self.hub = Hub(settings, child, bound=bound)
        for name, secret in (keys or {}).items():
            self.hub.store.add_key(name, secret)
        self.hub.keys = Keyring(self.hub.store.all_keys)
        self.app = application(self.hub, Rules(token, keys=self.hub.keys))
        self._loop = asyncio.new_event_loop()
        self._runs = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._runs.start()
        thread.start()

    def _draw(self, pipe: Any) -> None:
        if self.worker is not None:
            self.worker.run()
        else:
            while pipe.recv() != ("stop",):
                pass
        pipe.close()

    def __enter__(self) -> Self:
        async def start() -> None:
            self.hub.start()

        self.within(start())
        if self.worker:
            wait_for(lambda: self.hub.catalogue.info.ready)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.within(self.hub.stop())
        except TimeoutError:
            faulthandler.dump_traceback()  # shows which thread does not end, and where
            raise
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._runs.join()
        self._loop.close()

    def within(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine in the server's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """Call a route. path: decoded. body: bytes, or values that become JSON."""
        return self.within(self.asked(method, path, body, **headers))

    async def asked(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body)
        data = data.encode() if isinstance(data, str) else data
        path, _, query = path.partition("?")
        given = {"host": "localhost", "content-type": "application/json"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode("utf-8", "surrogateescape"),
            "query_string": query.encode(),
            "root_path": "",
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 7860),
            "headers": [(k.encode(), v.encode()) for k, v in given.items()],
        }
        parts = [{"type": "http.request", "body": data, "more_body": False}]
        sent: list[Any] = []

        async def receive() -> Any:
            if not parts:
                await asyncio.sleep(3600)  # the client stays
            return parts.pop()

        async def send(message: Any) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        found = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
        return Answer(sent[0]["status"], found, b"".join(m.get("body", b"") for m in sent[1:]))

    def submit(self, **settings: Any) -> str:
        answer = self.ask("POST", "/api/jobs", settings)
        assert answer.status == 202, answer.body
        return str(answer.json()["id"])

    def job(self, job_id: str) -> Any:
        return self.ask("GET", f"/api/jobs/{job_id}").json()

    def finished(self, job_id: str, seconds: float = 120) -> Any:
        def over() -> bool:
            assert self.hub.supervisor.child.process.is_alive(), "the worker died"
            return self.job(job_id)["status"] not in ("queued", "running")

        wait_for(over, seconds=seconds)
        return self.job(job_id)

    def drawn(self, **settings: Any) -> bytes:
        """Return the PNG of a job that succeeds."""
        job = self.finished(self.submit(**settings))
        assert job["status"] == "succeeded", job
        return self.picture(job["id"])

    def picture(self, job_id: str, index: int = 0) -> bytes:
        return self.ask("GET", f"/api/pictures/{self.job(job_id)['pictures'][index]['id']}").body
