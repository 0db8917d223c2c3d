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


def database_url(root: Path) -> str:
    """Return the URL of the database in a data folder."""
    return f"sqlite:///{root / DATABASE}"


def keep() -> None:
    """Make files that this process and its children write unreadable for other users."""
    os.umask(0o077)


def close(root: Path) -> None:
    """Remove other users' rights to a data folder that an earlier version left open to them.

    Only files of this user are changed. In a folder with other things in it, such as /tmp, only our
    files and folders are closed.
    """
    if os.name == "nt":  # a user's folders are closed to others there
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
    """Remove other users' rights to a path; return whether there were any."""
    found = path.lstat()
    mode = found.st_mode & 0o7777
    if found.st_uid != os.geteuid() or path.is_symlink() or not mode & 0o077:
        return False
    try:
        path.chmod(mode & 0o700)
    except OSError:  # a file system without permissions
        return False
    return True
