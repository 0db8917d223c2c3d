"""Workers that join a server's database from elsewhere."""

from __future__ import annotations

import asyncio
import shutil
import threading
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from inside import Inside
from PIL import Image
from serving import Serving, room_for_one, wait_for
from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError
from working import Working

import safelight
from safelight import SafelightError
from safelight.errors import StorageError
from safelight.server import claims, database, fleet, roster
from safelight.server.catalogue import Catalogue
from safelight.server.files import Files
from safelight.server.jobs import ModelInfo, Picture, WorkerInfo
from safelight.server.recovery import belongs, recover
from safelight.server.settings import WorkerSettings
from safelight.server.store import Store, new_id
from safelight.server.wire import PIECE, Wire
from safelight.weights.find import MODELS

pytestmark = pytest.mark.xdist_group("fleet")

MODEL = ModelInfo(name="m", width=64, height=64, ready=True)


def claimed(store: Store, worker: str) -> Any:
    settings = {"prompt": "a cat", "count": 2}
    store.submit(new_id(), settings, client="api", cost=1, bound=100)
    found = store.claim(worker)
    assert found is not None
    return found


def again(files: Files, store: Store, url: str) -> Store:
    """End the server as a kill does, and start it again."""
    store.close()
    store = Store(url)
    recover(files, store)
    return store


def test_a_server_that_starts_again_leaves_the_fleet_its_jobs(
    shared: tuple[Files, Store, str],
) -> None:
    """It also leaves pictures that the fleet is writing; jobs of other workers wait again."""
    files, store, url = shared
    member, own = new_id(), new_id()
    store.beat(member, "there", MODEL, 1)
    kept, lost = claimed(store, member), claimed(store, own)
    for each in (kept, lost):
        files.keep(Image.new("RGB", (8, 8)), each.picture_id(0), {})
    store = again(files, store, url)
    assert store.holds(kept.id, kept.token)
    assert not store.holds(lost.id, lost.token)
    assert files.pictures() == {kept.picture_id(0)}
    picture = Picture(id=kept.picture_id(0), index=0, seed=1, width=8, height=8, recipe={})
    store.add_picture(kept.id, kept.token, picture)
    store.close()


def test_a_fleet_keeps_its_jobs_while_the_database_is_away_with_the_server(
    shared: tuple[Files, Store, str],
) -> None:
    files, store, url = shared
    member = new_id()
    store.beat(member, "there", MODEL, 1)
    kept = claimed(store, member)
    _run(store, "UPDATE workers SET seen = seen - 3600")
    _run(store, "UPDATE jobs SET lease = lease - 3600")
    store = again(files, store, url)
    assert store.claim(new_id(), alone=True) is None
    assert store.holds(kept.id, kept.token)
    store.close()


def test_a_worker_of_another_version_takes_no_jobs(
    shared: tuple[Files, Store, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finishes those that it has."""
    files, store, url = shared
    member = new_id()
    mine = claimed(store, member)
    store.submit(new_id(), {"prompt": "a cat", "count": 1}, client="api", cost=1, bound=100)
    monkeypatch.setattr(roster, "VERSION", "9.9")
    server = Store(url)
    server.set_version()
    monkeypatch.undo()
    for known in (None, [mine.token]):
        with pytest.raises(StorageError, match=r"the server has Safelight 9\.9, and this worker"):
            store.claim(member, known=known)
    with pytest.raises(StorageError, match="install the server's version here"):
        store.beat(member, "there", MODEL, 1)
    store.finish(mine.id, mine.token, warnings=[])
    recover(files, store)
    assert store.claim(member) is not None
    server.close()


def test_the_roster_forgets_who_is_gone(
    shared: tuple[Files, Store, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files, store, url = shared
    member = new_id()
    for _ in range(2):
        store.beat(member, "there", MODEL, 4096)
    (found,) = store.fleet()
    assert (found.id, found.model, found.memory) == (member, MODEL, 4096)
    assert found.seen_at >= found.joined_at
    job = claimed(store, member)
    monkeypatch.setattr(roster, "GONE", -1.0)
    assert store.fleet() == []
    store.forget_gone()
    store = again(files, store, url)
    assert not store.holds(job.id, job.token)
    monkeypatch.undo()
    assert store.fleet() == []
    store.beat(member, "there", MODEL, None)
    store.leave(member)
    assert store.fleet() == []
    store.close()


def test_a_lease_that_ran_out_says_what_may_be_left(
    shared: tuple[Files, Store, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next worker cleans up pictures without a row that a lost machine left."""
    _, store, _ = shared
    monkeypatch.setattr(claims, "LEASE", -1.0)
    first = claimed(store, "a" * 32)
    picture = Picture(id=first.picture_id(0), index=0, seed=1, width=8, height=8, recipe={})
    store.add_picture(first.id, first.token, picture)
    second = store.claim("b" * 32, alone=True)
    assert second is not None
    assert second.done == {0}
    assert second.left == (first.picture_id(1),)


def test_a_worker_draws_several_models_and_declares_which(
    tmp_path: Path, shared: tuple[Files, Store, str]
) -> None:
    """One model is only on the worker's machine; jobs of models it may not draw wait."""
    _, store, url = shared
    store.close()
    library, others = tmp_path / "library", "embedded-unconditional"
    shutil.copytree(MODELS / "embedded-fast", library / "borrowed")
    how = {"steps": 2, "sampler": "euler", "prompt": "a cat"}
    room = ("--model-memory", room_for_one("embedded", "float32"))
    only = ("--models-dir", str(library), "--allow-models", "borrowed", *room)
    with Serving(tmp_path, "--workers", "0", "--database", url, "--allow-models", others) as server:
        waits = server.submit(model=others, unconditional=True, steps=2)
        assert server.client.post("/api/jobs", json=how | {"model": "borrowed"}).status_code == 422
        with Working(url, tmp_path / "data", tmp_path / "worker.log", *only):
            wait_for(lambda: server.client.get("/api/workers").json())
            (member,) = server.client.get("/api/workers").json()
            assert (member["model"]["name"], member["models"]) == (
                *("embedded", ["embedded", "borrowed"]),
            )
            wait_for(lambda: len(server.client.get("/api/models").json()) == 3)
            for name in ("borrowed", "embedded"):
                job = server.finished(server.submit(**how, model=name, width=64, height=64))
                assert (job["status"], job["model"]) == ("succeeded", name)
            # Its size is asked of the worker.
            body = how | {"model": "borrowed", "size": "64x64"}
            answer = server.client.post("/v1/images/generations", json=body)
            assert answer.status_code == 200, answer.text
        assert server.job(waits)["status"] == "queued"


def test_the_default_model_is_the_server_s_own_whoever_joins_first(tmp_path: Path) -> None:
    async def in_thread(call: Any, *given: Any) -> Any:
        return call(*given)

    url = f"sqlite:///{tmp_path / 'jobs.sqlite3'}"
    known = Catalogue(WorkerSettings("embedded", url, str(tmp_path)), lambda *_: None, in_thread)

    def default(*names: str) -> str:
        """Return the default model while workers with these models are there."""
        now = datetime.now(UTC)
        known.on_fleet(
            [
                WorkerInfo(id=n, model=ModelInfo(name=n), models=[n], joined_at=now, seen_at=now)
                for n in names
            ]
        )
        return asyncio.run(known.find(None))

    assert default() == "embedded"
    assert default("sdxl", "embedded-fast") == "sdxl"
    assert default("sdxl", "embedded-fast", "embedded") == "embedded"
    assert default("sdxl") == "embedded"  # jobs wait until its worker is back
    assert [one.name for one in asyncio.run(known.all())][:2] == ["embedded", "sdxl"]
    assert known.info.ready


@pytest.mark.parametrize("change", ["unmarked", "another", "newer", "older", "none"])
def test_who_may_join(shared: tuple[Files, Store, str], tmp_path: Path, change: str) -> None:
    """The storage must belong to the database, and a server must have made both ready."""
    files, store, _ = shared
    expected: Any = True
    if change == "another":
        files = Files(tmp_path / "other")
        files.root.mkdir()
        files.set_mark(new_id())
        expected = "the storage is not the one"
    elif change == "newer":
        _run(store, "UPDATE alembic_version SET version_num = '9999'")
        expected = "from a newer Safelight"
    elif change == "older":
        _run(store, "UPDATE alembic_version SET version_num = '0001'")
        expected = False
    elif change == "unmarked":
        _run(store, "DELETE FROM facts")
        expected = False
    if isinstance(expected, bool):
        assert belongs(files, store) is expected
        return
    with pytest.raises(SafelightError, match=expected) as refused:
        belongs(files, store)
    assert refused.value.code != "storage"


def _run(store: Store, statement: str) -> None:
    with store.engine.begin() as db:
        db.exec_driver_sql(statement)


def test_machines_go_by_the_clock_of_the_database(
    shared: tuple[Files, Store, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine whose clock is an hour ahead does not treat the leases of others as expired.

    Nor does one whose clock is set while it runs.
    """
    _, store, url = shared
    mine = claimed(store, "a" * 32)
    import time

    real = time.time
    monkeypatch.setattr("time.time", lambda: real() + 3600)
    other = Store(url)
    assert other.claim("b" * 32, alone=True) is None
    for hours in (0, 2):
        monkeypatch.setattr("time.time", lambda hours=hours: real() + hours * 3600)
        assert abs(other.now() - real()) < 5
        assert other.claim("b" * 32, alone=True) is None
    assert store.holds(mine.id, mine.token)
    other.close()


def test_what_a_lost_machine_leaves_holds_up_nobody_for_long(
    shared: tuple[Files, Store, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL ends its connections and transactions, and nobody waits for a lock for ever."""
    monkeypatch.setattr(database, "PATIENCE", 0.2)
    monkeypatch.setattr(database, "ABANDONED", 1)
    _, _, url = shared
    lost, store = Store(url), Store(url)
    lock = select(func.pg_advisory_xact_lock(database.LOCK))
    with store.engine.connect() as db:
        for name, value in (("idle", 5), ("interval", 2), ("count", 3)):
            assert db.scalar(text(f"SHOW tcp_keepalives_{name}")) in (str(value), f"{value}s")
        db.rollback()
        assert db.scalar(text("SHOW lock_timeout")) == "200ms"  # it survives a rollback
    with lost.engine.connect() as left:
        left.execute(lock)
        with pytest.raises(StorageError, match="lock timeout"):
            claimed(store, "a" * 32)
        store.migrate()  # waits, as a migration of a large table takes its time
        assert claimed(store, "a" * 32)
        with pytest.raises(DBAPIError):
            left.execute(lock)
    lost.close()
    store.close()


def test_a_server_takes_its_lock_again(shared: tuple[Files, Store, str]) -> None:
    """PostgreSQL ends the connection that has it. Meanwhile another server may come and go."""
    _, store, url = shared
    other = Store(url)
    assert store.held()
    assert not other.held()
    for comes in (False, True):
        with other.engine.begin() as db:
            locks = "SELECT pid FROM pg_locks WHERE locktype = 'advisory'"
            db.execute(text(f"SELECT pg_terminate_backend(({locks}), 5000)"))
        with pytest.raises(StorageError):
            store.held()
        assert (other if comes else store).held()
    assert not store.held()
    other.close()
    wait_for(store.held)


def test_a_server_ends_once_another_has_its_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "LOOK", 0.05)
    monkeypatch.setattr(fleet, "GIVE_UP", 0.4)
    ended = threading.Event()
    with Inside(tmp_path / "data", draws=False) as server:
        server.hub.on_refusal = ended.set
        has = [True]
        monkeypatch.setattr(server.hub.store, "held", lambda: has[0])
        server.submit(prompt="a cat")
        own = server.hub.store.claim("b" * 32)
        assert own is not None
        looking = asyncio.run_coroutine_threadsafe(server.hub.fleet._keep_looking(), server._loop)
        assert not ended.wait(1)
        has[0] = False
        wait_for(lambda: "another server" in server.ask("GET", "/readyz").json()["detail"])
        assert ended.wait(10)
        assert "another server" in str(server.hub.refusal)
        looking.result(10)
    store = Store(f"sqlite:///{tmp_path / 'data' / 'jobs.sqlite3'}")
    assert store.holds(own.id, own.token)  # it may be the other server's
    store.close()


def test_a_pause_or_an_absent_database_ends_no_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It ends if another session has the lock for a while, without a break."""
    monkeypatch.setattr(fleet, "LOOK", 0.05)
    monkeypatch.setattr(fleet, "GIVE_UP", 0.02)  # less than a pause
    seen: list[str | None] = []
    answers = iter([True, False, StorageError("away"), False, True, False, False])

    def held() -> bool:
        found = next(answers)
        if isinstance(found, StorageError):
            raise found
        return found

    def roster() -> list[Any]:
        seen.append(one.trouble)
        return []

    store: Any = SimpleNamespace(shared=False, held=held, fleet=roster)
    lost = threading.Event()
    how: Any = {"on_message": print, "on_change": lambda: None, "on_lost": lost.set}
    one = fleet.Fleet(store, "", **how)

    async def look() -> None:
        one.start()
        await one._keep_looking()

    asyncio.run(look())
    taken = str(one.refusal)
    assert seen == [None, None, taken, None, taken, None, taken]
    assert lost.is_set()


def test_news_long_and_short_arrive_in_order(postgres: str) -> None:
    """Only the last progress arrives; messages arrive in the order in which they were sent."""
    heard: list[Any] = []
    there, done = threading.Barrier(3), threading.Event()

    def hear(kind: str, rest: list[Any]) -> None:
        heard.append((kind, *rest))
        if kind == "end":
            done.set()

    ends = {"hears": "one", "tells": "two"}, {"hears": "two", "tells": "one"}
    a, b = (Wire(postgres, on_message=hear, on_open=there.wait, **names) for names in ends)
    for end in (a, b):
        end.start()
    there.wait(30)
    long = "é" * 3 * PIECE
    for step in range(50):
        a.send("progress", "job", step)
    a.send("preview", "job", long)
    a.send("cancel", "x")
    a.send("end", "job")
    assert done.wait(30)
    a.close()
    b.close()
    last = heard[-4:]
    assert last == [("progress", "job", 49), ("preview", "job", long), ("cancel", "x"), heard[-1]]
    assert len(heard) < 20
    b.send("end", "nobody")  # closed: lost in peace


def test_a_fleet_draws_and_drains(tmp_path: Path, shared: tuple[Files, Store, str]) -> None:
    """A server without a worker draws with one that joins, and lets it go.

    Pictures are equal to the byte; progress, previews and cancelling work. Told to end, the worker
    lets its job wait and leaves.
    """
    _, store, url = shared
    store.close()
    how = {"steps": 2, "sampler": "euler", "prompt": "a cat", "width": 64, "height": 64}
    with Serving(tmp_path, "--workers", "0", "--database", url) as server:
        answer = server.client.get("/readyz")
        assert answer.status_code == 503
        first = server.submit(seed=7, **how)
        with Working(url, tmp_path / "data", tmp_path / "worker.log") as worker:
            job = server.finished(first)
            assert job["status"] == "succeeded"
            wait_for(lambda: server.client.get("/readyz").status_code == 200)
            (member,) = server.client.get("/api/workers").json()
            assert member["model"]["name"] == "embedded"
            assert member["memory"] > 100
            assert "place" not in member
            long = server.submit(**how | {"steps": 1000, "count": 4})
            with server.client.stream("GET", f"/api/jobs/{long}/events") as events:
                wanted = {"event: progress", "event: preview"}
                for line in events.iter_lines():
                    wanted.discard(line)
                    if not wanted:
                        break
            server.client.delete(f"/api/jobs/{long}")
            last = server.submit(**how | {"steps": 1000, "count": 4})
            wait_for(lambda: server.job(last)["status"] == "running")
            assert worker.stop() == 0
        assert server.job(last)["status"] == "queued"
        assert server.job(last)["attempts"] == 0
        wait_for(lambda: server.client.get("/api/workers").json() == [])
        picture = server.client.get(f"/api/pictures/{job['pictures'][0]['id']}").content
    kept = tmp_path / "kept.png"
    kept.write_bytes(picture)
    alone = safelight.load(dtype="float32").generate(seed=7, **how).images[0]
    with Image.open(kept) as drawn:
        assert drawn.tobytes() == alone.tobytes()
