"""Read the bodies of requests: bounded in size and time, and decoded in one way."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from starlette.exceptions import HTTPException

from safelight.errors import SafelightError

MAX_BODY = 64 << 20
MAX_JSON = 1 << 20
"""For JSON without pictures: two prompts of 16 KiB with every letter escaped fit several times."""

SLOW = 30.0
MIN_BYTES = 16 << 10
"""A client sends, and takes of an answer, at least MIN_BYTES in SLOW seconds, or all that is left.
One byte now and then would hold a connection for ever.
"""

T = TypeVar("T")

PICTURE = "a PNG, JPEG or WebP picture in base64"


class RefusedError(HTTPException):
    """Raised while a body is read: each API answers it in a shape of its own."""


def limited(receive: Any, content_length: str) -> Any:
    """Return an ASGI `receive` that raises RefusedError for a body too long or too slow."""
    if content_length and not (content_length.isascii() and content_length.isdigit()):
        raise RefusedError(400, "Content-Length is no number")
    if content_length and int(content_length) > MAX_BODY:
        raise _too_long(MAX_BODY)
    seen, whole = 0, False
    due, until = MIN_BYTES, time.monotonic() + SLOW

    async def take() -> Any:
        nonlocal seen, whole, due, until
        if whole:
            return await receive()  # the disconnect, whenever it comes
        try:
            async with asyncio.timeout(until - time.monotonic()):
                message = await receive()
        except TimeoutError:
            raise RefusedError(408, "the client was too slow") from None
        seen += len(message.get("body", b""))
        whole = not message.get("more_body", False)
        if seen >= due:
            due, until = seen + MIN_BYTES, time.monotonic() + SLOW
        if seen > MAX_BODY:
            raise _too_long(MAX_BODY)
        return message

    return take


async def read_body(http: HttpRequest, limit: int | None = None) -> bytes:
    """Return the body; raise RefusedError once it is longer than `limit` bytes (MAX_BODY)."""
    limit = MAX_BODY if limit is None else limit
    chunks, seen = [], 0
    async for chunk in http.stream():
        seen += len(chunk)
        if seen > limit:
            raise _too_long(limit)
        chunks.append(chunk)
    return b"".join(chunks)


async def read_json(http: HttpRequest, limit: int | None = None) -> dict[str, Any]:
    """Return the JSON object in a body. Raises SafelightError, code "not_json", for others."""
    body = await read_body(http, limit)
    try:
        found = await asyncio.to_thread(json.loads, body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise SafelightError("the body must be a JSON object", code="not_json")
    return found


def decode_base64(text: Any, name: str) -> bytes:
    """Return the bytes of base64, with or without a data URI's prefix; line breaks are skipped.

    Raises SafelightError with the field `name`. An address is refused, never fetched.
    """
    if not isinstance(text, str):
        raise SafelightError(f"{name} must be {PICTURE}", field=name)
    if text.startswith("data:"):
        text = text.partition(",")[2]
    if "://" in text[:16]:
        raise SafelightError(f"{name} must be {PICTURE}: addresses are never fetched", field=name)
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise SafelightError(f"{name} must be {PICTURE}; this is not base64", field=name) from None


def open_upload(read: Callable[[bytes, str], T], data: bytes, name: str) -> T:
    """Return a decoded picture; an error carries the field `name`.

    read: `open_picture` or `open_mask`. For a thread of its own.
    """
    try:
        return read(data, name)
    except SafelightError as error:
        raise SafelightError(str(error), code=error.code, field=name) from None


def _too_long(limit: int) -> RefusedError:
    return RefusedError(413, f"the body must have at most {limit >> 20} MiB")
