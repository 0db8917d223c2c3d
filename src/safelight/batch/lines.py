"""Growing files of JSON objects, one in each line."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from safelight.errors import SafelightError
from safelight.picture import reason
from safelight.settings import shown
from safelight.storage import Storage


class Lines:
    """A growing file of JSON objects, one in each line.

    On this machine, lines are appended to it. Files elsewhere cannot be appended to, so parts of
    PART lines are written, and joined at the end.

    ours: whether an object may be in this file. whole: False if a line was cut off when the file
    was loaded; then the file must be replaced before it grows.
    """

    PART = 100

    def __init__(
        self,
        storage: Storage,
        stem: str,
        ours: Callable[[dict[str, Any]], bool] = lambda record: True,
    ) -> None:
        self._storage, self._stem, self._ours = storage, stem, ours
        self.name = f"{stem}.jsonl"
        self.whole = True
        self._waiting: list[str] = []
        self._part = 0
        self._file: BinaryIO | None = None

    def load(self) -> list[dict[str, Any]]:
        """Return the objects, without a last line that was cut off; see `whole`."""
        data = self._storage.read(self.name) or b""
        self.whole = data.endswith(b"\n") or not data
        lines = data[: data.rfind(b"\n") + 1].splitlines()
        for part in self._parts():
            self._part = int(part.rpartition("-")[2].partition(".")[0])
            lines += (self._storage.read(part) or b"").splitlines()
        # A kill after the parts were joined and before they were removed leaves lines twice.
        return [self._parsed(line) for line in dict.fromkeys(lines)]

    def append(self, *records: dict[str, Any]) -> None:
        """Add objects, all of them in one write."""
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        if self._storage.local:
            self._write("".join(lines).encode())
            return
        self._waiting += lines
        if len(self._waiting) >= self.PART:
            self.flush()

    def flush(self) -> None:
        """Write lines that wait for their part to fill."""
        if self._waiting:
            self._part += 1
            name = f"{self._stem}-{self._part:08d}.part.jsonl"
            self._storage.write(name, "".join(self._waiting).encode())
            self._waiting = []

    def replace(self, records: Iterable[dict[str, Any]]) -> None:
        """Replace the file by one with these objects alone."""
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        self.close()
        self._storage.write(self.name, "".join(lines).encode())
        self._waiting = []
        self._storage.remove(self._parts())

    def finish(self) -> None:
        """Join all parts."""
        self.flush()
        self.close()
        if self._parts():
            self.replace(self.load())

    def close(self) -> None:
        """Close the file, after all of it is on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _parts(self) -> list[str]:
        if self._storage.local:
            return []
        names = self._storage.names()
        return sorted(n for n in names if n.startswith(f"{self._stem}-") and ".part." in n)

    def _write(self, data: bytes) -> None:
        path = Path(self._storage.path(self.name))
        try:
            if self._file is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = path.open("ab", buffering=0)
            before = os.fstat(self._file.fileno()).st_size
            try:
                while data:  # a disk takes only a part if it is full
                    data = data[self._file.write(data) :]
            except OSError:
                # The next line would be joined to half of one.
                with contextlib.suppress(OSError):
                    self._file.truncate(before)
                raise
        except OSError as error:
            raise SafelightError(f"{shown(str(path))} cannot be written: {reason(error)}") from None

    def _parsed(self, line: bytes) -> dict[str, Any]:
        try:
            found = json.loads(line)
            if isinstance(found, dict) and self._ours(found):
                return found
        except (ValueError, RecursionError):
            pass
        raise self.foreign()

    def foreign(self) -> SafelightError:
        """Return the error that a line is not ours."""
        return SafelightError(
            f"{self.name} in {shown(self._storage.url)} has a line that is not ours: "
            "give another --out"
        )
