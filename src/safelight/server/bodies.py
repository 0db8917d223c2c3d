"""Read the bodies of requests: bounded in size and time, and decoded in one way."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from typing import Any

from fastapi import Request as HttpRequest
from starlette.exceptions import HTTPException

from safelight.errors import SafelightError
from safelight.request_pictures import by_input, by_setting, check_area, each, setting_of
from safelight.server.caged import MAX_JSON, PICTURE, from_base64, json_errors
from safelight.server.callers import caller_of
from safelight.server.decoding import Decoders

MAX_BODY = 64 << 20
SLOW = 30.0
MIN_BYTES = 16 << 10
"""The slowest rate that a client may send or read at: MIN_BYTES in SLOW seconds, or all that is
left. Otherwise a client that sends single bytes would hold a connection for ever.
"""

MAX_MARKS = 40_000
"""The most brackets, colons and commas in a JSON body. Each may stand for a value, which only
parsing shows. Two prompts of 16 KiB may consist of commas alone.
"""

MAX_VALUES = 5_000
"""The most values in a JSON body, all levels together. Checks and answers take time for each value,
and no other client is answered meanwhile.
"""

MAX_DEPTH = 60

_SHAPE = (
    f"the body must be a JSON object of at most {MAX_VALUES} values, "
    f"nested at most {MAX_DEPTH} deep"
)

_ATTACHED: ContextVar[dict[str, bytes] | None] = ContextVar("attached", default=None)
"""The pictures of a large body that a decoder's process read, by the text in place of each."""


class RefusedError(HTTPException):
    """Raised while a body is read; each API answers it in its own shape."""


def limited(receive: Any, content_length: str) -> Any:
    """Return an ASGI `receive` that raises RefusedError if a body is too long or too slow."""
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


async def read_body(
    http: HttpRequest, limit: int | None = None, *, marks: int | None = None
) -> bytes | bytearray:
    """Return the body; raise RefusedError if it is longer than `limit` bytes (default MAX_BODY).

    marks: the most brackets, colons and commas in it.
    """
    limit = MAX_BODY if limit is None else limit
    body, found = bytearray(), 0
    async for chunk in http.stream():
        if len(body) + len(chunk) > limit:
            raise _too_long(limit)
        if marks is not None:
            found += sum(map(chunk.count, (b"[", b"{", b",", b":")))
            if found > marks:
                raise RefusedError(413, f"the body must have at most {MAX_VALUES} values")
        body += chunk
    return bytes(body) if len(body) <= MAX_JSON else body  # a large one is not copied


def check_json(http: HttpRequest) -> None:
    """Raise SafelightError for a body whose content type is not JSON's."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (
        kind.startswith("application/") and kind.endswith("+json")
    ):
        raise SafelightError("the body must be JSON: send content-type application/json")


async def read_json(http: HttpRequest, *, pictures: bool = False) -> dict[str, Any]:
    """Return the JSON object in a body. Raises SafelightError, code "not_json", for other bodies.

    pictures: whether the body may hold pictures in base64. Then it may have MAX_BODY bytes, at most
    MAX_JSON of them outside pictures. A body beyond MAX_JSON is read in a decoder's process, since
    the parser would hold up all other clients; `decode_base64` returns its pictures.
    """
    found = await read_json_if_any(http, pictures=pictures)
    if found is None:
        raise SafelightError("the body must be a JSON object", code="not_json")
    return found


async def read_json_if_any(http: HttpRequest, *, pictures: bool) -> dict[str, Any] | None:
    """Return what `read_json` returns; None for an empty body."""
    _ATTACHED.set(None)
    body = await read_body(http, MAX_BODY if pictures else MAX_JSON, marks=MAX_MARKS)
    if not body:
        return None
    if len(body) > MAX_JSON:
        client = caller_of(http.scope).name
        decoders: Decoders = http.app.state.decoders
        blobs = [body]
        del body
        parts = await decoders.call("safelight.server.caged:body", blobs, client=client)
        found, *data = parts if isinstance(parts, tuple) else (parts,)
        attached = {f"attached {secrets.token_hex(16)}": one for one in data}
        _ATTACHED.set(attached)
        names = list(attached)
        found = {name: _named(value, names) for name, value in found.items()}
    else:
        found = await asyncio.to_thread(_parsed, body)
    if not isinstance(found, dict) or not _fits(found):
        raise SafelightError(_SHAPE, code="not_json")
    return found


def _parsed(body: bytes | bytearray) -> Any:
    with json_errors():
        return json.loads(body)


def _named(value: Any, names: list[str]) -> Any:
    """Return a value with the names of pictures in place of their numbers; see `caged.body`."""
    if isinstance(value, list):
        return [_named(entry, names) for entry in value]
    if isinstance(value, dict) and list(value) == [""] and isinstance(value[""], int):
        return names[value[""]] if 0 <= value[""] < len(names) else None
    if isinstance(value, dict):
        return {name: _named(entry, names) for name, entry in value.items()}
    return value


def read_event(body: bytes | bytearray) -> dict[str, Any]:
    """Return the JSON object in a body that another parser reads again afterwards.

    Raises RefusedError for other bodies, for one beyond the bounds above, and for lone surrogates,
    which no answer can repeat.
    """
    try:
        found = _parsed(body)
    except SafelightError as error:
        raise RefusedError(422, str(error)) from None
    if not isinstance(found, dict) or not _fits(found):
        raise RefusedError(422, _SHAPE)
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RefusedError(422, "the body must have no lone surrogates") from None
    return found


def _fits(value: Any) -> bool:
    """Return whether a value is nested at most MAX_DEPTH deep and has at most MAX_VALUES within."""
    level, seen = [value], 0
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict | list):
                seen += len(one)
                if seen > MAX_VALUES:
                    return False
                inner += one.values() if isinstance(one, dict) else one
        level = [one for one in inner if isinstance(one, dict | list)]
        if not level:
            return True
    return False


def decode_base64(text: Any, name: str, *, again: bool = False) -> bytes:
    """Return the bytes of base64, with or without a data URI's prefix; line breaks are skipped.

    again: whether the same text is decoded again later; if not, a picture of a large body is
    released to free memory. Raises SafelightError with the field `name`. A URL is refused, never
    fetched.
    """
    if not isinstance(text, str):
        raise SafelightError(f"{name} must be {PICTURE}", field=name)
    if (found := attached(text)) is not None:
        if not again:
            (_ATTACHED.get() or {}).pop(text, None)
        return found
    if not text.startswith("data:") and "://" in text[:16]:
        raise SafelightError(f"{name} must be {PICTURE}: addresses are never fetched", field=name)
    try:
        return from_base64(text)
    except ValueError:
        raise SafelightError(f"{name} must be {PICTURE}; this is not base64", field=name) from None


def attached(text: str) -> bytes | None:
    """Return the picture that a text of a large body stands for; None for any other text."""
    return (_ATTACHED.get() or {}).get(text)


def turn(http: HttpRequest) -> AbstractAsyncContextManager[None]:
    """Return a context: the client's turn to hold a decoded picture, or to encode one."""
    decoders: Decoders = http.app.state.decoders
    return decoders.handling.turn(caller_of(http.scope).name)


async def decoded(
    http: HttpRequest, function: str, data: list[bytes], name: str, what: str = ""
) -> Any:
    """Return the result of a function of `caged` for a picture; an error carries the field `name`.

    data: the picture's bytes; the list is emptied once a decoder has them. what: the picture's name
    in errors.
    """
    decoders: Decoders = http.app.state.decoders
    client = caller_of(http.scope).name
    try:
        return await decoders.call(
            f"safelight.server.caged:{function}", data, client=client, name=what or f"the {name}"
        )
    except SafelightError as error:
        text = str(error)
        text = f"the {name}: {text}" if text.startswith("it ") else text
        raise SafelightError(text, code=error.code, field=name) from None


def pictures_sent(settings: Mapping[str, Any]) -> dict[str, list[bytes]]:
    """Return the pictures among a body's settings, decoded from base64, by their inputs.

    Each is in a list of its own, as `decoded` takes it. Raises SafelightError for too many.
    """
    texts = by_input(settings)
    return {name: [decode_base64(text, setting_of(name))] for name, text in texts.items()}


async def decoded_pictures(
    http: HttpRequest, sent: Mapping[str, list[bytes]], name: str = ""
) -> dict[str, Any]:
    """Return a request's pictures by their settings, decoded one after another.

    sent: the bytes of each, by its input. name: what errors call them, by default as their
    settings. Raises SafelightError if those of a setting are too large together.
    """
    found: dict[str, Any] = {}
    for one in sorted(sent, key=lambda one: one != "mask"):  # first, as it is smaller
        setting = setting_of(one)
        kind = "mask" if setting == "mask" else "picture"
        found[one] = await decoded(http, kind, sent[one], name or setting)
        check_area(setting, each(by_setting(found)[setting]))
    return by_setting(found)


def _too_long(limit: int) -> RefusedError:
    return RefusedError(413, f"the body must have at most {limit >> 20} MiB")
