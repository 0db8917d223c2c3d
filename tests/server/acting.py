"""A worker on Ray that draws nothing: it claims jobs and finishes them as a real one does."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from safelight.server.claims import LostError
from safelight.server.crew import State
from safelight.server.jobs import ModelInfo, Picture
from safelight.server.settings import WorkerSettings
from safelight.server.store import Store, new_id


class Acting:
    """Takes the place of `crew.Actor`. It draws one job at a time, once a file `open` exists."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._store, self._root = Store(settings.url), Path(settings.root)
        self._name, self._draining = new_id(), threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        """Stay on the roster and keep the claimed job: another actor can take a minute to start."""
        model = ModelInfo(name="m", width=64, height=64, ready=True)
        self._store.beat(self._name, str(os.getpid()), model, 1)
        self._store.renew(self._name)

    def _work(self) -> None:
        while not self._draining.is_set():
            claim = self._store.claim(self._name, alone=True)
            if claim is None:
                self._beat()
                self._draining.wait(0.1)
                continue
            while not (self._root / "open").exists():
                self._beat()
                threading.Event().wait(0.1)
            picture = Picture(id=claim.picture_id(0), index=0, seed=1, width=8, height=8, recipe={})
            try:
                self._store.add_picture(claim.id, claim.token, picture)
                self._store.finish(claim.id, claim.token, warnings=[])
            except LostError:
                continue
        self._store.leave(self._name)

    def state(self) -> State:
        return State(self._name, ready=True, ended=not self._thread.is_alive())

    def end(self, drain: bool) -> None:
        self._draining.set()
