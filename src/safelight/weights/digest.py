"""The SHA-256 of a model. A recipe names its model by it, and it finds a damaged download."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safelight.weights.check import refusal

# Below this a file is hashed faster than its digest is looked up.
_CACHED_FROM = 16 * 2**20


def model_digest(files: Mapping[str, Path]) -> str:
    """Return the SHA-256 of a model, in hex.

    files: names inside the model to paths. One file (a single-file checkpoint) has its own
      digest, as every other program gives it; a folder has the digest of the lines
      "name sha256\\n", sorted by name.

    Raises SafelightError if a file in a hub cache is not what its name says it is.
    """
    digests = {name: file_digest(path) for name, path in files.items()}
    if len(digests) == 1:
        return next(iter(digests.values()))
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, remembered for large files as long as size and times stay.

    Raises SafelightError if a blob of a hub cache does not have the hash it is named by.
    """
    path = path.resolve()
    s = path.stat()
    stamp = [str(path), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino]
    note = cache_folder() / f"sha256-{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    if s.st_size >= _CACHED_FROM:
        with suppress(OSError, ValueError):
            remembered = json.loads(note.read_text())
            if remembered[:-1] == stamp:
                return remembered[-1]
    digest = _verified(path, s.st_size)
    if s.st_size >= _CACHED_FROM:
        with suppress(OSError):
            _write(note, json.dumps([*stamp, digest]))
    return digest


def cache_folder() -> Path:
    """Return the folder for what can be computed again: $XDG_CACHE_HOME/safelight."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "safelight"


def _verified(path: Path, size: int) -> str:
    with path.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
        # The hub names a large file by its SHA-256 and a small one as git names a blob.
        if path.parent.name != "blobs" or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", path.name):
            return digest
        found = digest
        if len(path.name) == 40:
            git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
            f.seek(0)
            git.update(f.read())
            found = git.hexdigest()
    if found != path.name:
        raise refusal(path.name, f"the download is damaged; delete it and get it again: {path}")
    return digest


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w") as f:
        f.write(text)
    Path(name).replace(path)
