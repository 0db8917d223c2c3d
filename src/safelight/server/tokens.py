"""The server's token: where it comes from, and whether a request carries it."""

from __future__ import annotations

import hmac
import os
import secrets
import sys
from pathlib import Path

from safelight.errors import SafelightError

VARIABLE = "SAFELIGHT_TOKEN"
AUTO = "auto"
MAX_LENGTH = 1024


def read_token(argument: str | None, file: Path | None) -> tuple[str | None, bool]:
    """Return the token of a file, of `--token`, or of the environment, in this order.

    None if there is none; an empty one is none. `auto` makes one, and the second value is true
    then: nobody knows it, unless it is told. It is taken out of the
    environment, which processes that this one starts would inherit. Raises SafelightError for a
    token that no client could send.
    """
    inherited = os.environ.pop(VARIABLE, None)
    if file is not None:
        try:
            with file.open("rb") as opened:
                found = opened.read(MAX_LENGTH + 2).decode()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise SafelightError(f"--token-file cannot be read: {why}") from None
        if not found.strip():
            raise SafelightError("--token-file is empty: write a token into it")
        argument = found.rstrip("\r\n")
    token = argument if argument is not None else inherited
    if token is None or not token.strip():
        return None, False
    if token == AUTO:
        return secrets.token_urlsafe(24), True
    if len(token) > MAX_LENGTH or token != token.strip() or not token.isprintable():
        raise SafelightError(
            f"the token must be one line of at most {MAX_LENGTH} printable characters, "
            "without spaces around it"
        )
    return token, False


def hide_argument(token: str | None) -> None:
    """Start this program again without `--token` among its arguments, which all users can read.

    The token goes through the environment, which this user alone can read.
    """
    kept, given = without_token(sys.orig_argv)
    if token is None or given is None or token == AUTO or os.name == "nt":
        return
    os.execve(sys.executable, kept, {**os.environ, VARIABLE: token})


def without_token(arguments: list[str]) -> tuple[list[str], str | None]:
    """Return arguments without `--token`, and its value; None if it is not there."""
    kept: list[str] = []
    given, rest = None, iter(arguments)
    for argument in rest:
        if argument == "--token":
            given = next(rest, None)
        elif argument.startswith("--token="):
            given = argument.partition("=")[2]
        else:
            kept.append(argument)
    return kept, given


def same(given: bytes, token: str) -> bool:
    """Compare in constant time. Clients send letters beyond ASCII as UTF-8 or as Latin-1."""
    well = hmac.compare_digest(given, token.encode("utf-8", "surrogateescape"))
    try:
        latin = token.encode("latin-1")
    except UnicodeEncodeError:  # "?" in the place of a letter would be another token
        return well
    return hmac.compare_digest(given, latin) | well
