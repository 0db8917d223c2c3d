"""Long work reports its progress here, so that a watchdog sees that it does not hang.

Networks need not report: hooks watch their blocks. Loops within a layer do.
"""

import io
from collections.abc import Callable

_listening: list[Callable[[], object]] = []


def listen(call: Callable[[], object]) -> None:
    """Call `call` at each report from now on, in the thread that reports."""
    _listening.append(call)


def get_on() -> None:
    """Report progress."""
    for call in _listening:
        call()


class Reader(io.BytesIO):
    """Bytes in memory; reading a piece reports progress."""

    def read(self, size: int | None = -1) -> bytes:
        get_on()
        return super().read(size)
