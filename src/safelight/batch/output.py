"""What a batch writes: pictures or shards of them, one index, and the rows that failed.

A row is done once it is in the index. Its pictures are written before that, each completely or not
at all.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safelight.batch.lines import Lines
from safelight.batch.shards import FOLDERS, WAITING, Shards, is_of_row
from safelight.batch.worklist import Problem, WorkList
from safelight.errors import SafelightError
from safelight.picture import HALF
from safelight.settings import shown
from safelight.storage import Storage

ABOUT = "batch.json"
PICTURES = "pictures"


@dataclass
class Outcome:
    """The outcome of a row.

    record: its line in the index, without the names of files. pictures: each as a file's bytes.
    recipes: one for each picture. error: code and message (one line) if it failed; then there are
    no pictures.
    """

    row_id: str
    name: str
    record: dict[str, Any] = field(default_factory=dict)
    pictures: list[bytes] = field(default_factory=list)
    recipes: list[dict[str, Any]] = field(default_factory=list)
    error: tuple[str, str] | None = None

    def names(self, ending: str) -> list[str]:
        """Return the names of its files, with @1, @2… if there are several."""
        if len(self.pictures) == 1:
            return [f"{self.name}.{ending}"]
        return [f"{self.name}@{i}.{ending}" for i in range(1, len(self.pictures) + 1)]


class Output:
    """The folder of a batch, open for writing.

    about: what all rows have in common; another run into the same folder must have the same.
    shards: "webdataset" or "parquet"; None writes each picture as a file of its own. shard_rows:
    rows of a shard. ending: of the pictures' names, which gives their format.
    """

    def __init__(
        self,
        storage: Storage,
        about: dict[str, Any],
        *,
        ending: str = "png",
        shards: str | None = None,
        shard_rows: int = 1000,
    ) -> None:
        self.storage, self._about, self._ending = storage, about, ending
        self._index, self._errors = Lines(storage, "index", is_of_row), Lines(storage, "errors")
        self._shards = Shards(storage, self._index, shards, shard_rows) if shards else None
        self._mended: list[dict[str, Any]] | None = None
        self.failed = 0
        self.warned = 0

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs on this machine out of the folder inside the `with` block."""
        if not self.storage.local:
            yield
            return
        from filelock import FileLock, Timeout

        lock = FileLock(f"{self.storage.path('.lock')}", timeout=0)
        try:
            Path(self.storage.root).mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise SafelightError(
                f"another run writes into {shown(self.storage.url)}: wait, or give another --out",
                code="busy",
            ) from None
        except OSError as error:
            raise SafelightError(
                f"out {shown(self.storage.url)} cannot be written: {error.strerror}"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def resume(self, work: WorkList) -> int:
        """Mark the rows of a list that are done. Returns how many rows of the index it lacks.

        A row whose picture or shard is gone is drawn again. Nothing is written before `begin`.
        Raises SafelightError if the folder has rows of a batch with other settings.
        """
        found = self.storage.read(ABOUT)
        if found is None and self._index.name in self.storage.names():
            raise SafelightError(
                f"{shown(self.storage.url)} has an {self._index.name} and no {ABOUT}: it is not of "
                "a batch; give another --out"
            )
        records = {record["id"]: record for record in self._index.load()}
        # A run that drew nothing, as if its device is missing, does not fix the settings.
        begun = records or self.storage.names(WAITING)
        if found is not None and begun and (other := _differing(found, self._about)):
            raise SafelightError(
                f"{shown(self.storage.url)} has rows of a batch with another {other}: give the "
                "same, or another --out",
                code="changed",
            )
        if self._shards is not None:
            kept = self._shards.load(records)
            done = kept | self._shards.pending()
        else:
            there = self.storage.names(PICTURES)
            there = {f"{PICTURES}/{name}" for name in there}
            kept = {i: record for i, record in records.items() if there.issuperset(record["files"])}
            done = kept
        if len(kept) < len(records) or not self._index.whole:
            self._mended = list(kept.values())
        return sum(not work.mark_done(i, record["request"]) for i, record in done.items())

    def begin(self, problems: list[Problem]) -> None:
        """Write what the batch is, repair what a kill has left, and empty the list of errors."""
        for folder in ("", PICTURES, *FOLDERS):
            halves = fnmatch.filter(self.storage.names(folder), HALF)
            self.storage.remove(f"{folder}/{name}" for name in halves)
        if self._mended is not None:
            self._index.replace(self._mended)
            self._mended = None
        if self._shards is not None:
            self._shards.clear()
        self.storage.write(ABOUT, f"{json.dumps(self._about, indent=1)}\n".encode())
        self._errors.replace([])
        self.fail(*problems)

    def keep(self, outcome: Outcome) -> None:
        """Write the outcome of a row."""
        if outcome.error is not None:
            self.fail(Problem(outcome.record["line"], outcome.row_id, *outcome.error))
            return
        self.warned += bool(outcome.record["warnings"])
        names = outcome.names(self._ending)
        if self._shards is not None:
            self._shards.keep(outcome, names)
            return
        files = [f"{PICTURES}/{name}" for name in names]
        for file, data in zip(files, outcome.pictures, strict=True):
            self.storage.write(file, data)
        self._index.append({**outcome.record, "files": files})

    def fail(self, *problems: Problem) -> None:
        """Write rows that failed into the list of errors."""
        self.failed += len(problems)
        for one in problems:
            told = {"id": one.row_id, "line": one.line, "code": one.code, "message": one.message}
            self._errors.append(told)

    def flush(self) -> None:
        """Write the lines that wait, as before a pause."""
        self._index.flush()
        self._errors.flush()

    def close(self) -> None:
        """Write the lines that wait, and close the files."""
        self.flush()
        self._index.close()
        self._errors.close()

    def finish(self, *, index: str = "jsonl") -> str:
        """Write the last shard and the whole index. Returns the index's full name.

        index: "parquet" writes it as index.parquet as well.
        """
        if self._shards is not None:
            self._shards.finish()
        self._index.finish()
        self._errors.finish()
        if index != "parquet":
            return self.storage.path(self._index.name)
        from safelight.batch.arrow import arrow, parquet

        table = arrow().Table.from_pylist(self._index.load())
        self.storage.write_with("index.parquet", lambda file: parquet().write_table(table, file))
        return self.storage.path("index.parquet")


def _differing(found: bytes, about: dict[str, Any]) -> str:
    """Return the first name whose value differs from that in a batch.json; "" if none does."""
    try:
        before = json.loads(found)
    except ValueError:
        before = None
    if not isinstance(before, dict):
        return ABOUT
    names = (name for name in about if name != "safelight")
    return next((n for n in names if before.get(n) != json.loads(json.dumps(about[n]))), "")
