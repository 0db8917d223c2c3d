"""Where the page and its files are on the server."""

import hashlib

from safelight.server.callers import Caller

PATH = "/studio"
KEPT_AT = f"{PATH}/kept/"


def folder_of(caller: Caller) -> str:
    """Return the name of the folder for what a caller draws on the page."""
    return hashlib.sha256(caller.owner.encode()).hexdigest()[:16]
