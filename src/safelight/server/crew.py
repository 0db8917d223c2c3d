"""Workers as Ray actors: started, watched and ended, in a process that is connected to Ray.

The server itself is not connected: Ray ends a process that has lost its cluster for a minute. The
database says which jobs there are and whose they are, so an actor, a node or this process may end
at any time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from safelight.errors import SafelightError, StorageError
from safelight.server import private
from safelight.server.logs import log_to_stderr
from safelight.server.process import spawn
from safelight.server.scaling import Load, WorkerPlan, change, room
from safelight.server.settings import WorkerSettings
from safelight.server.station import Station
from safelight.server.store import Store

log = logging.getLogger("safelight.server")

TICK = 1.0
"""Seconds between two looks at the workers."""

UNANSWERED = 5.0
"""Seconds without a first answer after which an actor is reported as waiting for room."""

PAUSE = 60.0
"""The longest pause in seconds before the next try when actors cannot be started."""

ENDING = 12.0
"""Seconds that actors have to put back their jobs when the server ends."""


@dataclass(frozen=True)
class State:
    """What an actor says of itself.

    worker: name on the roster of the process that draws now. ended: whether it has stopped drawing.
    refusal: why it cannot draw.
    """

    worker: str | None = None
    ready: bool = False
    ended: bool = False
    refusal: str | None = None


class Actor:
    """A `safelight worker` as a Ray actor."""

    def __init__(self, settings: WorkerSettings) -> None:
        private.keep()
        log_to_stderr()  # Ray keeps it with its logs
        self._refusal: str | None = None
        self._station = Station(settings, spawn(settings))
        self._thread = threading.Thread(target=self._work, name="station", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            asyncio.run(self._station.run())
        except SafelightError as error:
            self._refusal = str(error)
        else:
            refusal = self._station.supervisor.refusal
            self._refusal = None if refusal is None else str(refusal)

    def state(self) -> State:
        """Return the actor's state."""
        station = self._station
        ended = not self._thread.is_alive()
        return State(station.supervisor.name, station.draws, ended, self._refusal)

    def end(self, drain: bool) -> None:
        """Stop drawing; see `Station.end`."""
        self._station.end(drain=drain)


@dataclass(eq=False)
class Hand:
    """An actor as the crew knows it.

    answer: the pending answer to the last question for its state. answered: whether it has answered
    once, and so has a place on a node. idle: since when it has drawn nothing, None while it draws.
    """

    actor: Any
    answer: Any
    asked: float = field(default_factory=time.monotonic)
    state: State = State()
    answered: bool = False
    idle: float | None = None
    leaving: bool = False


class Crew:
    """Keeps the workers of a plan.

    ray: the module, connected. tell(kind, what): called with "workers" and the names of all that
    may have jobs, or "trouble" and what keeps workers from drawing (None if nothing does). actor:
    the class of the actors.
    """

    def __init__(
        self,
        ray: Any,
        plan: WorkerPlan,
        settings: WorkerSettings,
        tell: Callable[[str, Any], None],
        actor: type = Actor,
    ) -> None:
        self._ray, self._plan, self._settings, self._tell = ray, plan, settings, tell
        self._store = Store(settings.url)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._cpus, self._gpus = room(nodes, plan, settings.device)
        how = {"num_cpus": self._cpus, "num_gpus": self._gpus or None}
        self._actor = ray.remote(actor).options(**how)
        self._hands: list[Hand] = []
        self._told: dict[str, Any] = {}
        self._failed: str | None = None
        self._pause, self._next = 0.0, 0.0

    def run(self, pipe: Connection) -> None:
        """Keep workers until told to end, or until the server is gone."""
        try:
            while not pipe.poll(TICK):
                self.look()
        finally:
            self.close()

    def look(self) -> None:
        """Learn what became of the actors, then start or end some if needed."""
        asked = [hand.answer for hand in self._hands]
        done = set(self._ray.wait(asked, num_returns=len(asked), timeout=TICK)[0] if asked else ())
        for hand in [hand for hand in self._hands if hand.answer in done]:
            self._hear(hand)
        with contextlib.suppress(StorageError):  # the server itself reports that it is away
            self._scale(*self._store.load(self._plan.patience))
        names = [hand.state.worker for hand in self._hands]
        self._say("workers", sorted(name for name in names if name is not None))
        self._say("trouble", self._trouble())

    def close(self) -> None:
        """Let all actors put their jobs back, and end."""
        until = time.monotonic() + ENDING
        left = [hand for hand in self._hands if hand.answered]
        with contextlib.suppress(Exception):  # the others end with the connection to Ray
            for hand in left:
                hand.actor.end.remote(False)
            while left and time.monotonic() < until:
                left = [hand for hand in left if not self._has_ended(hand)]
                time.sleep(TICK / 10)
        self._store.close()

    def _has_ended(self, hand: Hand) -> bool:
        errors = self._ray.exceptions
        try:
            return self._ray.get(hand.actor.state.remote(), timeout=TICK).ended
        except errors.GetTimeoutError:
            return False
        except errors.RayError:
            return True

    # --- what became of them ---------------------------------------------------------------------

    def _hear(self, hand: Hand) -> None:
        try:
            state = self._ray.get(hand.answer)
        except self._ray.exceptions.ActorUnavailableError:  # temporary, by Ray's definition
            pass
        except self._ray.exceptions.RayError as error:
            self._hands.remove(hand)
            if hand.answered:
                told = _last_line(error).partition(". ")[0]
                log.warning("a worker on Ray is lost: its jobs wait for another one (%s)", told)
            else:
                self._on_failure(_last_line(error))
            return
        else:
            hand.state, hand.answered = state, True
            if state.ended:
                self._hands.remove(hand)
                self._ray.kill(hand.actor)
                if not hand.leaving:
                    self._on_failure(state.refusal or "it ended by itself")
                return
            if state.ready:
                self._failed, self._pause = None, 0.0
        hand.asked = time.monotonic()
        hand.answer = hand.actor.state.remote()

    def _on_failure(self, why: str) -> None:
        """Wait before the next actor is started: the pause grows while none becomes ready."""
        self._pause = min(2 * self._pause + 1, PAUSE)
        self._next = time.monotonic() + self._pause
        if why != self._failed:
            log.warning("a worker cannot be started on Ray: %s", why)
        self._failed = why

    # --- how many --------------------------------------------------------------------------------

    def _scale(self, late: int, drawn: dict[str, int]) -> None:
        now = time.monotonic()
        staying = [hand for hand in self._hands if not hand.leaving]
        ready = [hand for hand in staying if hand.state.ready]
        taken = {hand: drawn.get(hand.state.worker or "", 0) for hand in ready}
        for hand, jobs in taken.items():
            hand.idle = None if jobs else hand.idle or now
        idle = sorted((hand for hand in ready if hand.idle), key=lambda hand: hand.idle or now)
        load = Load(
            late=late,
            drawn=sum(taken.values()),
            ready=len(ready),
            starting=len(staying) - len(ready),
            idle=[now - (hand.idle or now) for hand in idle],
        )
        more = change(load, self._plan)
        if more > 0 and now >= self._next:
            log.info("workers on Ray: %d and %d more, %d jobs wait", len(staying), more, late)
            for _ in range(more):
                actor = self._actor.remote(self._settings)
                self._hands.append(Hand(actor, actor.state.remote()))
        for hand in idle[: max(0, -more)]:
            log.info("workers on Ray: %d, and one that is idle goes", len(staying) - 1)
            hand.leaving = True
            hand.actor.end.remote(True)

    def _trouble(self) -> str | None:
        if any(hand.state.ready for hand in self._hands):
            return None
        if self._failed is not None:
            return f"a worker cannot be started on Ray: {self._failed}"
        waiting = [hand for hand in self._hands if not hand.answered]
        if any(time.monotonic() - hand.asked > UNANSWERED for hand in waiting):
            each = f"{self._cpus:g} CPUs" + (f" and {self._gpus:g} GPUs" if self._gpus else "")
            return f"{len(waiting)} workers wait for room in the Ray cluster, {each} each"
        return "the workers on Ray are loading their model"

    def _say(self, kind: str, what: Any) -> None:
        if kind not in self._told or self._told[kind] != what:
            self._told[kind] = what
            self._tell(kind, what)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:200]
