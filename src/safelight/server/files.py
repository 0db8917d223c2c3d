"""The data folder: pictures, the inputs of jobs, thumbnails. File names are ids of ours."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from safelight.errors import SafelightError
from safelight.picture import open_picture, reason, save_png
from safelight.server.jobs import StorageError

THUMBNAIL = 256
_ID = re.compile(r"[0-9a-f]{32}")


class Files:
    """The files of a data folder. Reading and writing raise StorageError."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("pictures", "inputs", "thumbnails"):
            (root / name).mkdir(parents=True, exist_ok=True)

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
        self._save(image, self.input_path(job_id, name), {})

    def input(self, job_id: str, name: str) -> Image.Image | None:
        path = self.input_path(job_id, name)
        if not path.is_file():
            return None
        try:
            with Image.open(path) as image:  # our own, as it was written
                image.load()
                return image
        except (OSError, SyntaxError) as error:
            raise StorageError(f"the {name} cannot be read again: {reason(error)}") from None

    def keep(self, image: Image.Image, picture_id: str, texts: Mapping[str, str]) -> None:
        """Write a finished picture; it gets its name once all of it is on the disk."""
        self._save(image, self._picture(picture_id), texts)

    def remove(self, job_id: str, picture_ids: list[str]) -> None:
        for name in ("image", "mask"):
            self.input_path(job_id, name).unlink(missing_ok=True)
        for picture_id in picture_ids:
            for folder in ("pictures", "thumbnails"):
                (self.root / folder / f"{picture_id}.png").unlink(missing_ok=True)

    def sweep(self, pictures: set[str], jobs: set[str]) -> int:
        """Remove the files of no known picture or job; return how many.

        They are left over when a process is killed between writing a file and committing its row.
        """
        removed = 0
        for folder in ("pictures", "thumbnails", "inputs"):
            for path in (self.root / folder).iterdir():
                owner = path.stem.split("-")[0]
                if path.suffix == ".part" or owner not in (
                    jobs if folder == "inputs" else pictures
                ):
                    path.unlink()
                    removed += 1
        return removed

    def _picture(self, picture_id: str) -> Path:
        return self.root / "pictures" / f"{picture_id}.png"

    def input_path(self, job_id: str, name: str) -> Path:
        return self.root / "inputs" / f"{job_id}-{name}.png"

    def _save(
        self, image: Image.Image, path: Path, texts: Mapping[str, str], *, overwrite: bool = False
    ) -> None:
        try:
            save_png(image, path, texts, overwrite=overwrite)
        except SafelightError as error:
            with contextlib.suppress(OSError):  # it may have its name, and not be on the disk
                path.unlink(missing_ok=True)
            raise StorageError(str(error)) from None
