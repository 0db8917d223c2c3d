"""The SHA-256 of a model. A recipe names its model by it, and it finds a damaged download."""

from __future__ import annotations

import hashlib
import os
import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Self

from safelight.errors import SafelightError
from safelight.weights.cache import Stamp, keep, recall, stamp_of
from safelight.weights.check import refusal

# Below this a file is hashed faster than its digest is looked up.
_CACHED_FROM = 16 * 2**20
REOPENED = "/proc/self/fd/{}"
"""A path by which Linux opens an open file again, whatever has its name now.

macOS has /dev/fd alone, where both would share one place in the file.
"""
# Bytes; few enough to stay in the processor's cache while they are hashed and looked at.
_PIECE = 2**18


@dataclass(frozen=True, slots=True)
class FileDigest:
    """The SHA-256 of a file, and the file's stamp when it was hashed."""

    path: Path
    sha256: str
    stamp: Stamp


Look = Callable[[memoryview, int], object]
"""Called with each piece of a file while it is hashed, and the piece's offset in the file."""


def digest_files(
    files: Mapping[str, Path], looks: Mapping[Path, Look] | None = None
) -> dict[str, FileDigest]:
    """Return the digest of each file of a model. files: names inside the model to paths.

    looks: by resolved paths; called only for files that are read now, not for remembered digests.

    Raises SafelightError if a file in a hub cache is not what its name says it is.
    """
    looks = looks or {}
    return {name: digest_file(path, looks.get(path.resolve())) for name, path in files.items()}


def model_digest(digests: Mapping[str, FileDigest]) -> str:
    """Return the SHA-256 of a model, in hex.

    digests: see `digest_files`. One file (a single-file checkpoint) has its own digest, as every
    other program gives it; a folder has the digest of the lines "name sha256\\n", sorted by name.
    """
    if len(digests) == 1:
        return next(iter(digests.values())).sha256
    lines = "".join(f"{name} {found.sha256}\n" for name, found in sorted(digests.items()))
    return hashlib.sha256(os.fsencode(lines)).hexdigest()


def digest_file(path: Path, look: Look | None = None) -> FileDigest:
    """Return the SHA-256 of a file, remembered for large files as long as size and times stay.

    Raises SafelightError if a blob of a hub cache does not have the hash it is named by, or if
    the file changes while it is read.
    """
    path = path.resolve()
    with path.open("rb") as file:
        stamp = stamp_of(file.fileno())
        size = stamp[0]
        if size >= _CACHED_FROM:
            known = recall("sha256", path, stamp)
            if isinstance(known, str):
                return FileDigest(path, known, stamp)
        digest = _verified(path, file, size, look)
        if stamp_of(file.fileno()) != stamp:
            raise refusal(path.name, "it changed while it was read; load it again")
    if size >= _CACHED_FROM:
        keep("sha256", path, stamp, digest)
    return FileDigest(path, digest, stamp)


def known_digest(path: Path) -> str | None:
    """Return the SHA-256 of a file if it is remembered or quickly made, None if not."""
    path = path.resolve()
    stamp = stamp_of(path)
    if stamp[0] < _CACHED_FROM:
        return digest_file(path).sha256
    known = recall("sha256", path, stamp)
    return known if isinstance(known, str) else None


def tensors_digest(path: Path) -> str:
    """Return the SHA-256 of a safetensors file without its header.

    A1111 and kohya's scripts name a LoRA by it: it stays when the file's metadata is edited.
    """
    path = path.resolve()
    with path.open("rb") as file:
        stamp = stamp_of(file.fileno())
        known = recall("tensors", path, stamp)
        if isinstance(known, str):
            return known
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if stamp[0] >= _CACHED_FROM:
        keep("tensors", path, stamp, digest)
    return digest


def old_digest(path: Path) -> str:
    """Return the hash that A1111 named models by before 2023: of 64 KiB at 1 MiB, 8 digits."""
    with path.open("rb") as file:
        file.seek(2**20)
        return hashlib.sha256(file.read(2**16)).hexdigest()[:8]


class HashedFile:
    """A mapped weight file, compared with the digest that it had when it was loaded.

    Weights stay in their file until they are first used, and a file can be overwritten in place.
    The file is kept open, so that another file under its name changes nothing.
    """

    def __init__(self, digest: FileDigest) -> None:
        self._digest = digest
        self._seen = digest.stamp
        # A descriptor, because Python warns about a file object that nobody closes.
        self._file = os.open(digest.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._file)

    def __deepcopy__(self, memo: object) -> Self:
        return self

    @property
    def openable(self) -> str:
        """A path, in UTF-8, by which this very file is opened, also if another has its name now.

        Raises SafelightError, code "weights_changed", if the system has no such path and the name
        leads to another file, or to none.
        """
        opened = Path(REOPENED.format(self._file))
        if opened.exists():
            return str(opened)
        path = self._digest.path
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(self._file)):
            raise self._changed("replaced")
        return str(path)

    def check(self, *_: object) -> None:
        """Raise SafelightError, code "weights_changed", unless the file holds what was hashed.

        It takes a microsecond while size and times stay. If they do not, the file is hashed
        again: it may only have been touched, or removed from its folder.
        """
        stamp = stamp_of(self._file)
        if stamp == self._seen:
            return
        if stamp[0] == self._seen[0]:
            digest, at = hashlib.sha256(), 0
            # Reads by offset, because another thread may read from the same descriptor.
            while piece := os.pread(self._file, 2**20, at):
                digest.update(piece)
                at += len(piece)
            if digest.hexdigest() == self._digest.sha256:
                self._seen = stamp
                return
        raise self._changed("overwritten")

    def _changed(self, how: str) -> SafelightError:
        why = f"was {how} after it was loaded; load the model again"
        return refusal(self._digest.path.name, why, code="weights_changed")


def _sha256(file: BufferedReader, look: Look | None) -> str:
    digest, at = hashlib.sha256(), 0
    memory = bytearray(_PIECE)
    view = memoryview(memory)
    while count := file.readinto(view):
        digest.update(view[:count])
        if look is not None:
            look(view[:count], at)
        at += count
    return digest.hexdigest()


def _verified(path: Path, file: BufferedReader, size: int, look: Look | None) -> str:
    digest = _sha256(file, look)
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
