"""Check the structure of a picture's bytes before a decoder reads them.

A small file can keep a decoder busy for minutes: thousands of progressive scans, millions of empty
chunks, EXIF entries that all point at the same bytes. What is refused here is far beyond what
cameras and programs write.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from safelight.errors import SafelightError

MAX_CHUNKS = 20_000
"""Chunks of a PNG or WebP. Encoders write 8 KiB or more in each: this is over 160 MB."""

MAX_SEGMENTS = 2_000
"""Marker segments of a JPEG. A colour profile takes up to 255, a depth map some hundreds."""

MAX_SCANS = 100
"""Scans of a progressive JPEG; encoders write about ten. Each one passes over the whole picture."""

MAX_ENTRIES = 1_000
"""Entries of one directory in EXIF; cameras write fewer than a hundred."""

MAX_PROFILE = 1 << 20
"""Bytes of EXIF data."""

PNG = b"\x89PNG\r\n\x1a\n"
_EXIF = b"Exif\0\0"
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
"""Bytes of one value, by TIFF's type."""

_WHOLE = {3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I"}
"""The types of whole numbers, and how `struct` reads them. The standard asks for the first."""

_ORIENTATION = 0x0112
_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])", re.DOTALL)
"""The end of a scan: within one, 0xFF is followed by 0 or by a restart marker."""


def check_structure(data: bytes, name: str) -> None:
    """Raise SafelightError, about the picture `name`, for a structure beyond the bounds.

    Takes time linear in the number of chunks and segments, all of which are bounded.
    """
    if data.startswith(PNG):
        _check_png(data, name)
    elif data.startswith(b"\xff\xd8"):
        _check_jpeg(data, name)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        _check_webp(data, name)


def orientation(exif: bytes) -> int:
    """Return the orientation, 1 to 8, that EXIF data states; 1 if it states none.

    No other entry is read.
    """
    tiff = exif.removeprefix(_EXIF)
    for tag, kind, _, value in _entries(tiff):
        if tag == _ORIENTATION and kind in _WHOLE:
            order = "<" if tiff.startswith(b"II") else ">"
            (found,) = struct.unpack_from(order + _WHOLE[kind], value)
            return found if 1 <= found <= 8 else 1
    return 1


def _check_png(data: bytes, name: str) -> None:
    at, count = len(PNG), 0
    while at + 8 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        count += 1
        if count > MAX_CHUNKS:
            raise SafelightError(f"{name} must have at most {MAX_CHUNKS} chunks: save it again")
        if kind == b"eXIf":
            _check_exif(data[at + 8 : at + 8 + length], name)
        if kind == b"IEND":
            return
        at += 12 + length


def _check_webp(data: bytes, name: str) -> None:
    at, count = 12, 0
    while at + 8 <= len(data):
        length, kind = int.from_bytes(data[at + 4 : at + 8], "little"), data[at : at + 4]
        count += 1
        if count > MAX_CHUNKS:
            raise SafelightError(f"{name} must have at most {MAX_CHUNKS} chunks: save it again")
        if kind == b"EXIF":
            _check_exif(data[at + 8 : at + 8 + length], name)
        at += 8 + length + length % 2


def _check_jpeg(data: bytes, name: str) -> None:
    exif, at, segments, scans = b"", 2, 0, 0
    while (found := _MARKER.search(data, at)) is not None:
        marker, at = found[1][0], found.end()
        segments += 1
        if segments > MAX_SEGMENTS:
            raise SafelightError(f"{name} must have at most {MAX_SEGMENTS} segments: save it again")
        if marker == 0xD9:
            break
        if marker in (0x01, 0xD8):  # these have no length
            continue
        length = int.from_bytes(data[at : at + 2], "big")
        body = data[at + 2 : at + length]
        if marker == 0xE1 and body.startswith(_EXIF):
            exif += body[len(_EXIF) :]  # a decoder joins them
        elif marker == 0xE2 and body.startswith(b"MPF\0"):
            _check_exif(body[4:], name)
        elif marker == 0xDA:
            scans += 1
            if scans > MAX_SCANS:
                raise SafelightError(f"{name} must have at most {MAX_SCANS} scans: save it again")
        at += max(length, 2)
    _check_exif(exif, name)


def _check_exif(exif: bytes, name: str) -> None:
    exif = exif.removeprefix(_EXIF)
    problem = f"{name} has damaged EXIF data: save it again without"
    if len(exif) > MAX_PROFILE:
        raise SafelightError(f"{name} must have at most {MAX_PROFILE >> 20} MiB of EXIF data")
    told, total = 0, 0
    for _, kind, count, _ in _entries(exif):
        told, size = told + 1, _SIZES.get(kind, 1) * count
        total += size if size > 4 else 0
        # Honest entries do not overlap.
        if told > MAX_ENTRIES or total > len(exif):
            raise SafelightError(problem)


def _entries(tiff: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield tag, type, count and the four value bytes of each entry in TIFF's first directory."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return
    (at,) = struct.unpack_from(f"{order}I", tiff, 4)
    if at + 2 > len(tiff):
        return
    (count,) = struct.unpack_from(f"{order}H", tiff, at)
    for number in range(min(count, (len(tiff) - at - 2) // 12)):
        tag, kind, values = struct.unpack_from(f"{order}HHI", tiff, at + 2 + 12 * number)
        yield tag, kind, values, tiff[at + 10 + 12 * number : at + 14 + 12 * number]
