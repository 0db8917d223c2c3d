"""Jobs beyond --keep are deleted, in two steps; nothing else is."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inside import Inside
from PIL import Image
from serving import wait_for
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError
from test_recovery import start
from test_storage import QUICK, png, whole

from safelight.errors import SafelightError, StorageError
from safelight.server import retention as module
from safelight.server.database import Database
from safelight.server.jobs import Picture, Status
from safelight.server.keep import Keep
from safelight.server.retention import GRACE, Retention, clear
from safelight.server.store import new_id

DAY = 86400.0


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("90d", Keep(seconds=90 * DAY)),
        ("12h", Keep(seconds=12 * 3600)),
        ("1.5w", Keep(seconds=10.5 * DAY)),
        ("2y", Keep(seconds=730 * DAY)),
        ("50GB", Keep(size=50 * 10**9)),
        ("50 gib", Keep(size=50 << 30)),
        ("10000", Keep(jobs=10000)),
        ("90d, 50GB,10000", Keep(seconds=90 * DAY, size=50 * 10**9, jobs=10000)),
    ],
)
def test_limits_are_read(said: str, meant: Keep) -> None:
    assert Keep.parse(said) == meant


@pytest.mark.parametrize(
    "said",
    [
        "",
        "d",
        "-1d",
        "0d",
        "0",
        "90x",
        "90d,30d",
        "1.5",
        "1e9",
        "9" * 16,
        "∞",
        "٣d",
        "90d;50GB",
        "nan",
    ],
)
def test_other_limits_are_refused_in_a_line(said: str) -> None:
    with pytest.raises(SafelightError, match="expected an age") as refused:
        Keep.parse(said)
    assert "\n" not in str(refused.value)


class Years:
    """A data folder with a clock that the test sets."""

    def __init__(self, root: Path, url: str | None = None) -> None:
        self.root, self.url = root, url
        self.files, self.store = start(root, url)

    def again(self) -> None:
        self.store.close()
        self.files, self.store = start(self.root, self.url)

    def draw(self, age: float = 0.0, status: str = "succeeded", size: int = 8) -> str:
        """Add a job of two pictures and an input that ended some seconds ago."""
        job_id = new_id()
        self.files.keep_input(job_id, "image", Image.new("RGB", (8, 8)))
        settings = {"prompt": "a cat", "count": 2, "image_sha256": "0"}
        cost = 1000 if status == "queued" else 1  # the cheapest is claimed first
        self.store.submit(job_id, settings, client="api", cost=cost, bound=10**6)
        if status == "queued":
            return job_id
        claim = self.store.claim("w")
        assert claim is not None
        for i in range(2):
            picture = Picture(id=claim.picture_id(i), index=i, seed=i, width=8, height=8, recipe={})
            self.files.keep(Image.effect_noise((size, size), 50), picture.id, {})
            self.store.add_picture(claim.id, claim.token, picture)
        if status == "cancelled":
            self.store.cancel(claim.id)
        elif status != "running":
            error = "it failed" if status == "failed" else None
            self.store.finish(claim.id, claim.token, warnings=[], error=error)
        self.age(claim.id, age)
        return claim.id

    def age(self, job_id: str, seconds: float) -> None:
        with self.store.engine.begin() as db:
            db.execute(
                text("UPDATE jobs SET finished = finished - :s WHERE id = :i"),
                {"s": seconds, "i": job_id},
            )

    def pass_grace(self) -> None:
        with self.store.engine.begin() as db:
            db.execute(text("UPDATE jobs SET expires = 1 WHERE expires > 0"))

    def keep(self, text: str) -> Retention:
        return Retention(self.files, self.store, Keep.parse(text))

    def jobs(self) -> set[str]:
        return {job.id for job in self.store.list(limit=10**6)[0]}

    def whole(self) -> None:
        """Check that rows and files match, and that nothing is in quarantine."""
        pictures, jobs = self.store.known_files()
        assert self.files.pictures() == pictures
        assert {p.name.split("-")[0] for p in (self.root / "inputs").iterdir()} == jobs
        assert not list((self.root / "quarantine").rglob("*.png"))


@pytest.fixture
def years(tmp_path: Path, database: str) -> Iterator[Years]:
    made = Years(tmp_path / "data", database)
    yield made
    made.store.close()


@pytest.fixture
def lite(tmp_path: Path) -> Iterator[Years]:
    made = Years(tmp_path / "data")
    yield made
    made.store.close()


def test_by_age_in_two_steps(years: Years, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    old = [years.draw(91 * DAY, status) for status in ("succeeded", "failed", "cancelled")]
    young = years.draw(89 * DAY)
    waiting, running = years.draw(status="queued"), years.draw(status="queued")
    claim = years.store.claim("w")
    assert claim is not None
    kept = years.keep("90d")
    kept.look()
    assert kept.marked == 3
    job = years.store.get(old[0])
    assert job is not None
    assert job.expires_at is not None
    assert abs(job.expires_at.timestamp() - time.time() - GRACE) < 60
    kept.look()
    assert years.jobs() == {*old, young, waiting, running}, "the grace is not over"
    years.pass_grace()
    kept.look()
    assert years.jobs() == {young, waiting, running}
    assert (kept.freed.jobs, kept.freed.pictures, kept.marked) == (3, 6, 0)
    years.whole()
    assert "3 jobs are beyond --keep, and are deleted in 60 minutes" in caplog.text
    assert "deleted 3 jobs beyond --keep: 6 pictures, 0.0 MB" in caplog.text


def test_by_age_on_the_database_s_clock(lite: Years, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's machine may be a hundred days ahead of it."""
    lite.draw()
    now = lite.store.now()
    monkeypatch.setattr(time, "time", lambda: now + 100 * DAY)
    monkeypatch.setattr(lite.store, "now", lambda: now + 60)
    retention = lite.keep("90d")
    retention.look()
    assert retention.marked == 0
    monkeypatch.setattr(lite.store, "now", lambda: now + 91 * DAY)
    retention.look()
    assert retention.marked == 1


def test_by_number(years: Years) -> None:
    made = [years.draw(age) for age in (50, 40, 30, 20, 10)]
    waiting = years.draw(status="queued")
    kept = years.keep("3")
    kept.look()
    years.pass_grace()
    kept.look()
    assert years.jobs() == {*made[2:], waiting}
    years.whole()


def test_by_size(years: Years) -> None:
    made = [years.draw(age, size=64) for age in (50, 40, 30, 20, 10)]
    total = years.files.total_size()
    assert total == sum(p.stat().st_size for p in years.root.rglob("*.png"))
    kept = years.keep(f"{(total * 3 // 5 + 500) / 1000:.3f}KB")
    kept.look()
    assert kept.size == total
    years.pass_grace()
    kept.look()
    assert years.jobs() == set(made[2:])
    assert total - kept.freed.size == years.files.total_size()
    years.whole()


def test_jobs_that_ended_in_one_moment_stay_together(lite: Years) -> None:
    for _ in range(4):
        lite.draw()
    with lite.store.engine.begin() as db:
        db.execute(text("UPDATE jobs SET finished = 1e9"))
    lite.keep("2").look()
    assert lite.store.marked() == 0


def test_a_mark_is_taken_away(lite: Years) -> None:
    """Wider limits, a start without limits, and a retry take it away."""
    failed, other = lite.draw(50 * DAY, "failed"), lite.draw(40 * DAY)
    lite.keep("9d").look()
    assert lite.store.marked() == 2
    lite.keep("45d").look()
    assert lite.store.marked() == 1
    Retention(lite.files, lite.store, Keep()).look()
    assert lite.store.marked() == 0
    lite.keep("9d").look()
    again = lite.store.retry(failed, 100)
    assert again is not None
    assert (again.status, again.expires_at) == (Status.QUEUED, None)
    lite.pass_grace()
    lite.keep("9d").look()
    assert lite.jobs() == {failed}
    assert other not in lite.jobs()
    lite.whole()


def test_a_job_that_is_going_is_as_none(lite: Years) -> None:
    job_id = lite.draw(status="failed")
    assert lite.store.delete(job_id)
    assert lite.store.get(job_id) is None
    assert lite.store.retry(job_id, 100) is None
    assert lite.store.counts() == {}
    lite.again()  # goes on with it
    assert lite.store.gone() == {}
    lite.whole()


def test_a_key_is_free_again(lite: Years) -> None:
    how: Any = {"client": "api", "cost": 1, "bound": 9, "key": "k", "digest": "d"}
    job, _ = lite.store.submit(new_id(), {"count": 1}, **how)
    lite.store.cancel(job.id)
    lite.store.delete(job.id)
    assert lite.store.submit(new_id(), {"count": 1}, **how)[1]


def test_nothing_is_deleted_from_a_disk_that_is_away(lite: Years) -> None:
    lite.draw(91 * DAY)
    kept = lite.keep("90d")
    kept.look()
    lite.pass_grace()
    (lite.root / "folder.id").rename(lite.root / "away")
    with pytest.raises(StorageError, match="is not there"):
        kept.look()
    (lite.root / "away").rename(lite.root / "folder.id")
    assert len(lite.jobs()) == 1


def test_what_the_disk_does_not_let_go_is_tried_again(
    lite: Years, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stuck, other = lite.draw(92 * DAY), lite.draw(91 * DAY)
    kept = lite.keep("90d")
    kept.look()
    lite.pass_grace()
    real = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith(stuck):
            raise PermissionError(1, "Operation not permitted")
        real(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        kept.look()
    assert "cannot be removed yet: " in caplog.text
    assert "cannot be used: Operation not permitted" in caplog.text
    assert list(lite.store.gone()) == [stuck]
    assert not lite.files.pictures() & set(lite.store.gone([other]))
    kept.look()
    assert lite.store.gone() == {}
    lite.whole()


def test_a_full_disk_has_room_for_a_few_at_a_time(lite: Years) -> None:
    old = {lite.draw(91 * DAY) for _ in range(12)}
    young = lite.draw(1 * DAY)
    kept = lite.keep("90d")
    full = OperationalError("UPDATE", {}, sqlite3.OperationalError("database or disk is full"))

    def write(_: Any, __: Any, statement: str, given: Any, *___: Any) -> None:
        if statement.startswith("UPDATE jobs SET") and len(old.intersection(given)) > 7:
            raise full

    event.listen(lite.store.engine, "before_cursor_execute", write)
    kept.look()
    lite.pass_grace()
    kept.look()
    assert lite.jobs() == {young}
    lite.whole()


def test_a_disk_too_full_to_mark_is_freed_all_the_same(
    lite: Years, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked = lite.draw(91 * DAY)
    kept = lite.keep("90d")
    kept.look()
    lite.pass_grace()
    lite.draw(91 * DAY)

    def full(*_: Any) -> None:
        raise StorageError("the database of jobs does not take it: database or disk is full")

    monkeypatch.setattr(lite.store, "mark", full)
    with pytest.raises(StorageError, match="disk is full"):
        kept.look()
    assert marked not in lite.jobs()
    assert kept.freed.jobs == 1


def test_what_a_full_disk_takes_of_the_deletion_makes_room(
    lite: Years, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {lite.draw(91 * DAY) for _ in range(3)}
    kept = lite.keep("90d")
    kept.look()
    lite.pass_grace()
    real, begun = Database._write, []

    @contextmanager
    def write(store: Database, **how: Any) -> Iterator[Any]:
        with real(store, **how) as db:
            yield db
            begun.append(db.scalar(text("SELECT count(*) FROM jobs WHERE expires = 0")))
            if begun[-1] > 1:
                raise StorageError("the database of jobs does not take it: disk is full")

    monkeypatch.setattr(Database, "_write", write)
    with pytest.raises(StorageError, match="disk is full"):
        kept.look()
    assert len(lite.jobs() & old) == 2
    assert kept.freed.jobs == 1


def test_the_server_does_not_wait_for_a_long_look(
    lite: Years, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listing a large bucket takes minutes."""
    begun, go = threading.Event(), threading.Event()
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    retention = Retention(lite.files, lite.store, Keep())
    monkeypatch.setattr(retention, "look", lambda: begun.set() or go.wait(30))
    retention.start()
    assert begun.wait(10)
    began = time.monotonic()
    retention.stop()
    go.set()
    assert time.monotonic() - began < 10


class Killed(BaseException):
    """Stands for the end of the process at one of its writes."""


@contextmanager
def killed_at(patch: pytest.MonkeyPatch, number: int) -> Iterator[list[int]]:
    """Raise at the number-th write: of the database, before and after its commit, or of a file."""
    met = [0]

    def count() -> None:
        met[0] += 1
        if met[0] == number:
            raise Killed

    real_write: Any = Database._write
    real_unlink = Path.unlink

    @contextmanager
    def write(store: Database) -> Iterator[Any]:
        with real_write(store) as db:
            yield db
            count()
        count()

    def unlink(path: Path, missing_ok: bool = False) -> None:
        count()
        real_unlink(path, missing_ok)

    with patch.context() as inner:
        inner.setattr(Database, "_write", write)
        inner.setattr(Path, "unlink", unlink)
        yield met


def test_killed_at_each_write(lite: Years, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stays is complete each time, and in the end everything that should go is gone."""
    young = {lite.draw(DAY), lite.draw(2 * DAY, "failed")}
    waiting = lite.draw(status="queued")
    number, kills = 1, 0
    while True:
        old = lite.draw(91 * DAY)
        kept = lite.keep("90d")
        with killed_at(monkeypatch, number) as met:
            try:
                kept.look()
                lite.pass_grace()
                kept.look()
            except Killed:
                kills += 1
        lite.again()
        pictures, _ = lite.store.known_files()
        assert lite.files.pictures() == pictures
        assert lite.jobs() - {old} == young | {waiting}
        lite.pass_grace()
        for _ in range(2):
            lite.keep("90d").look()
            lite.pass_grace()
        lite.keep("90d").look()
        assert lite.jobs() == young | {waiting}
        lite.whole()
        if met[0] < number:
            break
        number += 1
    assert kills >= 15


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    ages=st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=12),
    days=st.none() | st.integers(1, 9),
    number=st.none() | st.integers(1, 9),
)
def test_exactly_what_is_beyond_the_limits_goes(
    tmp_path: Path, ages: list[tuple[int, bool]], days: int | None, number: int | None
) -> None:
    root = tmp_path / new_id()
    files, store = start(root)
    now = 1e9
    stays = []
    with store.engine.begin() as db:
        for place, (age, final) in enumerate(ages):
            db.execute(
                text(
                    "INSERT INTO jobs (id, status, client, created, finished, request, prompt,"
                    " pictures, cost, attempts, lease, warnings) VALUES"
                    " (:i, :s, '', 0, :f, '{}', '', 1, 1, 0, 0, '[]')"
                ),
                {
                    "i": f"{place:032x}",
                    "s": "succeeded" if final else "queued",
                    "f": now - age * DAY if final else None,
                },
            )
    done = sorted((age for age, final in ages if final))
    youngest_gone = [] if number is None else done[number:]
    limit = done[number - 1] if number is not None and youngest_gone else 10
    for place, (age, final) in enumerate(ages):
        if not final or (age <= limit and (days is None or age <= days)):
            stays.append(f"{place:032x}")
    kept = Retention(files, store, Keep(None if days is None else days * DAY, None, number))
    store.mark(kept._horizon(now), 1.0)
    store.expire(2.0)
    clear(files, store)
    assert sorted(job.id for job in store.list(limit=100)[0]) == stays
    store.close()


def test_under_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs come, are drawn and deleted at once; in the end the newest three are complete."""
    monkeypatch.setattr(module, "GRACE", 0.0)
    monkeypatch.setattr(module, "PAUSE", 0.01)
    with Inside(tmp_path, dtype="float32", rows=8) as server:
        kept = Retention(server.hub.files, server.hub.store, Keep(jobs=3))
        kept.start()
        try:
            made = [server.submit(**QUICK, image=png()) for _ in range(12)]
            wait_for(lambda: not server.ask("GET", "/api/jobs?status=queued").json())
            wait_for(lambda: not server.ask("GET", "/api/jobs?status=running").json())
            wait_for(lambda: kept.freed.jobs >= 9)
            wait_for(lambda: len(server.ask("GET", "/api/jobs").json()) == 3)
        finally:
            kept.stop()
        for job in server.ask("GET", "/api/jobs").json():
            assert job["id"] in made
            assert job["status"] == "succeeded"
            assert server.picture(job["id"])[:4] == b"\x89PNG"
        assert kept.freed.jobs == 9
        whole(tmp_path)
    assert not list((tmp_path / "quarantine").rglob("*.png"))


def test_a_command_line_without_sense_is_refused(tmp_path: Path) -> None:
    from safelight.cli import run

    assert run(["serve", "--keep", "90x", "--data-dir", os.fspath(tmp_path / "data")]) == 2
    assert not (tmp_path / "data").exists()
