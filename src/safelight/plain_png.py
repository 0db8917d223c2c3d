"""Write PNG files strip by strip, with little memory; they are larger than Pillow's."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from PIL import Image

from safelight.bounds import PNG
from safelight.pixels import strips


def parts(image: Image.Image) -> Iterator[bytes]:
    """Yield the parts of a PNG of mode RGB or L, whose rows are not filtered (specification, 9.2).

    Other threads run meanwhile. Pillow's own writer stops them until it has made 64 KiB, which for
    an evenly coloured picture is the whole file.
    """
    colour = {"L": 0, "RGB": 2}[image.mode]
    yield PNG + _chunk(b"IHDR", struct.pack(">IIBBBBB", *image.size, 8, colour, 0, 0, 0))
    row, packed = image.width * len(image.mode), zlib.compressobj(1)
    for box in strips(image.size):
        data = image.crop(box).tobytes()
        rows = b"".join(b"\0" + data[at : at + row] for at in range(0, len(data), row))
        yield _chunk(b"IDAT", packed.compress(rows))
    yield _chunk(b"IDAT", packed.flush()) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    check = zlib.crc32(data, zlib.crc32(kind))
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)
