"""Files that keep a decoder busy, and bodies that keep a parser busy."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image

NOISE = Image.effect_noise((64, 64), 60).convert("RGB")


def encoded(image: Image.Image = NOISE, kind: str = "PNG", **how: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(*chunks: bytes) -> bytes:
    """Return a PNG with more chunks after its header."""
    plain = encoded()
    return plain[:33] + b"".join(chunks) + plain[33:]


def exif(entries: int, size: int, order: str = ">") -> bytes:
    """Return EXIF whose entries all point at the same bytes."""
    head = (b"MM\0*" if order == ">" else b"II*\0") + struct.pack(f"{order}I", 8)
    at = 8 + 2 + 12 * entries + 4
    rows = b"".join(
        struct.pack(f"{order}HHII", 0x9000 + i % 100, 7, size, at) for i in range(entries)
    )
    return head + struct.pack(f"{order}H", entries) + rows + b"\0" * 4 + b"\0" * size


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def scans(count: int) -> bytes:
    """Return a progressive JPEG whose last scan is repeated."""
    plain = encoded(kind="JPEG", progressive=True)
    last = plain.rindex(b"\xff\xda")
    return plain[:last] + plain[last:-2] * count + b"\xff\xd9"


def riff(kind: bytes, data: bytes, count: int = 1) -> bytes:
    """Return a WebP with more chunks at its end."""
    more = (kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)) * count
    plain = encoded(kind="WEBP")[12:] + more
    return b"RIFF" + struct.pack("<I", len(plain) + 4) + b"WEBP" + plain


JPEG = encoded(kind="JPEG")
PICTURES = {
    "EXIF of 65,000 entries at the same bytes": with_chunks(chunk(b"eXIf", exif(65_000, 300_000))),
    "the same, little-endian": with_chunks(chunk(b"eXIf", exif(65_000, 300_000, "<"))),
    "the same in a WebP": riff(b"EXIF", exif(5_000, 50_000)),
    "the same in a JPEG, in many segments": JPEG[:2]
    + b"".join(
        segment(0xE1, b"Exif\0\0" + exif(5_000, 200_000)[at : at + 65_000])
        for at in range(0, 260_000, 65_000)
    )
    + JPEG[2:],
    "the index of several pictures": JPEG[:2]
    + segment(0xE2, b"MPF\0" + exif(4_000, 10_000))
    + JPEG[2:],
    "2,500 scans": scans(2_500),
    "a million empty chunks": with_chunks(chunk(b"teSt", b"") * 1_000_000),
    "100,000 empty chunks of pixels": with_chunks(chunk(b"IDAT", b"") * 100_000),
    "a WebP of 100,000 chunks": riff(b"teSt", b"", 100_000),
    "a JPEG of 100,000 segments": JPEG[:2] + segment(0xFE, b"") * 100_000 + JPEG[2:],
}
