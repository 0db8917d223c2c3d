"""Databases to test against: SQLite in a file, and PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from postgresql import Postgres

from safelight.server.files import Files
from safelight.server.recovery import recover
from safelight.server.store import Store


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Return the URL of our own PostgreSQL server, which ends with the session."""
    server = Postgres()
    yield server.url
    server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.sqlite3'}"
    url: str = request.getfixturevalue("postgres")
    import psycopg

    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    return url


@pytest.fixture
def store(database: str) -> Iterator[Store]:
    """Return an empty database of jobs with its tables."""
    opened = Store(database)
    opened.migrate()
    yield opened
    opened.close()


@pytest.fixture
def shared(tmp_path: Path, postgres: str) -> Iterator[tuple[Files, Store, str]]:
    """Return a folder and an empty PostgreSQL database, made ready as a server does it."""
    import psycopg

    with psycopg.connect(postgres.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    files, store = Files(tmp_path / "data"), Store(postgres)
    files.root.mkdir()
    recover(files, store)
    yield files, store, postgres
    store.close()
