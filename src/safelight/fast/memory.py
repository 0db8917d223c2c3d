"""What glibc's allocator does with the memory of activations and of packed weights."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

# The names of <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_MB = 1 << 20


@cache
def _libc() -> Any:
    """The C library, if it is one with these knobs."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


@cache
def keep_freed() -> None:
    """Let memory that is freed be kept for the next activation.

    By default every block of some MB goes back to the kernel when it is freed, which then hands
    out zeroed pages for the next: that took a third of the time of an elementwise operation.
    """
    if (libc := _libc()) is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, 32 * _MB)  # the most that it takes
        libc.mallopt(_M_TRIM_THRESHOLD, 512 * _MB)
        libc.mallopt(_M_TOP_PAD, 64 * _MB)


def give_back() -> None:
    """Return what is free after all: loaded weights, once they are packed."""
    if (libc := _libc()) is not None:
        libc.malloc_trim(0)
