"""The files of a server: pictures, inputs of jobs and thumbnails, in a folder or at a URL.

File names are ids of ours.
"""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from safelight.errors import SafelightError, StorageError
from safelight.picture import HALF, open_picture, reason, write_plain_png, write_png
from safelight.progress import Reader
from safelight.request_pictures import INPUTS, PICTURES, inputs_of
from safelight.server import private, quarantine
from safelight.storage import Stored, storage_at

log = logging.getLogger("safelight.server")

THUMBNAIL = 256
FOLDERS = ("pictures", "inputs", "thumbnails")
MARK = "folder.id"
"""The file that says which database a storage belongs to."""

RESTORING = "restore.unfinished"
"""A file that exists while a backup is copied to a storage."""

_ID = re.compile(r"[0-9a-f]{32}")
_OURS = re.compile(rf"([0-9a-f]{{32}})(?:-(?:{'|'.join(INPUTS)}))?\.png")
"""Names of files that this class writes. Other files in its folders are a person's, and stay."""


class Files:
    """The files of a server. Reading and writing raise StorageError.

    where: a folder of this machine, such as the data folder, or a URL that fsspec knows.
    """

    def __init__(self, where: Path | str) -> None:
        self.storage = storage_at(where)

    @property
    def local(self) -> bool:
        """Whether they are in a folder of this machine."""
        return self.storage.local

    @property
    def root(self) -> Path:
        """The folder of this machine that they are in."""
        return Path(self.storage.root)

    def prepare(self) -> None:
        """Make the folders, closed to other users of this machine."""
        if self.storage.find(RESTORING) is not None:
            raise StorageError(
                "the data folder has half of a backup that was being restored: run "
                "`safelight restore` again"
            )
        if not self.local:
            return
        try:
            for name in FOLDERS:
                (self.root / name).mkdir(mode=0o700, parents=True, exist_ok=True)
            for half in self.root.glob(HALF):
                if half.is_file():
                    half.unlink()
            private.close(self.root)
        except OSError as error:
            raise StorageError(f"the data folder cannot be used: {error.strerror}") from None

    def mark(self) -> str | None:
        """Return the mark by which its database knows this storage; None for a new storage."""
        try:
            return (self.storage.read(MARK) or b"").decode().strip() or None
        except UnicodeDecodeError as error:
            raise StorageError(f"{MARK} cannot be read: {reason(error)}") from None

    def set_mark(self, mark: str) -> None:
        self.storage.write(MARK, mark.encode())

    def make_sure(self) -> None:
        """Raise StorageError if the storage is away, as when a disk came loose."""
        if self.storage.find(MARK) is None:
            what = "the data folder" if self.local else f"the storage {self.storage.url}"
            raise StorageError(f"{what} is not there")

    def picture(self, picture_id: str) -> Stored | None:
        """Return a picture; None for an id that is invalid or has no file."""
        return self.storage.find(picture_name(picture_id)) if _ID.fullmatch(picture_id) else None

    def picture_bytes(self, picture_id: str) -> bytes | None:
        """Return the bytes of a picture; None for an id that is invalid or has no file."""
        return self.storage.read(picture_name(picture_id)) if _ID.fullmatch(picture_id) else None

    def thumbnail(self, picture_id: str) -> Stored | None:
        """Return a picture of at most 256 pixels a side, made on the first call."""
        if self.picture(picture_id) is None:
            return None
        name = thumbnail_name(picture_id)
        if (found := self.storage.find(name)) is not None:
            return found
        whole = self.picture_bytes(picture_id)
        if whole is None:
            return None
        image = open_picture(whole)
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        self._save(name, lambda file: write_png(file, image, {}))
        return self.storage.find(name)

    def keep_input(self, job_id: str, name: str, image: Image.Image) -> None:
        self.make_sure()
        self._save(input_name(job_id, name), lambda file: write_plain_png(file, image))

    def input_bytes(self, job_id: str, name: str) -> bytes | None:
        """Return the PNG of an input picture of a job; None if it has none."""
        data = self.storage.read(input_name(job_id, name))
        if data is None:
            self.make_sure()
        return data

    def input_path(self, job_id: str, name: str, folder: Path) -> Path | None:
        """Return the path of an input picture of a job on this machine; None if it has none.

        A picture in a storage elsewhere is copied to `folder`.
        """
        if self.local:
            return Path(self.storage.path(input_name(job_id, name)))
        data = self.input_bytes(job_id, name)
        if data is None:
            return None
        path = folder / f"{name}.png"
        path.write_bytes(data)
        return path

    def input(self, job_id: str, name: str) -> Image.Image | None:
        """Return an input picture of a job; None if it has none.

        Raises StorageError if it cannot be read now, SafelightError if it is damaged.
        """
        data = self.input_bytes(job_id, name)
        if data is None:
            return None
        try:
            with Image.open(Reader(data)) as image:  # our own, as it was written
                image.load()
                return image
        except (OSError, SyntaxError, ValueError) as error:
            raise SafelightError(f"the {name} cannot be read again: {reason(error)}") from None

    def keep(self, image: Image.Image, picture_id: str, texts: Mapping[str, str]) -> None:
        """Write a finished picture; the file gets its name once it is complete."""
        self.make_sure()
        self._save(picture_name(picture_id), lambda file: write_png(file, image, texts))

    def remove_inputs(self, job_id: str) -> None:
        self.storage.remove(input_name(job_id, name) for name in INPUTS)

    def remove_pictures(self, picture_ids: Iterable[str]) -> None:
        self.storage.remove(
            name(picture_id)
            for picture_id in picture_ids
            for name in (picture_name, thumbnail_name)
        )

    def size_of(self, job_id: str, picture_ids: Iterable[str]) -> int:
        """Return the bytes of all files of a job."""
        names: list[str] = []
        for picture_id in picture_ids:
            names += [picture_name(picture_id), thumbnail_name(picture_id)]
        found = [self.storage.find(name) for name in names]
        for setting in PICTURES:
            for name in inputs_of(setting):
                found.append(self.storage.find(input_name(job_id, name)))
                if found[-1] is None:  # none follows one that is not there
                    break
        return sum(one.size for one in found if one is not None)

    def total_size(self) -> int:
        """Return the bytes of the files of all jobs."""
        return sum(sum(self.storage.sizes(folder).values()) for folder in FOLDERS)

    def pictures(self) -> set[str]:
        """Return the ids of all pictures that are there."""
        names = (Path(name) for name in self.storage.sizes("pictures"))
        return {name.stem for name in names if name.suffix == ".png" and _ID.fullmatch(name.stem)}

    def sweep(self, known: Callable[[], tuple[set[str], set[str]]]) -> int:
        """Move the files of unknown pictures and jobs into quarantine; return how many.

        known: returns the ids of pictures and jobs. It is called after the folders were listed,
        since workers of a fleet draw meanwhile.

        Files may be unknown after the database was restored, moved or exchanged. Folders, and files
        with names of other kinds, are left as they are. What was half written when a process was
        killed is removed.
        """
        found = {folder: [*self.storage.sizes(folder)] for folder in FOLDERS}
        moved: list[str] = []
        pictures, jobs = known()
        for folder, names in found.items():
            ids = jobs if folder == "inputs" else pictures
            for name in names:
                file, ours = f"{folder}/{name}", _OURS.fullmatch(name)
                try:
                    if fnmatch.fnmatchcase(name, HALF):
                        self.storage.remove([file])
                    elif ours is not None and ours[1] not in ids:
                        quarantine.put_away(self.storage, file)
                        moved.append(file)
                except (OSError, StorageError) as error:
                    if not self.local:
                        raise
                    log.warning("%s is not ours, and stays: %s", file, reason(error))
        if moved:
            log.warning(
                "the database does not know %d files, which are in quarantine now, for %d days: %s",
                *(len(moved), quarantine.DAYS, ", ".join(moved[:5]) + ", …" * (len(moved) > 5)),
            )
        quarantine.forget(self.storage, FOLDERS)
        return len(moved)

    def _save(self, name: str, write: Callable[[BinaryIO], object]) -> None:
        try:
            self.storage.write_with(name, write)
        except StorageError:
            if self.local:  # the file may have its name, and not be on the disk
                with contextlib.suppress(StorageError):
                    self.storage.remove([name])
            raise


def picture_name(picture_id: str) -> str:
    """Return the name of a picture's file in the storage."""
    return f"pictures/{picture_id}.png"


def thumbnail_name(picture_id: str) -> str:
    """Return the name of the file of a picture's thumbnail in the storage."""
    return f"thumbnails/{picture_id}.png"


def input_name(job_id: str, name: str) -> str:
    """Return the name of the file of a job's input picture in the storage."""
    return f"inputs/{job_id}-{name}.png"
