"""Who asks: the address and the key of a request, and whose jobs that lets them see."""

from __future__ import annotations

import hashlib
import ipaddress
from dataclasses import dataclass
from typing import Any

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


def address_of(scope: Any, proxies: frozenset[str] = frozenset()) -> str:
    """Return the client's address; an IPv6 one by its network of 64 bits, which one client owns.

    proxies: addresses whose X-Forwarded-For is believed, its last entry.
    """
    told = (scope.get("client") or ("",))[0]
    if told in proxies:
        for name, value in scope["headers"]:
            if name == b"x-forwarded-for":
                told = value.decode("latin-1").rpartition(",")[2].strip()
    try:
        address = ipaddress.ip_address(told.partition("%")[0])
    except ValueError:
        return "unknown"
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    if address.is_loopback:
        return LOCAL
    if address.version == 6:
        return str(ipaddress.ip_network((address, 64), strict=False).network_address)
    return str(address)


def shortened(address: str) -> str:
    """Return an address without what tells apart the machines of one network."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    prefix = 24 if found.version == 4 else 48
    return str(ipaddress.ip_network((address, prefix), strict=False).network_address)
