"""Paths as people write them."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """Return a path with ~ replaced by the home directory, if there is one.

    Shells leave the ~ of `--out=~/pictures` as it is.
    """
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises without a home
