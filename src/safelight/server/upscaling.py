"""The worker's thread that enlarges pictures for calls; `enlargements` is the server's side.

It makes one tile after the other, beside the steps of pictures, and callers take turns at each.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from safelight.errors import SafelightError
from safelight.picture import open_picture, save_whole, write_plain_png
from safelight.pixels import resized
from safelight.server.logs import without_words
from safelight.server.settings import WorkerSettings
from safelight.upscaling.names import is_lanczos

if TYPE_CHECKING:
    from safelight.server.pulse import Pulse

AT_ONCE = 2
"""The most pictures that the worker has in memory to enlarge them."""

FAULT = "this upscaler met a fault of Safelight; the server's log says where: try another"


@dataclass(frozen=True)
class Wanted:
    """A picture to enlarge: at what size, by which upscalers.

    upscalers: names, and how much of each one's picture is laid over that of those before, 0 to 1.
    """

    size: tuple[int, int]
    upscalers: tuple[tuple[str, float], ...]

    @property
    def needs_worker(self) -> bool:
        """Whether a network is among the upscalers."""
        return not all(is_lanczos(name) for name, _ in self.upscalers)


class Upscaling:
    """The worker's thread that enlarges pictures, while there are any."""

    def __init__(self, settings: WorkerSettings, pulse: Pulse) -> None:
        self._settings, self._pulse = settings, pulse
        self._lock = threading.Lock()
        self._new: dict[str, Iterator[None]] = {}
        self._callers: dict[str, str] = {}
        self._stopped: set[str] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="upscaling")
        self._answers: deque[tuple[Any, ...]] = deque()
        self._loaded: Any = None
        self._works = False

    @property
    def busy(self) -> bool:
        """Whether there is a picture to enlarge, or an answer that is not sent yet."""
        return self._works or bool(self._answers)

    def on_message(self, kind: str, rest: list[Any]) -> None:
        """Start enlarging a picture, or cancel it."""
        with self._lock:
            if kind == "stop upscaling":
                if self._new.pop(rest[0], None) is None:
                    self._stopped.add(rest[0])
                return
            key, folder, wanted, caller = rest
            self._new[key] = self._steps(key, Path(folder), wanted)
            self._callers[key] = caller
            if not self._works:
                self._works = True
                self._thread.submit(self._work)

    def answers(self) -> Iterator[tuple[Any, ...]]:
        """Yield the messages to the server, each once."""
        with contextlib.suppress(IndexError):
            while True:
                yield self._answers.popleft()

    def close(self) -> None:
        """End without waiting."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _work(self) -> None:
        """Make tiles until no picture is left."""
        active: deque[tuple[str, Iterator[None]]] = deque()
        with self._pulse.working():
            while True:
                with self._lock:
                    self._take_in(active)
                    if not active:
                        self._stopped.clear()
                        self._works = False
                        return
                    key, steps = active.popleft()
                    stopped = key in self._stopped
                    self._stopped.discard(key)
                if not stopped and self._goes_on(key, steps):
                    active.append((key, steps))
                else:
                    with self._lock:
                        self._callers.pop(key, None)

    def _take_in(self, active: deque[tuple[str, Iterator[None]]]) -> None:
        """Begin waiting pictures, those of callers who have none first."""
        while self._new and len(active) < AT_ONCE:
            having = [self._callers[key] for key, _ in active]
            key = min(self._new, key=lambda key: having.count(self._callers[key]))
            active.append((key, self._new.pop(key)))

    def _goes_on(self, key: str, steps: Iterator[None]) -> bool:
        """Take a step, and return whether there is another; errors are answered."""
        try:
            next(steps)
            return True
        except StopIteration:
            return False
        except SafelightError as error:
            self._answers.append(("upscaled", key, [], str(error), error.code))
        except Exception as error:
            sys.stderr.write(f"enlarging a picture failed: {without_words(error)}\n")
            self._answers.append(("upscaled", key, [], FAULT, "failed"))
        return False

    def _steps(self, key: str, folder: Path, wanted: Wanted) -> Iterator[None]:
        """Enlarge a picture, a tile at each step, and answer."""
        with self._pulse.patient():  # imports take seconds
            from safelight.upscaling.loaded import Upscalers

            settings = self._settings
            if self._loaded is None:
                self._loaded = Upscalers(settings.device, settings.models_dir, takes_paths=False)
            picture = open_picture(folder / "in.png")
        result, used = picture, []
        for name, share in wanted.upscalers:
            with self._pulse.patient():
                upscaler = self._loaded.get(name)
            yield
            if upscaler is None:
                made = resized(picture, wanted.size)
            else:
                work = upscaler.begin(picture, size=wanted.size)
                for _ in work:
                    yield
                made = work.picture
                used.append(upscaler.used)
            result = made if share == 1 else Image.blend(result, made, share)
        if not folder.is_dir():  # the caller has left: it would be made again
            return
        save_whole(folder / "out.png", lambda file: write_plain_png(file, result))
        self._answers.append(("upscaled", key, used, None, None))
