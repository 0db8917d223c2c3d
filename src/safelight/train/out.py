"""The folder that a training writes to."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from safelight.errors import SafelightError
from safelight.picture import reason

_HELD: dict[Path, FileLock] = {}
"""The locks of this process. They end with it, so that a kill leaves none."""


def make_folder(folder: Path) -> None:
    """Make the folder of a run. Raises SafelightError if it cannot be one."""
    try:
        str(folder).encode()  # TensorBoard writes to no other
        folder.mkdir(parents=True, exist_ok=True)
    except UnicodeEncodeError:
        raise SafelightError(f"out {folder} must have a name in UTF-8") from None
    except OSError as error:
        raise SafelightError(f"out {folder} cannot be a folder: {error.strerror}") from None


def hold(folder: Path) -> None:
    """Keep the trainings of other processes out of a folder. Raises SafelightError if one is in it.

    Two would write the same checkpoint and the same model at once.
    """
    folder = folder.resolve()
    if folder in _HELD:
        return
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise SafelightError(
            f"another training writes to {folder}: wait for its end, or give another --out",
            code="busy",
        ) from None
    except (OSError, NotImplementedError):
        return  # a file system without locks
    _HELD[folder] = lock


class _Noted(io.FileIO):
    """A file that keeps the error of a write. torch's own says only that a write failed."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


def save_whole(path: Path, value: Any, what: str, kept: str) -> None:
    """Write a file by a rename. Raises SafelightError if it fails, which says what is kept."""
    beside, raw = path.with_suffix(".part"), None
    try:
        raw = _Noted(beside, "wb")
        with io.BufferedWriter(raw) as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
        beside.unlink(missing_ok=True)
        cause = error if raw is None or raw.error is None else raw.error
        raise SafelightError(
            f"{what} could not be written to {path.parent} ({reason(cause)}); {kept}: make room "
            "and start the same command again"
        ) from None


def is_kept(path: Path, rows: int, say: Callable[[str], None]) -> bool:
    """Return whether a file has a tensor of so many rows. say: is told of a damaged file."""
    if not path.exists():
        return False
    try:
        # Mapped: the tensor is not read.
        if len(torch.load(path, weights_only=True, map_location="cpu", mmap=True)) == rows:
            return True
    except Exception:  # for a damaged file it raises anything
        pass
    say(f"{path} is damaged: it is made again")
    return False
