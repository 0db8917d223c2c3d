"""The functions that a decoder's process runs. All of their input comes from strangers."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin

from safelight.errors import SafelightError
from safelight.picture import opened, reason
from safelight.pixels import Strips, alpha_of, mask_of, rgb_of, upright
from safelight.server.decoder import MEMORY, Sent

LARGE = 12_000_000
"""Pixels of a picture that takes so much memory that decoders may not get enough."""

WEBP_ROOM = 20 << 20
"""Bytes that a decoder takes beside the copies of a WebP."""

LONG = 16 << 10
"""A JSON string of this length or more may be a picture, and is passed on apart: no text is as
long.
"""

MAX_JSON = 1 << 20
"""The most bytes of JSON without pictures. Two prompts of 16 KiB fit several times, even with every
letter escaped.
"""

PIECE = 4 << 20
"""Characters of base64 that are decoded at a time, to avoid a second copy of the whole."""

PICTURE = "a PNG, JPEG or WebP picture in base64"


def picture(sent: Sent, name: str) -> Strips:
    """Return a picture as RGB; see `picture.open_picture`."""
    return rgb_of(_decoded(sent.take(), name))


def mask(sent: Sent, name: str) -> Strips:
    """Return a mask; see `picture.open_mask`."""
    return mask_of(rgb_of(_decoded(sent.take(), name)))


def strokes(sent: Sent, name: str) -> Strips:
    """Return the mask that a drawing program sent.

    Such programs send strokes on a transparent layer. If the picture has transparency, the mask is
    what is opaque, whatever its colour.
    """
    image = _decoded(sent.take(), name)
    drawn = alpha_of(image)
    if drawn is not None and any(strip.getextrema()[0] != 255 for strip in drawn):
        return mask_of(drawn)
    return mask_of(rgb_of(image))


def alpha(sent: Sent, name: str) -> Strips | None:
    """Return a picture's alpha channel, None if it has none."""
    return alpha_of(_decoded(sent.take(), name))


def with_alpha(sent: Sent, name: str) -> tuple[Strips, Strips | None]:
    """Return a picture as RGB on white, and its alpha channel; None if it has none."""
    image = _decoded(sent.take(), name)
    return rgb_of(image), alpha_of(image)


def texts(sent: Sent, name: str) -> dict[str, str]:
    """Return the texts of a PNG by keyword. The whole file must be intact.

    If there is no text `parameters`, as in any JPEG or WebP, the EXIF comment takes its place.
    """
    return texts_and_size(sent, name)[0]


def texts_and_size(sent: Sent, name: str) -> tuple[dict[str, str], list[int]]:
    """Return what `texts` does, and the width and height of the picture, upright."""
    data = sent.take()
    size = list(_decoded(data, name).size)
    with opened(data, name) as image:
        found = dict(image.text) if isinstance(image, PngImagePlugin.PngImageFile) else {}
        if "parameters" not in found and (comment := exif_comment(image)):
            found["parameters"] = comment
        return found, size


def exif_comment(image: Image.Image) -> str:
    """Return the comment in a picture's EXIF; "" if it cannot be read."""
    try:
        found = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    except Exception:  # Pillow raises anything at broken EXIF
        return ""
    if not isinstance(found, bytes):
        return ""
    kind, text = found[:8], found[8:]
    if kind == b"UNICODE\0":
        # UTF-16 in either order: the higher byte of a Latin letter is 0.
        little = text[1::2].count(0) > text[::2].count(0)
        return text.decode("utf-16-le" if little else "utf-16-be", "replace").strip("\0\ufeff")
    known = kind in (b"ASCII\0\0\0", bytes(8))
    return (text if known else found).decode("utf-8", "replace").strip("\0")


def _decoded(data: bytes, name: str) -> Image.Image:
    """Return a picture, upright."""
    _check_webp(data, name)
    with opened(data, name) as image:
        del data
        try:
            image.load()  # from here on it has no need of the file
            return upright(image)
        except (MemoryError, SafelightError):
            raise
        except Exception as error:  # decoders of broken files raise anything
            told = f"{name} is damaged or cut off ({reason(error)}): save or download it again"
            if image.width * image.height > LARGE:  # short of memory, decoders call it damage, too
                told = f"{name} cannot be read ({reason(error)}): make it smaller, or save it again"
            raise SafelightError(told) from None


def _check_webp(data: bytes, name: str) -> None:
    """Raise SafelightError for a WebP that takes more memory than a decoder has.

    Pillow holds it four times, at four bytes a pixel, beside its file. Its own error calls the file
    damaged.
    """
    if (size := _webp_size(data)) is None:
        return
    most = (MEMORY - WEBP_ROOM - len(data)) // 16
    if size[0] * size[1] > most:
        raise SafelightError(
            f"{name} must have at most {max(0, most) // 10**6} million pixels as a WebP of this "
            f"length, not {size[0]}x{size[1]}: make it smaller, or send a JPEG or PNG"
        )


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Return the width and height that a WebP's header states; None for any other file."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None

    def number(start: int, end: int) -> int:
        return int.from_bytes(data[start:end], "little")

    if data[12:16] == b"VP8X":
        return number(24, 27) + 1, number(27, 30) + 1
    if data[12:16] == b"VP8L":
        return (number(21, 25) & 0x3FFF) + 1, (number(21, 25) >> 14 & 0x3FFF) + 1
    return number(26, 28) & 0x3FFF, number(28, 30) & 0x3FFF


NESTED = ("controlnet", "args", "image", "input_image")
"""The names of nested objects and of their pictures that are read."""


def body(sent: Sent) -> tuple[Any, ...]:
    """Return the JSON object of a request's body, and the bytes of its pictures.

    In the object, {"": number} stands for each base64 string of LONG characters or more: the
    number of its picture, from 0. Inside nested objects, as a web UI's extensions send them, such a
    string becomes null, but for the picture of a ControlNet: nobody reads others there.
    """
    with json_errors():
        found = json.loads(sent.take())
    if not isinstance(found, dict):
        raise SafelightError("the body must be a JSON object", code="not_json")
    pictures: list[bytes] = []
    for name, value in found.items():
        found[name] = _without(pictures, value)  # replaced at once: one copy of a picture is enough
    if len(json.dumps(found)) > MAX_JSON:
        raise SafelightError(f"the body must have at most {MAX_JSON >> 20} MiB without pictures")
    return found, *pictures


@contextmanager
def json_errors() -> Iterator[None]:
    """Raise SafelightError, code "not_json", for what `json.loads` raises inside the block.

    A function around `json.loads` would hold a copy of a large body.
    """
    try:
        yield
        return
    except json.JSONDecodeError as error:
        told = f"is not a valid JSON object: line {error.lineno}, column {error.colno}"
    except UnicodeDecodeError:
        told = "is not a valid JSON object: it is not UTF-8"
    except RecursionError:
        told = "is not a valid JSON object: it is nested too deep"
    except ValueError:  # Python's bound: reading digits takes time that grows with their square
        told = "has a number of too many digits"
    raise SafelightError(f"the body {told}", code="not_json")


def _without(pictures: list[bytes] | None, value: Any) -> Any:
    """Return a value with numbers in place of its pictures, which are appended to the list.

    pictures: None to put null in their place. This is no function inside `body`: a closure that
    calls itself would keep its variables from being freed.
    """
    if isinstance(value, str) and len(value) >= LONG:
        try:
            found = from_base64(value)
        except ValueError:
            return value
        if pictures is None:
            return None
        pictures.append(found)
        return {"": len(pictures) - 1}
    if isinstance(value, list):
        return [_without(pictures, entry) for entry in value]
    if isinstance(value, dict):
        return {
            name: _without(pictures if name.casefold() in NESTED else None, entry)
            for name, entry in value.items()
        }
    return value


def from_base64(text: str) -> bytes:
    """Return the bytes of base64 with or without a data URI's prefix; white space is skipped.

    Raises ValueError for other text.
    """
    start = len(text.partition(",")[0]) + 1 if text.startswith("data:") else 0
    found, rest, padded = bytearray(), b"", False
    try:
        for at in range(start, len(text), PIECE):
            # Not split: a list of all words takes thirty times the memory of the text.
            plain = rest + text[at : at + PIECE].encode("ascii").translate(None, b" \t\r\n\f\v")
            if plain and padded:
                raise ValueError
            whole = plain[: len(plain) // 4 * 4]
            rest, padded = plain[len(whole) :], whole.endswith(b"=")
            found += base64.b64decode(whole, validate=True)
        if rest:
            raise ValueError
    except (ValueError, UnicodeEncodeError):  # binascii.Error is a ValueError
        raise ValueError("not base64") from None
    return bytes(found)
