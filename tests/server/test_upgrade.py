"""A data folder of an earlier version opens, migrates and serves, with all its pictures.

`schema-0002.zip` was written by the code of 26 November 2026. It has succeeded jobs, from text
alone and with image and mask, a cancelled job, and two that wait, one with an image and one with an
Idempotency-Key. Its `postgresql.sql` is the same database, written by pg_dump.
"""

from __future__ import annotations

import sqlite3
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from inside import Inside
from sqlalchemy import text
from test_recovery import start

from safelight.errors import StorageError
from safelight.recipe import read_recipe
from safelight.server.database import open_engine
from safelight.server.schema import HEAD

WRITTEN = Path(__file__).with_name("schema-0002.zip")
PICTURES = {
    "2ddc4a25be4bb6c02a6aa8baf49cfabb",
    "483f7c1a2780fec3932a2d367c6d1e46",
    "e04fe8d01b4daf445031ebb60c93dc35",
}
WAITING = "972cc1794113488b4ff1e7bf5d053a5a"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with zipfile.ZipFile(WRITTEN) as written:
        names = [name for name in written.namelist() if not name.endswith(".sql")]
        written.extractall(tmp_path / "data", names)
    return tmp_path / "data"


def bytes_of(name: str) -> bytes:
    with zipfile.ZipFile(WRITTEN) as written:
        return written.read(f"pictures/{name}.png")


@pytest.fixture(scope="module")
def upgraded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    root = tmp_path_factory.mktemp("upgraded")
    with zipfile.ZipFile(WRITTEN) as written:
        written.extractall(root, [n for n in written.namelist() if not n.endswith(".sql")])
    with Inside(root, dtype="float32") as server:
        yield server


def test_it_serves_every_picture(upgraded: Inside) -> None:
    jobs = {job["id"]: job for job in upgraded.ask("GET", "/api/jobs").json()}
    assert len(jobs) == 5
    drawn = {picture["id"]: picture for job in jobs.values() for picture in job["pictures"]}
    assert drawn.keys() >= PICTURES
    for name in PICTURES:
        answer = upgraded.ask("GET", f"/api/pictures/{name}")
        assert answer.body == bytes_of(name)
        settings = read_recipe(answer.body)["settings"]
        assert drawn[name]["recipe"]["settings"]["prompt"] == settings["prompt"]
        assert upgraded.ask("GET", f"/api/pictures/{name}/thumbnail").status == 200


def test_it_draws_what_waited(upgraded: Inside) -> None:
    job = upgraded.finished(WAITING)
    assert job["status"] == "succeeded"
    assert "image_sha256" in job["settings"]
    again = upgraded.ask("GET", "/api/jobs?search=teddy").json()
    assert upgraded.finished(again[0]["id"])["status"] == "succeeded"


def test_a_backup_from_before_is_kept_and_the_schema_is_of_today(folder: Path) -> None:
    start(folder)[1].close()
    with closing(sqlite3.connect(folder / "jobs.sqlite3")) as db:
        assert db.execute("SELECT version_num FROM alembic_version").fetchone() == (HEAD,)
    with closing(sqlite3.connect(folder / "jobs.sqlite3.schema-0002")) as db:
        assert db.execute("SELECT count(*) FROM pictures").fetchone() == (3,)


def test_on_postgresql(folder: Path, postgres: str) -> None:
    engine = open_engine(postgres)
    with zipfile.ZipFile(WRITTEN) as written, engine.begin() as db:
        db.execute(text("DROP SCHEMA public CASCADE"))
        db.execute(text("CREATE SCHEMA public"))
        db.exec_driver_sql(written.read("postgresql.sql").decode().replace("%", "%%"))
    engine.dispose()
    (folder / "jobs.sqlite3").unlink()
    files, store = start(folder, postgres)
    try:
        found = {picture.id for job in store.list()[0] for picture in job.pictures}
        assert found == files.pictures() == PICTURES
        assert store.counts() == {"succeeded": 2, "cancelled": 1, "queued": 2}
        claims: Any = [store.claim("w"), store.claim("w")]
        assert WAITING in [claim.id for claim in claims]
        assert files.input(WAITING, "image") is not None
    finally:
        store.close()


def test_the_newest_schema_is_refused_by_an_earlier_version(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version that wrote the folder refuses it so once it has been migrated."""
    start(folder)[1].close()
    monkeypatch.setattr("safelight.server.schema.HEAD", "0002")
    monkeypatch.setattr("safelight.server.schema.versions", lambda: {"0001", "0002"})
    with pytest.raises(StorageError, match="from a newer Safelight than this one") as refused:
        start(folder)
    assert "\n" not in str(refused.value)
