"""Log a browser in: a person types the token once and gets a cookie in its place.

A browser cannot send a bearer token by itself. The cookie is derived from the token by HMAC.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from urllib.parse import parse_qs

COOKIE = "safelight"
ENTER = "/studio/enter"
MAX_FORM = 4096
MAX_COOKIES = 2
"""The most of our cookies in one request that are checked: each is a guess at the token."""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Safelight</title>
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<style>
body {{ font: 1.1rem/1.6 system-ui, sans-serif; max-width: 24rem; margin: 18vh auto;
  padding: 1rem }}
input, button {{ font: inherit; padding: .5rem .7rem; width: 100%; box-sizing: border-box;
  margin-top: .6rem }}
</style></head>
<body><main><h1>Safelight</h1>
<form method="post" action="{action}">
<label>This server's token <input name="token" type="password" required autofocus
autocomplete="current-password"></label><button>Enter</button></form>
<p role="alert">{problem}</p></main></body></html>
"""


def page(problem: str = "") -> bytes:
    """Return the form that asks for the token. problem: a sentence of ours."""
    return _PAGE.format(action=ENTER, problem=problem).encode()


def token_in(form: bytes) -> bytes:
    """Return the token in a form or a query that a browser sent; empty if there is none."""
    try:
        fields = parse_qs(form, max_num_fields=4)
    except ValueError:
        return b""
    return fields.get(b"token", [b""])[0].strip()


def onward() -> bytes:
    """Return a page that leads to the studio.

    A redirect does not work: browsers send no strict cookie with it after a link on another site.
    """
    return (
        b'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Safelight</title>'
        b'<meta http-equiv="refresh" content="0; url=/studio"></head>'
        b'<body><a href="/studio">Safelight</a></body></html>'
    )


def set_cookie(token: str, host: str) -> bytes:
    """Return the Set-Cookie header. Strict: requests that another site starts do not carry it.

    host: the server's, as the browser names it.
    """
    month = 30 * 24 * 3600
    value = f"{cookie_name(host)}={cookie_of(token)}"
    return f"{value}; Path=/; HttpOnly; SameSite=Strict; Max-Age={month}".encode()


def cookie_name(host: str) -> str:
    """Return the cookie's name: with the port, since a host's cookies go to all of its ports."""
    port = re.search(r":(\d+)$", host, re.ASCII)
    return COOKIE if port is None else f"{COOKIE}-{port[1]}"


def cookies_in(headers: list[str], host: str) -> bytes | None:
    """Return our cookies in these Cookie headers, joined by ";"; None if there is none."""
    # http.cookies drops all cookies if it cannot read one, which another server here may have set.
    pairs = (pair.strip().partition("=") for header in headers for pair in header.split(";"))
    found = [value for name, _, value in pairs if name == cookie_name(host)]
    return ";".join(found[:MAX_COOKIES]).encode("latin-1", "replace") if found else None


def matches(cookies: bytes, token: str) -> bool:
    """Return whether one of these cookies is the one that `set_cookie` sets for this token."""
    value = cookie_of(token).encode()
    # Browsers send two cookies of one name if another path has set one too.
    return any(hmac.compare_digest(given, value) for given in cookies.split(b";"))


def cookie_of(token: str) -> str:
    """Return the cookie's value for a token. The token cannot be computed from it."""
    return hmac.new(token.encode(), b"safelight studio", hashlib.sha256).hexdigest()
