"""Where packed weights are kept between their uses: in memory, or in a file to save memory."""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from safelight.errors import StorageError

_PAGE = 2 << 20


class Store(Protocol):
    """A place for packed weights."""

    def room(self, count: int) -> Tensor:
        """Return memory for so many bfloat16 numbers, to pack weights into before `keep`."""
        ...

    def keep(self, weights: Tensor) -> Callable[[], Tensor]:
        """Return a function that returns these weights; they are valid until others are fetched."""
        ...


def _large_pages(size: int) -> Tensor:
    """Return memory of `size` bytes in large pages. Pages that are not used take no memory.

    Our kernels read gigabytes of weights in each step, and looking up pages of 4 KB would cost a
    fifth of the time. Raises MemoryError.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):  # as on Windows
        return torch.empty(size // 2, dtype=torch.bfloat16)
    # Private: shared memory has large pages only where the administrator allows it.
    try:
        memory = mmap.mmap(-1, size + _PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        raise MemoryError(f"no {size >> 20} MB for packed weights") from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    block = torch.frombuffer(memory, dtype=torch.bfloat16)
    return block[-block.data_ptr() % _PAGE // 2 :][: size // 2]


class Arena:
    """Keeps weights in memory, in a few large blocks."""

    BLOCK = 64 << 20  # bytes; a block lives as long as a weight in it, of any network

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.bfloat16)
        self._lock = threading.Lock()  # a picture may be decoded in a thread beside the steps

    def room(self, count: int) -> Tensor:
        count = -(-count // 32) * 32
        with self._lock:
            if len(self._rest) < count:
                self._rest = _large_pages(max(self.BLOCK, 2 * count))
            taken, self._rest = self._rest[:count], self._rest[count:]
        return taken

    def keep(self, weights: Tensor) -> Callable[[], Tensor]:
        return lambda: weights


ARENA = Arena()


class Passing:
    """Keeps nothing: for weights that are packed for one use."""

    def room(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.bfloat16)

    def keep(self, weights: Tensor) -> Callable[[], Tensor]:
        return lambda: weights


PASSING = Passing()


class Shelf:
    """Keeps weights in a temporary file, which ends with the process.

    What is fetched overwrites what was fetched before. The operating system caches as much of the
    file as there is memory for. `keep` raises StorageError if the file cannot be written.
    A deep copy is a new one: the layers that are packed already use the old one.
    """

    def __init__(self) -> None:
        self._desk = torch.empty(0, dtype=torch.bfloat16)
        self._file: Any = None
        self._end = 0

    def __reduce__(self) -> tuple[type[Shelf], tuple[()]]:
        return Shelf, ()

    def room(self, count: int) -> Tensor:
        if len(self._desk) < count:
            self._desk = _large_pages(2 * count)
        return self._desk[:count]

    def keep(self, weights: Tensor) -> Callable[[], Tensor]:
        dtype, shape, left = weights.dtype, weights.shape, _bytes(weights.contiguous())
        place, size = self._end, len(left)
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(  # noqa: SIM115  # closed when this ends
                    prefix="safelight-", dir=_disk(), buffering=0
                )
                weakref.finalize(self, self._file.close)
            self._file.seek(place)
            while left:
                left = left[self._file.write(left) :]
        except OSError as e:
            raise _unwritten("low_memory", e) from None
        self._end = place + size  # only now: the next weight overwrites one that was cut off

        def fetch() -> Tensor:
            weights = self.room(-(-size // 2)).view(torch.uint8)[:size]
            left = _bytes(weights)
            self._file.seek(place)
            while left:
                got = self._file.readinto(left)
                if not got:
                    raise OSError("the file of packed weights ends early")
                left = left[got:]
            return weights.view(dtype).view(shape)

        return fetch


def in_file(weights: Tensor, what: str) -> Tensor:
    """Return weights in a mapped temporary file of their own, which ends with the tensor.

    The operating system caches as much of the file as there is memory for. what: what they are
    for, in the error. Raises StorageError if the file cannot be written.
    """
    if os.name == "nt":  # a file that is mapped could not be deleted there
        return weights
    left = _bytes(weights.contiguous())
    try:
        with tempfile.NamedTemporaryFile(prefix="safelight-", dir=_disk(), buffering=0) as file:
            while left:
                left = left[file.write(left) :]
            size, dtype = weights.numel(), weights.dtype
            mapped = torch.from_file(file.name, shared=False, size=size, dtype=dtype)
    except OSError as e:
        raise _unwritten(what, e) from None
    return mapped.view(weights.shape)


def _unwritten(what: str, error: OSError) -> StorageError:
    """Return the error for weights that could not be written. what: what they are for."""
    return StorageError(
        f"{what} could not write weights to {_disk()}: {error.strerror}; "
        "name another folder in TMPDIR"
    )


def _bytes(numbers: Tensor) -> memoryview:
    return numbers.flatten().view(torch.uint8).numpy().data


def _disk() -> str:
    """Return a folder on a disk; /tmp is often in memory."""
    lasting = Path("/var/tmp")  # for a TemporaryFile, which has no name there  # nosec B108
    if "TMPDIR" not in os.environ and os.access(lasting, os.W_OK):
        return str(lasting)
    return tempfile.gettempdir()
