"""A folder of a user's own pictures, with or without captions."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from safelight.errors import SafelightError
from safelight.picture import open_picture
from safelight.request import Request
from safelight.train.loop import progress
from safelight.weights.check import printable, read_bytes

Pixels = NDArray[np.uint8]

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp")
METADATA = "metadata.jsonl"
COMPANIONS = (".txt", ".jsonl", ".json", ".md")
"""Endings of files beside the pictures that are left out without a word."""
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
    {"file_name": "cat.png", "text": "a cat"}, as in Hugging Face's image folders: in the folder or
    in a subfolder, where names are relative to it. Raises SafelightError if there are no pictures,
    if pictures or captions are missing, or if a caption cannot be a prompt.
    """
    paths = pictures(folder)
    listed = _metadata(folder)
    examples, silent = [], []
    for path in paths:
        name, beside = path.relative_to(folder).as_posix(), path.with_suffix(".txt")
        caption = listed.get(name)
        if caption is None and beside.is_file():
            caption = _text(beside, MAX_CAPTION)
        if not (caption or "").strip():
            silent.append(path.name)
        caption = " ".join((caption or "").split())
        check_prompt(caption, f"the caption of {printable(name, 200)}")
        examples.append(Example(path, caption))
    if silent:
        raise SafelightError(
            f"{len(silent)} of {len(paths)} pictures have no caption ({_some(silent)}): write it "
            f"into a .txt of the picture's name, or a line of {METADATA}"
        )
    missing = sorted(listed.keys() - {p.relative_to(folder).as_posix() for p in paths})
    other = [name for name in missing if (folder / name).exists()]
    if other:
        raise SafelightError(
            f"{METADATA} names files that are not read: {_some(other)}; PNG, JPEG and WebP are, "
            "unless they are hidden"
        )
    if missing:
        raise SafelightError(f"{METADATA} names pictures that are not there: {_some(missing)}")
    return examples


def check_prompt(text: str, what: str) -> None:
    """Raise SafelightError that names `what` unless a text can be a prompt.

    Samples are drawn by it, perhaps hours after the start.
    """
    try:
        Request(prompt=text)
    except SafelightError as error:
        raise SafelightError(f"{what} cannot be used: {error}") from None


def check_apart(folder: Path, out: Path) -> None:
    """Raise SafelightError if what is written would be among the pictures to learn from."""
    if out.resolve().is_relative_to(folder.resolve()):
        raise SafelightError(
            f"out {out} is in {folder}, where sheets of samples would be learned from, too: give "
            "a folder beside it"
        )


def pictures(folder: Path) -> list[Path]:
    """Return all pictures of a folder and its subfolders, without hidden ones.

    Says which files of other kinds are left out. Raises SafelightError if there is no picture.
    """
    if not folder.is_dir():
        raise SafelightError(f"{folder} is not a folder")
    found, other = [], []
    for path in _visible(folder, "*"):
        if path.suffix.lower() in SUFFIXES:
            found.append(path)
        elif path.suffix.lower() not in COMPANIONS:
            other.append(path.relative_to(folder).as_posix())
    if other:
        progress(f"left out, because they are not PNG, JPEG or WebP: {_some(other)}")
    if not found:
        raise SafelightError(f"there is no picture in {folder}: PNG, JPEG and WebP are read")
    return found


def read(paths: Sequence[Path], size: int) -> Pixels:
    """Return the middle square of each picture, resized: uint8 [n, size, size, 3].

    Raises SafelightError that names those that cannot be read.
    """
    squares, bad = np.empty((len(paths), size, size, 3), np.uint8), []
    for i, path in enumerate(paths):
        try:
            image = open_picture(path)
        except SafelightError as error:
            bad.append(str(error))
            continue
        squares[i] = np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))
    if bad:
        raise SafelightError(
            f"{len(bad)} of {len(paths)} pictures cannot be read: {_some(bad, 2)}; "
            "repair them or take them out"
        )
    return squares


def digest(squares: Pixels, captions: Sequence[str]) -> str:
    """Return the SHA-256 of what is learned from."""
    found = hashlib.sha256(json.dumps([list(captions), squares.shape]).encode())
    # Its own memory is read: bytes of it would be a copy.
    found.update(np.ascontiguousarray(squares).reshape(-1).data)
    return found.hexdigest()


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


def _visible(folder: Path, pattern: str) -> list[Path]:
    """Return the files of a folder and its subfolders, sorted, without hidden files and folders."""
    return sorted(
        path
        for path in folder.rglob(pattern)
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not path.is_dir()
    )


def _metadata(folder: Path) -> dict[str, str]:
    """Return the captions in all metadata.jsonl of a folder, by names relative to the folder."""
    listed: dict[str, str] = {}
    # Deeper ones come last: of two captions the nearer file's counts.
    for path in sorted(_visible(folder, METADATA), key=lambda path: len(path.parts)):
        where = path.relative_to(folder)
        for name, text in _rows(path, where.as_posix()):
            inside = os.path.normpath(where.parent / name)  # "./a.png" is a.png
            listed[Path(inside).as_posix()] = text
    return listed


def _rows(path: Path, told: str) -> Iterator[tuple[str, str]]:
    """Yield names and captions of one metadata.jsonl. told: what to call it in errors."""
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
                f'{printable(told, 200)}, line {number}: expected {{"file_name": "cat.png", '
                '"text": "a cat"}'
            )
        yield name, text


def _text(path: Path, limit: int) -> str:
    """Return the text in a file of at most `limit` bytes."""
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SafelightError(f"{printable(path.name, 120)} cannot be read as UTF-8 text") from None


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(printable(name, 200) for name in names[:most]) + more
