"""A backup that is made while a server serves is whole, and comes back whole."""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
import stat
import subprocess
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from inside import Inside
from PIL import Image
from serving import wait_for
from sqlalchemy import create_engine, inspect, text
from test_recovery import draw, drawn, start, to_first
from test_retention import Years
from test_storage import QUICK, png

from safelight.cli import run
from safelight.errors import SafelightError, StorageError
from safelight.server import backup as module
from safelight.server import snapshot
from safelight.server.backup import back_up, restore
from safelight.server.files import Files
from safelight.storage import storage_at

__all__ = ["drawn"]


def rows(url: str) -> dict[str, list[Any]]:
    """All rows of a database."""
    engine = create_engine(url)
    with engine.connect() as db:
        found = {
            table: sorted(map(tuple, db.execute(text(f"SELECT * FROM {table}"))), key=str)
            for table in inspect(engine).get_table_names()
        }
    engine.dispose()
    return found


def contents(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for folder in ("pictures", "inputs", "grids", "training")
        for path in sorted((root / folder).rglob("*"))
        if path.is_file()
    }


def empty(url: str) -> str:
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    return url


@pytest.fixture
def years(tmp_path: Path, database: str) -> Any:
    made = Years(tmp_path / "data", database)
    for status in ("succeeded", "failed", "cancelled", "queued"):
        made.draw(status=status)
    (made.root / "grids" / "a").mkdir(parents=True)
    (made.root / "grids" / "a" / "page.html").write_text("a page")
    yield made
    made.store.close()


def test_there_and_back(years: Years, tmp_path: Path, postgres: str) -> None:
    """Backups go from each kind of database to each kind, with the same rows and the same files."""
    url = years.store.engine.url.render_as_string(hide_password=False)
    before, files = rows(url), contents(years.root)
    made = back_up(years.root, url, tmp_path / "backup")
    assert (made.jobs, made.pictures, made.lost, made.linked) == (4, 6, 0, 0)
    assert made.files == len(files) + 2
    listed = (tmp_path / "backup" / "SHA256SUMS").read_text().splitlines()
    assert len(listed) == made.files
    done = subprocess.run(
        ["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path / "backup"
    )
    assert done.returncode == 0
    years.store.close()
    restore(tmp_path / "backup", tmp_path / "lite")
    restore(tmp_path / "backup", tmp_path / "postgres", empty(postgres))
    for name, there in (
        ("lite", f"sqlite:///{tmp_path / 'lite' / 'jobs.sqlite3'}"),
        ("postgres", postgres),
    ):
        assert rows(there) == before
        assert contents(tmp_path / name) == files
        assert not (tmp_path / name / "restore.unfinished").exists()
        again, store = start(tmp_path / name, there)
        drawn = {picture.id for job in store.list()[0] for picture in job.pictures}
        assert again.pictures() == drawn
        assert store.counts() == {"succeeded": 1, "failed": 1, "cancelled": 1, "queued": 1}
        store.close()


def test_an_earlier_backup_is_shared(drawn: tuple[Path, set[str]], tmp_path: Path) -> None:
    root, _ = drawn
    url = f"sqlite:///{root / 'jobs.sqlite3'}"
    back_up(root, url, tmp_path / "one")
    files, store = start(root)
    draw(files, store, 3)
    store.close()
    made = back_up(root, url, tmp_path / "two", earlier=tmp_path / "one")
    assert (made.pictures, made.linked) == (15, 12)
    shared = [p for p in (tmp_path / "two" / "pictures").iterdir() if p.stat().st_nlink == 2]
    assert len(shared) == 12
    restore(tmp_path / "two", tmp_path / "three")
    assert contents(tmp_path / "three") == contents(root)


def damage(place: Path, what: str) -> None:
    picture = next((place / "pictures").iterdir())
    if what == "a byte of a picture":
        data = bytearray(picture.read_bytes())
        data[len(data) // 2] ^= 1
        picture.write_bytes(data)
    elif what == "a picture is away":
        picture.unlink()
    elif what == "a byte of the database":
        data = bytearray((place / "jobs.sqlite3").read_bytes())
        data[-100] ^= 1
        (place / "jobs.sqlite3").write_bytes(data)
    elif what == "a line":
        lines = (place / "SHA256SUMS").read_text().splitlines(keepends=True)
        (place / "SHA256SUMS").write_text("".join(lines[1:]))
    elif what == "it was cut off":
        (place / "backup.json").unlink()
    elif what == "another schema":
        told = (place / "backup.json").read_text()
        (place / "backup.json").write_text(re.sub(r'"schema": "\d+"', '"schema": "9999"', told))
    elif what == "no JSON":
        (place / "backup.json").write_text("[1")
    else:
        lines = f"{'0' * 64}  ../../evil\n"
        (place / "SHA256SUMS").write_text(lines)
        told = (place / "backup.json").read_text()
        digest = hashlib.sha256(lines.encode()).hexdigest()
        (place / "backup.json").write_text(re.sub(r'"sums": "\w+"', f'"sums": "{digest}"', told))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("a byte of a picture", "in the backup is damaged"),
        ("a picture is away", "in the backup is damaged"),
        ("a byte of the database", "jobs.sqlite3 in the backup is damaged"),
        ("a line", "SHA256SUMS is another than the one that was written"),
        ("it was cut off", "is no finished backup"),
        ("another schema", "use a newer one"),
        ("no JSON", "backup.json is damaged"),
        ("a path outside", "names a file that no backup has"),
    ],
)
def test_a_damaged_backup_is_refused(
    drawn: tuple[Path, set[str]], tmp_path: Path, what: str, said: str
) -> None:
    """The refusal is one line, and nothing stays in the folder."""
    root, _ = drawn
    back_up(root, f"sqlite:///{root / 'jobs.sqlite3'}", tmp_path / "backup")
    damage(tmp_path / "backup", what)
    with pytest.raises(SafelightError, match=said) as refused:
        restore(tmp_path / "backup", tmp_path / "again")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "again").exists() or not any((tmp_path / "again").iterdir())
    assert not (tmp_path / "evil").exists()


def test_a_folder_that_is_not_empty_is_left_alone(
    drawn: tuple[Path, set[str]], tmp_path: Path
) -> None:
    root, _ = drawn
    url = f"sqlite:///{root / 'jobs.sqlite3'}"
    back_up(root, url, tmp_path / "backup")
    before = contents(root)
    with pytest.raises(SafelightError, match="is not empty"):
        restore(tmp_path / "backup", root)
    with pytest.raises(SafelightError, match="is not empty"):
        back_up(root, url, tmp_path / "backup")
    assert contents(root) == before
    assert (tmp_path / "backup" / "backup.json").is_file()


def test_a_database_that_has_tables_is_left_alone(
    drawn: tuple[Path, set[str]], tmp_path: Path, postgres: str
) -> None:
    root, _ = drawn
    back_up(root, f"sqlite:///{root / 'jobs.sqlite3'}", tmp_path / "backup")
    empty(postgres)
    with psycopg.connect(postgres.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("CREATE TABLE theirs (a int)")
    with pytest.raises(StorageError, match="has tables already"):
        restore(tmp_path / "backup", tmp_path / "again", postgres)
    assert not any((tmp_path / "again").iterdir())
    assert list(rows(postgres)) == ["theirs"]


def test_a_restore_that_was_cut_off(
    drawn: tuple[Path, set[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody serves half of it, and the next restore begins anew."""
    root, _ = drawn
    back_up(root, f"sqlite:///{root / 'jobs.sqlite3'}", tmp_path / "backup")
    real: Any = module._copy
    copied: list[Path] = []

    def copy(source: Path, target: Path) -> str:
        copied.append(target)
        if len(copied) > 5:
            raise KeyboardInterrupt
        return real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_copy", copy)
        patch.setattr(module, "_clear", lambda _: None)  # as after kill -9
        with pytest.raises(KeyboardInterrupt):
            restore(tmp_path / "backup", tmp_path / "again")
    with pytest.raises(StorageError, match="run `safelight restore` again"):
        start(tmp_path / "again")
    restore(tmp_path / "backup", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(root)


def test_a_restore_to_a_database_that_was_cut_off(
    drawn: tuple[Path, set[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, postgres: str
) -> None:
    root, _ = drawn
    back_up(root, f"sqlite:///{root / 'jobs.sqlite3'}", tmp_path / "backup")
    empty(postgres)

    def cut_off(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "select", cut_off)  # before the first row is read
        with pytest.raises(KeyboardInterrupt):
            restore(tmp_path / "backup", tmp_path / "again", postgres)
    assert rows(postgres) == {}
    restore(tmp_path / "backup", tmp_path / "again", postgres)
    assert rows(postgres)["jobs"]


def test_jobs_that_are_deleted_meanwhile(
    years: Years, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their rows are taken out again; a picture that was lost before is reported."""
    url = years.store.engine.url.render_as_string(hide_password=False)
    going, damaged, *_ = [job for job in years.store.list()[0] if job.pictures]
    years.files.remove_pictures([damaged.pictures[0].id])
    real: Any = snapshot.take

    def take(url: str, place: Path) -> str:
        version = real(url, place)
        if place.name == "jobs.sqlite3":
            years.store.delete(going.id)
            years.files.remove_pictures([going.pictures[0].id])  # half of it
        return version

    monkeypatch.setattr(snapshot, "take", take)
    made = back_up(years.root, url, tmp_path / "backup")
    assert (made.jobs, made.pictures, made.lost) == (3, 4, 1)
    names = {path.stem for path in (tmp_path / "backup" / "pictures").iterdir()}
    with closing(sqlite3.connect(tmp_path / "backup" / "jobs.sqlite3")) as db:
        known = {row[0] for row in db.execute("SELECT id FROM pictures")}
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []
    assert known - names == {damaged.pictures[0].id}
    assert names < known
    restore(tmp_path / "backup", tmp_path / "again")


def test_a_folder_of_the_first_version(drawn: tuple[Path, set[str]], tmp_path: Path) -> None:
    """This version backs it up before it is migrated."""
    root, ids = drawn
    _, store = start(root)
    to_first(store)
    store.close()
    made = back_up(root, f"sqlite:///{root / 'jobs.sqlite3'}", tmp_path / "backup")
    assert (made.schema, made.pictures) == ("0001", 12)
    restore(tmp_path / "backup", tmp_path / "again")
    files, store = start(tmp_path / "again")
    assert files.pictures() == ids
    store.close()


def test_under_load(tmp_path: Path) -> None:
    """Backups one after the other while jobs are drawn and deleted: each is whole."""
    data, backups = tmp_path / "data", []
    with Inside(data, dtype="float32", rows=8) as server:
        stop = threading.Event()
        first = server.finished(server.submit(**QUICK, image=png()))

        def work() -> None:
            while not stop.is_set():
                made = [server.submit(**QUICK, image=png()) for _ in range(3)]
                server.finished(made[0])
                server.ask("DELETE", f"/api/jobs/{made[0]}")

        worker = threading.Thread(target=work)
        worker.start()
        try:
            for number in range(3):
                place = tmp_path / f"backup{number}"
                back_up(data, f"sqlite:///{data / 'jobs.sqlite3'}", place)
                backups.append(place)
        finally:
            stop.set()
            worker.join()
        wait_for(lambda: not server.ask("GET", "/api/jobs?status=queued").json())
    for place in backups:
        again = tmp_path / f"{place.name}-again"
        restore(place, again)
        files, store = start(again)
        pictures, _ = store.known_files()
        assert files.pictures() == pictures
        assert store.get(first["id"]) is not None
        for path in (again / "pictures").iterdir():
            with Image.open(path) as image:
                image.load()
        for job in store.list(limit=1000)[0]:
            assert files.input(job.id, "image") is not None
        store.close()
        assert not list((again / "quarantine").rglob("*.png"))


def test_a_new_volume_of_ext4_is_empty(drawn: tuple[Path, set[str]], tmp_path: Path) -> None:
    root, _ = drawn
    for name in ("backup", "again"):
        (tmp_path / name / "lost+found").mkdir(parents=True)
    back_up(root, f"sqlite:///{root / 'jobs.sqlite3'}", tmp_path / "backup")
    restore(tmp_path / "backup", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(root)
    assert (tmp_path / "again" / "lost+found").is_dir()


def test_a_storage_that_is_not_empty_leaves_no_mark_in_the_folder(
    drawn: tuple[Path, set[str]], tmp_path: Path
) -> None:
    root, _ = drawn
    back_up(root, f"sqlite:///{root / 'jobs.sqlite3'}", tmp_path / "backup")
    there = "memory://not-empty"
    storage_at(there).write("pictures/a.png", b"a")
    with pytest.raises(SafelightError, match="is not empty"):
        restore(tmp_path / "backup", tmp_path / "again", storage=there)
    assert not any((tmp_path / "again").iterdir())


def test_the_commands(
    drawn: tuple[Path, set[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, _ = drawn
    place, again = os.fspath(tmp_path / "backup"), os.fspath(tmp_path / "again")
    mask = os.umask(0o077)
    try:
        assert run(["backup", place, "--data-dir", os.fspath(root)]) == 0
        assert run(["restore", place, "--data-dir", again]) == 0
        told = capsys.readouterr()
        assert told.out.split() == [place, again]
        for folder in (tmp_path / "backup", tmp_path / "again"):
            assert {stat.S_IMODE(p.stat().st_mode) for p in folder.rglob("*")} == {0o600, 0o700}
        assert told.err.startswith("1 jobs and 12 pictures: 14 files, ")
        assert run(["restore", place, "--data-dir", again]) == 2
        assert "is not empty" in capsys.readouterr().err
        assert run(["backup", os.fspath(tmp_path / "b"), "--data-dir", again + "x"]) == 2
        (tmp_path / "nothing").mkdir()
        assert run(["backup", os.fspath(tmp_path / "b"), "--data-dir", f"{tmp_path}/nothing"]) == 2
        assert "jobs.sqlite3 is not there" in capsys.readouterr().err
        assert not list((tmp_path / "b").iterdir())
    finally:
        os.umask(mask)
    assert Files(Path(again)).pictures()


def test_what_is_not_there_is_not_made_and_home_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, os.fspath(tmp_path))
    mask = os.umask(0o077)
    try:
        assert run(["backup", os.fspath(tmp_path / "b")]) == 2
        assert "jobs.sqlite3 is not there" in capsys.readouterr().err
        assert not (tmp_path / "safelight").exists()
        assert run(["backup", os.fspath(tmp_path / "b"), "--earlier=~/a"]) == 2
        assert f"{tmp_path}/a is no finished backup" in capsys.readouterr().err
    finally:
        os.umask(mask)
