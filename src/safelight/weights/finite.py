"""Check that a file's weights are finite, while the file is hashed, and remember the result."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Set
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from safelight.weights.cache import Stamp, keep, recall
from safelight.weights.check import ITEM_SIZES, Header
from safelight.weights.tensors import DTYPES

_BITS = {"F16": np.uint16, "BF16": np.uint16, "F32": np.uint32}
_SIGNED = {np.uint16: np.int16, np.uint32: np.int32}
"""Integers of as many bits. numpy's, because PyTorch's threads would cost more than they save."""


class FiniteCheck:
    """Checks the weights of one file, piece by piece.

    wanted: the precision in which each computes, by its key in the file. finite_keys: those whose
    numbers are all known to be finite.
    """

    def __init__(self, header: Header, wanted: Mapping[str, torch.dtype]) -> None:
        self.finite_keys: Set[str] = frozenset()
        self._wanted = wanted
        text = "\n".join(f"{key} {dtype}" for key, dtype in sorted(wanted.items()))
        self._what = f"finite-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self._good: dict[str, bool] = {}
        # Where each begins and ends in the file. A number that is not aligned may be split between
        # two pieces: such tensors are checked later, one by one.
        self._places = [
            (header.start + info.start, header.start + info.end, key)
            for key, info in header.tensors.items()
            if key in wanted
            and info.dtype in _BITS
            and header.format != "torch"
            and not (header.start + info.start) % ITEM_SIZES[info.dtype]
        ]
        self._limits = {
            key: (_BITS[stored], _largest(DTYPES[stored], wanted[key]))
            for _, _, key in self._places
            for stored in [header.tensors[key].dtype]
        }

    def check_piece(self, piece: memoryview, at: int) -> None:
        """Check a piece of the file. Pieces come in order; all but the last are n · 4 KiB long.

        at: its offset in the file, in bytes.
        """
        end = at + len(piece)
        first = bisect_right(self._places, at, key=lambda place: place[1])
        for start, stop, key in self._places[first:]:
            if start >= end:
                break
            low, high = max(start, at), min(stop, end)
            if low < high:
                bits, limit = self._limits[key]
                count = (high - low) // np.dtype(bits).itemsize
                values: Any = np.frombuffer(piece, bits, count, low - at)
                # Read as integers, floats of 0 or more are in order, with NaN last. Those with a
                # sign come after them as unsigned integers, and before them as signed ones.
                sign = np.iinfo(bits).max // 2 + 1
                good = int(values.view(_SIGNED[bits]).max()) <= limit
                good = good and int(values.max()) <= sign + limit
                self._good[key] = self._good.get(key, True) and good

    def finish(self, path: Path, stamp: Stamp) -> None:
        """Set `finite_keys` after the file was hashed, now or at an earlier load."""
        if recall(self._what, path, stamp) is True:
            self.finite_keys = self._wanted.keys()
        else:
            self.finite_keys = {key for key, good in self._good.items() if good}

    def keep(self, path: Path, stamp: Stamp) -> None:
        """Remember that all numbers are finite."""
        keep(self._what, path, stamp, True)


@lru_cache
def _largest(stored: torch.dtype, dtype: torch.dtype) -> int:
    """Return the bits of the largest number in `stored` that is finite in `dtype`."""
    kind = {2: torch.int16, 4: torch.int32}[stored.itemsize]
    low, high = 0, int(torch.iinfo(kind).max)
    while low < high:
        middle = (low + high + 1) // 2
        value = torch.tensor([middle], dtype=kind).view(stored)
        low, high = (middle, high) if bool(value.to(dtype).isfinite()) else (low, middle - 1)
    return low
