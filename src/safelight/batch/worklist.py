"""The rows of a batch in a temporary SQLite file: a million of them take no memory."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safelight.batch.check import Row, Rules
from safelight.batch.rows import Columns
from safelight.errors import SafelightError, StorageError
from safelight.picture import reason
from safelight.settings import shown

_SCHEMA = """
CREATE TABLE rows (
    number INTEGER PRIMARY KEY, line INTEGER NOT NULL, id TEXT NOT NULL UNIQUE,
    folded TEXT NOT NULL UNIQUE, name TEXT NOT NULL, model TEXT NOT NULL, width INTEGER NOT NULL,
    height INTEGER NOT NULL, settings TEXT NOT NULL, digest TEXT NOT NULL,
    done INTEGER NOT NULL DEFAULT 0
);
"""
_ORDER = "model, width, height, number"
_ROW = "number, line, id, name, model, settings, digest"


@dataclass(frozen=True)
class Problem:
    """A row that cannot be drawn. row_id: its id, or its number if it has none."""

    line: int
    row_id: str
    code: str
    message: str


class WorkList:
    """Rows in the order of drawing: by model and size, then in the file's order."""

    def __init__(self) -> None:
        with _disk():
            self._folder = tempfile.TemporaryDirectory(prefix="safelight-batch-")
            self._database = sqlite3.connect(Path(self._folder.name) / "rows.sqlite3")
            self._database.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;")
            self._database.executescript(_SCHEMA)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Delete the list."""
        self._database.close()
        self._folder.cleanup()

    def fill(self, rows: Iterable[Columns], rules: Rules) -> Iterator[Problem]:
        """Take in rows; yield a problem for each invalid row."""
        for number, columns in enumerate(rows, 1):
            try:
                self._add(rules.row(number, columns))
            except StorageError:
                raise
            except SafelightError as error:
                row_id = str(columns.values.get(rules.id_column or "id", number))[:200]
                row_id = row_id.encode(errors="replace").decode()
                yield Problem(columns.line, row_id, error.code, str(error))
        self._do(f"CREATE INDEX order_of_drawing ON rows (done, {_ORDER})")
        with _disk():
            self._database.commit()

    def _add(self, row: Row) -> None:
        settings = row.settings
        values = {
            "number": row.number,
            "line": row.line,
            "id": row.id,
            "folded": row.name.casefold(),
            "name": row.name,
            "model": row.model,
            "width": settings.get("width", 0),
            "height": settings.get("height", 0),
            "settings": json.dumps(settings, ensure_ascii=False),
            "digest": row.digest,
        }
        places = ", ".join(f":{name}" for name in values)
        try:
            self._do(f"INSERT INTO rows ({', '.join(values)}) VALUES ({places})", values)  # nosec B608
        except sqlite3.IntegrityError:
            (line, other) = self._one(
                "SELECT line, id FROM rows WHERE folded = ?", values["folded"]
            )
            kind = (
                "is"
                if other == row.id
                else f"differs in upper and lower case alone from {shown(other)}"
            )
            raise SafelightError(
                f"id {shown(row.id)} {kind} that of line {line}: each row needs its own",
                code="same_id",
            ) from None

    def mark_done(self, row_id: str, digest: str) -> bool:
        """Mark a row as done. Returns whether the list has such a row.

        Raises SafelightError if the row has other settings or pictures than when it was drawn.
        """
        found = self._one("SELECT line, digest FROM rows WHERE id = ?", row_id)
        if found is None:
            return False
        if found[1] != digest:
            raise SafelightError(
                f"line {found[0]}: row {shown(row_id)} was drawn with other settings or pictures; "
                "give another --out, or remove its picture to have it drawn anew",
                code="changed",
            )
        self._do("UPDATE rows SET done = 1 WHERE id = ?", (row_id,))
        return True

    def fail(self, model: str, error: SafelightError) -> list[Problem]:
        """Remove a model's rows that are not done, and return a problem for each."""
        problems = [Problem(row.line, row.id, error.code, str(error)) for row in self.rows(model)]
        self._do("DELETE FROM rows WHERE NOT done AND model = ?", (model,))
        return problems

    def models(self) -> list[tuple[str, int]]:
        """Return the models of rows that are not done, each with its number of rows, in order."""
        return self._all(
            "SELECT model, COUNT(*) FROM rows WHERE NOT done GROUP BY model ORDER BY model"
        )

    def count(self, *, done: bool | None = None) -> int:
        """Return the number of rows: of all, of those that are done, or of those that are not."""
        return self._one("SELECT COUNT(*) FROM rows WHERE ? IS NULL OR done = ?", done, done)[0]

    def rows(self, model: str, more: str = "") -> Iterator[Row]:
        """Yield a model's rows that are not done yet, in order. more: further SQL."""
        found = self._do(
            f"SELECT {_ROW} FROM rows WHERE NOT done AND model = ? ORDER BY {_ORDER} {more}",  # nosec B608
            (model,),
        )
        for number, line, row_id, name, of, settings, digest in found:
            yield Row(number, line, row_id, name, of, json.loads(settings), digest)

    def sample(self, model: str, most: int) -> list[Row]:
        """Return up to `most` of a model's rows that are not done, evenly spread over the list."""
        count = dict(self.models()).get(model, 0)
        number = min(most, count)
        places = [i * (count - 1) // max(1, number - 1) for i in range(number)]
        return [next(self.rows(model, f"LIMIT 1 OFFSET {at}")) for at in places]

    def shapes(self, model: str, names: Sequence[str]) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield the distinct values of settings in a model's rows, each with its count.

        A list is JSON text.
        """
        columns = ", ".join(f"json_extract(settings, '$.{name}')" for name in names)
        groups = ", ".join(str(i + 1) for i in range(len(names)))
        found = self._do(
            f"SELECT {columns}, COUNT(*) FROM rows "  # nosec B608
            f"WHERE NOT done AND model = ? GROUP BY {groups}",
            (model,),
        )
        for *values, count in found:
            yield dict(zip(names, values, strict=True)), count

    def _one(self, statement: str, *values: Any) -> Any:
        with _disk():
            return self._do(statement, values).fetchone()

    def _all(self, statement: str, *values: Any) -> list[Any]:
        with _disk():
            return self._do(statement, values).fetchall()

    def _do(self, statement: str, values: Any = ()) -> sqlite3.Cursor:
        with _disk():
            return self._database.execute(statement, values)


@contextlib.contextmanager
def _disk() -> Iterator[None]:
    """Raise StorageError, one line, if the list cannot be kept."""
    try:
        yield
    except (sqlite3.OperationalError, OSError) as error:
        raise StorageError(
            f"the folder for temporary files, {tempfile.gettempdir()}, cannot be used: "
            f"{reason(error)} (TMPDIR names another)"
        ) from None
