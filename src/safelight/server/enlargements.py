"""Pictures that are enlarged for a call, by the server's worker.

Such a picture is no job: nothing is drawn, and nothing is kept once the call is answered. It goes
to the worker as a file, and comes back as one (`upscaling` is the worker's side).
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from PIL import Image

from safelight.errors import SafelightError
from safelight.picture import open_picture, save_whole, write_plain_png
from safelight.pixels import resized
from safelight.server.fleet import Elsewhere
from safelight.server.jobs import TooMuchError
from safelight.server.store import new_id
from safelight.server.supervisor import Supervisor
from safelight.server.upscaling import Wanted

MOST = 32
"""The most pictures that wait to be enlarged, or are being enlarged."""

LOOK_AGAIN = 2.0
"""Seconds after which a waiting call looks whether the worker is still the same."""

ALONE = "this server has no worker of its own, which enlarges pictures"
ENDED = "the worker ended while it enlarged a picture: try again"

Keeper = Supervisor | Elsewhere


class Enlargements:
    """The pictures that calls wait for. For use in the event loop.

    root: the data folder. keeper: keeps the server's worker, and sends it messages.
    """

    def __init__(self, root: Path, keeper: Keeper) -> None:
        self._folder, self._keeper = root / "upscaling", keeper
        self._waiting: dict[str, asyncio.Future[list[dict[str, str]]]] = {}
        shutil.rmtree(self._folder, ignore_errors=True)  # left by a server that was killed

    async def enlarged(
        self, picture: Image.Image, wanted: Wanted, caller: str
    ) -> tuple[Image.Image, list[dict[str, str]]]:
        """Return a picture enlarged, and name and SHA-256 of the networks that did it.

        Raises TooMuchError if too many wait, and SafelightError as `Upscaler.upscale` does.
        """
        if not wanted.needs_worker:
            return await asyncio.to_thread(resized, picture, wanted.size), []
        keeper = self._keeper
        if isinstance(keeper, Elsewhere):  # its workers share no folder with the server
            raise SafelightError(ALONE, code="no_worker")
        if (why := keeper.trouble) is not None:
            raise SafelightError(f"no picture can be enlarged now: {why}", code="no_worker")
        if len(self._waiting) >= MOST:
            why = f"{MOST} pictures wait to be enlarged: try again in 30 s"
            raise TooMuchError(why, code="queue_full", retry_after=30)
        key, before = new_id(), keeper.restarts
        folder = self._folder / key
        coming = asyncio.get_running_loop().create_future()
        self._waiting[key] = coming
        try:
            await asyncio.to_thread(_write, folder / "in.png", picture)
            keeper.send("upscale", key, str(folder), wanted, caller)
            while not coming.done():
                await asyncio.wait([coming], timeout=LOOK_AGAIN)
                if not coming.done() and keeper.restarts != before:
                    raise SafelightError(ENDED, code="no_worker")
            used = coming.result()  # raises what the worker answered
            return await asyncio.to_thread(open_picture, folder / "out.png"), used
        finally:
            del self._waiting[key]
            if not coming.done():
                coming.cancel()
                keeper.send("stop upscaling", key)
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True))

    def answer(
        self, key: str, used: list[dict[str, str]], why: str | None, code: str | None
    ) -> None:
        """Take in the worker's answer. why, code: of the error, if it is one."""
        coming = self._waiting.get(key)
        if coming is None or coming.done():  # the caller has left
            return
        if why is None:
            coming.set_result(used)
        else:
            coming.set_exception(SafelightError(why, code=code or "invalid"))


def _write(path: Path, picture: Image.Image) -> None:
    path.parent.parent.mkdir(mode=0o700, exist_ok=True)
    save_whole(path, lambda file: write_plain_png(file, picture))
