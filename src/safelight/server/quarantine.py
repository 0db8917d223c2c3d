"""Where files go that no database knows: nothing is deleted for being unknown."""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

log = logging.getLogger("safelight.server")

NAME = "quarantine"
DAYS = 30
"""Days after which a file in quarantine is deleted."""

FIRST = date(2025, 1, 1)
"""No day of a quarantine is earlier. A machine without a battery starts in 1970."""


def put_away(root: Path, path: Path) -> None:
    """Move a file into today's folder of the quarantine. Raises OSError."""
    today = _today().isoformat()
    try:
        path.rename(_free(root / NAME / today / path.parent.name, path.name))
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        # The folder is a disk of its own.
        path.rename(_free(path.parent / NAME / today, path.name))


def forget(root: Path, folders: Iterable[str]) -> None:
    """Delete what has been in quarantine for more than DAYS."""
    for place in (root / NAME, *(root / folder / NAME for folder in folders)):
        try:
            days = list(place.iterdir()) if place.is_dir() else []
        except OSError as error:
            log.warning("the quarantine cannot be read: %s", error.strerror)
            continue
        for day in days:
            if _too_old(day) and not day.is_symlink():
                shutil.rmtree(day, ignore_errors=True)
                log.warning("the quarantine of %s was deleted", day.name)


def _too_old(day: Path) -> bool:
    try:
        put = date.fromisoformat(day.name)
    except ValueError:
        return False  # somebody else's
    # Before there was a quarantine, the clock was wrong.
    return FIRST <= put < _today() - timedelta(days=DAYS)


def _free(folder: Path, name: str) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    number, path = 0, folder / name
    while path.exists():
        number += 1
        path = folder / f"{name}.{number}"
    return path


def _today() -> date:
    return datetime.now(UTC).date()
