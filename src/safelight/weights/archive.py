"""Read the zip archive that torch.save writes, without trusting it.

What torch.save never writes is refused: compression, two entries of one name, names that lead
elsewhere, entries that overlap, code. Format: pkware's APPNOTE.TXT, and torch/serialization.py.
"""

from __future__ import annotations

import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from safelight.weights.check import MAX_TENSORS, refusal

MAX_ENTRIES = MAX_TENSORS + 16
MAX_DIRECTORY = MAX_ENTRIES * 256
MAX_PICKLE = 2**23
"""Bytes of data.pkl. That of Stable Diffusion has 200,000."""

_TAIL = 98
"""Bytes of the records at the end of a zip archive without a comment."""


@dataclass(frozen=True, slots=True)
class Archive:
    """What an archive holds.

    pickle: the content of data.pkl. records: start and size, in bytes, of each storage in the file.
    """

    pickle: bytes
    records: dict[str, tuple[int, int]]


def read_archive(path: Path, name: str) -> Archive:
    """Read what an archive says about itself; the tensors themselves are not touched.

    name: what to call the file in errors. Raises SafelightError.
    """
    try:
        with path.open("rb") as file:
            return _read(file, name)
    except OSError as e:
        raise refusal(name, f"cannot be read ({e.strerror})") from None
    # For a broken file the zip library raises whatever its parts raise.
    except (
        zipfile.BadZipFile,
        struct.error,
        ValueError,
        EOFError,
        RuntimeError,
        OverflowError,
    ) as e:
        raise refusal(name, f"a broken zip archive ({e})") from None


def _read(file: BinaryIO, name: str) -> Archive:
    size = file.seek(0, 2)
    _check_directory(file, name, size)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if len(entries) > MAX_ENTRIES:
            raise refusal(name, f"more than {MAX_ENTRIES} entries in the archive")
        tops = {entry.filename.partition("/")[0] for entry in entries}
        if len(tops) != 1:
            raise refusal(name, "not an archive that torch.save wrote: not one folder in it")
        top, spans, records = tops.pop(), [], {}
        seen: set[str] = set()
        for entry in entries:
            inner = entry.filename.removeprefix(f"{top}/")
            if entry.filename in seen:
                raise refusal(name, f"{inner!r:.60} is in the archive twice")
            seen.add(entry.filename)
            _check_entry(entry, inner, name)
            start = _data_start(file, entry, name)
            spans.append((entry.header_offset, start + entry.file_size))
            if inner.startswith("data/"):
                records[inner.removeprefix("data/")] = (start, entry.file_size)
        spans.sort()
        ends = [end for _, end in spans]
        starts = [start for start, _ in spans[1:]] + [archive.start_dir]
        if any(end > start for end, start in zip(ends, starts, strict=True)):
            raise refusal(name, "entries of the archive overlap")
        if f"{top}/data.pkl" not in seen:
            raise refusal(name, "not a file that torch.save wrote: it has no data.pkl")
        if f"{top}/byteorder" in seen and archive.read(f"{top}/byteorder") != b"little":
            raise refusal(name, "its numbers are not in little-endian order")
        return Archive(archive.read(f"{top}/data.pkl"), records)


def _check_directory(file: BinaryIO, name: str, size: int) -> None:
    """Refuse an archive whose list of entries is too long to be read at all."""
    file.seek(max(0, size - _TAIL))
    tail = file.read(_TAIL).rjust(_TAIL, b"\0")
    if tail[-22:-18] != b"PK\5\6":
        raise refusal(name, "cut short: the end of the archive is missing")
    length = struct.unpack("<I", tail[-10:-6])[0]
    if tail[-42:-38] == b"PK\6\7" and tail[:4] == b"PK\6\6":
        length = struct.unpack("<Q", tail[40:48])[0]
    if length > MAX_DIRECTORY:
        raise refusal(name, f"a list of entries of {length} bytes; {MAX_DIRECTORY} are the most")


def _check_entry(entry: zipfile.ZipInfo, inner: str, name: str) -> None:
    odd = entry.filename.startswith("/") or "\\" in inner or "\0" in entry.orig_filename
    if odd or ".." in entry.filename.split("/"):
        raise refusal(name, f"{entry.filename!r:.60} leads out of the archive")
    if inner.startswith("code/") or inner == "constants.pkl":
        raise refusal(name, "a TorchScript program, not weights; convert it to safetensors")
    if entry.compress_type or entry.compress_size != entry.file_size or entry.flag_bits & 1:
        raise refusal(name, f"{inner!r:.60} is compressed, which torch.save does not do")
    small = {"data.pkl": MAX_PICKLE, "byteorder": 16}
    if inner in small:
        if entry.file_size > small[inner]:
            raise refusal(name, f"{inner} of {entry.file_size} bytes; {small[inner]} are the most")
    elif not inner.startswith(("data/", ".data/")) and inner not in (
        "version",
        ".format_version",
        ".storage_alignment",
    ):
        raise refusal(name, f"{inner!r:.60} is nothing that torch.save writes")


def _data_start(file: BinaryIO, entry: zipfile.ZipInfo, name: str) -> int:
    """Return where the bytes of an entry begin, by its own header."""
    file.seek(entry.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise refusal(name, f"{entry.filename!r:.60} is not where the archive says")
    named, extra = struct.unpack("<HH", header[26:30])
    if file.read(named) != entry.orig_filename.encode():
        raise refusal(name, f"{entry.filename!r:.60} has another name inside the archive")
    return entry.header_offset + 30 + named + extra
