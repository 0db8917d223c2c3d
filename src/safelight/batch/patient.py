"""A storage elsewhere that waits while its store cannot be used."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from safelight.errors import AwayError
from safelight.storage import Storage, Stored

WAITS = (1, 2, 4, 8, 16, 32, 60, 60, 60, 60)
"""Seconds before each further try of a call; five minutes in all."""


class Patient(Storage):
    """Another storage, each call of which is tried again for some minutes.

    A store is busy at times, and a batch takes hours. Nothing is tried again before the first
    write, since the URL or the key may be wrong. tell: called with one line at each outage.
    """

    local = False

    def __init__(self, inner: Storage, tell: Callable[[str], object]) -> None:
        self._inner, self._tell = inner, tell
        self.url, self.root = inner.url, inner.root
        self._works = False

    def write(self, name: str, data: bytes) -> None:
        self._do(lambda: self._inner.write(name, data), wrote=True)

    def write_with(self, name: str, write: Callable[[BinaryIO], object]) -> None:
        self._do(lambda: self._inner.write_with(name, write), wrote=True)

    def read(self, name: str) -> bytes | None:
        return self._do(lambda: self._inner.read(name))

    def find(self, name: str) -> Stored | None:
        return self._do(lambda: self._inner.find(name))

    def parts(self, file: Stored) -> Iterator[bytes]:
        return self._inner.parts(file)

    def sizes(self, folder: str) -> dict[str, int]:
        return self._do(lambda: self._inner.sizes(folder))

    def folders(self, folder: str) -> set[str]:
        return self._do(lambda: self._inner.folders(folder))

    def remove(self, names: Iterable[str]) -> None:
        names = list(names)
        self._do(lambda: self._inner.remove(names))

    def remove_folder(self, folder: str) -> None:
        self._do(lambda: self._inner.remove_folder(folder))

    def move(self, name: str, to: str) -> None:
        self._inner.move(name, to)

    def _do(self, call: Callable[[], Any], *, wrote: bool = False) -> Any:
        waits = iter(WAITS)
        told = False
        while True:
            try:
                found = call()
            except AwayError as error:
                wait = next(waits, None) if self._works else None
                if wait is None:
                    self._works = False  # what is written after it, at the end, does not wait again
                    raise
                if not told:
                    self._tell(f"{error}; it is tried again for {sum(WAITS) // 60} minutes")
                    told = True
                time.sleep(wait)
            else:
                self._works = self._works or wrote
                return found
