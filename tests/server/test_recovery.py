"""What a start does with a folder and a database: no file is deleted for being unknown."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from PIL import Image
from sqlalchemy import text

from safelight.errors import StorageError
from safelight.server import quarantine, schema
from safelight.server import uploads as module
from safelight.server.files import Files
from safelight.server.jobs import Picture
from safelight.server.recovery import recover
from safelight.server.store import Store, new_id
from safelight.server.tables import meta
from safelight.server.uploads import Uploads
from safelight.storage import Folder


def start(root: Path, url: str | None = None) -> tuple[Files, Store]:
    """Do what a server does first."""
    root.mkdir(exist_ok=True)
    files, store = Files(root), Store(url or f"sqlite:///{root / 'jobs.sqlite3'}")
    try:
        recover(files, store)
    except StorageError:
        store.close()
        raise
    return files, store


def draw(files: Files, store: Store, count: int = 12) -> set[str]:
    """Return the ids of pictures that a job has drawn."""
    ids = set()
    store.submit(new_id(), {"prompt": "a cat", "count": count}, client="api", cost=1, bound=100)
    claim = store.claim("w")
    assert claim is not None
    for i in range(count):
        picture = Picture(id=claim.picture_id(i), index=i, seed=i, width=8, height=8, recipe={})
        files.keep(Image.new("RGB", (8, 8)), picture.id, {})
        store.add_picture(claim.id, claim.token, picture)
        ids.add(picture.id)
    store.finish(claim.id, claim.token, warnings=[])
    return ids


def everywhere(root: Path) -> set[str]:
    return {path.name.split(".png")[0] for path in root.rglob("*.png*")}


@pytest.fixture
def drawn(tmp_path: Path) -> tuple[Path, set[str]]:
    root = tmp_path / "data"
    files, store = start(root)
    ids = draw(files, store)
    store.close()
    return root, ids


def moved(root: Path) -> str | None:
    (root / "jobs.sqlite3").rename(root.parent / "elsewhere.sqlite3")
    return None


def emptied(root: Path) -> str | None:
    (root / "jobs.sqlite3").write_bytes(b"")
    return None


def another(root: Path) -> str | None:
    return f"sqlite:///{root.parent / 'another.sqlite3'}"


def older(root: Path) -> str | None:
    """Return a backup from before the first picture."""
    with closing(sqlite3.connect(root / "jobs.sqlite3", isolation_level=None)) as db:
        db.execute("DELETE FROM pictures")
        db.execute("DELETE FROM jobs")
    return None


def of_another_server(root: Path) -> str | None:
    files, store = start(root.parent / "theirs")
    draw(files, store, 2)
    store.close()
    shutil.copy(root.parent / "theirs" / "jobs.sqlite3", root / "jobs.sqlite3")
    return None


def damaged(root: Path) -> str | None:
    file = root / "jobs.sqlite3"
    file.write_bytes(file.read_bytes()[:100] + os.urandom(file.stat().st_size - 100))
    return None


def no_database(root: Path) -> str | None:
    (root / "jobs.sqlite3").write_bytes(b"this is a text\n" * 1000)
    return None


def cut_off(root: Path) -> str | None:
    file = root / "jobs.sqlite3"
    file.write_bytes(file.read_bytes()[:4096])
    return None


WAYS = [moved, emptied, another, older, of_another_server, damaged, no_database, cut_off]


@pytest.mark.parametrize("way", WAYS)
def test_another_database_costs_no_picture(drawn: tuple[Path, set[str]], way: Any) -> None:
    """Each of 12 starts is refused in one line, and every picture stays where it was."""
    root, ids = drawn
    url = way(root)
    for _ in range(12):
        with pytest.raises(StorageError) as refused:
            start(root, url)
        assert "\n" not in str(refused.value)
        assert {path.stem for path in (root / "pictures").iterdir()} == ids
        assert way is not moved or "knows none of the 12 pictures" in str(refused.value)
    if way is moved:
        (root.parent / "elsewhere.sqlite3").rename(root / "jobs.sqlite3")
        start(root)[1].close()
        assert {path.stem for path in (root / "pictures").iterdir()} == ids


def test_what_an_older_backup_does_not_know_is_kept_for_a_month(
    drawn: tuple[Path, set[str]], caplog: pytest.LogCaptureFixture
) -> None:
    root, ids = drawn
    backup = (root / "jobs.sqlite3").read_bytes()
    files, store = start(root)
    newer = draw(files, store, 3)
    store.close()
    (root / "jobs.sqlite3").write_bytes(backup)
    for _ in range(3):
        start(root)[1].close()
    assert {path.stem for path in (root / "pictures").iterdir()} == ids
    assert everywhere(root / "quarantine") == newer
    assert "does not know 3 files, which are in quarantine now, for 30 days" in caplog.text
    today = next((root / "quarantine").iterdir())
    for days, there in ((30, True), (31, False)):
        then = (datetime.now(UTC) - timedelta(days=days)).date().isoformat()
        today = today.rename(today.with_name(then))
        start(root)[1].close()
        assert today.exists() is there


def test_what_is_not_ours_stays(drawn: tuple[Path, set[str]]) -> None:
    """Folders of the file system, links and a person's folders stay."""
    root, ids = drawn
    for folder in ("pictures", "inputs", "thumbnails"):
        (root / folder / "lost+found").mkdir(mode=0o700)
        (root / folder / "of a person").mkdir()
        (root / folder / "of a person" / "a.png").write_bytes(b"x")
        (root / folder / "link.png").symlink_to("/etc/passwd")
    (root / "quarantine" / "of a person").mkdir(parents=True)
    start(root)[1].close()
    for folder in ("pictures", "inputs", "thumbnails"):
        assert (root / folder / "lost+found").is_dir()
        assert (root / folder / "of a person" / "a.png").read_bytes() == b"x"
        assert (root / folder / "link.png").is_symlink()
    assert (root / "quarantine" / "of a person").is_dir()
    assert ids <= everywhere(root / "pictures")


def test_a_folder_on_a_disk_of_its_own(
    drawn: tuple[Path, set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = drawn
    stray = root / "pictures" / f"{new_id()}.png"
    stray.write_bytes(b"x")
    real = Path.rename

    def rename(path: Path, to: Path) -> Path:
        if Path(to).parents[2] == root / "quarantine":
            raise OSError(18, "Invalid cross-device link")
        return real(path, to)

    monkeypatch.setattr(Path, "rename", rename)
    start(root)[1].close()
    assert [p.name for p in (root / "pictures" / "quarantine").rglob("*.png")] == [stray.name]


def test_what_was_half_written_is_cleaned_up(drawn: tuple[Path, set[str]]) -> None:
    """A killed process leaves temporary files, and a picture without its row."""
    root, ids = drawn
    files, store = start(root)
    store.submit(new_id(), {"prompt": "a", "count": 3}, client="api", cost=1, bound=100)
    claim = store.claim("w")
    assert claim is not None
    files.keep(Image.new("RGB", (8, 8)), claim.picture_id(1), {})
    for place in (root / "pictures", root / "inputs", root):
        (place / ".safelight-0123456789abcdef.part").write_bytes(b"half")
    store.close()
    start(root)[1].close()
    assert {path.stem for path in (root / "pictures").iterdir()} == ids
    assert not list(root.rglob("*.part"))
    assert everywhere(root / "quarantine") == {claim.picture_id(1)}


def test_the_first_picture_without_its_row_is_no_reason_to_refuse(tmp_path: Path) -> None:
    root = tmp_path / "data"
    files, store = start(root)
    store.submit(new_id(), {"prompt": "a", "count": 1}, client="api", cost=1, bound=100)
    claim = store.claim("w")
    assert claim is not None
    files.keep(Image.new("RGB", (8, 8)), claim.picture_id(0), {})
    store.close()
    files, store = start(root)
    assert files.pictures() == set()
    assert store.counts() == {"queued": 1}
    store.close()


def test_one_database_has_one_folder(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another folder, an empty one, and a copy beside a running server are refused in one line."""
    monkeypatch.setattr("safelight.server.store.PATIENCE", 0)
    files, store = start(tmp_path / "one", database)
    for name in ("two", "three"):
        with pytest.raises(StorageError) as refused:
            start(tmp_path / name, database)
        assert "\n" not in str(refused.value)
        assert "another" in str(refused.value)
    draw(files, store)
    with pytest.raises(StorageError):
        start(tmp_path / "two", database)
    store.close()
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    start(tmp_path / "one", database)[1].close()
    with pytest.raises(StorageError, match="another data folder"):
        start(tmp_path / "two", database)
    assert len(list((tmp_path / "one" / "pictures").iterdir())) == 12


def test_two_servers_on_one_postgresql(
    tmp_path: Path, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They run on copies of one folder, of which each server locks its own."""
    monkeypatch.setattr("safelight.server.store.PATIENCE", 0)
    import psycopg

    with psycopg.connect(postgres.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    _, store = start(tmp_path / "one", postgres)
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    to_first(store)  # as if the first server were of an older version
    with pytest.raises(StorageError, match="another server draws the jobs"):
        start(tmp_path / "copy", postgres)
    assert schema.version_of(store.engine) == schema.FIRST
    store.close()
    start(tmp_path / "copy", postgres)[1].close()


def modes(root: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in (root, *root.rglob("*"))}


def test_others_on_this_machine_are_kept_out(drawn: tuple[Path, set[str]]) -> None:
    """A folder that an earlier version left open is closed, too."""
    root, _ = drawn
    for path in (root, *root.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    start(root)[1].close()
    assert modes(root) == {0o700, 0o600}


def test_a_folder_of_others_is_not_closed(drawn: tuple[Path, set[str]]) -> None:
    """With --data-dir /tmp, only our files and folders in it are closed."""
    root, _ = drawn
    (root / "somebody's").write_bytes(b"x")
    for path in root.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    root.chmod(0o1777)
    start(root)[1].close()
    assert stat.S_IMODE(root.stat().st_mode) == 0o1777
    assert stat.S_IMODE((root / "somebody's").stat().st_mode) == 0o644
    assert modes(root / "pictures") == {0o700, 0o600}
    assert stat.S_IMODE((root / "jobs.sqlite3").stat().st_mode) == 0o600


# --- the schema -----------------------------------------------------------------------------------


def test_migrations_make_what_the_tables_say(database: str) -> None:
    store = Store(database)
    store.migrate()
    with store.engine.connect() as db:
        assert compare_metadata(MigrationContext.configure(db), meta) == []
    store.close()
    script = ScriptDirectory(str(schema.MIGRATIONS))
    assert script.get_current_head() == schema.HEAD
    assert script.get_base() == schema.FIRST


def to_first(store: Store) -> None:
    """Take a database back to what the first version made: no version, no owner."""
    with store.engine.begin() as db:
        gone = ("alembic_version", "facts", "choices", "shares", "allowances", "keys", "workers")
        for table in (*gone, "webhooks"):
            db.execute(text(f"DROP TABLE {table}"))
        for index in ("owner", "shortest", "oldest", "expires", "finished", "model"):
            db.execute(text(f"DROP INDEX ix_jobs_{index}"))
        for column in ("owner", "kills", "ends", "model", "pixel_steps", "expires", "trace"):
            db.execute(text(f"ALTER TABLE jobs DROP COLUMN {column}"))


def test_a_folder_of_the_first_version_opens_and_migrates(tmp_path: Path, database: str) -> None:
    root = tmp_path / "data"
    files, store = start(root, database)
    ids = draw(files, store)
    to_first(store)
    store.close()
    (root / "folder.id").unlink()
    files, store = start(root, database)
    assert files.pictures() == ids
    jobs = store.list(owner="default")[0]
    assert {picture.id for picture in jobs[0].pictures} == ids
    assert store.list(owner="another")[0] == []
    store.close()
    backups = list(tmp_path.rglob("jobs.sqlite3.schema-0001"))
    assert len(backups) == database.startswith("sqlite")
    for backup in backups:
        with closing(sqlite3.connect(backup)) as db:
            assert db.execute("SELECT count(*) FROM pictures").fetchone() == (12,)
            assert "owner" not in {row[1] for row in db.execute("PRAGMA table_info(jobs)")}
        assert stat.S_IMODE(backup.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("UPDATE alembic_version SET version_num = '9999'", "from a newer Safelight than this one"),
        ("UPDATE alembic_version SET version_num = 'abc'", "from a newer Safelight than this one"),
        ("ALTER TABLE jobs DROP COLUMN digest", "lacks jobs.digest"),
        ("ALTER TABLE pictures DROP COLUMN recipe", "lacks pictures.recipe"),
        ("DROP TABLE facts", "cannot be opened"),
    ],
)
def test_a_schema_that_is_not_known_is_refused_in_a_line(
    tmp_path: Path, database: str, statement: str, said: str
) -> None:
    files, store = start(tmp_path / "data", database)
    ids = draw(files, store)
    with store.engine.begin() as db:
        db.execute(text(statement))
    store.close()
    with pytest.raises(StorageError) as refused:
        start(tmp_path / "data", database)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert Files(tmp_path / "data").pictures() == ids


def test_no_migration_without_its_backup(
    drawn: tuple[Path, set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = drawn
    store = Store(f"sqlite:///{root / 'jobs.sqlite3'}")
    to_first(store)
    store.close()

    def full(*_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(schema, "_back_up", full)
        with pytest.raises(StorageError, match="disk is full"):
            start(root)
    with closing(sqlite3.connect(root / "jobs.sqlite3")) as db:
        assert "owner" not in {row[1] for row in db.execute("PRAGMA table_info(jobs)")}
    start(root)[1].close()


def test_the_quarantine_overwrites_nothing(tmp_path: Path) -> None:
    for text_ in ("one", "two"):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        path = tmp_path / "pictures" / "a.png"
        path.write_text(text_)
        quarantine.put_away(Folder(tmp_path), "pictures/a.png")
    kept = sorted(p.read_text() for p in (tmp_path / "quarantine").rglob("a.png*"))
    assert kept == ["one", "two"]


# --- kin: other files that nobody knows, and clocks -----------------------------------------------


def test_a_person_s_folder_costs_that_person_nothing(tmp_path: Path) -> None:
    """The data folder already has folders with our names, and other things in them."""
    theirs = [
        *("pictures/holiday.jpg", "pictures/a.png", "pictures/film.part", "thumbnails/x.png"),
        *("inputs/letter.txt", "uploads/tmp/cv.pdf", "uploads/tmp.txt", "uploads/2019/a.jpg"),
        *("inside/notes.html", "grids/town.png", "quarantine/2020-01-01.txt", "film.part"),
    ]
    root = tmp_path / "data"
    for name in theirs:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"of a person")
        os.utime(root / name, (0, 0))
    for folder in root.rglob("*"):
        if folder.is_dir():
            os.utime(folder, (0, 0))
    start(root)[1].close()
    uploads = Uploads(None, root / "uploads")
    uploads.clean_up()
    uploads.forget()
    assert uploads._make_room("somebody", module.OWN)
    assert [name for name in theirs if not (root / name).is_file()] == []


@pytest.mark.parametrize("when", ["1970-01-01", "2019-12-31"])
def test_a_clock_that_was_wrong_deletes_nothing(drawn: tuple[Path, set[str]], when: str) -> None:
    """A machine without a battery starts in 1970, and learns the date a little later."""
    root, _ = drawn
    (root / "quarantine" / when).mkdir(parents=True)
    start(root)[1].close()
    assert (root / "quarantine" / when).is_dir()


def test_what_a_backup_in_the_middle_of_a_job_does_not_know_is_kept(tmp_path: Path) -> None:
    """The restored database says that a job is running, whose pictures were finished since."""
    root = tmp_path / "data"
    files, store = start(root)
    draw(files, store, 1)
    store.submit(new_id(), {"prompt": "a", "count": 2}, client="api", cost=1, bound=100)
    claim = store.claim("w")
    assert claim is not None
    store.close()
    backup = (root / "jobs.sqlite3").read_bytes()
    newer = {claim.picture_id(i) for i in range(2)}
    for picture_id in newer:
        files.keep(Image.new("RGB", (8, 8)), picture_id, {})
    (root / "jobs.sqlite3").write_bytes(backup)
    start(root)[1].close()
    assert newer <= everywhere(root / "quarantine")


@pytest.mark.parametrize(
    "odd",
    [
        lambda root: (root / ".safelight-0123.part").mkdir(),
        lambda root: (root / "pictures" / ".safelight-0123.part").mkdir(),
        lambda root: (root / "lost+found").mkdir(),
        lambda root: (root / "quarantine").write_bytes(b"no folder"),
        lambda root: os.mkfifo(root / "pictures" / "pipe.png"),
        lambda root: (root / "pictures" / "nowhere.png").symlink_to("nowhere"),
        lambda root: (root / "pictures" / f"{new_id()}.png").mkdir(),
        lambda root: (root / "inputs" / "\udcff.png").write_bytes(b"x"),
    ],
)
def test_odd_entries_are_no_reason_not_to_start(drawn: tuple[Path, set[str]], odd: Any) -> None:
    root, ids = drawn
    odd(root)
    start(root)[1].close()
    assert ids <= everywhere(root / "pictures")


def test_a_quarantine_that_cannot_be_read(
    drawn: tuple[Path, set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, ids = drawn
    (root / "quarantine").mkdir()
    real = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "quarantine":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    start(root)[1].close()
    assert ids <= everywhere(root / "pictures")
