"""Bring a database to the schema of this version: Alembic's migrations, in `migrations/`.

To change the tables: change `tables.py`, add `migrations/versions/NNNN_what.py`, and set HEAD. A
test compares the tables with the migrations.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, func, inspect, select, text
from sqlalchemy.exc import SQLAlchemyError

from safelight.errors import SafelightError, StorageError
from safelight.server.database import LOCK, reason, sqlite_file, storage_errors
from safelight.server.tables import meta

log = logging.getLogger("safelight.server")

HEAD = "0011"
FIRST = "0001"
"""The schema of databases that are older than version numbers."""

MIGRATIONS = Path(__file__).parent / "migrations"


def migrate(engine: Engine, *, only_new: bool = False) -> None:
    """Make the tables of an empty database, or bring older tables up to date.

    A SQLite file is first copied, in its own folder. only_new: refuse databases of an older
    version, which a server may be using, and leave them alone. Raises StorageError, one line, for a
    database that is damaged, of a newer version, or not ours.
    """
    file = sqlite_file(engine)
    try:
        if file is not None:
            file.touch(mode=0o600)
        with engine.begin() as db:
            if file is None:
                for limit in ("lock_timeout", "idle_in_transaction_session_timeout"):
                    db.execute(text(f"SET LOCAL {limit} = 0"))  # a large table takes its time
                db.execute(select(func.pg_advisory_xact_lock(LOCK)))
            version = _version(db)
            if version not in (HEAD, None) and only_new:
                raise StorageError(
                    f"the database of jobs has schema {version}, and this Safelight has {HEAD}: "
                    "start its server once, which brings it up to date"
                )
            if version != HEAD:
                if file is not None and version is not None:
                    _back_up(file, version)
                _upgrade(db, version)
            _make_sure_of_columns(db)
    except SQLAlchemyError as error:
        raise StorageError(
            f"the database of jobs cannot be opened: {reason(error)}; "
            "a damaged one is restored from a backup"
        ) from None
    except (OSError, sqlite3.Error) as error:
        raise StorageError(f"the database of jobs cannot be opened: {error}") from None


def versions() -> set[str]:
    """Return the schema versions that this program knows."""
    return {path.name[:4] for path in (MIGRATIONS / "versions").glob("0*.py")}


def version_of(engine: Engine) -> str | None:
    """Return the schema version of a database; None if it has no tables of ours.

    Raises StorageError for a newer one.
    """
    with engine.connect() as db:
        return _version(db)


def make(db: Connection, version: str) -> None:
    """Make the tables of a schema in an empty database."""
    _alembic(db, lambda command, config: command.upgrade(config, version))


def is_current(engine: Engine) -> bool:
    """Return whether a database has the current schema; False for an older or empty one.

    Raises SafelightError for a newer one, StorageError if it cannot be read now.
    """
    with storage_errors(), engine.connect() as db:
        try:
            return _version(db) == HEAD
        except StorageError as error:
            raise SafelightError(str(error)) from None


def _version(db: Connection) -> str | None:
    """Return the version of the schema; None if the database has no tables of ours."""
    tables = inspect(db).get_table_names()
    if "alembic_version" in tables:
        found = db.execute(text("SELECT version_num FROM alembic_version")).scalar()
        if found not in versions():
            raise StorageError(
                f"the database of jobs has schema {found}, from a newer Safelight than this one "
                f"(schema {HEAD}): use that one, or a backup from before its first start"
            )
        return str(found)
    return FIRST if "jobs" in tables else None


def _upgrade(db: Connection, version: str | None) -> None:
    def upgrade(command: Any, config: Any) -> None:
        if version == FIRST:
            command.stamp(config, FIRST)
        command.upgrade(config, "head")

    _alembic(db, upgrade)
    if version is not None:
        log.info("the database of jobs was migrated from schema %s to %s", version, HEAD)


def _alembic(db: Connection, do: Callable[[Any, Any], None]) -> None:
    """Call `do` with Alembic's commands and a configuration that uses our connection."""
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = db
    do(command, config)


def _back_up(file: Path, version: str) -> None:
    number, place = 0, file.with_name(f"{file.name}.schema-{version}")
    while place.exists():
        number += 1
        place = file.with_name(f"{file.name}.schema-{version}.{number}")
    place.touch(mode=0o600)
    try:
        with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(place)) as copy:
            source.backup(copy)
    except sqlite3.Error:
        place.unlink(missing_ok=True)
        raise
    log.info("before its migration the database of jobs was copied to %s", place.name)


def _make_sure_of_columns(db: Connection) -> None:
    inspector = inspect(db)
    for table in meta.sorted_tables:
        if not inspector.has_table(table.name):
            raise StorageError(
                f"the database of jobs cannot be opened: it lacks the table {table.name}; "
                "a damaged one is restored from a backup"
            )
        there = {column["name"] for column in inspector.get_columns(table.name)}
        for column in table.columns:
            if column.name not in there:
                raise StorageError(
                    f"the database of jobs lacks {table.name}.{column.name}, which schema {HEAD} "
                    "has: restore a backup, or name another --database"
                )
