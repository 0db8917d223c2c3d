"""Access to the database in short transactions; its errors become StorageError."""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, func, select
from sqlalchemy.exc import DBAPIError, DisconnectionError, IntegrityError, SQLAlchemyError

from safelight.errors import StorageError, first_line
from safelight.server.tables import timestamp

LOCK = 0x5AFE
"""The number of our advisory lock in PostgreSQL: held by each transaction that writes."""

PATIENCE = 5
"""Seconds to wait for a lock or a connection. A worker is replaced after a longer silence, so one
that waits here does not count as hung.
"""


CONNECTING: dict[str, Any] = {
    "connect_timeout": 3,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": PATIENCE * 1000,
}
"""Arguments of connections to PostgreSQL: one that the network dropped is noticed soon."""

ABANDONED = 10
"""Seconds after which PostgreSQL ends a transaction of ours that asks for nothing."""

CLOCK = 900
"""Seconds after which the database's clock is read again."""

STEP = 1.0
"""Seconds by which this machine's clock may step before the database's is read again."""


class Database:
    """A database. url: in SQLAlchemy's form. Nothing is opened before the first transaction.

    Methods of subclasses block. Each method that writes is one transaction, and raises StorageError
    if it fails.
    """

    def __init__(self, url: str) -> None:
        self.engine = open_engine(url)
        self._lite = self.engine.dialect.name == "sqlite"
        self._ahead, self._clock_read, self._steady = 0.0, -math.inf, 0.0
        if not self._lite:
            event.listen(self.engine, "connect", _limit)
            event.listen(self.engine, "checkout", self._read_clock)

    def close(self) -> None:
        self.engine.dispose()

    def now(self) -> float:
        """Return the time by the database's clock, which all machines of a fleet share."""
        if not (self._lite or self._knows_clock()):
            with self._read():
                pass
        return round(timestamp() + self._ahead, 6)

    def _knows_clock(self) -> bool:
        """Return whether the database's clock was read, and ours was not set since then."""
        steady = time.monotonic()
        known = steady - self._clock_read < CLOCK
        return known and abs(time.time() - steady - self._steady) < STEP

    def _read_clock(self, connection: Any, *_: Any) -> None:
        if self._knows_clock():
            return
        before = time.time()
        try:
            found = connection.execute("SELECT extract(epoch FROM clock_timestamp())").fetchone()
            connection.rollback()
        except self.engine.dialect.loaded_dbapi.Error as error:
            raise DisconnectionError from error
        now, self._clock_read = time.time(), time.monotonic()
        self._ahead = float(found[0]) - (before + now) / 2
        self._steady = now - self._clock_read

    @contextmanager
    def _write(self, *, alone: bool = True) -> Iterator[Connection]:
        """Begin a transaction that writes. alone: it excludes all other `alone` transactions."""
        with storage_errors(), self.engine.begin() as connection:
            if alone and not self._lite:  # SQLite's begins with BEGIN IMMEDIATE
                connection.execute(select(func.pg_advisory_xact_lock(LOCK)))
            yield connection

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with storage_errors(), self.engine.connect() as connection:
            yield connection.execution_options(reads=True)


def open_engine(url: str) -> Engine:
    """Return the engine of a database. Raises StorageError for an invalid URL.

    The engine's errors hide the parameters of a statement, which may contain a prompt.
    """
    how: dict[str, Any] = {"hide_parameters": True}
    if url.startswith("postgresql"):
        how |= {"pool_pre_ping": True, "connect_args": CONNECTING}
        url = url.replace("postgresql://", "postgresql+psycopg://")
    try:
        engine = create_engine(url, pool_timeout=PATIENCE, **how)
    except (SQLAlchemyError, ImportError, TypeError) as error:
        raise StorageError(f"the database of jobs cannot be used: {first_line(error)}") from None
    except ValueError:  # its text may quote part of a password
        raise StorageError(
            "the database of jobs cannot be used: its URL cannot be read: expected one as "
            "postgresql://user@host:5432/name"
        ) from None
    if engine.dialect.name == "sqlite":
        _set_up_sqlite(engine)
    return engine


def _limit(connection: Any, _: Any) -> None:
    """Let PostgreSQL end what a lost machine leaves: its connections, transactions and locks.

    They are no options of the connection, which poolers refuse.
    """
    limits = {
        "tcp_keepalives_idle": "5s",
        "tcp_keepalives_interval": "2s",
        "tcp_keepalives_count": "3",
        "idle_in_transaction_session_timeout": f"{ABANDONED}s",
        "lock_timeout": f"{PATIENCE}s",
    }
    connection.execute("; ".join(f"SET {name} = '{value}'" for name, value in limits.items()))
    connection.commit()


def sqlite_file(engine: Engine) -> Path | None:
    """Return the file of a SQLite database; None for other databases."""
    if engine.dialect.name != "sqlite" or engine.url.database in (None, "", ":memory:"):
        return None
    return Path(str(engine.url.database))


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turn each error of the database into StorageError, except a violated constraint."""
    try:
        yield
    except IntegrityError:
        raise
    except SQLAlchemyError as error:
        raise StorageError(f"the database of jobs does not take it: {reason(error)}") from None


def reason(error: Exception) -> str:
    """Return a database's error in one line, without values that it may quote."""
    original = error.orig if isinstance(error, DBAPIError) else error
    speaks = isinstance(error, DBAPIError) and type(error).__name__ in (
        "OperationalError",
        "DatabaseError",
        "InterfaceError",
    )
    return first_line(original) if speaks else type(original).__name__


def _set_up_sqlite(engine: Engine) -> None:
    # Before 3.51.3, a reset of the write-ahead log may lose committed data.
    journal = "WAL" if sqlite3.sqlite_version_info >= (3, 51, 3) else "DELETE"
    file = sqlite_file(engine)

    @event.listens_for(engine, "do_connect")
    def _(*_: Any) -> None:
        # SQLite would create an empty database where one was moved away.
        if file is not None and not file.is_file():
            raise sqlite3.OperationalError(f"{file.name} is not there")

    @event.listens_for(engine, "connect")
    def _(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # else the driver begins transactions itself
        # SQLite's own `lower` knows ASCII only, but prompts are searched in all languages.
        connection.create_function("lower", 1, str.lower, deterministic=True)
        record.info["file"] = _identity(file)
        for pragma in (
            f"busy_timeout={PATIENCE * 1000}",
            f"journal_mode={journal}",
            "synchronous=FULL",
            "foreign_keys=ON",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "checkout")
    def _(_connection: Any, record: Any, _proxy: Any) -> None:
        # An open connection would keep using a file that was moved away or deleted.
        if record.info.get("file") != _identity(file):
            raise DisconnectionError

    @event.listens_for(engine, "begin")
    def _(connection: Connection) -> None:
        # A write lock requested at the start is waited for; requested later, it may be refused.
        reads = connection.get_execution_options().get("reads")
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _identity(file: Path | None) -> tuple[int, int] | None:
    if file is None:
        return None
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
