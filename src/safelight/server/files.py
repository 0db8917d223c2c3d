"""The data folder: pictures, the inputs of jobs, thumbnails. File names are ids of ours."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from PIL import Image

from safelight.errors import SafelightError
from safelight.picture import HALF, open_picture, reason, save_plain_png, save_png, save_whole
from safelight.progress import Reader
from safelight.server import private, quarantine
from safelight.server.jobs import StorageError

log = logging.getLogger("safelight.server")

THUMBNAIL = 256
FOLDERS = ("pictures", "inputs", "thumbnails")
MARK = "folder.id"
"""The file that says which database a data folder belongs to."""

RESTORING = "restore.unfinished"
"""A file that is there while a backup is copied to a data folder."""

_ID = re.compile(r"[0-9a-f]{32}")
_OURS = re.compile(r"([0-9a-f]{32})(?:-(?:image|mask))?\.png")
"""Files that this class writes. Others in its folders are a person's, and stay."""


class Files:
    """The files of a data folder. Reading and writing raise StorageError."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def prepare(self) -> None:
        """Make the folders, closed to other users of this machine."""
        if (self.root / RESTORING).is_file():
            raise StorageError(
                "the data folder has half of a backup that was being restored: run "
                "`safelight restore` again"
            )
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
        """Return what this data folder is known by in its database; None for a new one."""
        try:
            return (self.root / MARK).read_text().strip() or None
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise StorageError(f"{MARK} cannot be read: {reason(error)}") from None

    def set_mark(self, mark: str) -> None:
        try:
            save_whole(self.root / MARK, lambda f: f.write(mark.encode()), overwrite=True)
        except SafelightError as error:
            raise StorageError(str(error)) from None

    def make_sure(self) -> None:
        """Raise StorageError if the data folder is away, as that of a disk which came loose."""
        if not (self.root / MARK).is_file():
            raise StorageError("the data folder is not there")

    def picture(self, picture_id: str) -> Path | None:
        """Return the path of a picture; None for an id that is invalid or has no file."""
        if not _ID.fullmatch(picture_id):
            return None
        path = self._picture(picture_id)
        return path if path.is_file() else None

    def thumbnail(self, picture_id: str) -> Path | None:
        """Return the path of a picture of at most 256 pixels a side, made on the first call."""
        whole = self.picture(picture_id)
        if whole is None:
            return None
        path = self.root / "thumbnails" / f"{picture_id}.png"
        if not path.is_file():
            image = open_picture(whole)
            image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
            self._save(image, path, {}, overwrite=True)
        return path

    def keep_input(self, job_id: str, name: str, image: Image.Image) -> None:
        self.make_sure()
        path = self.input_path(job_id, name)
        self._saved(path, lambda: save_plain_png(image, path))

    def input(self, job_id: str, name: str) -> Image.Image | None:
        """Return a picture that a job starts from, None if it has none.

        Raises StorageError if it cannot be read now, SafelightError if it is damaged.
        """
        path = self.input_path(job_id, name)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            self.make_sure()
            return None
        except OSError as error:
            raise StorageError(f"the {name} cannot be read: {error.strerror}") from None
        try:
            with Image.open(Reader(data)) as image:  # our own, as it was written
                image.load()
                return image
        except (OSError, SyntaxError, ValueError) as error:
            raise SafelightError(f"the {name} cannot be read again: {reason(error)}") from None

    def keep(self, image: Image.Image, picture_id: str, texts: Mapping[str, str]) -> None:
        """Write a finished picture; it gets its name once all of it is on the disk."""
        self.make_sure()
        self._save(image, self._picture(picture_id), texts, overwrite=True)

    def remove_inputs(self, job_id: str) -> None:
        for name in ("image", "mask"):
            self.input_path(job_id, name).unlink(missing_ok=True)

    def remove_pictures(self, picture_ids: Iterable[str]) -> None:
        for picture_id in picture_ids:
            for folder in ("pictures", "thumbnails"):
                (self.root / folder / f"{picture_id}.png").unlink(missing_ok=True)

    def size_of(self, job_id: str, picture_ids: Iterable[str]) -> int:
        """Return the bytes of all files of a job."""
        paths = [self.input_path(job_id, name) for name in ("image", "mask")]
        for picture_id in picture_ids:
            paths += [self.root / name / f"{picture_id}.png" for name in ("pictures", "thumbnails")]
        return sum(_size(path) for path in paths)

    def total_size(self) -> int:
        """Return the bytes of the files of all jobs. Raises StorageError."""
        total = 0
        try:
            for name in FOLDERS:
                with os.scandir(self.root / name) as entries:
                    total += sum(_size(entry) for entry in entries)
        except OSError as error:
            raise StorageError(f"the data folder cannot be read: {error.strerror}") from None
        return total

    def pictures(self) -> set[str]:
        """Return the ids of all pictures that are there."""
        with os.scandir(self.root / "pictures") as entries:
            names = (Path(entry.name) for entry in entries if entry.is_file(follow_symlinks=False))
            return {
                name.stem for name in names if name.suffix == ".png" and _ID.fullmatch(name.stem)
            }

    def sweep(self, known: Callable[[], tuple[set[str], set[str]]]) -> int:
        """Put the files of no known picture or job into quarantine; return how many.

        known: returns the ids of pictures and jobs. It is asked after the folders were looked at,
        since workers of a fleet draw meanwhile.

        A database that was restored, moved or exchanged does not know them. Folders, and files
        with names of other kinds, are left as they are. What was half written when a process was
        killed is removed.
        """
        found: dict[str, list[str]] = {}
        for folder in FOLDERS:
            with os.scandir(self.root / folder) as entries:
                found[folder] = [e.name for e in entries if e.is_file(follow_symlinks=False)]
        moved: list[str] = []
        pictures, jobs = known()
        for folder, names in found.items():
            ids = jobs if folder == "inputs" else pictures
            for name in names:
                path = self.root / folder / name
                ours = _OURS.fullmatch(name)
                try:
                    if path.match(HALF):
                        path.unlink()
                    elif ours is not None and ours[1] not in ids:
                        quarantine.put_away(self.root, path)
                        moved.append(f"{folder}/{name}")
                except OSError as error:
                    log.warning("%s/%s is not ours, and stays: %s", folder, name, error.strerror)
        if moved:
            log.warning(
                "the database does not know %d files, which are in quarantine now, for %d days: %s",
                *(len(moved), quarantine.DAYS, ", ".join(moved[:5]) + ", …" * (len(moved) > 5)),
            )
        quarantine.forget(self.root, FOLDERS)
        return len(moved)

    def _picture(self, picture_id: str) -> Path:
        return self.root / "pictures" / f"{picture_id}.png"

    def input_path(self, job_id: str, name: str) -> Path:
        return self.root / "inputs" / f"{job_id}-{name}.png"

    def _save(
        self, image: Image.Image, path: Path, texts: Mapping[str, str], *, overwrite: bool = False
    ) -> None:
        self._saved(path, lambda: save_png(image, path, texts, overwrite=overwrite))

    def _saved(self, path: Path, save: Callable[[], None]) -> None:
        try:
            save()
        except SafelightError as error:
            with contextlib.suppress(OSError):  # it may have its name, and not be on the disk
                path.unlink(missing_ok=True)
            raise StorageError(str(error)) from None


def _size(file: Path | os.DirEntry[str]) -> int:
    """Return the bytes of a file; 0 for one that is gone, and for a folder."""
    try:
        found = file.lstat() if isinstance(file, Path) else file.stat(follow_symlinks=False)
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0
