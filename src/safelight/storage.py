"""A folder on this machine or at a URL, in which files are whole or absent."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from safelight.errors import AwayError, SafelightError, StorageError
from safelight.paths import expanded
from safelight.picture import reason, save_whole

CHUNK = 4 << 20
"""Bytes of a large file that are read at a time."""

_OBJECTS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"})
"""Protocols of object stores, which have names with slashes and no folders to make."""

_PATIENCE = {"connect_timeout": 3, "read_timeout": 8, "retries": {"max_attempts": 1}}
"""Timeouts of S3's client in seconds, and its attempts. Both are low, because callers try again as
well, and their own callers wait.
"""


def storage_at(where: str | Path) -> Storage:
    """Return the storage at a path of this machine, or at a URL that fsspec knows.

    Raises SafelightError if a package for that kind of URL is missing.
    """
    text = str(where)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    return Remote(text) if "://" in text else Folder(expanded(text))


def checked(given: str) -> str:
    """Return where a server's storage is, as it was given; a path is made absolute.

    Raises SafelightError for a URL with credentials, which all users of the machine could see, for
    memory://, which ends with its process, and for a URL without a bucket or with ? # * [ or ].
    """
    scheme, mark, rest = given.partition("://")
    if not mark:
        return str(expanded(given).resolve())
    if "@" in rest.partition("/")[0]:
        raise SafelightError(
            "--storage must be a URL without credentials: those of S3 are taken from "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or from a profile (AWS_PROFILE)"
        )
    if scheme == "memory":
        raise SafelightError("--storage memory:// ends with its process: give s3:// or a folder")
    if not rest.strip("/") or set("?#*[]") & set(rest):
        raise SafelightError("--storage must be as s3://bucket/prefix, without any of ? # * [ ]")
    return given.rstrip("/")


@dataclass(frozen=True)
class Stored:
    """A file as it was found. size: its bytes. changed: in nanoseconds since 1970."""

    storage: Storage
    name: str
    size: int
    changed: int

    @property
    def path(self) -> Path | None:
        """Its path, if the storage is on this machine; else None."""
        return Path(self.storage.path(self.name)) if self.storage.local else None

    def parts(self) -> Iterator[bytes]:
        """Yield its bytes, some MiB at a time. Raises FileNotFoundError if it is gone."""
        return self.storage.parts(self)


class Storage(ABC):
    """Files under one folder. A file's name may have folders, separated by slashes.

    url: where it is. root: the same in the form of its file system. local: whether it is on this
    machine, where files have paths and can be appended to.

    Methods raise StorageError, one line, if it cannot be read or written.
    """

    url: str
    root: str
    local: bool

    def path(self, name: str) -> str:
        """Return the full name of a file."""
        return f"{self.root}/{name}" if name else self.root

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all; one that exists is replaced."""
        self.write_with(name, lambda file: file.write(data))

    @abstractmethod
    def write_with(self, name: str, write: Callable[[BinaryIO], object]) -> None:
        """Write a large file, whole or not at all; `write` is called with the opened file."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """Return the bytes of a file, None if there is none."""

    @abstractmethod
    def find(self, name: str) -> Stored | None:
        """Return a file, None if there is none."""

    @abstractmethod
    def parts(self, file: Stored) -> Iterator[bytes]:
        """See `Stored.parts`."""

    @abstractmethod
    def sizes(self, folder: str) -> dict[str, int]:
        """Return the bytes of each file in a folder, by its name without the folder.

        Links are left out. A folder that is not there has none.
        """

    @abstractmethod
    def folders(self, folder: str) -> set[str]:
        """Return the names of the folders in a folder, without links."""

    @abstractmethod
    def remove(self, names: Iterable[str]) -> None:
        """Remove files; those that are not there are no error."""

    @abstractmethod
    def remove_folder(self, folder: str) -> None:
        """Remove a folder with all that is in it, as far as that can be done now."""

    @abstractmethod
    def move(self, name: str, to: str) -> None:
        """Give a file another name. Raises OSError on this machine, as `Path.rename`."""

    def names(self, folder: str = "") -> set[str]:
        """Return the names of the files in a folder, without the folder; empty if there is none."""
        return {*self.sizes(folder)}


class Folder(Storage):
    """A folder of this machine. A file has its name once all of it is on the disk."""

    local = True

    def __init__(self, root: Path) -> None:
        self.url = self.root = str(root)

    def write_with(self, name: str, write: Callable[[BinaryIO], object]) -> None:
        try:
            save_whole(self.path(name), write, overwrite=True)
        except SafelightError as error:
            raise StorageError(str(error)) from None

    def read(self, name: str) -> bytes | None:
        try:
            return Path(self.path(name)).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._failed(error) from None

    def find(self, name: str) -> Stored | None:
        path = Path(self.path(name))
        try:
            if not path.is_file():
                return None
            found = path.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._failed(error) from None
        return Stored(self, name, found.st_size, found.st_mtime_ns)

    def parts(self, file: Stored) -> Iterator[bytes]:
        with Path(self.path(file.name)).open("rb") as reading:
            while chunk := reading.read(CHUNK):
                yield chunk

    def sizes(self, folder: str) -> dict[str, int]:
        found = {}
        for entry in self._entries(folder):
            with contextlib.suppress(FileNotFoundError):  # gone just now
                if entry.is_file(follow_symlinks=False):
                    found[entry.name] = entry.stat(follow_symlinks=False).st_size
        return found

    def folders(self, folder: str) -> set[str]:
        return {e.name for e in self._entries(folder) if e.is_dir(follow_symlinks=False)}

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.path(folder)) as entries:
                return list(entries)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise self._failed(error) from None

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            try:
                Path(self.path(name)).unlink(missing_ok=True)
            except OSError as error:
                raise self._failed(error) from None

    def remove_folder(self, folder: str) -> None:
        shutil.rmtree(self.path(folder), ignore_errors=True)

    def move(self, name: str, to: str) -> None:
        target = Path(self.path(to))
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        Path(self.path(name)).rename(target)

    def _failed(self, error: OSError) -> StorageError:
        return StorageError(f"{self.url} cannot be used: {reason(error)}")


class Remote(Storage):
    """Files at a URL, by fsspec. A file is put as one object, which is there whole or not at all.

    fs: fsspec's file system.
    """

    local = False

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url
        protocol = url.partition("://")[0]
        how = {"config_kwargs": _PATIENCE, "use_listings_cache": False}
        try:
            self.fs, root = fsspec.core.url_to_fs(url, **how if protocol in ("s3", "s3a") else {})
        except ImportError as error:
            more = ": pip install 'safelight[s3]'" if protocol in ("s3", "s3a") else ""
            raise SafelightError(f"{url} cannot be used: {reason(error)}{more}") from None
        except ValueError as error:
            raise SafelightError(f"{url} cannot be used: {reason(error)}") from None
        if hasattr(self.fs, "retries"):
            self.fs.retries = 1  # its client tries again by itself
        self.root = str(root).rstrip("/")
        self._makes_folders = protocol not in _OBJECTS
        self._made: set[str] = set()

    def write(self, name: str, data: bytes) -> None:
        self._do(lambda: self.fs.pipe_file(self._place(name), data))

    def write_with(self, name: str, write: Callable[[BinaryIO], object]) -> None:
        try:
            with tempfile.TemporaryDirectory() as folder:
                here = Path(folder) / "file"
                with here.open("wb") as file:
                    write(file)
                self._do(lambda: self.fs.put_file(str(here), self._place(name)))
        except OSError as error:
            raise StorageError(
                f"the folder for temporary files cannot be used: {reason(error)}"
            ) from None

    def read(self, name: str) -> bytes | None:
        return self._do(lambda: self.fs.cat_file(self.path(name)), missing=None)

    def find(self, name: str) -> Stored | None:
        found = self._do(lambda: self.fs.info(self.path(name)), missing=None)
        if found is None or found["type"] != "file":
            return None
        return Stored(self, name, found["size"], _changed(found))

    def parts(self, file: Stored) -> Iterator[bytes]:
        path = self.path(file.name)
        for start in range(0, file.size, CHUNK):
            end = min(start + CHUNK, file.size)
            part = self._do(
                lambda start=start, end=end: self.fs.cat_file(path, start=start, end=end),
                missing=None,
            )
            if part is None:
                raise FileNotFoundError(file.name)
            yield part

    def sizes(self, folder: str) -> dict[str, int]:
        found = self._list(folder)
        return {_last(one["name"]): one["size"] for one in found if one["type"] == "file"}

    def folders(self, folder: str) -> set[str]:
        return {_last(one["name"]) for one in self._list(folder) if one["type"] == "directory"}

    def _list(self, folder: str) -> list[dict[str, Any]]:
        where = self.path(folder)
        self.fs.invalidate_cache()
        found = self._do(lambda: self.fs.ls(where, detail=True), missing=[])
        self.fs.invalidate_cache()  # it would keep a million names
        return [one for one in found if one["name"].strip("/") != where.strip("/")]

    def remove(self, names: Iterable[str]) -> None:
        paths = [self.path(name) for name in names]
        if self.fs.async_impl and not set("*?[") & set("".join(paths)):
            if paths:  # many of them in one request
                self._do(lambda: self.fs.rm(paths), missing=None)
            return
        for path in paths:
            self._do(lambda path=path: self.fs.rm_file(path), missing=None)

    def remove_folder(self, folder: str) -> None:
        self._do(lambda: self.fs.rm(self.path(folder), recursive=True), missing=None)

    def move(self, name: str, to: str) -> None:
        target = self._place(to)
        self._do(lambda: self.fs.cp_file(self.path(name), target))
        self.remove([name])

    def _place(self, name: str) -> str:
        """Return the full name of a file, and make its folder where that is needed."""
        folder = self.path(name).rpartition("/")[0]
        if self._makes_folders and folder not in self._made:
            self.fs.makedirs(folder, exist_ok=True)
            self._made.add(folder)
        return self.path(name)

    def _do(self, call: Callable[[], Any], **missing: Any) -> Any:
        """Return what a call returns, or `missing`, if given, for a file or folder not there."""
        try:
            return call()
        except (FileNotFoundError, NotADirectoryError) as error:
            if "missing" in missing:
                return missing["missing"]
            raise self._failed(error) from None
        except Exception as error:  # the clients of stores have errors of their own
            raise self._failed(error) from None

    def _failed(self, error: Exception) -> AwayError:
        # The message may hold a private address.
        why = re.sub(r'"?https?://\S*', "…", reason(error))
        return AwayError(f"the storage {self.url} cannot be used: {why}")


def _changed(found: dict[str, Any]) -> int:
    for key in ("LastModified", "mtime", "created"):
        value = found.get(key)
        if isinstance(value, datetime):
            value = value.timestamp()
        if isinstance(value, int | float):
            return round(value * 1e9)
    return 0


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]
