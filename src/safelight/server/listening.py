"""Open the socket and lock the data folder, before anything heavy is imported."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
from pathlib import Path
from typing import Any
from urllib.parse import quote

from safelight.errors import SafelightError

_HELD: list[Any] = []
"""The locks that are held as long as this process lives."""


class ServedError(SafelightError):
    """Another server has this data folder, at `address`."""

    def __init__(self, root: Path, address: str) -> None:
        super().__init__(f"{root} is served already, at {address}: another --data-dir?")
        self.address = address


BACKLOG = 1024
"""The most connections that may wait to be accepted."""


def hold(root: Path, listening: socket.socket) -> None:
    """Lock a data folder for this server. Raises ServedError if another one holds it.

    A second server would take the first one's running jobs for leftovers and draw them again.
    """
    from filelock import FileLock, Timeout

    address = root / "server.address"
    lock = FileLock(root / "server.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        told = address.read_text().strip() if address.is_file() else ""
        raise ServedError(root, told or "another address") from None
    except OSError:
        return  # a later write there gives a better error
    _HELD.append(lock)
    with contextlib.suppress(OSError):  # a full disk: the lock is held all the same
        address.write_text(shown(listening))


def listen(host: str, port: int, token: str | None) -> socket.socket:
    """Return a listening socket. Raises SafelightError if that fails, or if a token is needed."""
    if token is None and not _loopback(host):
        raise SafelightError(
            f"--host {host} can be reached from other machines: add --token auto, or give a token "
            "by --token-file or SAFELIGHT_TOKEN; an empty one is none"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With protocol 0, asyncio leaves Nagle's algorithm on, which adds 40 ms to an answer.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if os.name == "posix":  # on Windows two servers could then have one port
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        if everywhere(host) and family == socket.AF_INET6:  # IPv4 as well
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listening.bind((host, port))
    except (OSError, TypeError) as error:  # the second for a text that no host name can be
        listening.close()
        why = error.strerror if isinstance(error, OSError) else error
        raise SafelightError(
            f"{host}:{port} cannot be listened on ({why}): another --host or --port?"
        ) from None
    listening.listen(BACKLOG)
    return listening


def shown(listening: socket.socket) -> str:
    """Return the server's address, as a person types it into a browser."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def link(listening: socket.socket, token: str | None) -> str:
    """Return the address of the studio, with the token in it."""
    query = "" if token is None else f"?token={quote(token, safe='')}"
    return f"{shown(listening)}/studio{query}"


def host_name(given: str) -> str:
    """Return a host name or an address in the form that the guard compares.

    Raises SafelightError for a text that is neither.
    """
    name = given.lower().rstrip(".")
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(name))
    if re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", name) is None:
        raise SafelightError(
            f"--allow-host {given[:80]!r}: expected a name or an address alone, without http://, "
            "port or path, as studio.example.com"
        )
    return name


def origin_of(given: str) -> str:
    """Return an origin as browsers send it. Raises SafelightError for a text that is none."""
    origin = given.lower()
    host = r"([a-z0-9._-]+|\[[0-9a-f:.]+\])"
    if re.fullmatch(rf"null|file://|[a-z][a-z0-9+.-]*://{host}(:\d+)?", origin, re.A) is None:
        raise SafelightError(
            f"--allow-origin {given[:80]!r}: expected an origin as browsers send it, without a "
            "path, as http://localhost:3000"
        )
    # Browsers leave out the port that the scheme has anyway.
    return origin.removesuffix({"http": ":80", "https": ":443"}.get(origin.split(":")[0], ""))


def everywhere(host: str) -> bool:
    """Return whether a host means all addresses of this machine."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
