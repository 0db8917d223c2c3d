"""The largest and slowest input that strangers may send: pictures up to 64 MiB, and bodies of JSON.

`PICTURES` and `bodies` make each one only when it is used: together they take gigabytes.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from hostile import chunk, encoded, exif, segment
from PIL import Image

MOST = 62 << 20
"""The most bytes of a picture in a body of 64 MiB, which also has other fields."""

SIDE = 5000
"""Pixels a side: 25 million in all, the most that is accepted over HTTP."""


def noise(mode: str, width: int, height: int) -> Image.Image:
    size = (width, height)
    data = np.random.default_rng(1).bytes(width * height * len(mode))
    return Image.frombytes(mode, size, data)


def smooth(width: int = SIDE, height: int = SIDE) -> Image.Image:
    """Return a picture that compresses well."""
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


def png(kind: int, depth: int, width: int, height: int, *before: bytes, level: int = 1) -> bytes:
    """Return a PNG of any colour type and depth: of noise or, at level 9, of zeros."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    row = -(-width * channels * depth // 8)
    packed, rows, chance = zlib.compressobj(level), [], np.random.default_rng(1)
    for _ in range(height):
        rows.append(packed.compress(b"\0" + (chance.bytes(row) if level < 9 else bytes(row))))
    rows.append(packed.flush())
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + b"".join(before)
        + chunk(b"IDAT", b"".join(rows))
        + chunk(b"IEND", b"")
    )


PALETTE = chunk(b"PLTE", bytes(range(256)) * 3)


def jpeg(image: Image.Image, scans: int = 0, **how: Any) -> bytes:
    """Return a JPEG. scans: how often the last scan of a progressive one is repeated."""
    plain = encoded(image, "JPEG", progressive=bool(scans), **how)
    if scans:
        last = plain.rindex(b"\xff\xda")
        plain = plain[:-2] + plain[last:-2] * scans + plain[-2:]
    return plain


def webp(frames: int, side: int = 4000) -> bytes:
    first = smooth(side, side)
    more = [first.rotate(90 * i) for i in range(1, frames)]
    return encoded(first, "WEBP", save_all=frames > 1, append_images=more, lossless=True, method=0)


def rough_webp() -> bytes:
    return encoded(noise("RGB", 2500, 2500).resize((SIDE, SIDE)), "WEBP", quality=80, method=0)


def text(kind: bytes, size: int, letter: str = "a") -> bytes:
    """Return a chunk of text that unpacks to so many bytes."""
    words = (letter * (size // len(letter.encode()))).encode()
    if kind == b"tEXt":
        return chunk(kind, b"key\0" + words)
    if kind == b"zTXt":
        return chunk(kind, b"key\0\0" + zlib.compress(words, 9))
    return chunk(kind, b"key\0\1\0\0\0" + zlib.compress(words, 9))


def small(*chunks: bytes) -> bytes:
    return png(2, 8, 64, 64, *chunks)


PICTURES: dict[str, Callable[[], bytes]] = {
    "PNG, RGB, 62 MiB": partial(png, 2, 8, 4650, 4650),
    "PNG, RGBA, 62 MiB": partial(png, 6, 8, 4000, 4000),
    "PNG, RGB, 48 MB": partial(png, 2, 8, 4000, 4000),
    "PNG, RGBA, 25 MP, empty": partial(png, 6, 8, SIDE, SIDE, level=9),
    "PNG, RGBA, 16 bit, 25 MP": partial(png, 6, 16, SIDE, SIDE, level=9),
    "PNG, gray, 16 bit, 50 MB": partial(png, 0, 16, SIDE, SIDE),
    "PNG, gray and alpha, 16 bit": partial(png, 4, 16, 3900, 3900),
    "PNG, RGB, transparent colour": partial(
        png, 2, 8, SIDE, SIDE, chunk(b"tRNS", bytes(6)), level=9
    ),
    "PNG, palette, 25 MP": partial(png, 3, 8, SIDE, SIDE, PALETTE),
    "PNG, palette with transparency": partial(
        png, 3, 8, SIDE, SIDE, PALETTE, chunk(b"tRNS", bytes(range(256)))
    ),
    "PNG, one bit": partial(png, 0, 1, SIDE, SIDE),
    "PNG, 8 pixels high": partial(png, 2, 8, 3_125_000, 8, level=9),
    "PNG, 8 pixels wide": partial(png, 2, 8, 8, 3_125_000, level=9),
    "PNG, as high as may be": partial(png, 2, 8, 381, 65_535, level=9),
    "PNG, as wide as may be": partial(png, 2, 8, 65_535, 381, level=9),
    "PNG, turned by EXIF": partial(
        png,
        6,
        8,
        SIDE,
        SIDE,
        chunk(b"eXIf", b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"),
        level=9,
    ),
    "PNG, truncated": lambda: png(6, 8, 4000, 4000)[: 40 << 20],
    "PNG, 60 MiB of text": lambda: small(text(b"tEXt", 60 << 20)),
    "PNG, text that unpacks to 60 MiB": lambda: small(*[text(b"zTXt", 1000 << 10)] * 60),
    "PNG, iTXt of wide letters": lambda: small(*[text(b"iTXt", 1000 << 10, "😀")] * 60),
    "PNG, 500 iTXt": lambda: small(*[text(b"iTXt", 1000 << 10, "é")] * 500),
    "PNG, EXIF of 1 MiB": lambda: small(chunk(b"eXIf", exif(900, 1000))),
    "PNG, a profile that unpacks": lambda: small(
        chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(60 << 20), 9))
    ),
    "PNG, 62 MiB after its end": lambda: small() + bytes(MOST),
    "JPEG, 25 MP": lambda: jpeg(smooth(), quality=100, subsampling=0),
    "JPEG, noise, 60 MiB": lambda: jpeg(noise("RGB", SIDE, SIDE), quality=90)[:MOST],
    "JPEG, progressive, 25 MP": lambda: jpeg(smooth(), 1, quality=100, subsampling=0),
    "JPEG, progressive, noise": lambda: jpeg(noise("RGB", SIDE, SIDE), 1, quality=85)[:MOST],
    "JPEG, 90 scans": lambda: jpeg(smooth(), 88, quality=90),
    "JPEG, CMYK": lambda: jpeg(smooth().convert("CMYK"), quality=95),
    "JPEG, CMYK, progressive": lambda: jpeg(smooth().convert("CMYK"), 1, quality=95),
    "JPEG, truncated": lambda: jpeg(noise("RGB", SIDE, SIDE), 1, quality=85)[: 30 << 20],
    "JPEG, 1,000 comments": lambda: (
        (plain := jpeg(smooth(64, 64)))[:2] + segment(0xFE, bytes(65_000)) * 900 + plain[2:]
    ),
    "WebP, lossless": partial(webp, 1),
    "WebP, animated": partial(webp, 18),
    "WebP, lossy": rough_webp,
    "WebP, truncated": lambda: rough_webp()[: 1 << 20],
}
COSTLY = [
    "PNG, RGB, 48 MB",
    "PNG, gray, 16 bit, 50 MB",
    "PNG, palette with transparency",
    "PNG, text that unpacks to 60 MiB",
    "PNG, iTXt of wide letters",
    "JPEG, truncated",
    "WebP, animated",
    "PNG, turned by EXIF",
    "JPEG, progressive, noise",
]
"""The pictures that the long run sends by every entrance."""

TWICE = [
    "PNG, RGBA, 16 bit, 25 MP",
    "PNG, RGB, transparent colour",
    "PNG, as high as may be",
    "PNG, turned by EXIF",
    "JPEG, progressive, noise",
    "WebP, lossless",
]
"""The pictures of which two fit into a body, as picture and mask."""

SMALL = ["PNG, gray, 16 bit, 50 MB", "JPEG, CMYK, progressive"]
"""The pictures that the suite sends: the ones that cost most before."""


FIELDS = ("prompt", "negative_prompt", "sampler", "schedule", "size", "model", "sampler_name")
FIELDS += ("scheduler", "styles", "loras", "embeddings")


def json_bodies(size: int) -> dict[str, bytes]:
    """Return bodies of JSON of about `size` bytes that keep a parser or a check busy."""

    def told(value: Any) -> bytes:
        return json.dumps(value).encode()

    many = min(size // 12, 98_000 // 2)
    wide = {f"{i:x}": 0 for i in range(many)}
    big = "9" * 4000
    return {
        "deep lists": b"[" * (size // 2) + b"]" * (size // 2),
        "deep objects": b'{"a":' * min(size // 6, 49_000) + b"0" + b"}" * min(size // 6, 49_000),
        "50 deep, everywhere": b'{"prompt":['
        + b",".join([b"[" * 50 + b"]" * 50] * min(size // 102, 1900))
        + b"]}",
        "a wide object": told(wide),
        "unknown keys": told(
            {"prompt": "a", **{f"unknown {i}": [] for i in range(min(size // 22, 30_000))}}
        ),
        "a long key": told({"x" * (size - 10): 1}),
        "long keys": told({f"{i}" + "x" * 1000: i for i in range(size // 1100)}),
        "a long text": told({"prompt": "x" * (size - 20)}),
        "a long text of commas": told({"prompt": "," * min(size - 20, 90_000)}),
        "escapes": b'{"prompt": "' + b"\\u00e9" * (size // 6 - 4) + b'"}',
        "half pairs": b'{"prompt": "' + b"\\ud800" * (size // 6 - 4) + b'"}',
        "large numbers": b'{"steps": [' + b",".join([big.encode()] * (size // 4001)) + b"]}",
        "a number of many digits": b'{"seed": ' + b"9" * (size - 20) + b"}",
        "a fraction of many digits": b'{"guidance_scale": 0.' + b"7" * (size - 30) + b"}",
        "fractions": told(
            {"guidance_scale": [0.1234567890123456789e-300] * min(size // 24, 40_000)}
        ),
        "the same key": b"{" + b",".join([b'"prompt":1'] * min(size // 11, 49_000)) + b"}",
        "many texts": told({"loras": ["a"] * min(size // 5, 90_000)}),
        "text in each field": told(dict.fromkeys(FIELDS, "x" * (size // 40))),
        "objects in each field": told(
            {
                n: wide if n == "override_settings" else {"a": [1] * 50}
                for n in (
                    "prompt",
                    "override_settings",
                    "alwayson_scripts",
                    "data",
                    "init_images",
                    "image",
                    "mask",
                    "styles",
                )
            }
        ),
        "no JSON": b"{" + b" " * (size - 2) + b"x",
        "brackets within a text": told({"prompt": "[" * min(size - 20, 90_000)}),
        "words of a prompt": told({"prompt": "(a:1.1), [b:c:0.5], " * 800}),
        "white space": b" " * (size - 20) + b'{"prompt": "a"}',
    }
