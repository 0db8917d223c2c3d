"""Back up a data folder while its server serves, and restore it.

A backup is a folder laid out like a data folder, with two more files: SHA256SUMS, which
`sha256sum --check` understands, and backup.json, which is written last. Without backup.json the
backup is not complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from safelight import __version__
from safelight.errors import SafelightError, StorageError
from safelight.picture import save_whole
from safelight.request_pictures import inputs_in
from safelight.server import schema, snapshot
from safelight.server.files import MARK, RESTORING, input_name, picture_name
from safelight.server.private import DATABASE
from safelight.storage import Storage, Stored, storage_at

ABOUT = "backup.json"
SUMS = "SHA256SUMS"
FORMAT = 1

LOST = "lost+found"
"""A folder that new ext4 volumes have; a folder with it alone counts as empty."""

KEPT = ("grids", "inside", "training")
"""Folders of the studio that are copied as they are. Thumbnails can be made again; uploads that no
job has used, and the quarantine, are left out.
"""
STORED = ("pictures", "inputs")
"""Folders that may be in a storage elsewhere."""

FOLDERS = (*STORED, *KEPT)
TOP = (DATABASE, MARK)


@dataclass
class Backup:
    """What a backup holds.

    linked: files shared with an earlier backup. lost: pictures and inputs that have a row, but
    whose file the data folder itself no longer has.
    """

    version: str
    schema: str
    created: str
    jobs: int = 0
    pictures: int = 0
    files: int = 0
    size: int = 0
    linked: int = 0
    lost: int = 0
    format: int = FORMAT


def back_up(
    root: Path, url: str, place: Path, *, earlier: Path | None = None, storage: str | None = None
) -> Backup:
    """Copy the data folder `root` and its database to a new folder.

    Each picture whose row is in the backup is in the backup too: the database is copied first, and
    a picture does not change once it has a row. Jobs that are deleted meanwhile are taken out.
    earlier: a backup; files that are the same become hard links to its files. storage: where
    pictures and inputs are, if not in the data folder. Raises SafelightError if `place` is not
    empty, StorageError if the backup cannot be made.
    """
    known: dict[str, str] = {}
    if earlier is not None:
        _about(earlier)
        known = dict(_sums(earlier))
    _make_empty(place, "a backup is made in a new folder")
    try:
        return _make(storage_at(root), storage_at(storage or root), url, place, earlier, known)
    except BaseException as error:
        _clear(place)
        if isinstance(error, OSError | sqlite3.Error):
            raise StorageError(f"the backup cannot be made: {_line(error)}") from None
        raise


def _make(
    data: Storage,
    storage: Storage,
    url: str,
    place: Path,
    earlier: Path | None,
    known: dict[str, str],
) -> Backup:
    version = snapshot.take(url, place / DATABASE)
    made = Backup(__version__, version, datetime.now(UTC).isoformat(timespec="seconds"))
    sums: dict[str, str] = {}
    missing: list[tuple[str, str]] = []
    for job_id, name in _names(place / DATABASE):
        try:
            sums[name] = _copied(storage, place, name, made, earlier, known)
        except FileNotFoundError:
            missing.append((job_id, name))
    if missing:
        made.lost = _take_out(place, url, missing, sums)
    for source, names in ((storage, [MARK]), (data, _others(Path(data.root)))):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # deleted just now
                sums[name] = _copied(source, place, name, made)
    _count(place / DATABASE, made)
    sums[DATABASE] = _digest(place / DATABASE)
    made.size += (place / DATABASE).stat().st_size
    made.files = len(sums)
    os.sync()
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    save_whole(place / SUMS, lambda file: file.write(lines.encode()))
    save_whole(place / ABOUT, lambda file: file.write(_json(made, lines)))
    return made


def restore(
    place: Path, root: Path, url: str | None = None, *, storage: str | None = None
) -> Backup:
    """Copy a backup to an empty data folder and compare each file with its SHA-256.

    url: an empty database for the rows, in place of a SQLite file. storage: an empty place for
    pictures and inputs, in place of the data folder. Raises SafelightError if one of them is not
    empty, StorageError if a file of the backup is damaged; what was copied is then removed again.
    """
    made, to = _about(place), storage_at(storage or root)
    try:
        if (root / RESTORING).is_file():  # left by a restore that was cut off
            _clear(root)
        _make_empty(root, "a backup is restored to an empty folder")
        _begin_elsewhere(to)
        (root / RESTORING).touch(mode=0o600)  # after what may be refused
        try:
            damaged = [
                name for name, digest in _sums(place) if _restored(place, root, to, name) != digest
            ]
            if damaged:
                more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
                raise StorageError(
                    f"{damaged[0]}{more} in the backup is damaged: restore another backup; "
                    "nothing was restored"
                )
            if url is not None:
                snapshot.put_back(root / DATABASE, url)
                (root / DATABASE).unlink()
            os.sync()
        except BaseException:
            _clear(root)
            _clear_elsewhere(to)
            raise
        to.remove([RESTORING])
        (root / RESTORING).unlink(missing_ok=True)
    except (OSError, sqlite3.Error) as error:
        raise StorageError(f"the backup cannot be restored: {_line(error)}") from None
    return made


def _about(place: Path) -> Backup:
    try:
        found = json.loads((place / ABOUT).read_bytes())
        digest = found.pop("sums")
        made = Backup(**found)
    except FileNotFoundError:
        raise StorageError(f"{place} is no finished backup: it has no {ABOUT}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise StorageError(f"{place} is no backup that can be read: {ABOUT} is damaged") from None
    if made.format != FORMAT or made.schema not in schema.versions():
        raise StorageError(
            f"{place} is a backup of Safelight {made.version} with schema {made.schema}, which "
            f"this one ({__version__}, schema {schema.HEAD}) does not know: use a newer one"
        )
    if not (place / SUMS).is_file() or _digest(place / SUMS) != digest:
        raise StorageError(f"{place} is damaged: {SUMS} is another than the one that was written")
    return made


def _sums(place: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and the SHA-256 of each file of a backup. Call `_about` first."""
    with (place / SUMS).open(encoding="utf-8") as lines:
        for line in lines:
            digest, name = line.rstrip("\n").split("  ", 1)
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or path.parts[0] not in (*FOLDERS, *TOP):
                raise StorageError(f"{SUMS} names a file that no backup has")
            yield name, digest


def _names(database: Path) -> Iterator[tuple[str, str]]:
    """Yield each job's id with the names of its files, the oldest job first."""
    with closing(sqlite3.connect(database)) as db:
        for job_id, request in db.execute("SELECT id, request FROM jobs ORDER BY created"):
            for which in inputs_in(json.loads(request)):
                yield job_id, input_name(job_id, which)
        for job_id, picture_id in db.execute("SELECT job, id FROM pictures ORDER BY created"):
            yield job_id, picture_name(picture_id)


def _others(root: Path) -> Iterator[str]:
    """Yield the names of the studio's files."""
    for folder in KEPT:
        for path in sorted((root / folder).rglob("*")):
            # A training keeps its .lock closed to others on Windows.
            if path.is_file() and not path.is_symlink() and path.name != ".lock":
                name = path.relative_to(root).as_posix()
                if "\n" in name:  # SHA256SUMS has one line per file
                    raise SafelightError(f"{name!r} has a line break in its name: rename it")
                yield name


def _copied(
    storage: Storage,
    place: Path,
    name: str,
    made: Backup,
    earlier: Path | None = None,
    known: dict[str, str] | None = None,
) -> str:
    """Copy one file, or link it to the one of an earlier backup; return its SHA-256.

    Raises FileNotFoundError if it is gone.
    """
    target = place / name
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = storage.find(name)
    if found is None:
        raise FileNotFoundError(name)
    made.size += found.size
    if earlier is not None and known and name in known:
        before = earlier / name
        there = before.stat() if before.is_file() else None
        if there and (there.st_size, there.st_mtime_ns) == (found.size, found.changed):
            try:
                target.hardlink_to(before)
            except OSError:  # another disk
                pass
            else:
                made.linked += 1
                return known[name]
    return _copy(found, target)


def _restored(place: Path, root: Path, storage: Storage, name: str) -> str:
    """Copy one file of a backup; return the SHA-256 of the copy, "" if the file is missing."""
    found = storage_at(place).find(name)
    if found is None:
        return ""
    if not storage.local and (name == MARK or name.startswith(STORED)):
        digest = hashlib.sha256()
        storage.write_with(name, lambda file: _pour(found, file, digest))
        return digest.hexdigest()
    target = root / name
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return _copy(found, target)


def _copy(found: Stored, target: Path) -> str:
    digest = hashlib.sha256()
    try:
        with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            _pour(found, file, digest)
    except FileNotFoundError:
        target.unlink()
        raise
    os.utime(target, ns=(found.changed, found.changed))
    return digest.hexdigest()


def _pour(found: Stored, file: BinaryIO, digest: hashlib._Hash) -> None:
    for part in found.parts():
        digest.update(part)
        file.write(part)


def _take_out(place: Path, url: str, missing: list[tuple[str, str]], sums: dict[str, str]) -> int:
    """Take jobs that were deleted meanwhile out of a backup; return how many files are lost.

    A missing file is lost if the served database still has its job.
    """
    now = place / f"{DATABASE}.now"
    snapshot.take(url, now)
    with closing(sqlite3.connect(now)) as db:
        columns = {row[1] for row in db.execute("PRAGMA table_info(jobs)")}
        jobs = "SELECT id FROM jobs"
        if "expires" in columns:
            jobs += " WHERE expires IS NULL OR expires != 0"
        present = {row[0] for row in db.execute(jobs)}
    now.unlink()
    deleted = {job_id for job_id, _ in missing} - present
    with closing(sqlite3.connect(place / DATABASE)) as db:
        for job_id, name in list(_names(place / DATABASE)):
            if job_id in deleted and sums.pop(name, None):
                (place / name).unlink()
        db.execute("PRAGMA foreign_keys=ON")  # deletes the other rows of these jobs as well
        db.executemany("DELETE FROM pictures WHERE job = ?", [(job_id,) for job_id in deleted])
        db.executemany("DELETE FROM jobs WHERE id = ?", [(job_id,) for job_id in deleted])
        db.commit()
    return sum(job_id in present for job_id, _ in missing)


def _count(database: Path, made: Backup) -> None:
    with closing(sqlite3.connect(database)) as db:
        made.jobs = db.execute("SELECT count(*) FROM jobs").fetchone()[0]
        made.pictures = db.execute("SELECT count(*) FROM pictures").fetchone()[0]


def _json(made: Backup, lines: str) -> bytes:
    digest = hashlib.sha256(lines.encode()).hexdigest()
    return json.dumps({**asdict(made), "sums": digest}, indent=2).encode() + b"\n"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make_empty(place: Path, why: str) -> None:
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        empty = all(path.name == LOST for path in place.iterdir())
    except OSError as error:
        raise SafelightError(f"{place} cannot be used: {error.strerror}") from None
    if not empty:
        raise SafelightError(f"{place} is not empty: {why}")


def _clear(root: Path) -> None:
    """Remove what a backup or a restore has written, the mark of a restore last."""
    for name in (*FOLDERS, *TOP, f"{DATABASE}.now", SUMS, ABOUT):
        path = root / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (root / RESTORING).unlink(missing_ok=True)


def _begin_elsewhere(to: Storage) -> None:
    """Make sure that a storage elsewhere is empty, and mark it as half restored."""
    if to.local:
        return
    if to.find(RESTORING) is not None:  # left by a restore that was cut off
        _clear_elsewhere(to)
    if to.find(MARK) is not None or any(to.sizes(folder) for folder in STORED):
        raise SafelightError(f"{to.url} is not empty: a backup is restored to an empty storage")
    to.write(RESTORING, b"")


def _clear_elsewhere(to: Storage) -> None:
    """Remove what a restore has written to a storage elsewhere, its mark last."""
    if to.local or to.find(RESTORING) is None:
        return
    for folder in STORED:
        to.remove(f"{folder}/{name}" for name in to.sizes(folder))
    to.remove([MARK])
    to.remove([RESTORING])


def _line(error: Exception) -> str:
    return getattr(error, "strerror", None) or (str(error).splitlines() or ["?"])[0][:100]
