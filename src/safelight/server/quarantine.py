"""The quarantine of files that no database knows: unknown files are not deleted at once."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta

from safelight.errors import StorageError
from safelight.storage import Storage

log = logging.getLogger("safelight.server")

NAME = "quarantine"
DAYS = 30
"""Days after which a file in quarantine is deleted."""

FIRST = date(2025, 1, 1)
"""The first possible day of a quarantine. A machine without a battery starts in 1970."""


def put_away(storage: Storage, name: str) -> None:
    """Move a file into today's folder of the quarantine. Raises OSError, as `Storage.move`."""
    today = _today().isoformat()
    folder, _, file = name.rpartition("/")
    try:
        storage.move(name, _free(storage, f"{NAME}/{today}/{folder}/{file}"))
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        # The folder is on another disk.
        storage.move(name, _free(storage, f"{folder}/{NAME}/{today}/{file}"))


def forget(storage: Storage, folders: Iterable[str]) -> None:
    """Delete what has been in quarantine for more than DAYS days."""
    # Only a local storage can have a folder on another disk.
    own = [f"{folder}/{NAME}" for folder in folders] if storage.local else []
    for place in (NAME, *own):
        try:
            days = storage.folders(place)
        except StorageError as error:
            log.warning("the quarantine cannot be read: %s", error)
            continue
        for day in days:
            if _too_old(day):
                storage.remove_folder(f"{place}/{day}")
                log.warning("the quarantine of %s was deleted", day)


def _too_old(day: str) -> bool:
    try:
        put = date.fromisoformat(day)
    except ValueError:
        return False  # not ours
    # A day before FIRST was written while the clock was wrong.
    return FIRST <= put < _today() - timedelta(days=DAYS)


def _free(storage: Storage, name: str) -> str:
    number, free = 0, name
    while storage.find(free) is not None:
        number += 1
        free = f"{name}.{number}"
    return free


def _today() -> date:
    return datetime.now(UTC).date()
