"""The wording of answers: short, and without a path of this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

MAX_ERROR = 1000
"""The most characters of an error's line. At most 200 of them repeat text of a request."""

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""The HTTP methods that metrics and traces name. Strangers may send any word."""

PAGES = frozenset({"/", "/openapi.json", "/favicon.ico", "/studio", "/studio/"})
"""Paths that are answered without one of our routes, at least at times."""

_CODES = {
    401: "no_token",
    403: "forbidden",
    404: "not_found",
    405: "no_method",
    408: "too_slow",
    413: "too_large",
    429: "too_many",
}
"""The words for programs in errors that belong to no setting, by their HTTP status."""

_HIDDEN: list[str] = []


def hide(*paths: str | Path) -> None:
    """Hide these paths in what `public` returns from now on."""
    found = {str(Path(path).resolve()) for path in paths} | {str(path) for path in paths}
    _HIDDEN[:] = sorted({*_HIDDEN, *(path for path in found if len(path) > 1)}, key=len)[::-1]


def public(text: str) -> str:
    """Return an error's line in a form that strangers may read."""
    home = os.path.expanduser("~")  # noqa: PTH111 - Path.home raises where there is none
    for path in (*_HIDDEN, home, str(Path(__file__).parents[2])):
        if len(path) > 1 and path in text:
            text = re.sub(rf"{re.escape(path)}(?=/|\b|')", "…", text)
    return _whole(text if len(text) <= MAX_ERROR else f"{text[:MAX_ERROR]}…")


def problem(status: int, text: str) -> dict[str, Any]:
    """Return the body of an error in a form that fits all three APIs."""
    error = {"message": text, "type": "invalid_request_error", "param": None, "code": None}
    code = _CODES.get(status, "invalid" if status < 500 else "failed")
    return {"detail": text, "code": code, "field": None, "error": error}


def route_of(scope: Any) -> str:
    """Return the pattern of a request's route, which has no value of the request; "" without one.

    Inside a mounted application it begins with the mount's path.
    """
    if scope["path"] in PAGES:
        return scope["path"]
    return scope.get("root_path", "") + getattr(scope.get("route"), "path", "")


def clipped(text: object, length: int = 100) -> str:
    """Return the beginning of a client's text, on one line."""
    shown = _whole(" ".join(str(text)[: length + 1].split()))
    return shown if len(shown) <= length else f"{shown[:length]}…"


def _whole(text: str) -> str:
    """Return a text without lone surrogates, which no answer can contain."""
    return text.encode("utf-8", "replace").decode()
