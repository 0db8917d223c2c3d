"""The functions that a decoder's process runs. All of their input comes from strangers."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

from PIL import Image, PngImagePlugin

from safelight.errors import SafelightError
from safelight.picture import opened, reason
from safelight.pixels import alpha_of, as_rgb, upright

LARGE = 16 << 10
"""Bytes from which on a string of a JSON body is handed over apart: no text is as long."""

MAX_JSON = 1 << 20
"""For JSON without pictures: two prompts of 16 KiB with every letter escaped fit several times."""

PICTURE = "a PNG, JPEG or WebP picture in base64"


def picture(data: bytes, name: str) -> Image.Image:
    """Return a picture as RGB; see `picture.open_picture`."""
    return with_alpha(data, name, alpha=False)[0]


def with_alpha(
    data: bytes, name: str, *, alpha: bool = True
) -> tuple[Image.Image, Image.Image | None]:
    """Return a picture as RGB on white, and its alpha channel; None if it has none."""
    with opened(data, name) as image:
        try:
            image.load()
            turned = upright(image)
            return as_rgb(turned), alpha_of(turned) if alpha else None
        except (MemoryError, SafelightError):
            raise
        except Exception as error:  # decoders of broken files raise anything
            raise SafelightError(
                f"{name} is damaged or cut off ({reason(error)}): save or download it again"
            ) from None


def texts(data: bytes, name: str) -> dict[str, str]:
    """Return the texts of a PNG by keyword; of other pictures none. All of it must be intact."""
    picture(data, name)
    with opened(data, name) as image:
        return dict(image.text) if isinstance(image, PngImagePlugin.PngImageFile) else {}


def body(data: bytes) -> tuple[Any, ...]:
    """Return the JSON object of a request's body, and the bytes of pictures within.

    The object has a number in the place of each base64 string of LARGE characters or more: that of
    its picture, as {"": number}.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise SafelightError("the body must be a JSON object", code="not_json")
    pictures: list[bytes] = []

    def taken(value: Any) -> Any:
        if isinstance(value, str) and len(value) >= LARGE:
            try:
                pictures.append(from_base64(value))
            except ValueError:
                return value
            return {"": len(pictures) - 1}
        if isinstance(value, list):
            return [taken(entry) for entry in value]
        return value

    reduced = {name: taken(value) for name, value in found.items()}
    if len(json.dumps(reduced)) > MAX_JSON:
        raise SafelightError(f"the body must have at most {MAX_JSON >> 20} MiB without pictures")
    return reduced, *pictures


def from_base64(text: str) -> bytes:
    """Return the bytes of base64 with or without a data URI's prefix; white space is skipped.

    Raises ValueError for other text.
    """
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        # Not split: a list of all words takes thirty times the memory of the text.
        plain = text.encode("ascii").translate(None, b" \t\r\n\f\v")
        return base64.b64decode(plain, validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise ValueError("not base64") from None
