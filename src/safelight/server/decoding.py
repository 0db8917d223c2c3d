"""Processes that read what strangers send, shared fairly by the clients of all APIs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, cast

from PIL import Image

from safelight.errors import SafelightError
from safelight.pixels import joined, strips
from safelight.server.decoder import MAX_PIXELS, receive, send
from safelight.server.turns import Turns

log = logging.getLogger("safelight.server")

WALL = 60.0
"""Seconds after which a decoder that does not answer is killed. Its own limit is processor time."""


ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # Memory of a large picture goes back to the system at once: a decoder is idle for long.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 20),
}


class Decoder:
    """A decoder process, started by the first call, replaced when it ends. For one thread."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def call(
        self,
        function: str,
        blobs: list[Any],
        keywords: dict[str, Any],
        wall: float,
    ) -> Any:
        """Return what the function returns; see `Decoders.call`. blobs: the list is emptied."""
        process = self._started()
        timer = threading.Timer(wall, process.kill)
        timer.daemon = True
        timer.start()
        header = {"function": function, "keywords": keywords, "sizes": [len(b) for b in blobs]}
        try:
            send(cast(BinaryIO, process.stdin), header, blobs)
            blobs.clear()  # the decoder has them
            source = cast(BinaryIO, process.stdout)
            if (answer := receive(source)) is not None:
                return _parts(answer, source)
        except (OSError, ValueError, KeyError) as error:
            if isinstance(error, SafelightError):
                raise
        except BaseException:
            self.close()  # short of memory
            raise
        finally:
            timer.cancel()
        self.close()
        raise SafelightError("it takes too long to read, or breaks what reads it")

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "safelight.server.decoder"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **ENVIRONMENT},
            )
        return self._process


class Decoders:
    """A few decoders that clients take turns at. For one event loop.

    handling: turns for the work around decoding. Each client that holds a decoded picture, or
    encodes one, has a turn, so that their number bounds the memory for pictures.
    """

    def __init__(self, count: int | None = None) -> None:
        self._turns, self.handling = Turns(count), Turns(count)
        count = self._turns.count
        self._idle = [Decoder() for _ in range(count)]
        self._all = list(self._idle)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="decoding")

    async def call(
        self,
        function: str,
        blobs: list[Any] | None = None,
        *,
        client: str = "",
        wall: float = WALL,
        **keywords: Any,
    ) -> Any:
        """Call a function in a decoder's process and return its result.

        function: "module:name". It gets the blobs as `decoder.Sent`, and returns pictures, bytes,
        JSON values, or a tuple of these. blobs: the list is emptied once they are sent, to free
        their memory. client: who asks. Raises SafelightError if the function does, or if it exceeds
        a limit.
        """
        await self._turns.take(client)
        given = [] if blobs is None else blobs
        work = self._threads.submit(self._work, function, given, keywords, wall)
        loop = asyncio.get_running_loop()

        def ended(_: Future[Any]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._turns.leave, client)

        work.add_done_callback(ended)
        return await asyncio.wrap_future(work)

    def close(self) -> None:
        """End the processes. Calls that are in progress raise SafelightError."""
        for decoder in self._all:
            if decoder.pid is not None:
                with contextlib.suppress(OSError):
                    os.kill(decoder.pid, 9)
        self._threads.shutdown(cancel_futures=True)
        for decoder in self._all:
            decoder.close()

    def _work(
        self,
        function: str,
        blobs: list[Any],
        keywords: dict[str, Any],
        wall: float,
    ) -> Any:
        decoder = self._idle.pop()
        try:
            return decoder.call(function, blobs, keywords, wall)
        finally:
            self._idle.append(decoder)


def _parts(header: dict[str, Any], source: BinaryIO) -> Any:
    """Read the parts of an answer. They are checked: a hostile file may have taken over the
    decoder.

    Raises ValueError or KeyError for what our own decoder never sends.
    """
    problem = header.get("error")
    if problem is not None:
        code, message = str(problem["code"]), str(problem["message"])[:300]
        if code == "memory":
            raise SafelightError("it takes too much memory to read: make it smaller")
        if code == "fault":
            log.warning("a decoder failed: %s", message[:40])
            raise SafelightError("it cannot be read")
        field = problem["field"]
        raise SafelightError(message, code=code, field=None if field is None else str(field))
    found: list[Any] = []
    sizes = iter(header["sizes"])
    for part in header["parts"]:
        if part["kind"] == "json":
            found.append(part["value"])
            continue
        size = int(next(sizes, 0))
        if part["kind"] == "bytes":
            found.append(_read(source, size))
            continue
        mode, width, height = str(part["mode"]), int(part["width"]), int(part["height"])
        if mode not in ("RGB", "L") or min(width, height) < 1 or width * height > MAX_PIXELS:
            raise ValueError("no picture of ours")
        found.append(joined(mode, (width, height), _strips(source, mode, (width, height))))
    return found[0] if len(found) == 1 else tuple(found)


def _strips(source: BinaryIO, mode: str, size: tuple[int, int]) -> Iterator[Image.Image]:
    for left, top, right, bottom in strips(size):
        shape = right - left, bottom - top
        yield Image.frombytes(mode, shape, _read(source, shape[0] * shape[1] * len(mode)))


def _read(source: BinaryIO, size: int) -> bytes:
    data = source.read(size)
    if len(data) < size:
        raise ValueError("the decoder ended")
    return data
