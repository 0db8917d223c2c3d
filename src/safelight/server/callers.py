"""Who asks: the address and the key of a request, and whose jobs that lets them see."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from safelight.errors import SafelightError

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

ADMIN = "admin"
"""The name of the key that sees all jobs: a server's `token`."""

LOCAL = "local"
"""The address of all who are on this machine: IPv4 and IPv6 are two ways to one person."""

SCOPE = "safelight.caller"
MAX_OWNER = 64
"""Characters of an owner, as the database keeps it."""


@dataclass(frozen=True)
class Caller:
    """key: the name of the key that a request came with; None on a server that asks for none."""

    address: str = LOCAL
    key: str | None = None

    @property
    def owner(self) -> str:
        """Who the jobs of this caller belong to: at most 64 characters."""
        name = f"at:{self.address}" if self.key is None else f"key:{self.key}"
        if len(name) > MAX_OWNER:  # cut off, two long names could be one
            return f"key#{hashlib.sha256(name.encode()).hexdigest()[: MAX_OWNER - 4]}"
        return name

    @property
    def sees(self) -> str | None:
        """The owner whose jobs this caller sees; None for all.

        All are for the admin's key, and for the person at the machine of a server without keys.
        """
        everything = self.key == ADMIN or (self.key is None and self.address == LOCAL)
        return None if everything else self.owner

    @property
    def name(self) -> str:
        """Key and address together: what limits are counted by."""
        return f"{self.key or ''}@{self.address}"


def key_of(owner: str | None) -> str | None:
    """Return the name of the key that an owner is; None for one who has no key."""
    kind, _, name = (owner or "").partition(":")
    return name if kind == "key" else None


def caller_of(scope: Any) -> Caller:
    """Return who sent the request of an ASGI scope, as the guard found."""
    return scope.get(SCOPE) or Caller()


def network(given: str) -> Network:
    """Return the network of a proxy that is trusted; an address is one by itself.

    Raises SafelightError for what is neither.
    """
    one = parsed(given)
    with contextlib.suppress(ValueError):
        found = ipaddress.ip_network(given if one is None else str(one), strict=False)
        if not getattr(found.network_address, "ipv4_mapped", None):  # IPv4 goes by its own form
            return found
    raise SafelightError(
        f"--trust-proxy {given[:80]!r}: expected an address or a network, as 10.0.0.1 or 10.0.0.0/8"
    )


def parsed(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return an address, None if it is none; of an IPv4 client on an IPv6 socket that of IPv4."""
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def forwarded(scope: Any, proxies: Sequence[Network], name: bytes) -> str | None:
    """Return the last entry of a header that a trusted proxy sets; None if none has set it."""
    told = None
    peer = parsed(_peer(scope))
    if peer is not None and any(peer in trusted for trusted in proxies):
        for key, value in scope["headers"]:
            if key == name:
                told = value.decode("latin-1").rpartition(",")[2].strip()
    return told


def address_of(scope: Any, proxies: Sequence[Network] = ()) -> str:
    """Return the client's address; an IPv6 one by its network of 64 bits, which one client owns.

    proxies: those whose X-Forwarded-For is believed, its last entry.
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
    """Return an address without what tells apart the machines of one network."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    prefix = 24 if found.version == 4 else 48
    return str(ipaddress.ip_network((address, prefix), strict=False).network_address)
