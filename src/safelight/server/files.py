"""The data folder: pictures, what jobs start from, thumbnails. Names are ids, never a caller's."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

from safelight.picture import open_picture, save_png

THUMBNAIL = 256
_ID = re.compile(r"[0-9a-f]{32}")


class Files:
    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("pictures", "inputs", "thumbnails"):
            (root / name).mkdir(parents=True, exist_ok=True)

    def picture(self, picture_id: str) -> Path | None:
        """Where the picture of this id lies; None for what is no id or no file."""
        if not _ID.fullmatch(picture_id):
            return None
        path = self.root / "pictures" / f"{picture_id}.png"
        return path if path.is_file() else None

    def new_picture(self, picture_id: str) -> Path:
        return self.root / "pictures" / f"{picture_id}.png"

    def thumbnail(self, picture_id: str) -> Path | None:
        """A picture of at most 256 pixels a side, made when it is first asked for."""
        whole = self.picture(picture_id)
        if whole is None:
            return None
        path = self.root / "thumbnails" / f"{picture_id}.png"
        if not path.is_file():
            image = open_picture(whole)
            image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
            save_png(image, path, {}, overwrite=True)
        return path

    def keep_input(self, job_id: str, name: str, image: Image.Image) -> None:
        save_png(image, self._input(job_id, name), {})

    def input(self, job_id: str, name: str) -> Image.Image | None:
        path = self._input(job_id, name)
        if not path.is_file():
            return None
        with Image.open(path) as image:  # our own, as it was written
            image.load()
            return image

    def remove(self, job_id: str, picture_ids: list[str]) -> None:
        for name in ("image", "mask"):
            self._input(job_id, name).unlink(missing_ok=True)
        for picture_id in picture_ids:
            for folder in ("pictures", "thumbnails"):
                (self.root / folder / f"{picture_id}.png").unlink(missing_ok=True)

    def sweep(self, pictures: set[str], jobs: set[str]) -> int:
        """Remove what belongs to none of these: left over when a process was killed between
        writing a file and committing its row. Returns how many.
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

    def _input(self, job_id: str, name: str) -> Path:
        return self.root / "inputs" / f"{job_id}-{name}.png"
