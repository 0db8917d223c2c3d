"""Whose requests are taken: checks of the headers Host, Origin and Sec-Fetch-Site."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from safelight.server.bodies import RefusedError
from safelight.server.callers import parsed
from safelight.server.wording import clipped

METHODS = "GET, HEAD, POST, DELETE"
"""The methods of our routes."""

Headers = dict[str, list[str]]
"""The values of each header, by its name in lower case."""


def headers_of(scope: Any) -> Headers:
    found: Headers = {}
    for name, value in scope["headers"]:
        found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return found


def single(headers: Headers, name: str) -> str:
    """Return the value of a header; empty if it is there several times, or not at all."""
    values = headers.get(name, [])
    return values[0] if len(values) == 1 else ""


def check_site(scope: Any, headers: Headers, hosts: frozenset[str], origins: frozenset[str]) -> str:
    """Return the origin of another site's page that may send this request; "" for our own pages.

    hosts, origins: as in `guard.Rules`. Raises RefusedError for another host or site.
    """
    host = single(headers, "host")
    if not _known_host(host, scope, hosts):
        name = _name(host)
        if name is None:
            raise RefusedError(400, "the Host must be one name or address, with or without a port")
        told = f"safelight serve --allow-host {clipped(name)} allows it"
        raise RefusedError(400, f"this Host is not served here: {told}")
    given = headers.get("origin", [])
    if given and not (len(given) == 1 and _same(given[0], host)):
        if len(given) == 1 and given[0] in origins:
            return given[0]
        told = f"safelight serve --allow-origin {clipped(given[0])} allows those of this origin"
        raise RefusedError(403, f"cross-site requests are refused: {told}")
    site = headers.get("sec-fetch-site", ["none"])
    if site[0] not in ("none", "same-origin"):
        # A link on another page may lead here; no other cross-site request may.
        mode = headers.get("sec-fetch-mode", [""])[0]
        if scope["method"] not in ("GET", "HEAD") or mode != "navigate":
            told = "--allow-origin allows only those that name an origin, and this one does not"
            raise RefusedError(403, f"cross-site requests are refused: {told}")
    return ""


def shared(origin: str, headers: Headers) -> list[tuple[bytes, bytes]]:
    """Return the headers by which a browser gives an answer to a page of this origin, unless "".

    headers: of the request. The page may send and read any header, but send no cookie of the
    browser's.
    """
    found = {"vary": "Origin"}  # also without an origin: browsers keep answers for other pages
    if origin:
        found["access-control-allow-origin"] = origin
        if "access-control-request-method" in headers:
            asked = single(headers, "access-control-request-headers")
            found["access-control-allow-methods"] = METHODS
            found["access-control-allow-headers"] = asked
        else:
            found["access-control-expose-headers"] = "*"  # such as Link and Retry-After
    return [(name.encode(), value.encode("latin-1")) for name, value in found.items()]


def _known_host(host: str, scope: Any, hosts: frozenset[str]) -> bool:
    # DNS rebinding: a web page reaches this machine by a foreign name that resolves to it.
    name = _name(host)
    if name is None:
        return False
    if name == "localhost" or name in hosts:
        return True
    asked, own = parsed(name), parsed(str((scope.get("server") or ("",))[0]))
    return asked is not None and (asked.is_loopback or asked == own)


def _name(host: str) -> str | None:
    """Return the name in a Host header, without its port; None if it is invalid."""
    try:
        parts = urlsplit("//" + host)
        _ = parts.port
    except ValueError:
        return None
    if parts.netloc != host or parts.username is not None or parts.path or not parts.hostname:
        return None
    return parts.hostname.rstrip(".")


def _same(origin: str, host: str) -> bool:
    return origin in (f"http://{host}", f"https://{host}")
