"""Uploaded pictures that no job has used yet: bounded by owner and in all, and cleaned up."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

from starlette.responses import PlainTextResponse

from safelight.server.callers import caller_of

log = logging.getLogger("safelight.server")

OWN = 256 << 20
ALL = 1 << 30
"""The most bytes of one owner's uploads, and of all uploads."""

LEAST = 64 << 10
"""The least bytes that an upload counts for: millions of empty ones would be a burden, too."""

FRESH = 3600.0
"""Seconds for which an upload is never removed to make room: its page may still be open."""

OLD = 7 * 24 * 3600.0
"""Seconds after which an upload is removed; jobs drawn from it have a copy."""

_KEPT = re.compile(r"[0-9a-f]{32,128}")
_COMING = re.compile(r"tmp[0-9a-z_]{8,10}")
"""Names that Gradio gives: a digest for an upload's folder, and one of `tempfile` while it is
written. Everything else in the folder is not ours, and stays.
"""

LONGEST = 64 << 20
"""The bytes assumed for an upload that does not state its length."""


class Uploads:
    """An ASGI application around the one that writes uploads to a folder.

    While an upload is written, its name begins with tmp; then it gets a folder of its own.
    """

    def __init__(self, app: Any, folder: Path) -> None:
        self._app, self._folder = app, folder
        self._owners: dict[Path, str] = {}
        self._coming: Counter[str] = Counter()
        self._checking = asyncio.Lock()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        owner = caller_of(scope).name
        size = max(_length(scope), LEAST)
        async with self._checking:  # else uploads that come together would all find room
            room = await asyncio.to_thread(self._make_room, owner, size)
            if room:
                self._coming[owner] += size
        if not room:
            answer = PlainTextResponse(
                f"the uploads that are not used yet take {OWN >> 20} MiB, or those of all "
                f"{ALL >> 20} MiB: try again in an hour\n",
                429,
                {"retry-after": str(round(FRESH))},
            )
            await answer(scope, receive, send)
            return
        held: list[Any] = []
        status = 500

        async def hold(message: Any) -> None:
            held.append(message)

        try:
            await self._app(scope, receive, hold)
            status = held[0]["status"] if held else 500
            self._note(owner, held)
        except OSError as error:
            log.warning("an upload cannot be kept: %s", error.strerror)
            text = f"the upload cannot be kept: {error.strerror}\n"
            await PlainTextResponse(text, 507)(scope, receive, send)
            return
        except Exception:
            for message in held:
                await send(message)
            raise
        finally:
            self._coming[owner] -= size
            if status >= 400:
                await asyncio.to_thread(self.clean_up)
        for message in held:
            await send(message)

    def clean_up(self, seconds: float = 60.0) -> None:
        """Remove uploads that were broken off.

        These are tmp* files: all while no upload is in progress, otherwise those that nobody has
        written to for `seconds`.
        """
        busy = sum(self._coming.values()) > 0
        for path in self._entries():
            if _COMING.fullmatch(path.name) and (not busy or _age(path) > seconds):
                _remove(path)

    def forget(self) -> None:
        """Remove old uploads, and those that were broken off."""
        self.clean_up()
        for path in self._entries():
            if _KEPT.fullmatch(path.name) and _age(path) > OLD:
                _remove(path)

    def _make_room(self, owner: str, size: int) -> bool:
        """Remove uploads if room is needed, the oldest first; return whether a new one fits.

        size: its bytes. Uploads that are still FRESH stay.
        """
        while True:
            kept = [path for path in self._entries() if _KEPT.fullmatch(path.name)]
            files = [path for one in kept for path in one.glob("*") if path.is_file()]
            sizes = {path: _size(path) for path in files}
            self._owners = {p: name for p, name in self._owners.items() if p in sizes}
            own = sum(sizes[path] for path, name in self._owners.items() if name == owner)
            # What is being written counts once: as announced, or as it stands if that is more.
            tmp = [path for path in self._entries() if _COMING.fullmatch(path.name)]
            written = sum(_size(path) for path in tmp if path.is_file())
            coming = max(written, sum(self._coming.values()))
            everything = sum(sizes.values()) + coming + size
            mine = own + self._coming[owner] + size
            if mine <= OWN and everything <= ALL:
                return True
            going = [p for p in sizes if everything > ALL or self._owners.get(p) == owner]
            oldest = max(going, key=_age, default=None)
            if oldest is None or _age(oldest) < FRESH:
                return False
            _remove(oldest)

    def _note(self, owner: str, held: list[Any]) -> None:
        """Note the owner of uploaded files. held: Gradio's answer, a list of their paths."""
        try:
            paths = json.loads(b"".join(message.get("body", b"") for message in held))
        except ValueError:
            return
        for path in paths if isinstance(paths, list) else ():
            self._owners[Path(str(path))] = owner

    def _entries(self) -> list[Path]:
        try:
            return list(self._folder.iterdir())
        except OSError:
            return []


def _length(scope: Any) -> int:
    given = dict(scope.get("headers", ())).get(b"content-length", b"")
    return int(given) if given.isdigit() else LONGEST


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _size(path: Path) -> int:
    try:
        return max(path.stat().st_size, LEAST)
    except OSError:
        return 0


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("an upload cannot be removed: %s", error.strerror)
