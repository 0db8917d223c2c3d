"""A folder of a user's own pictures, with or without captions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from safelight.errors import SafelightError
from safelight.picture import open_picture
from safelight.weights.check import printable, read_bytes

Pixels = NDArray[np.uint8]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
METADATA = "metadata.jsonl"
MAX_CAPTION = 2**16
"""Bytes of one caption in a file of its own. A prompt has 16 KiB at most."""
MAX_LINE = 2**17
MAX_METADATA = 2**26
"""Characters of a line of metadata.jsonl, and bytes of all of it: 64 MiB, a million captions."""


@dataclass(frozen=True)
class Example:
    path: Path
    caption: str = ""


def captioned(folder: Path) -> list[Example]:
    """Return the pictures of a folder and its subfolders with their captions, sorted by path.

    The caption of cat.png is the text of cat.txt beside it, or a line of metadata.jsonl,
    {"file_name": "cat.png", "text": "a cat"}, as in Hugging Face's image folders. Raises
    SafelightError if there are no pictures, or if pictures or captions are missing.
    """
    paths = pictures(folder)
    listed = _metadata(folder)
    examples, silent = [], []
    for path in paths:
        beside = path.with_suffix(".txt")
        caption = listed.get(path.relative_to(folder).as_posix())
        if caption is None and beside.is_file():
            caption = _text(beside, MAX_CAPTION)
        if not (caption or "").strip():
            silent.append(path.name)
        examples.append(Example(path, " ".join((caption or "").split())))
    if silent:
        raise SafelightError(
            f"{len(silent)} of {len(paths)} pictures have no caption ({_some(silent)}): write it "
            f"into a .txt of the picture's name, or a line of {METADATA}"
        )
    missing = sorted(listed.keys() - {p.relative_to(folder).as_posix() for p in paths})
    if missing:
        raise SafelightError(f"{METADATA} names pictures that are not there: {_some(missing)}")
    return examples


def check_apart(folder: Path, out: Path) -> None:
    """Raise SafelightError if what is written would be among the pictures to learn from."""
    if out.resolve().is_relative_to(folder.resolve()):
        raise SafelightError(
            f"out {out} is in {folder}, where sheets of samples would be learned from, too: give "
            "a folder beside it"
        )


def pictures(folder: Path) -> list[Path]:
    """Return all pictures of a folder and its subfolders. Raises SafelightError if it has none."""
    if not folder.is_dir():
        raise SafelightError(f"{folder} is not a folder")
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )
    if not found:
        raise SafelightError(f"there is no picture in {folder}: PNG, JPEG and WebP are read")
    return found


def read(paths: Sequence[Path], size: int) -> Pixels:
    """Return the middle square of each picture, resized: uint8 [n, size, size, 3].

    Raises SafelightError that names those that cannot be read.
    """
    squares, bad = [], []
    for path in paths:
        try:
            image = open_picture(path)
        except SafelightError as error:
            bad.append(str(error))
            continue
        square = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        squares.append(np.asarray(square))
    if bad:
        raise SafelightError(
            f"{len(bad)} of {len(paths)} pictures cannot be read: {_some(bad, 2)}; "
            "repair them or take them out"
        )
    return np.stack(squares)


def digest(squares: Pixels, captions: Sequence[str]) -> str:
    """Return the SHA-256 of what is learned from."""
    words = json.dumps([list(captions), squares.shape]).encode()
    return hashlib.sha256(words + np.ascontiguousarray(squares).tobytes()).hexdigest()


def digits(size: int) -> Pixels:
    """Return scikit-learn's 1,797 handwritten digits, ink on white, uint8 [n, size, size, 3]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SafelightError("the digits are scikit-learn's: pip install scikit-learn") from None
    drawn: Any = load_digits()
    gray = (255 - drawn.images * (255 / 16)).round().astype(np.uint8)
    shape = (size, size)
    return np.stack(
        [
            np.asarray(Image.fromarray(one).convert("RGB").resize(shape, Image.Resampling.BICUBIC))
            for one in gray
        ]
    )


def _metadata(folder: Path) -> dict[str, str]:
    path = folder / METADATA
    if not path.is_file():
        return {}
    listed: dict[str, str] = {}
    # Split at newlines alone: JSON may hold other characters at which splitlines() splits.
    for number, line in enumerate(_text(path, MAX_METADATA).split("\n"), 1):
        if not line.strip():
            continue
        try:
            if len(line) > MAX_LINE:
                raise ValueError
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
            (name + text).encode()  # refuses a lone surrogate
        except (ValueError, KeyError, TypeError, RecursionError):
            name = text = None
        if not (isinstance(name, str) and isinstance(text, str)):
            raise SafelightError(
                f'{METADATA}, line {number}: expected {{"file_name": "cat.png", "text": "a cat"}}'
            )
        listed[name] = text
    return listed


def _text(path: Path, limit: int) -> str:
    """Return the text in a file of at most `limit` bytes."""
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SafelightError(f"{printable(path.name, 120)} cannot be read as UTF-8 text") from None


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(printable(name, 200) for name in names[:most]) + more
