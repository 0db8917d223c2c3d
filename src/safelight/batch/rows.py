"""Read the rows of a batch: JSONL, CSV or Parquet, on this machine or at a URL."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import math
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.utils import infer_compression

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

MAX_CELL = 16 << 20
"""The most characters of a CSV cell. Python's own limit is 128 KiB."""

SILENCE = 60.0
"""Seconds without a byte after which a download has failed."""

_WEB = ("http://", "https://")


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
    suffixes = [suffix.lower() for suffix in PurePosixPath(_path(file)).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED and KINDS.get(suffixes[-2:][0]) != "parquet":
        suffixes.pop()
    if not suffixes or suffixes[-1] not in KINDS:
        raise SafelightError(
            f"{_told(file)} must be a file of rows that ends in {', '.join(KINDS)}"
        )
    return KINDS[suffixes[-1]]


def read_rows(file: str) -> Iterator[Columns]:
    """Yield the rows of a file in order.

    Raises SafelightError if the file cannot be read at all. A row that cannot be read is yielded
    with its problem.
    """
    kind = kind_of(file)
    try:
        with _here(file) as place:
            if kind == "parquet":
                yield from _parquet(place, _told(file))
                return
            newline = "\n" if kind == "jsonl" else ""
            compression = infer_compression(_path(file))
            opened = fsspec.open(
                place, "rt", encoding="utf-8-sig", newline=newline, compression=compression
            )
            with opened as text:
                yield from _jsonl(text) if kind == "jsonl" else _csv(text, _told(file))
    except UnicodeDecodeError:
        raise SafelightError(f"{_told(file)} is not text in UTF-8: save it as that") from None
    except SafelightError:
        raise
    except Exception as error:  # decoders of damaged files raise anything
        raise SafelightError(f"{_told(file)} cannot be read: {_why(error)}") from None


def _path(file: str) -> str:
    """Return a file's name; of a web address its path, without what follows a question mark."""
    return urlsplit(file).path if file.startswith(_WEB) else file


def _told(file: str) -> str:
    """Return a file in the form for messages: a URL without what may be a secret in it."""
    scheme, mark, rest = file.partition("://")
    if not mark:
        return shown(file)
    rest, query, _ = rest.partition("?")
    host, slash, path = rest.partition("/")
    return shown(f"{scheme}://{host.rpartition('@')[2]}{slash}{path}{'?…' if query else ''}")


def _why(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):  # at a URL its text is the URL
        return "No such file"
    # The message may hold the whole address.
    return re.sub(r"['\"(]*https?://\S*", "…", reason(error))


@contextlib.contextmanager
def _here(file: str) -> Iterator[str]:
    """Give a file that can be read from any place: one at a web address is downloaded first.

    Web servers may know no ranges and no length, and checking all rows takes longer than they wait.
    """
    if not file.startswith(_WEB):
        yield file
        return
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
    web = fsspec.filesystem("http", client_kwargs={"timeout": timeout}, skip_instance_cache=True)
    with tempfile.TemporaryDirectory(prefix="safelight-rows-") as folder:
        place = str(Path(folder) / "rows")
        web.get_file(file, place)
        yield place


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


def _csv(text: Any, told: str) -> Iterator[Columns]:
    first = text.readline()
    separator = max(SEPARATORS, key=first.count)
    csv.field_size_limit(max(MAX_CELL, csv.field_size_limit()))
    # Some sources cannot be read from their beginning again.
    reader = csv.reader(itertools.chain([first], text), delimiter=separator, strict=True)
    names = _names(reader, told)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if reader.line_num > line:  # rows in between are lost
                raise SafelightError(
                    f"{told} cannot be read as CSV: a quote that begins at line {line} ends "
                    f"wrongly at line {reader.line_num}, or nowhere"
                ) from None
            yield Columns(line, {}, problem=f"this is not CSV: {reason(error)}")
            continue
        if not any(cells):  # as spreadsheets write them at the end
            continue
        while len(cells) > len(names) and not cells[-1]:
            cells.pop()
        if len(cells) != len(names):
            problem = f"this row has {len(cells)} cells, and {len(names)} columns have names"
            yield Columns(line, {}, problem=problem)
            continue
        values = {name: cell for name, cell in zip(names, cells, strict=True) if cell and name}
        yield Columns(line, values, typed=False)


def _names(reader: Any, told: str) -> list[str]:
    """Return the names of a CSV file's columns.

    Only the first may be empty, which is the row number of pandas. Separators at the end of the
    line are ignored.
    """
    try:
        names = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise SafelightError(f"{told} cannot be read as CSV: line 1: {reason(error)}") from None
    while names and not names[-1]:
        names.pop()
    if not names or len({*names}) < len(names) or "" in names[1:]:
        raise SafelightError("a CSV file begins with a line of column names, each of them once")
    return names


def _parquet(file: str, told: str) -> Iterator[Columns]:
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
            raise SafelightError(f"{told} is not Parquet: {_why(error)}") from None


def _missing(value: Any) -> bool:
    """Whether a cell is empty; pandas writes NaN for a number that is missing."""
    return value is None or (isinstance(value, float) and math.isnan(value))
