"""Pictures that are enlarged for a call, by the server's worker.

Such a picture is no job: nothing is drawn, and nothing is kept once the call is answered. It goes
to the worker as a file, and comes back as one (`upscaling` is the worker's side).
"""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from safelight.errors import SafelightError
from safelight.picture import save_whole, write_plain_png
from safelight.server.fleet import Elsewhere
from safelight.server.jobs import TooMuchError
from safelight.server.store import new_id
from safelight.server.supervisor import Supervisor
from safelight.server.upscaling import Wanted

MAX_WAITING = 32
"""The most pictures that wait to be enlarged, or are being enlarged."""

LOOK_AGAIN = 2.0
"""Seconds after which a waiting call looks whether the worker is still the same."""

ALONE = "this server has no worker of its own, which enlarges pictures"
ENDED = "the worker ended while it enlarged a picture: try again"

Keeper = Supervisor | Elsewhere


@dataclass(frozen=True)
class Begun:
    """A picture that waits to be enlarged.

    folder: of its files. restarts: how often the worker had restarted when it was sent.
    """

    key: str
    folder: Path
    coming: asyncio.Future[list[dict[str, str]]]
    restarts: int

    @property
    def made(self) -> Path:
        """The file of the enlarged picture, once there is one."""
        return self.folder / "out.png"


class Enlargements:
    """The pictures that calls wait for. For use in the event loop.

    Pictures wait as files. root: the data folder. keeper: keeps the server's worker, and sends it
    messages.
    """

    def __init__(self, root: Path, keeper: Keeper) -> None:
        self._folder, self._keeper = root / "upscaling", keeper
        self._waiting: dict[str, asyncio.Future[list[dict[str, str]]]] = {}
        shutil.rmtree(self._folder, ignore_errors=True)  # left by a server that was killed

    async def begin(self, picture: Image.Image, wanted: Wanted, caller: str) -> Begun:
        """Begin to enlarge a picture, which is not kept; call `end` with the result.

        Raises TooMuchError if too many wait, and SafelightError if there is no worker.
        """
        keeper = self._keeper
        if isinstance(keeper, Elsewhere):  # its workers share no folder with the server
            raise SafelightError(ALONE, code="no_worker")
        if (why := keeper.trouble) is not None:
            raise SafelightError(f"no picture can be enlarged now: {why}", code="no_worker")
        if len(self._waiting) >= MAX_WAITING:
            why = f"{MAX_WAITING} pictures wait to be enlarged: try again in 30 s"
            raise TooMuchError(why, code="queue_full", retry_after=30)
        key, coming = new_id(), asyncio.get_running_loop().create_future()
        begun = Begun(key, self._folder / key, coming, keeper.restarts)
        self._waiting[key] = coming
        writing = asyncio.ensure_future(asyncio.to_thread(_write, begun.folder / "in.png", picture))
        try:
            await asyncio.shield(writing)
            keeper.send("upscale", key, str(begun.folder), wanted, caller)
        except BaseException:
            await asyncio.wait([writing])  # else its file would stay
            await self.end(begun)
            raise
        return begun

    async def used(self, begun: Begun) -> list[dict[str, str]]:
        """Wait until a picture is made, and return name and SHA-256 of its networks.

        Raises SafelightError as `Upscaler.upscale` does, and if the worker ends.
        """
        coming = begun.coming
        while not coming.done():
            await asyncio.wait([coming], timeout=LOOK_AGAIN)
            if not coming.done() and self._keeper.restarts != begun.restarts:
                raise SafelightError(ENDED, code="no_worker")
        return coming.result()  # raises what the worker answered

    async def end(self, begun: Begun) -> None:
        """Remove a picture's files, and stop the work if it goes on."""
        del self._waiting[begun.key]
        if not begun.coming.done():
            begun.coming.cancel()
            self._keeper.send("stop upscaling", begun.key)
        await asyncio.shield(asyncio.to_thread(shutil.rmtree, begun.folder, ignore_errors=True))

    def answer(
        self, key: str, used: list[dict[str, str]], why: str | None, code: str | None
    ) -> None:
        """Take in the worker's answer. why, code: of the error, if it is one."""
        coming = self._waiting.get(key)
        if coming is None:  # the caller has left, perhaps while the file was written
            shutil.rmtree(self._folder / key, ignore_errors=True)
            return
        if coming.done():
            return
        if why is None:
            coming.set_result(used)
        else:
            coming.set_exception(SafelightError(why, code=code or "invalid"))


def _write(path: Path, picture: Image.Image) -> None:
    path.parent.parent.mkdir(mode=0o700, exist_ok=True)
    save_whole(path, lambda file: write_plain_png(file, picture))
