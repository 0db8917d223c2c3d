"""The folder that a training writes to."""

from __future__ import annotations

import os
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


def save_whole(path: Path, value: Any, what: str, kept: str) -> None:
    """Write a file by a rename. Raises SafelightError if it fails, which says what is kept."""
    beside = path.with_suffix(".part")
    try:
        with beside.open("wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
        beside.unlink(missing_ok=True)
        raise SafelightError(
            f"{what} could not be written to {path.parent} ({reason(error)}); {kept}: make room "
            "and start the same command again"
        ) from None
