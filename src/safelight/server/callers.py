"""The caller of a request: its address, key, and whose jobs it may see; and the server's hub."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from safelight.errors import SafelightError

if TYPE_CHECKING:
    from fastapi import Request as HttpRequest

    from safelight.server.hub import Hub

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

ADMIN = "admin"
"""The name of the key that sees all jobs: a server's `token`."""

LOCAL = "local"
"""The address of all clients on this machine: they are one person, by IPv4 or by IPv6."""

SCOPE = "safelight.caller"
MAX_OWNER = 64
"""The most characters of an owner; the database has room for as many."""


@dataclass(frozen=True)
class Caller:
    """Who sent a request. key: the name of the key sent; None on a server that asks for none."""

    address: str = LOCAL
    key: str | None = None

    @property
    def owner(self) -> str:
        """The owner of this caller's jobs: at most 64 characters."""
        name = f"at:{self.address}" if self.key is None else f"key:{self.key}"
        if len(name) > MAX_OWNER:  # if cut off, two long names could become equal
            return f"key#{hashlib.sha256(name.encode()).hexdigest()[: MAX_OWNER - 4]}"
        return name

    @property
    def sees(self) -> str | None:
        """The owner whose jobs this caller sees; None for all jobs.

        The admin's key sees all jobs. On a server without keys, so does a client on its machine.
        """
        everything = self.key == ADMIN or (self.key is None and self.address == LOCAL)
        return None if everything else self.owner

    @property
    def name(self) -> str:
        """Key and address together; limits are counted by it."""
        return f"{self.key or ''}@{self.address}"


def key_of(owner: str | None) -> str | None:
    """Return the name of the key of an owner; None for an owner without a key."""
    kind, _, name = (owner or "").partition(":")
    return name if kind == "key" else None


def caller_of(scope: Any) -> Caller:
    """Return who sent the request of an ASGI scope, as set by the guard."""
    return scope.get(SCOPE) or Caller()


def network(given: str) -> Network:
    """Return the network of a trusted proxy; a single address is a network of one.

    Raises SafelightError for a text that is neither.
    """
    one = parsed(given)
    with contextlib.suppress(ValueError):
        found = ipaddress.ip_network(given if one is None else str(one), strict=False)
        if not getattr(found.network_address, "ipv4_mapped", None):  # IPv4 must be written as IPv4
            return found
    raise SafelightError(
        f"--trust-proxy {given[:80]!r}: expected an address or a network, as 10.0.0.1 or 10.0.0.0/8"
    )


def parsed(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return an IP address, or None for other text. An IPv4 address mapped to IPv6 becomes IPv4."""
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def forwarded(scope: Any, proxies: Sequence[Network], name: bytes) -> str | None:
    """Return the last entry of a header that a trusted proxy set; None if none did."""
    told = None
    peer = parsed(_peer(scope))
    if peer is not None and any(peer in trusted for trusted in proxies):
        for key, value in scope["headers"]:
            if key == name:
                told = value.decode("latin-1").rpartition(",")[2].strip()
    return told


def address_of(scope: Any, proxies: Sequence[Network] = ()) -> str:
    """Return the client's address; for IPv6, its network of 64 bits, which belongs to one client.

    proxies: the trusted ones; the last entry of their X-Forwarded-For is the client.
    """
    told = forwarded(scope, proxies, b"x-forwarded-for")
    found = parsed(_peer(scope) if told is None else told)
    if found is None:
        return "unknown"
    if found.is_loopback:
        return LOCAL
    if found.version == 6:
        return str(ipaddress.ip_network((found, 64), strict=False).network_address)
    return str(found)


def _peer(scope: Any) -> str:
    return (scope.get("client") or ("",))[0]


def shortened(address: str) -> str:
    """Return an address without the part that tells apart machines of one network."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    prefix = 24 if found.version == 4 else 48
    return str(ipaddress.ip_network((address, prefix), strict=False).network_address)


def hub_of(http: HttpRequest) -> Hub:
    """Return the hub of the server that got a request."""
    return http.app.state.hub
