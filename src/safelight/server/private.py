"""Keep other users of this machine out of the data folder."""

from __future__ import annotations

import os
from pathlib import Path

OURS = frozenset(
    {
        *("pictures", "inputs", "thumbnails", "quarantine", "uploads", "grids", "inside"),
        *("training", "folder.id", "server.lock", "server.address"),
    }
)
DATABASE = "jobs.sqlite3"


def keep() -> None:
    """Close what this process and its children make from now on to other users."""
    os.umask(0o077)


def close(root: Path) -> None:
    """Close a data folder that an earlier version left open, if it is this user's.

    A folder that has other things in it, as /tmp has, stays as it is; what is ours in it does not.
    """
    if os.name == "nt":  # folders of a user are closed there
        return
    entries = list(root.iterdir())
    ours = [path for path in entries if path.name in OURS or path.name.startswith(DATABASE)]
    if len(ours) == len(entries):
        _close(root)
    for path in ours:
        if _close(path) and path.is_dir() and not path.is_symlink():
            for folder, names, files in os.walk(path):
                for name in (*names, *files):
                    _close(Path(folder, name))


def _close(path: Path) -> bool:
    """Return whether the path was open, and is closed now."""
    found = path.lstat()
    mode = found.st_mode & 0o7777
    if found.st_uid != os.geteuid() or path.is_symlink() or not mode & 0o077:
        return False
    try:
        path.chmod(mode & 0o700)
    except OSError:  # a file system without rights
        return False
    return True
