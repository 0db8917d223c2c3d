"""Shards: many pictures in one file, a WebDataset's tar or a table in Parquet."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from safelight.batch.lines import Lines
from safelight.errors import SafelightError
from safelight.settings import shown
from safelight.storage import Storage

if TYPE_CHECKING:
    from safelight.batch.output import Outcome

FOLDERS = FOLDER, WAITING = "shards", "pending"
GROUP = 100
"""Pictures in a row group of Parquet; this many are in memory at once."""


_SHARD = re.compile(rf"{FOLDER}/[0-9]{{1,18}}\.(tar|parquet)")


def is_of_row(record: dict[str, Any]) -> bool:
    """Return whether an object is what the index holds of a row."""
    texts, files = (record.get("id"), record.get("request")), record.get("files")
    return isinstance(files, list) and all(
        isinstance(text, str) and text.isprintable() for text in (*texts, *files)
    )


class Shards:
    """Writes shards of a fixed number of rows.

    Until there are enough, pictures wait in a folder of their own, so that none is drawn again
    after a kill: first the pictures are written, then a JSON file that marks the row as done. A
    shard is written completely, then all of its rows are added to the index, then the waiting files
    are removed.
    """

    def __init__(self, storage: Storage, index: Lines, kind: str, rows: int) -> None:
        self._storage, self._index, self._rows = storage, index, rows
        self._ending, self._write = {
            "webdataset": ("tar", write_tar),
            "parquet": ("parquet", write_parquet),
        }[kind]
        self._waiting: dict[str, str] = {}
        self._left: set[str] = set()
        self._number = 0

    def load(self, records: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Return the records of the index, without those of a shard that is gone or incomplete.

        The rows that wait are all in the index or none is; otherwise a kill came in between. A row
        without all of its pictures does not wait: its files were being removed.
        """
        if not all(_SHARD.fullmatch(str(r.get("shard"))) for r in records.values()):
            raise self._index.foreign()
        there = self._storage.names(FOLDER)
        records = {i: r for i, r in records.items() if _last(r["shard"]) in there}
        names = self._storage.names(WAITING)
        waiting, used = {}, set[str]()
        for name in sorted(n for n in names if n.endswith(".json")):
            row = self._read(name)
            if names.issuperset(row["files"]):
                waiting[row["record"]["id"]] = name
                used |= {name, *row["files"]}
        both = waiting.keys() & records.keys()
        if both and both != waiting.keys():
            torn = {records[i]["shard"] for i in both}
            records = {i: r for i, r in records.items() if r["shard"] not in torn}
        elif both:
            waiting, used = {}, set[str]()
        self._waiting, self._left = waiting, names - used
        numbers = [int(_last(r["shard"]).partition(".")[0]) for r in records.values()]
        self._number = max(numbers, default=-1) + 1
        return records

    def clear(self) -> None:
        """Remove files left of rows that do not wait."""
        self._storage.remove(f"{WAITING}/{name}" for name in self._left)

    def pending(self) -> dict[str, dict[str, Any]]:
        """Return the records of rows that wait for their shard, by id."""
        return {i: self._read(name)["record"] for i, name in self._waiting.items()}

    def keep(self, outcome: Outcome, names: list[str]) -> None:
        """Take in a row's outcome. names: of its pictures."""
        # Build shards before the row is taken in, so that all waiting rows belong to one shard,
        # even if an earlier run was killed while it wrote one.
        while len(self._waiting) >= self._rows:
            self._build()
        for name, data in zip(names, outcome.pictures, strict=True):
            self._storage.write(f"{WAITING}/{name}", data)
        told = {"record": outcome.record, "files": names, "recipes": outcome.recipes}
        name = f"{outcome.name}.json"
        data = json.dumps(told, ensure_ascii=False).encode()
        self._storage.write(f"{WAITING}/{name}", data)
        self._waiting[outcome.row_id] = name

    def finish(self) -> None:
        """Write the rows that still wait into shards."""
        while self._waiting:
            self._build()

    def _build(self) -> None:
        """Write one shard."""
        names = list(self._waiting.values())[: self._rows]
        shard = f"{FOLDER}/{self._number:05d}.{self._ending}"
        self._storage.write_with(shard, lambda file: self._write(file, self._samples(names)))
        rows = [self._read(name) for name in names]
        self._index.append(*({**r["record"], "shard": shard, "files": r["files"]} for r in rows))
        self._index.flush()
        # The JSON is removed last: pictures without one belong to no row and are replaced.
        self._storage.remove(f"{WAITING}/{file}" for row in rows for file in row["files"])
        self._storage.remove(f"{WAITING}/{name}" for name in names)
        self._waiting = dict(list(self._waiting.items())[len(names) :])
        self._number += 1

    def _read(self, name: str) -> dict[str, Any]:
        try:
            row = json.loads(self._file(name))
            files, recipes = row["files"], row["recipes"]
            if is_of_row({**row["record"], "files": files}) and len(recipes) == len(files):
                return row
        except SafelightError:
            raise
        except (ValueError, RecursionError, LookupError, TypeError):
            pass
        raise SafelightError(
            f"{WAITING}/{name} in {shown(self._storage.url)} is not ours: remove it, or give "
            "another --out"
        )

    def _file(self, name: str) -> bytes:
        data = self._storage.read(f"{WAITING}/{name}")
        if data is None:
            raise SafelightError(
                f"{WAITING}/{name} is gone from {shown(self._storage.url)}: start the same command "
                "again, which draws its row anew"
            )
        return data

    def _samples(self, names: list[str]) -> Iterator[dict[str, Any]]:
        """Yield each picture of waiting rows, with all that is known about it."""
        for name in names:
            row = self._read(name)
            for i, file in enumerate(row["files"]):
                yield {
                    "record": row["record"],
                    "number": i + 1,
                    "file": file,
                    "image": self._file(file),
                    "recipe": row["recipes"][i],
                }


def _last(name: str) -> str:
    return name.rpartition("/")[2]


Samples = Iterator[dict[str, Any]]


def write_tar(file: BinaryIO, samples: Samples) -> None:
    """Write a WebDataset: for each picture KEY.png, KEY.json (id and recipe) and KEY.txt (prompt).

    Format: webdataset.github.io; the key ends at the first dot. Owners and times are left out, so
    that the same pictures give the same bytes.
    """
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for sample in samples:
            key, _, ending = sample["file"].partition(".")
            recipe = sample["recipe"]
            told = {"id": sample["record"]["id"], "number": sample["number"], **recipe}
            members = {
                ending: sample["image"],
                "json": json.dumps(told, ensure_ascii=False).encode(),
                "txt": recipe["settings"]["prompt"].encode(),
            }
            for end, data in members.items():
                member = tarfile.TarInfo(f"{key}.{end}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_parquet(file: BinaryIO, samples: Samples) -> None:
    """Write a table with one row for each picture; `image` has the form of the hub's data sets."""
    from safelight.batch.arrow import arrow, parquet

    pa = arrow()
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    texts = dict.fromkeys(("id", "prompt", "negative_prompt", "model", "recipe"), pa.string())
    numbers = dict.fromkeys(("number", "seed", "width", "height"), pa.int64())
    schema = pa.schema({**texts, **numbers, "image": image})
    with parquet().ParquetWriter(file, schema) as writer:
        group: list[dict[str, Any]] = []
        for sample in samples:
            group.append(_cells(sample))
            if len(group) == GROUP:
                writer.write_table(pa.Table.from_pylist(group, schema))
                group = []
        if group:
            writer.write_table(pa.Table.from_pylist(group, schema))


def _cells(sample: dict[str, Any]) -> dict[str, Any]:
    recipe, record = sample["recipe"], sample["record"]
    settings = recipe["settings"]
    width, height = recipe["size"]
    return {
        "id": record["id"],
        "prompt": settings["prompt"],
        "negative_prompt": settings["negative_prompt"],
        "model": record["model"],
        "recipe": json.dumps(recipe, ensure_ascii=False),
        "number": sample["number"],
        "seed": settings["seed"],
        "width": width,
        "height": height,
        "image": {"bytes": sample["image"], "path": sample["file"]},
    }
