"""Tidy up: before a server takes jobs (files and database match), and after a worker has ended."""

from __future__ import annotations

from safelight.errors import SafelightError, StorageError
from safelight.server import schema
from safelight.server.database import sqlite_file
from safelight.server.files import Files
from safelight.server.retention import clear
from safelight.server.store import Store, new_id


def recover(files: Files, store: Store) -> None:
    """Make the folder and the database ready. Raises StorageError, one line, if they do not match.

    Jobs that an earlier server left running wait again. Why that server ended is not known, and
    mostly it was no job's fault: see `claims.ENDS`. Workers of a fleet go on meanwhile.
    """
    files.prepare()
    store.hold()  # first, so that a refused server leaves the tables as the other one needs them
    store.migrate()
    known, _ = store.known_files()
    present = files.pictures() - set(store.leftovers())
    mark = _mark(files, store, bool(known), bool(known & present))
    if present and not known & present:
        raise StorageError(
            f"the database of jobs knows none of the {len(present)} pictures in "
            f"{files.storage.url}/pictures: name the one that does as --database, restore it, or "
            "move that folder away to begin anew"
        )
    if files.mark() != mark:
        files.set_mark(mark)  # before the database: this write may fail
    store.set_folder(mark)
    store.set_version()
    store.release(ended=True)
    clear(files, store)  # jobs that were being deleted
    # A picture without a row may be a commit that was cut off, or newer than a restored backup.
    files.sweep(store.known_or_coming)


def belongs(files: Files, store: Store) -> bool:
    """Return whether a worker may draw with this storage; False until a server made it ready.

    Raises SafelightError, one line, if the storage belongs to another database, and StorageError if
    storage or database cannot be read now.
    """
    mark = store.folder() if schema.is_current(store.engine) else None
    if mark is None:
        return False
    files.make_sure()
    if files.mark() != mark:
        raise SafelightError(
            "the storage is not the one that this database of jobs belongs to: give --storage as "
            "the server has it"
        )
    return True


def put_back(files: Files, store: Store, worker: str, *, killed: bool, stopping: bool) -> None:
    """Let the jobs of a worker that ended wait again, without what it wrote for them.

    killed: it was killed from outside. stopping: it was told to end, which counts against no job.
    """
    left = store.release(worker, told_to=stopping, killed=killed and not stopping)
    files.remove_pictures(left)
    store.leave(worker)


def _mark(files: Files, store: Store, knows: bool, knows_these: bool) -> str:
    """Return this folder's mark in its database. Raises StorageError if another has it."""
    here, there = files.mark(), store.folder()
    file = sqlite_file(store.engine)
    within = files.local and file is not None and files.root in file.resolve().parents
    what, option = ("data folder", "--data-dir") if files.local else ("storage", "--storage")
    foreign = StorageError(
        f"the database of jobs belongs to another {what} than {files.storage.url}: give that one "
        f"as {option}, or another --database"
    )
    if there is None:
        if knows and not knows_these and not within:
            raise foreign
        return here or new_id()
    if here is None and (knows_these or within):
        return there
    if here != there:
        raise foreign
    return there
