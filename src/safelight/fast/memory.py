"""How much memory there is, and how the C library manages it for activations and weights."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from safelight import containers

# The names of <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
_MAPPED = 65536  # the C library's own value of the last
_MADV_PAGEOUT = 21
_MB = 1 << 20


@cache
def _libc() -> Any:
    """Return the C library, or None if it lacks these functions."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    if not all(hasattr(library, name) for name in ("mallopt", "malloc_trim", "madvise")):
        return None
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library


@cache
def total() -> int:
    """Return the bytes of memory that this machine has, or its container's limit; 0 if unknown."""
    try:
        most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return _of_windows()[0]
    limit = containers.memory_limit()
    return most if limit is None else min(most, limit)


def free() -> int:
    """Return the bytes of memory that are free or can be freed, in this container; 0 if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        most = next(int(ln.split()[1]) * 1024 for ln in lines if ln.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return _of_windows()[1]
    left = containers.free_memory()
    return most if left is None else min(most, left)


class _Status(ctypes.Structure):
    """MEMORYSTATUSEX of <sysinfoapi.h>."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("total", ctypes.c_uint64),
        ("free", ctypes.c_uint64),
        ("others", ctypes.c_uint64 * 5),
    )


def _of_windows() -> tuple[int, int]:
    """Return the bytes of memory that Windows has and that are free; zeros elsewhere."""
    windll = getattr(ctypes, "windll", None)
    status = _Status(length=ctypes.sizeof(_Status))
    if windll is None or not windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return 0, 0
    return status.total, status.free


@cache
def keep_freed() -> None:
    """Keep freed memory for the next activation.

    By default each block of several MB goes back to the operating system when it is freed, and the
    next block gets zeroed pages: that took a third of the time of an elementwise operation.
    """
    if (libc := _libc()) is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, 32 * _MB)  # the largest value allowed
        libc.mallopt(_M_TRIM_THRESHOLD, 256 * _MB)  # more than a tiny decoder frees at its end
        libc.mallopt(_M_TOP_PAD, 64 * _MB)


_mapping: bool | None = None


def map_large(wanted: bool) -> None:
    """Take blocks of over 32 MB from the operating system if `wanted`, else from freed memory."""
    global _mapping
    if wanted != _mapping and (libc := _libc()) is not None:
        libc.mallopt(_M_MMAP_MAX, _MAPPED if wanted else 0)
        _mapping = wanted


def give_back() -> None:
    """Return freed memory to the operating system, as that of loaded weights after packing."""
    if (libc := _libc()) is not None:
        libc.malloc_trim(0)


def page_out(tensor: Tensor) -> None:
    """Drop a tensor's pages of a mapped file from memory; they are read again when needed.

    Unlike MADV_DONTNEED this cannot lose data, whatever kind of memory the tensor has.
    """
    if (libc := _libc()) is None:
        return
    begin, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (begin + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        libc.madvise(first, last - first, _MADV_PAGEOUT)
