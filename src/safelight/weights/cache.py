"""Remember what was computed from a file, as long as its size and times stay.

Each value is in a small JSON file in the user's cache folder. It can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

Stamp = tuple[int, ...]
"""What the system says of a file: size, times of change, inode, device."""


def stamp_of(file: int | Path) -> Stamp:
    """Return the stamp of a file, by its path or its open descriptor. Raises OSError."""
    s = os.fstat(file) if isinstance(file, int) else file.stat()
    return s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev


def recall(what: str, path: Path, stamp: Stamp) -> Any:
    """Return what was kept for a file; None if nothing was, or if the file has changed."""
    with suppress(OSError, RuntimeError, ValueError, TypeError):
        kept = json.loads(_file(what, path).read_text())
        if kept[:-1] == [os.fsencode(path).hex(), *stamp]:
            return kept[-1]
    return None


def keep(what: str, path: Path, stamp: Stamp, value: Any) -> None:
    """Keep a JSON value for a file. If the cache folder cannot be written, nothing is kept."""
    with suppress(OSError, RuntimeError):
        file = _file(what, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(handle, "w") as f:
            f.write(json.dumps([os.fsencode(path).hex(), *stamp, value]))
        Path(name).replace(file)


def cache_folder() -> Path:
    """Return the folder for what can be computed again: $XDG_CACHE_HOME/safelight.

    Raises RuntimeError if that is not set and there is no home directory.
    """
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "safelight"


def _file(what: str, path: Path) -> Path:
    return cache_folder() / f"{what}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
