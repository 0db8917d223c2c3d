"""Where long work says that it gets on, for whoever watches that it does not hang.

Networks need not: their blocks are watched by hooks. Loops within a layer do.
"""

import io
from collections.abc import Callable

_listening: list[Callable[[], object]] = []


def listen(call: Callable[[], object]) -> None:
    """From now on call this when work gets on, in the thread that does it."""
    _listening.append(call)


def get_on() -> None:
    """Say that work gets on."""
    for call in _listening:
        call()


class Reader(io.BytesIO):
    """Bytes in memory; work gets on with each piece that is read."""

    def read(self, size: int | None = -1) -> bytes:
        get_on()
        return super().read(size)
