"""Read the rows of a batch: JSONL, CSV or Parquet, on this machine or at a URL."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import fsspec

from safelight.errors import SafelightError
from safelight.picture import reason
from safelight.settings import shown

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
"""Formats by the ending of a file's name. Text formats may have one of COMPRESSED after it."""

COMPRESSED = (".gz", ".bz2", ".xz", ".zip")
SEPARATORS = (",", ";", "\t")


@dataclass(frozen=True)
class Columns:
    """A row as it stands in the file.

    line: its line, from 1; in Parquet its number. values: by column, without empty ones. typed:
    False if numbers are still text. problem: why the row cannot be read, None if it can.
    """

    line: int
    values: dict[str, Any]
    typed: bool = True
    problem: str | None = None


def kind_of(file: str) -> str:
    """Return "jsonl", "csv" or "parquet". Raises SafelightError for another ending."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(file).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED and KINDS.get(suffixes[-2:][0]) != "parquet":
        suffixes.pop()
    if not suffixes or suffixes[-1] not in KINDS:
        raise SafelightError(
            f"{shown(file)} must be a file of rows that ends in {', '.join(KINDS)}"
        )
    return KINDS[suffixes[-1]]


def read_rows(file: str) -> Iterator[Columns]:
    """Yield the rows of a file in order.

    Raises SafelightError if the file cannot be read at all. A row that cannot be read is yielded
    with its problem.
    """
    kind = kind_of(file)
    try:
        if kind == "parquet":
            yield from _parquet(file)
            return
        newline = "\n" if kind == "jsonl" else ""
        opened = fsspec.open(file, "rt", encoding="utf-8-sig", newline=newline, compression="infer")
        with opened as text:
            yield from (_jsonl if kind == "jsonl" else _csv)(text)
    except UnicodeDecodeError:
        raise SafelightError(f"{shown(file)} is not text in UTF-8: save it as that") from None
    except csv.Error as error:
        raise SafelightError(f"{shown(file)} cannot be read as CSV: {error}") from None
    except SafelightError:
        raise
    except Exception as error:  # decoders of damaged files raise anything
        raise SafelightError(f"{shown(file)} cannot be read: {reason(error)}") from None


def _jsonl(lines: Any) -> Iterator[Columns]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Columns(number, {}, problem=f"this is not JSON: {reason(error)}")
            continue
        if isinstance(values, dict):
            yield Columns(number, {k: v for k, v in values.items() if v is not None})
        else:
            yield Columns(number, {}, problem=f"a row is a JSON object, not {shown(values)}")


def _csv(text: Any) -> Iterator[Columns]:
    first = text.readline()
    separator = max(SEPARATORS, key=first.count)
    text.seek(0)
    reader = csv.reader(text, delimiter=separator, strict=True)
    names = [name.strip() for name in next(reader, [])]
    if not names or len({*names}) < len(names) or "" in names:
        raise SafelightError("a CSV file begins with a line of column names, each of them once")
    before = reader.line_num
    for cells in reader:
        line, before = before + 1, reader.line_num
        if not any(cells):  # as spreadsheets write them at the end
            continue
        if len(cells) == len(names):
            values = {name: cell for name, cell in zip(names, cells, strict=True) if cell != ""}
            yield Columns(line, values, typed=False)
        else:
            problem = f"this row has {len(cells)} cells, and {len(names)} columns have names"
            yield Columns(line, {}, problem=problem)


def _parquet(file: str) -> Iterator[Columns]:
    from safelight.batch.arrow import parquet

    number = 0
    with fsspec.open(file, "rb") as opened:
        try:
            for batch in parquet().ParquetFile(opened).iter_batches(1000):
                for values in batch.to_pylist():
                    number += 1
                    yield Columns(number, {k: v for k, v in values.items() if not _missing(v)})
        except (ValueError, OSError) as error:  # Arrow's own errors are of these
            if isinstance(error, SafelightError):
                raise
            raise SafelightError(f"{shown(file)} is not Parquet: {reason(error)}") from None


def _missing(value: Any) -> bool:
    """Whether a cell is empty; pandas writes NaN for a number that is missing."""
    return value is None or (isinstance(value, float) and math.isnan(value))
