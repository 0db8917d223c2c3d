"""The SHA-256 of a model. A recipe names its model by it, and it finds a damaged download."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Self

from safelight.weights.check import refusal

# Below this a file is hashed faster than its digest is looked up.
_CACHED_FROM = 16 * 2**20


@dataclass(frozen=True, slots=True)
class FileDigest:
    """The SHA-256 of a file, and what the file's system said about it when it was hashed."""

    path: Path
    sha256: str
    stamp: tuple[int, ...]


def digest_files(files: Mapping[str, Path]) -> dict[str, FileDigest]:
    """Return the digest of each file of a model. files: names inside the model to paths.

    Raises SafelightError if a file in a hub cache is not what its name says it is.
    """
    return {name: digest_file(path) for name, path in files.items()}


def model_digest(digests: Mapping[str, FileDigest]) -> str:
    """Return the SHA-256 of a model, in hex.

    digests: see `digest_files`. One file (a single-file checkpoint) has its own digest, as every
    other program gives it; a folder has the digest of the lines "name sha256\\n", sorted by name.
    """
    if len(digests) == 1:
        return next(iter(digests.values())).sha256
    lines = "".join(f"{name} {found.sha256}\n" for name, found in sorted(digests.items()))
    return hashlib.sha256(os.fsencode(lines)).hexdigest()


def digest_file(path: Path) -> FileDigest:
    """Return the SHA-256 of a file, remembered for large files as long as size and times stay.

    Raises SafelightError if a blob of a hub cache does not have the hash it is named by, or if
    the file changes while it is read.
    """
    path = path.resolve()
    with path.open("rb") as file:
        stamp = _stamp(file.fileno())
        size = stamp[0]
        known = [os.fsencode(path).hex(), *stamp]
        note = cache_folder() / f"sha256-{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
        if size >= _CACHED_FROM:
            with suppress(OSError, ValueError, TypeError):
                remembered = json.loads(note.read_text())
                if remembered[:-1] == known and isinstance(remembered[-1], str):
                    return FileDigest(path, remembered[-1], stamp)
        digest = _verified(path, file, size)
        if _stamp(file.fileno()) != stamp:
            raise refusal(path.name, "it changed while it was read; load it again")
    if size >= _CACHED_FROM:
        with suppress(OSError):
            _write(note, json.dumps([*known, digest]))
    return FileDigest(path, digest, stamp)


class Original:
    """A weight file that is mapped, held against the digest of what was read of it.

    Weights stay in their file until they are first used, and a file can be overwritten in place.
    The file is kept open, so that another file under its name changes nothing.
    """

    def __init__(self, digest: FileDigest) -> None:
        self._digest = digest
        self._seen = digest.stamp
        # A descriptor: a file object that nobody closes is warned about.
        self._file = os.open(digest.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._file)

    def __deepcopy__(self, memo: object) -> Self:
        return self

    @property
    def openable(self) -> str:
        """A path of the file for libraries that take UTF-8 alone."""
        path = str(self._digest.path)
        try:
            path.encode()
        except UnicodeEncodeError:
            return f"/dev/fd/{self._file}"
        return path

    def check(self, *_: object) -> None:
        """Raise SafelightError, code "weights_changed", unless the file holds what was hashed.

        It takes a microsecond while size and times stay. If they do not, the file is hashed
        again: it may have been touched, or removed from its folder.
        """
        stamp = _stamp(self._file)
        if stamp == self._seen:
            return
        if stamp[0] == self._seen[0]:
            digest, at = hashlib.sha256(), 0
            # Each piece by its place: another thread may be reading, too.
            while piece := os.pread(self._file, 2**20, at):
                digest.update(piece)
                at += len(piece)
            if digest.hexdigest() == self._digest.sha256:
                self._seen = stamp
                return
        raise refusal(
            self._digest.path.name,
            "was overwritten after it was loaded; load the model again",
            code="weights_changed",
        )


def _stamp(descriptor: int) -> tuple[int, ...]:
    s = os.fstat(descriptor)
    return s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev


def cache_folder() -> Path:
    """Return the folder for what can be computed again: $XDG_CACHE_HOME/safelight."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "safelight"


def _verified(path: Path, file: BufferedReader, size: int) -> str:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    # The hub names a large file by its SHA-256 and a small one as git names a blob.
    if path.parent.name != "blobs" or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", path.name):
        return digest
    found = digest
    if len(path.name) == 40:
        git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        file.seek(0)
        while piece := file.read(2**20):
            git.update(piece)
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
