"""Processes that read what strangers send; shared fairly by the clients of all interfaces."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, cast

from PIL import Image

from safelight.errors import SafelightError
from safelight.server.decoder import MAX_PIXELS, receive, send
from safelight.server.turns import Turns

log = logging.getLogger("safelight.server")

WALL = 60.0
"""Seconds after which a decoder that does not answer is killed. Its own limit is processor time."""


class Decoder:
    """One process, started with the first call and replaced when it ends. For one thread."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def call(self, function: str, blobs: list[bytes], keywords: dict[str, Any], wall: float) -> Any:
        """Return what the function returns; see `Decoders.call`."""
        process = self._started()
        timer = threading.Timer(wall, process.kill)
        timer.daemon = True
        timer.start()
        header = {"function": function, "keywords": keywords, "sizes": [len(b) for b in blobs]}
        try:
            send(cast(BinaryIO, process.stdin), header, blobs)
            blobs = []
            answer = receive(cast(BinaryIO, process.stdout))
        except (OSError, ValueError, KeyError):
            answer = None
        finally:
            timer.cancel()
        if answer is None:
            self.close()
            raise SafelightError("it takes too long to read, or breaks what reads it")
        try:
            return _parts(*answer)
        except BaseException:
            self.close()  # short of memory, or not what we sent
            raise

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
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        return self._process


class Decoders:
    """A few decoders, at which clients take turns. For one event loop.

    handling: turns for what is done with a picture around its decoding. Who holds a decoded
    picture, or makes a file of one, has one of them: their number bounds the memory it takes.
    """

    def __init__(self, count: int | None = None) -> None:
        self._turns, self.handling = Turns(count), Turns(count)
        count = self._turns.count
        self._idle = [Decoder() for _ in range(count)]
        self._all = list(self._idle)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="decoding")

    async def call(
        self, function: str, *blobs: bytes, client: str = "", wall: float = WALL, **keywords: Any
    ) -> Any:
        """Return what a function returns, called in a decoder's process.

        function: "module:name". It returns pictures, bytes, or what JSON has, or a tuple of them.
        client: who asks. Raises SafelightError if it does, or does not keep to the limits.
        """
        await self._turns.take(client)
        work = self._threads.submit(self._work, function, list(blobs), keywords, wall)
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
        self, function: str, blobs: list[bytes], keywords: dict[str, Any], wall: float
    ) -> Any:
        decoder = self._idle.pop()
        try:
            return decoder.call(function, blobs, keywords, wall)
        finally:
            self._idle.append(decoder)


def _parts(header: dict[str, Any], blobs: list[bytes]) -> Any:
    """Return the parts of an answer. It is checked: the decoder may be a stranger's by now."""
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
    for part in header["parts"]:
        if part["kind"] == "json":
            found.append(part["value"])
            continue
        data = blobs.pop(0)
        if part["kind"] == "bytes":
            found.append(data)
            continue
        size = int(part["width"]), int(part["height"])
        if part["mode"] not in ("RGB", "L") or size[0] * size[1] > MAX_PIXELS:
            raise SafelightError("it cannot be read")
        found.append(Image.frombytes(part["mode"], size, data))
        del data
    return found[0] if len(found) == 1 else tuple(found)
