"""What the server knows about the models it may draw with: facts, and which are loaded."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Container, Sequence
from typing import Any

from safelight.errors import SafelightError
from safelight.server.jobs import ModelInfo, StoppingError, WorkerInfo
from safelight.server.served import Served
from safelight.server.settings import WorkerSettings

log = logging.getLogger("safelight.server")

ASK_AGAIN = 2.0
"""Seconds after which a worker is asked about a model again: another worker may run by now."""

UNKNOWN = 30.0
"""Seconds until a caller that asks for a model's facts gets an error if no worker has told them."""


class Catalogue:
    """The models and their facts. For use in the event loop.

    send: sends a message to the worker. in_thread: calls a function in a thread. own_worker:
    whether the server has a worker of its own, which is waited for while it loads its model.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        send: Callable[..., None],
        in_thread: Callable[..., Awaitable[Any]],
        *,
        own_worker: bool = True,
    ) -> None:
        self.served = Served(settings)
        self._send, self._in_thread, self._own_worker = send, in_thread, own_worker
        self.info = ModelInfo(name=self.served.default)
        self._others: dict[str, ModelInfo] = {}
        self._elsewhere: list[str] = []
        self.loads = Counter[str]()
        """How often each model was loaded since the start."""
        self._asked: dict[str, asyncio.Future[ModelInfo]] = {}
        self.arrived = asyncio.Event()
        self.stopping = False

    # --- the worker ------------------------------------------------------------------------------

    def on_message(self, kind: str, rest: list[Any]) -> bool:
        """Take in a worker's message about a model; return False for any other message."""
        if kind == "ready":
            self._on_ready(ModelInfo(**rest[0]))
        elif kind == "loaded":
            self._set(ModelInfo(**rest[1]))
            self.loads[rest[0]] += 1
            log.info("loaded: %s", rest[0])
        elif kind == "dropped":
            self._get(rest[0]).loaded = False
            log.info("dropped: %s", rest[0])
        elif kind == "described":
            self._on_described(*rest)
        else:
            return False
        return True

    def on_worker_end(self) -> None:
        """Mark all models as neither ready nor loaded."""
        for info in (self.info, *self._others.values()):
            info.ready = info.loaded = False

    def on_fleet(self, workers: Sequence[WorkerInfo]) -> None:
        """Take in which models workers elsewhere have, for a server without a worker of its own.

        The model of this server's settings stays the default one once a worker has joined with it.
        Before that, it is the model of the worker that joined first.
        """
        self._elsewhere = [*dict.fromkeys(name for one in workers for name in one.models)]
        if workers:
            own = {worker.model.name: worker.model for worker in reversed(workers)}
            name = self.served.default
            if name not in own and not (self.arrived.is_set() and self.info.name == name):
                name = workers[0].model.name
            elif self.info.loaded and name not in self._elsewhere:
                self.info.loaded = False
                log.warning("no worker has %s any more: jobs that name no model wait for one", name)
            self._others |= own
            self.info = self._others.pop(name, self.info)
            self.arrived.set()
        self.info.ready = bool(workers)

    def stop(self) -> None:
        """Release all callers that wait."""
        self.stopping = True
        self.arrived.set()

    def _on_ready(self, info: ModelInfo) -> None:
        self._set(info)
        self.loads[info.name] += 1
        self.arrived.set()
        log.info("ready: %s on %s", info.name, info.device)

    def _on_described(self, name: str, facts: dict[str, Any] | None, error: str | None) -> None:
        known = self._get(name)
        if facts is None and name in self._elsewhere:
            return  # another worker may have it
        if facts is not None and not known.loaded:
            same = {"ready": known.ready, "sha256": known.sha256, "device": known.device}
            self._set(ModelInfo(**facts | same))
        waiting = self._asked.pop(name, None)
        if waiting is None or waiting.done():
            return
        if facts is None:
            waiting.set_exception(SafelightError(error or "", code="no_model", field="model"))
        else:
            waiting.set_result(self._get(name))

    # --- what there is ---------------------------------------------------------------------------

    async def find(self, asked: str | None, hidden: Container[str] = ()) -> str:
        """Return the name of the model that a request means; see `Served.find`."""
        if asked is None or asked == self.info.name:
            return self.info.name
        elsewhere = [self.info.name, *self._elsewhere]
        infos = (self.info, *self._others.values())
        digests = {one.name: one.sha256 for one in infos if one.sha256 is not None}
        return await self._in_thread(self.served.find, asked, elsewhere, digests, hidden)

    async def all(self) -> list[ModelInfo]:
        """Return the models that may be drawn with, the default one first."""
        names = [self.info.name, *self._elsewhere, *await self._in_thread(self.served.sources)]
        ready = self.info.ready
        found = [self._get(name) for name in dict.fromkeys(names)]
        return [one.model_copy(update={"ready": ready}) for one in found]

    async def facts(self, name: str | None) -> ModelInfo:
        """Return a model's facts, once they are known. None is the default model by then.

        Raises SafelightError if it has none, or if no worker has told them within UNKNOWN seconds.
        """
        try:
            async with asyncio.timeout(None if self._own_worker else UNKNOWN):
                await self.arrived.wait()
        except TimeoutError:
            told = "no worker has joined yet: try again once one has"
            raise SafelightError(told, code="no_worker") from None
        name = name or self.info.name
        loop = asyncio.get_running_loop()
        until = loop.time() + UNKNOWN
        while self._get(name).width is None:
            if self.stopping:
                raise StoppingError
            if loop.time() > until:
                told = f"no worker has said yet what model {name!r} is: try again, or name a size"
                raise SafelightError(told, code="no_model", field="model")
            answer = self._asked.setdefault(name, loop.create_future())
            self._send("describe", name)
            done, _ = await asyncio.wait({answer}, timeout=ASK_AGAIN)
            if done:
                answer.result()
        if self.stopping:
            raise StoppingError
        return self._get(name)

    @property
    def loaded(self) -> list[str]:
        """The names of the models in the worker's memory."""
        return [one.name for one in (self.info, *self._others.values()) if one.loaded]

    @property
    def in_memory(self) -> dict[str, int]:
        """By name: 1 for each model in the worker's memory, 0 for each that was there before."""
        return {name: int(self._get(name).loaded) for name in self.loads}

    def size(self, name: str) -> tuple[int, int]:
        """Return a model's own width and height in pixels; 512 × 512 until they are known."""
        info = self._get(name)
        return info.width or 512, info.height or 512

    def _get(self, name: str) -> ModelInfo:
        if name == self.info.name:
            return self.info
        return self._others.setdefault(name, ModelInfo(name=name))

    def _set(self, info: ModelInfo) -> None:
        before = self._get(info.name)
        if None not in (before.sha256, info.sha256) and before.sha256 != info.sha256:
            log.warning(
                "the model's files are others than before: jobs are drawn with these (%s)",
                info.name,
            )
        if before is self.info:
            self.info = info
        else:
            self._others[info.name] = info
