"""A folder on this machine or at a URL, in which files are whole or absent."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from safelight.errors import SafelightError
from safelight.picture import reason, save_whole
from safelight.settings import shown


class Storage:
    """The folder that a batch writes into.

    url: a path of this machine, or a URL that fsspec knows (`s3://bucket/folder`). local: whether
    it is of this machine, where files can be appended to.

    Methods raise SafelightError, one line, if it cannot be read or written.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self.fs, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise SafelightError(f"out {shown(url)} cannot be used: {reason(error)}") from None
        self.root = str(root).rstrip("/")
        self.local = "file" in _names(self.fs.protocol)

    def path(self, name: str) -> str:
        """Return the full name of a file."""
        return f"{self.root}/{name}"

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all; one that exists is replaced."""
        if self.local:
            self.write_with(name, lambda file: file.write(data))
        else:
            self._do(lambda: self.fs.pipe_file(self._made(name), data))

    def write_with(self, name: str, write: Callable[[BinaryIO], object]) -> None:
        """Write a large file, whole or not at all; `write` is called with the opened file."""
        if self.local:
            save_whole(Path(self.path(name)), write, overwrite=True)
            return
        with tempfile.TemporaryDirectory() as folder:
            here = Path(folder) / "file"
            with here.open("wb") as file:
                write(file)
            self._do(lambda: self.fs.put_file(str(here), self._made(name)))

    def read(self, name: str) -> bytes | None:
        """Return the bytes of a file, None if there is none."""
        try:
            return self._do(lambda: self.fs.cat_file(self.path(name)), missing=True)
        except FileNotFoundError:
            return None

    def names(self, folder: str = "") -> set[str]:
        """Return the names of the files in a folder, without the folder; empty if there is none."""
        where = self.path(folder).rstrip("/")
        try:
            self.fs.invalidate_cache()
            found = self._do(lambda: self.fs.ls(where, detail=True), missing=True)
        except (FileNotFoundError, NotADirectoryError):
            return set()
        return {one["name"].rpartition("/")[2] for one in found if one["type"] == "file"}

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; those that are not there are no error."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self._do(lambda name=name: self.fs.rm_file(self.path(name)), missing=True)

    def _made(self, name: str) -> str:
        """Return the full name of a file whose folder is there: some file systems have none."""
        self.fs.makedirs(self.path(name).rpartition("/")[0], exist_ok=True)
        return self.path(name)

    def _do(self, call: Callable[[], Any], *, missing: bool = False) -> Any:
        try:
            return call()
        except (FileNotFoundError, NotADirectoryError) as error:
            if missing:
                raise
            raise self._failed(error) from None
        except (OSError, ImportError, ValueError, NotImplementedError) as error:
            raise self._failed(error) from None

    def _failed(self, error: Exception) -> SafelightError:
        return SafelightError(
            f"out {shown(self.url)} cannot be used: {reason(error)}", code="storage"
        )


class Lines:
    """A file of JSON objects, one a line, that grows.

    On this machine lines are appended to it. Elsewhere files cannot be appended to: parts of PART
    lines are written, and put together at the end.
    """

    PART = 100

    def __init__(self, storage: Storage, stem: str) -> None:
        self._storage, self._stem = storage, stem
        self.name = f"{stem}.jsonl"
        self._waiting: list[str] = []
        self._part = 0
        self._file: BinaryIO | None = None

    def load(self) -> list[dict[str, Any]]:
        """Return the objects. A last line that was cut off is not among them, and is cut away."""
        data = self._storage.read(self.name) or b""
        lines = data[: data.rfind(b"\n") + 1].splitlines()
        if data and not data.endswith(b"\n"):
            self._replace(lines)
        for part in self._parts():
            self._part = int(part.rpartition("-")[2].partition(".")[0])
            lines += (self._storage.read(part) or b"").splitlines()
        # A kill between putting parts together and removing them leaves lines twice.
        return [self._parsed(line) for line in dict.fromkeys(lines)]

    def append(self, *records: dict[str, Any]) -> None:
        """Add objects, all of them in one write."""
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        if self._storage.local:
            self._write("".join(lines).encode())
            return
        self._waiting += lines
        if len(self._waiting) >= self.PART:
            self.flush()

    def flush(self) -> None:
        """Write what waits for its part to be full."""
        if self._waiting:
            self._part += 1
            name = f"{self._stem}-{self._part:08d}.part.jsonl"
            self._storage.write(name, "".join(self._waiting).encode())
            self._waiting = []

    def replace(self, records: Iterable[dict[str, Any]]) -> None:
        """Write the file anew, with these objects alone."""
        self._replace(json.dumps(record, ensure_ascii=False).encode() for record in records)
        self._waiting = []
        self._storage.remove(self._parts())

    def _replace(self, lines: Iterable[bytes]) -> None:
        self.close()
        self._storage.write(self.name, b"".join(line + b"\n" for line in lines))

    def finish(self) -> None:
        """Put all parts together."""
        self.flush()
        self.close()
        if self._parts():
            self.replace(self.load())

    def close(self) -> None:
        """Close the file, with all of it on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _parts(self) -> list[str]:
        if self._storage.local:
            return []
        names = self._storage.names()
        return sorted(n for n in names if n.startswith(f"{self._stem}-") and ".part." in n)

    def _write(self, data: bytes) -> None:
        path = Path(self._storage.path(self.name))
        try:
            if self._file is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = path.open("ab", buffering=0)
            self._file.write(data)
        except OSError as error:
            raise SafelightError(f"{shown(str(path))} cannot be written: {reason(error)}") from None

    def _parsed(self, line: bytes) -> dict[str, Any]:
        try:
            found = json.loads(line)
            if isinstance(found, dict):
                return found
        except (ValueError, RecursionError):
            pass
        raise SafelightError(
            f"{self.name} in {shown(self._storage.url)} has a line that is not ours: "
            "give another --out"
        )


def _names(protocol: str | tuple[str, ...]) -> tuple[str, ...]:
    return (protocol,) if isinstance(protocol, str) else protocol
