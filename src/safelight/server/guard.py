"""Check each request before its route: token, host, origin, size and speed."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from safelight.errors import SafelightError
from safelight.server import bodies, entrance, tokens
from safelight.server.bodies import RefusedError
from safelight.server.callers import (
    ADMIN,
    SCOPE,
    Caller,
    Network,
    address_of,
    forwarded,
    shortened,
)
from safelight.server.keyring import Keyring
from safelight.server.limits import Guesses, Share
from safelight.server.sites import Headers, check_site, headers_of, shared, single
from safelight.server.wording import problem, route_of

log = logging.getLogger("safelight.http")

LINGER = 5.0
"""Seconds for which a refused body is still read, so that the client sees the answer."""

OPEN = frozenset({"/healthz"})
"""Paths that need no token: the check that the process lives."""

HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"same-origin"),
    (b"x-frame-options", b"SAMEORIGIN"),
)


@dataclass(frozen=True)
class Rules:
    """Who may send requests.

    token: the admin's. Without a token and without keys everyone may; such a server listens on
    loopback only. hosts: names that a Host header may have besides loopback's. keys: those of
    people, who see only their own jobs. proxies: those whose X-Forwarded-For and X-Forwarded-Proto
    are believed. short: whether the log has shortened addresses. origins: those of pages of other
    sites that may send requests; cookies do not count in these.
    """

    token: str | None = None
    hosts: frozenset[str] = frozenset()
    keys: Keyring | None = None
    proxies: Sequence[Network] = ()
    short: bool = False
    origins: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.token is not None and not self.token.strip():
            raise SafelightError("an empty token lets anyone in")

    async def ask(self) -> bool:
        """Return whether a request needs a token or a key."""
        return self.token is not None or (self.keys is not None and await self.keys.some())

    async def key_of(self, given: bytes, *, cookies: bool = False) -> str | None:
        """Return the name of the given key, or the admin's for the token; None if neither matches.

        cookies: whether `given` holds cookies, joined by ";", in place of a token.
        """
        if self.token is not None:
            same = entrance.matches if cookies else tokens.same
            if same(given, self.token):
                return ADMIN
        if self.keys is None:
            return None
        if cookies:
            return await self.keys.of_cookies(given.split(b";"))
        return await self.keys.of_token(given)


class Guard:
    """An ASGI application around another one. on_answer: called with method, route and status."""

    def __init__(self, app: Any, rules: Rules, on_answer: Any = lambda *_: None) -> None:
        self.app, self.rules, self.on_answer = app, rules, on_answer
        self._guesses, self._share = Guesses(), Share()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        assert scope["type"] == "http"  # websockets are off
        began, status = time.monotonic(), 500
        asked, method = scope, scope["method"]
        if method == "HEAD" and not is_stream(scope["path"]):
            # Routes know GET alone. It is a copy: the web server looks at the method, too.
            scope = {**asked, "method": "GET"}
        request_id = secrets.token_hex(8)
        started = body_open = False
        key: str | None = None
        origin = ""  # of another site's page that may have the answer

        async def reply(message: Any) -> None:
            nonlocal status, started, body_open
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                kept = [
                    (k, v)
                    for k, v in message["headers"]
                    if k not in dict(HEADERS) and not k.startswith(b"access-control-")
                ]
                if self.rules.origins:
                    kept += shared(origin, headers)
                if status in (408, 413):  # the rest of the body is not waited for
                    kept.append((b"connection", b"close"))
                if key is not None and self.rules.keys is not None:
                    kept += self.rules.keys.headers(key)
                message["headers"] = [*kept, *HEADERS, (b"x-request-id", request_id.encode())]
            elif method == "HEAD":
                message = {**message, "body": b""}
            elif status == 413 and not body_open and not message.get("more_body", False):
                body_open, message = True, {**message, "more_body": True}
            async with asyncio.timeout(bodies.SLOW):
                await send(message)

        unread, headers = receive, headers_of(scope)
        host = single(headers, "host")
        address, client, received = address_of(scope, self.rules.proxies), "", 0
        scheme = forwarded(scope, self.rules.proxies, b"x-forwarded-proto")
        if scheme in ("http", "https"):
            scope["scheme"] = scheme  # for links in answers

        async def metered() -> Any:
            nonlocal received
            message = await unread()
            size = len(message.get("body", b""))
            received += size
            self._share.add(client, size)
            return message

        try:
            origin = check_site(scope, headers, self.rules.hosts, self.rules.origins)
            if origin:
                # Browsers send the cookie for another port of this host along, too.
                headers.pop("cookie", None)
                if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                    await reply({"type": "http.response.start", "status": 204, "headers": []})
                    await reply({"type": "http.response.body"})
                    return
            if scope["path"] in OPEN:
                await self.app(scope, bodies.limited(receive, ""), reply)
                return
            receive = bodies.limited(metered, single(headers, "content-length"))
            caller = Caller(address)
            client = caller.name
            if scope["path"] == entrance.ENTER and scope["method"] == "POST":
                with self._share.request(client, stream=False):
                    await self._enter(receive, reply, address, host)
            elif (known := await self._caller(headers, caller, host)) is not None:
                scope[SCOPE], client, key = known, known.name, known.key
                with self._share.request(client, stream=is_stream(scope["path"])):
                    await self.app(scope, receive, reply)
                    if body_open:  # a route refused the body before its end
                        await _discard(unread)
                        await reply({"type": "http.response.body"})
            elif scope["method"] == "GET" and (token := _linked(scope)):
                await self._enter_by_link(token, reply, address, host)
            elif scope["method"] == "GET" and _is_page(scope["path"]):
                await _page(reply, 401, entrance.page())
            else:
                challenge = {"www-authenticate": "Bearer"}
                raise RefusedError(401, "a token is needed: Authorization: Bearer …", challenge)
        except RefusedError as refusal:
            if not started:
                body_open = True  # _answer leaves the response open
                await _answer(reply, refusal.status_code, refusal.detail, refusal.headers)
                if refusal.status_code == 413 and not received and "expect" not in headers:
                    await _discard(unread)
                await reply({"type": "http.response.body"})
        finally:
            self._share.release(client, received)
            route = route_of(scope)
            asked["route"] = scope.get("route")  # for the trace around
            self.on_answer(method, route, status)
            log.info(
                "request",
                extra={
                    "request_id": request_id,
                    "address": shortened(address) if self.rules.short else address,
                    "method": method,
                    "route": route,
                    "status": status,
                    "seconds": round(time.monotonic() - began, 4),
                },
            )

    async def _enter(self, receive: Any, reply: Any, address: str, host: str) -> None:
        """Answer a browser's form that has the token: set a cookie and lead to the page."""
        form, more = b"", True
        while more and len(form) <= entrance.MAX_FORM:
            message = await receive()
            form += message.get("body", b"")
            more = message.get("more_body", False)
        cookie = await self._cookie(entrance.token_in(form), address, host)
        if cookie is None:
            await _page(reply, 401, entrance.page("That is not this server's token."))
            return
        await _page(reply, 303, b"", [(b"location", b"/"), *cookie])

    async def _enter_by_link(self, given: bytes, reply: Any, address: str, host: str) -> None:
        """Answer a link that has the token, as the command line opens it."""
        cookie = await self._cookie(given, address, host)
        if cookie is None:
            await _page(reply, 401, entrance.page("That is not this server's token."))
            return
        await _page(reply, 200, entrance.onward(), [(b"cache-control", b"no-store"), *cookie])

    async def _cookie(
        self, given: bytes, address: str, host: str
    ) -> list[tuple[bytes, bytes]] | None:
        """Return the header that sets the cookie for a token; None for a wrong one."""
        if not await self.rules.ask():
            return []
        key = await self._key(given, address)
        if key is None:
            return None
        # A client may send the admin's token in another encoding: the cookie is made of ours.
        token = self.rules.token if key == ADMIN else given.decode("latin-1")
        return [(b"set-cookie", entrance.set_cookie(token or "", host))]

    async def _key(self, given: bytes, address: str, *, cookies: bool = False) -> str | None:
        """Return the name of the given key. An address with many wrong keys has to wait.

        cookies: as for `Rules.key_of`.
        """
        await self._guesses.wait(address, given)
        key = await self.rules.key_of(given, cookies=cookies)
        if key is not None:
            self._guesses.right(address, given)
        elif given:
            self._guesses.wrong(address)
        return key

    async def _caller(self, headers: Headers, caller: Caller, host: str) -> Caller | None:
        """Return the caller with its key; None without a valid key."""
        if not await self.rules.ask():
            return caller
        if (cookie := entrance.cookies_in(headers.get("cookie", []), host)) is not None:
            key = await self._key(cookie, caller.address, cookies=True)
            if key is not None:
                return replace(caller, key=key)
        given = headers.get("authorization", [])
        kind, _, text = (given[0] if len(given) == 1 else "").partition(" ")
        value = text.strip().encode("latin-1")
        if kind.lower() == "basic":  # for clients that know only name and password
            try:
                value = base64.b64decode(value, validate=True).partition(b":")[2]
            except binascii.Error:
                return None
        elif kind.lower() != "bearer":
            return None
        key = await self._key(value.strip(), caller.address)
        return None if key is None else replace(caller, key=key)


def is_stream(path: str) -> bool:
    """Return whether an answer at this path lasts: nobody asks for its head alone."""
    return path.endswith(("/events", "/queue/data")) or "/heartbeat/" in path


def _is_page(path: str) -> bool:
    return path == "/" or path.startswith("/studio")


def _linked(scope: Any) -> bytes:
    """Return the token in a link to the studio; empty if there is none."""
    if scope["path"] != "/studio":
        return b""
    return entrance.token_in(scope.get("query_string", b"")[: entrance.MAX_FORM])


async def _answer(send: Any, status: int, text: str, headers: Mapping[str, str] | None) -> None:
    body = json.dumps(problem(status, text))
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body.encode())).encode()),
                *((k.encode(), v.encode()) for k, v in (headers or {}).items()),
            ],
        }
    )
    await send({"type": "http.response.body", "body": body.encode(), "more_body": True})


async def _discard(receive: Any) -> None:
    """Read on for a moment after a body was refused unread.

    Closing a connection with unread bytes resets it, and the client may lose the answer.
    """
    seen = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER):
            while seen < 2 * bodies.MAX_BODY:
                message = await receive()
                seen += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


async def _page(
    send: Any, status: int, body: bytes, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    kind = (b"content-type", b"text/html; charset=utf-8")
    start = {"type": "http.response.start", "status": status, "headers": [kind, *(headers or [])]}
    await send(start)
    await send({"type": "http.response.body", "body": body})
