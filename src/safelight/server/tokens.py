"""The server's token: read it, hide it, and compare a request's token with it."""

from __future__ import annotations

import hmac
import os
import secrets
import sys
from pathlib import Path

from safelight.errors import SafelightError
from safelight.paths import expanded

VARIABLE = "SAFELIGHT_TOKEN"
AUTO = "auto"
MAX_LENGTH = 1024


def read_token(argument: str | None, file: Path | None) -> tuple[str | None, bool]:
    """Return the token and whether it was made here.

    It is read from a file, from `--token` or from the environment, in this order; None if there is
    none or it is empty. `auto` makes a random one, which nobody knows until it is shown. The
    variable is removed from the environment, which child processes would inherit. Raises
    SafelightError for a token that no client could send.
    """
    inherited = os.environ.pop(VARIABLE, None)
    if file is not None:
        try:
            with expanded(file).open("rb") as opened:
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
    """Restart this program without `--token` among its arguments, which all users can read.

    The token goes through the environment, which only this user can read.
    """
    kept, given = without_token(sys.orig_argv)
    if token is None or given is None or token == AUTO or os.name == "nt":
        return
    os.execve(sys.executable, kept, {**os.environ, VARIABLE: token})


def without_token(arguments: list[str]) -> tuple[list[str], str | None]:
    """Return arguments without `--token`, and its value; None if it is absent."""
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
    """Compare tokens in constant time. Clients send non-ASCII letters as UTF-8 or as Latin-1."""
    well = hmac.compare_digest(given, token.encode("utf-8", "surrogateescape"))
    try:
        latin = token.encode("latin-1")
    except UnicodeEncodeError:  # replacing a letter by "?" would give another token
        return well
    return hmac.compare_digest(given, latin) | well
