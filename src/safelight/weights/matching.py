"""Names as people type them: of a file without its ending, and the known one that is closest."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


def stem(path: Path) -> str:
    """Return the name of a file without its ending, or that of a folder."""
    return path.name if path.is_dir() else path.stem


def last_part(name: str) -> str:
    """Return a name without the folders before it."""
    return name.rpartition("/")[2]


def close_name(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is closest to a mistyped one, None if none is close.

    Folders before a name, endings and case are passed over.
    """
    plain = {stem(Path(last_part(one))).casefold(): one for one in known}
    # Only a name is compared, as the time grows with its square.
    near = get_close_matches(stem(Path(last_part(name[-200:]))).casefold(), plain, 1, 0.7)
    return plain[near[0]] if near else None
