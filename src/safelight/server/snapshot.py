"""Copy a database of jobs while it is in use: to a SQLite file, and back into any database."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from sqlalchemy import Engine, MetaData, inspect, select
from sqlalchemy.exc import SQLAlchemyError

from safelight.errors import StorageError
from safelight.server import schema
from safelight.server.database import open_engine, reason, sqlite_file

ROWS = 1000
"""The number of rows read and written at a time."""


def take(url: str, place: Path) -> str:
    """Copy a database in its present state to a new SQLite file; return its schema version.

    SQLite copies itself. For another database, one transaction reads all rows and they are written
    to tables of the same schema. Raises StorageError.
    """
    engine = open_engine(url)
    try:
        version = schema.version_of(engine)
        if version is None:
            raise StorageError("the database has no jobs of Safelight: nothing is to be copied")
        place.touch(mode=0o600, exist_ok=False)
        file = sqlite_file(engine)
        if file is not None:
            _copy_file(file, place)
        else:
            _copy_rows(engine, f"sqlite:///{place}", version)
    except SQLAlchemyError as error:
        raise StorageError(f"the database of jobs cannot be copied: {reason(error)}") from None
    except (OSError, sqlite3.Error) as error:
        raise StorageError(f"the database of jobs cannot be copied: {error}") from None
    finally:
        engine.dispose()
    return version


def put_back(place: Path, url: str) -> None:
    """Write the rows of a SQLite file to a database that has no tables. Raises StorageError."""
    source, target = open_engine(f"sqlite:///{place}"), open_engine(url)
    try:
        if inspect(target).get_table_names():
            raise StorageError("--database has tables already: give an empty one")
        _copy_rows(source, url, schema.version_of(source) or schema.FIRST)
    except SQLAlchemyError as error:
        raise StorageError(f"--database does not take the backup: {reason(error)}") from None
    finally:
        source.dispose()
        target.dispose()


def _copy_file(file: Path, place: Path) -> None:
    with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=rw", uri=True)) as source:
        source.execute("PRAGMA busy_timeout=60000")
        with closing(sqlite3.connect(place)) as copy:
            source.backup(copy)  # in one go: writers wait, and the copy need not restart
            copy.execute("PRAGMA journal_mode=DELETE")  # one file, without a log beside it
            found = copy.execute("PRAGMA integrity_check").fetchone()[0]
    if found != "ok":
        raise StorageError(f"the database of jobs is damaged: {str(found)[:100]}")


def _copy_rows(source: Engine, url: str, version: str) -> None:
    target = open_engine(url)
    try:
        level = "SERIALIZABLE" if sqlite_file(source) else "REPEATABLE READ"
        with (
            source.connect().execution_options(isolation_level=level, reads=True) as reading,
            target.begin() as writing,
        ):
            schema.make(writing, version)  # in the rows' transaction: a copy cut off leaves nothing
            tables = MetaData()
            tables.reflect(writing)
            for table in tables.sorted_tables:
                if table.name != "alembic_version":
                    rows = reading.execution_options(yield_per=ROWS).execute(select(table))
                    for part in rows.mappings().partitions():
                        writing.execute(table.insert(), [dict(row) for row in part])
    finally:
        target.dispose()
