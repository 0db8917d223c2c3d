"""Pictures and inputs in a store that is reached by a URL: an S3, and fsspec's in memory."""

from __future__ import annotations

import asyncio
import base64
import io
import tempfile
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bucket import SECRET, Bucket
from inside import Inside
from PIL import Image
from serving import Serving, wait_for
from sqlalchemy import text
from test_recovery import draw
from working import Working

import safelight
from safelight import SafelightError, cli
from safelight.errors import AwayError, StorageError
from safelight.server import retention
from safelight.server.backup import back_up, restore
from safelight.server.files import Files
from safelight.server.holder import Holder
from safelight.server.keep import Keep
from safelight.server.recovery import belongs, recover
from safelight.server.retention import Retention
from safelight.server.store import Store, new_id
from safelight.storage import checked, storage_at

pytestmark = pytest.mark.xdist_group("elsewhere")


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with pytest.MonkeyPatch.context() as patch:
        made = Bucket(patch)
        yield made
        made.leave()


@pytest.fixture(params=["memory", "s3"])
def place(request: pytest.FixtureRequest) -> str:
    """The URL of an empty storage."""
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/safelight"
    bucket: Bucket = request.getfixturevalue("bucket")
    return bucket.url()


class Begun:
    """A database and a storage, made ready by a server; `again` is its next start."""

    def __init__(self, folder: Path, place: str) -> None:
        folder.mkdir(exist_ok=True)
        self.place, self.url = place, f"sqlite:///{folder / 'jobs.sqlite3'}"
        self.folder, self.store = folder, Store(self.url)
        self.again()

    def again(self) -> Files:
        self.store.close()
        self.files, self.store = Files(self.place), Store(self.url)
        recover(self.files, self.store)
        return self.files

    def names(self) -> set[str]:
        """Return the names of all files; those in quarantine without the day."""
        storage, found = self.files.storage, set()
        for folder in ("pictures", "inputs", "thumbnails"):
            found |= {f"{folder}/{name}" for name in storage.names(folder)}
            for day in storage.folders("quarantine"):
                put = storage.names(f"quarantine/{day}/{folder}")
                found |= {f"quarantine/{folder}/{name}" for name in put}
        return found


@pytest.fixture
def begun(tmp_path: Path, place: str) -> Iterator[Begun]:
    made = Begun(tmp_path / "data", place)
    yield made
    made.store.close()


def test_what_is_kept_is_read_again(begun: Begun) -> None:
    files, picture_id, job_id = begun.files, new_id(), new_id()
    image = Image.effect_noise((300, 200), 50).convert("RGB")
    files.keep(image, picture_id, {"parameters": "a cat"})
    files.keep_input(job_id, "image", image)
    found, small = files.picture(picture_id), files.thumbnail(picture_id)
    assert found is not None
    assert small is not None
    assert found.path is None
    assert b"".join(found.parts()) == files.picture_bytes(picture_id)
    assert found.size == len(files.picture_bytes(picture_id) or b"")
    again = files.thumbnail(picture_id)
    assert (again and again.size) == small.size
    started = files.input(job_id, "image")
    assert started is not None
    assert started.tobytes() == image.tobytes()
    assert files.input(job_id, "mask") is None
    path = files.input_path(job_id, "image", begun.folder)
    assert path is not None
    with Image.open(path) as copy:
        assert copy.tobytes() == image.tobytes()
    everything = found.size + small.size + path.stat().st_size
    assert files.size_of(job_id, [picture_id]) == files.total_size() == everything
    assert files.pictures() == {picture_id}
    files.remove_pictures([picture_id, new_id()])
    files.remove_inputs(job_id)
    assert files.total_size() == 0
    assert files.picture(picture_id) is files.thumbnail(picture_id) is None
    for other in ("../folder.id", new_id(), f"{picture_id}/x"):
        assert files.picture(other) is None


def test_a_file_in_parts(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safelight.storage.CHUNK", 1000)
    storage, data = storage_at(place), bytes(range(256)) * 10
    storage.write("a/b", data)
    found = storage.find("a/b")
    assert found is not None
    assert [len(part) for part in found.parts()] == [1000, 1000, 560]
    assert b"".join(found.parts()) == data
    storage.remove(["a/b"])
    with pytest.raises(FileNotFoundError):
        list(found.parts())


def test_what_no_row_knows_goes_to_quarantine(begun: Begun) -> None:
    """It is deleted a month later; what a person put there stays."""
    ids = draw(begun.files, begun.store, 3)
    strays = {f"pictures/{new_id()}.png", f"inputs/{new_id()}-mask.png"}
    for name in (*strays, "pictures/of a person.txt", "inputs/mine/a.png"):
        begun.files.storage.write(name, b"x")
    old = (datetime.now(UTC) - timedelta(days=31)).date().isoformat()
    for day in (old, "of a person"):
        begun.files.storage.write(f"quarantine/{day}/pictures/a.png", b"x")
    begun.again()
    kept = {f"pictures/{picture}.png" for picture in ids}
    put = {f"quarantine/{name}" for name in strays} | {"quarantine/pictures/a.png"}
    assert begun.names() == {*kept, *put, "pictures/of a person.txt"}
    assert old not in begun.files.storage.folders("quarantine")
    assert begun.files.storage.read("inputs/mine/a.png") == b"x"


def test_a_storage_belongs_to_one_database(begun: Begun, tmp_path: Path) -> None:
    draw(begun.files, begun.store, 2)
    assert belongs(begun.files, begun.store)
    with pytest.raises(StorageError, match=r"knows none of the 2 pictures in \S+/pictures: name"):
        Begun(tmp_path / "other", begun.place)
    other = Begun(tmp_path / "another", f"{begun.place}-2")
    with pytest.raises(SafelightError, match="not the one that this database"):
        belongs(Files(begun.place), other.store)
    draw(other.files, other.store, 1)
    other.place = begun.place
    with pytest.raises(StorageError, match=r"another storage than \S+: give that one as --storage"):
        other.again()
    other.store.close()


def test_a_storage_that_was_emptied_takes_nothing(begun: Begun) -> None:
    begun.files.storage.remove(["folder.id"])
    with pytest.raises(StorageError, match="is not there"):
        begun.files.keep(Image.new("RGB", (8, 8)), new_id(), {})
    with pytest.raises(StorageError, match="is not there"):
        retention.clear(begun.files, begun.store)


def test_retention_by_size(begun: Begun) -> None:
    for _ in range(3):
        draw(begun.files, begun.store, 2)
    first = min(begun.store.list()[0], key=lambda job: job.created_at)
    size = begun.files.total_size()
    kept = Retention(begun.files, begun.store, Keep(size=size - 1))
    kept.look()
    assert kept.marked == 1
    assert begun.files.total_size() == size
    with begun.store.engine.begin() as db:
        db.execute(text("UPDATE jobs SET expires = 1 WHERE expires > 0"))
    kept.look()
    assert (kept.freed.jobs, kept.freed.pictures, kept.freed.size) == (1, 2, size // 3)
    left = {picture.id for job in begun.store.list()[0] for picture in job.pictures}
    assert begun.files.pictures() == left
    assert not left & {picture.id for picture in first.pictures}


@pytest.mark.parametrize("to", ["same", "folder"])
def test_a_backup_and_back(begun: Begun, tmp_path: Path, to: str) -> None:
    ids = draw(begun.files, begun.store, 3)
    job_id = new_id()
    begun.files.keep_input(job_id, "image", Image.new("RGB", (8, 8)))
    settings = {"prompt": "a cat", "count": 1, "image_sha256": "0"}
    begun.store.submit(job_id, settings, client="api", cost=1, bound=100)
    (begun.folder / "grids").mkdir()
    (begun.folder / "grids" / "page.html").write_text("a page")
    places = [tmp_path / "one", tmp_path / "two"]
    made = back_up(begun.folder, begun.url, places[0], storage=begun.place)
    assert (made.jobs, made.pictures, made.lost) == (2, 3, 0)
    made = back_up(begun.folder, begun.url, places[1], earlier=places[0], storage=begun.place)
    assert made.linked == 4
    before = begun.names()
    storage = f"{begun.place}-again" if to == "same" else None
    root = tmp_path / "restored"
    restore(places[1], root, storage=storage)
    again = Begun(root, storage or str(root))
    assert again.files.pictures() == ids
    assert again.names() == before
    assert (root / "grids" / "page.html").is_file()
    assert again.store.counts() == {"succeeded": 1, "queued": 1}
    again.store.close()
    if storage is None:
        return
    with pytest.raises(SafelightError, match="is not empty: a backup is restored to an empty st"):
        restore(places[1], tmp_path / "more", storage=storage)
    assert again.names() == before


def test_a_damaged_backup_leaves_nothing(begun: Begun, tmp_path: Path) -> None:
    """A restore that was cut off is not served, and does not block the next one."""
    ids = draw(begun.files, begun.store, 2)
    back_up(begun.folder, begun.url, tmp_path / "one", storage=begun.place)
    picture = tmp_path / "one" / "pictures" / f"{min(ids)}.png"
    data, to = picture.read_bytes(), f"{begun.place}-again"
    picture.write_bytes(data[:-1])
    with pytest.raises(StorageError, match="is damaged: restore another"):
        restore(tmp_path / "one", tmp_path / "restored", storage=to)
    storage = storage_at(to)
    assert not storage.names() | storage.names("pictures") | storage.names("inputs")
    picture.write_bytes(data)
    storage.write("restore.unfinished", b"")
    storage.write("pictures/half.png", b"")
    with pytest.raises(StorageError, match="half of a backup"):
        Begun(tmp_path / "half", to)
    restore(tmp_path / "one", tmp_path / "restored", storage=to)
    assert storage.names("pictures") == {f"{picture}.png" for picture in ids}


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (f"s3://key:{SECRET}@bucket/prefix", "without credentials"),
        ("memory://x", "ends with its process"),
        ("s3://", "as s3://bucket/prefix"),
        ("s3://bucket/a?b=c", "as s3://bucket/prefix"),
    ],
)
def test_urls_that_are_refused_in_a_line(given: str, why: str) -> None:
    with pytest.raises(SafelightError, match=why) as refused:
        checked(given)
    assert SECRET not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("command", ["serve", "worker", "backup", "restore"])
def test_each_command_takes_a_storage(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    """Each says what would be right if the storage is wrong."""
    monkeypatch.setattr("safelight.server.private.keep", lambda: None)
    given = {"serve": [], "worker": ["--queue", "postgresql://db/x"]}.get(command, ["here"])
    if command != "worker":
        given += ["--data-dir", str(tmp_path)]
    assert cli.run([command, *given, "--storage", f"s3://key:{SECRET}@bucket/x"]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: --storage must be a URL without credentials")
    assert SECRET not in told.err + told.out


def test_where_a_storage_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert checked("here/there") == str(tmp_path / "here" / "there")
    assert checked("s3://bucket/prefix/") == "s3://bucket/prefix"
    assert storage_at(f"file://{tmp_path}").local


@pytest.mark.parametrize("trouble", ["no bucket", "away"])
def test_a_store_that_cannot_be_used_is_one_line(
    bucket: Bucket, tmp_path: Path, trouble: str
) -> None:
    """The server does not start with it, and no bucket is made."""
    place = "s3://no-such-bucket/x" if trouble == "no bucket" else bucket.url()
    if trouble == "away":
        bucket.leave()
    with pytest.raises(AwayError, match=r"^the storage s3://\S+ cannot be used: [^\n]+$") as told:
        Begun(tmp_path / "data", place)
    assert "127.0.0.1" not in str(told.value)
    if trouble == "away":
        bucket.come_back()
    else:
        assert not bucket.fs.exists("no-such-bucket")
        place = bucket.url()
    Begun(tmp_path / "data", place).store.close()  # no other storage has this database yet


def test_a_worker_that_waits_for_another_machine_is_not_taken_for_hung() -> None:
    """It keeps beating. With folder and database on this machine, calls run in the same thread."""

    class Waiting(Holder):
        def __init__(self, place: str, shared: bool = False) -> None:
            self._files, self._threads = Files(place), ThreadPoolExecutor(1)
            self._store: Any = SimpleNamespace(shared=shared)
            self.beats, self.enough = 0, threading.Event()
            self._pulse: Any = SimpleNamespace(count=self._count)

        def _count(self) -> None:
            self.beats += 1
            if self.beats == 3:
                self.enough.set()

    elsewhere = Waiting("memory://x")
    assert elsewhere._stored(lambda: elsewhere.enough.wait(60))
    with pytest.raises(AwayError):
        elsewhere._stored(lambda: (_ for _ in ()).throw(AwayError("away")))
    on_postgresql = Waiting("/here", shared=True)
    assert on_postgresql._in_database(on_postgresql.enough.wait, timeout=60)
    for call in (Waiting("/here")._stored, Waiting("/here")._in_database):
        assert call(threading.get_ident) == threading.get_ident()


def test_a_silent_store_holds_up_no_submission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that asks for many pictures of it takes its own turns, not all threads."""
    go_on = threading.Event()
    url = f"memory://{uuid.uuid4().hex}/safelight"
    with Inside(tmp_path / "data", draws=False, storage=url) as server:
        monkeypatch.setattr(server.hub.files, "picture", lambda _: go_on.wait(60) and None)

        async def run() -> tuple[int, set[int]]:
            fetches = [server.asked("GET", f"/api/pictures/{new_id()}") for _ in range(48)]
            waiting = asyncio.gather(*fetches)
            await asyncio.sleep(0.2)
            try:
                async with asyncio.timeout(20):
                    made = await server.asked("POST", "/api/jobs", {"prompt": "a cat"})
            finally:
                go_on.set()
            return made.status, {answer.status for answer in await waiting}

        assert server.within(run()) == (202, {404})


@pytest.mark.parametrize("how", ["full", "nowhere"])
def test_a_temporary_folder_that_cannot_be_used_is_waited_for(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker waits after a StorageError; any other error would end it."""

    def write(file: Any) -> None:
        raise OSError(28, "No space left on device")

    if how == "nowhere":
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(StorageError, match="the folder for temporary files cannot be used: "):
        storage_at(f"memory://{uuid.uuid4().hex}").write_with("a", write)


QUICK: dict[str, Any] = {
    "prompt": "a cat",
    "steps": 2,
    "sampler": "euler",
    "width": 64,
    "height": 64,
}


def test_a_store_that_is_away_for_a_while_loses_nothing(bucket: Bucket, tmp_path: Path) -> None:
    """Requests get 503 and one line. A picture that cannot be written waits, as does its job."""
    place, image = bucket.url(), _png()
    with Inside(tmp_path / "data", dtype="float32", storage=place) as server:
        first = server.submit(**QUICK, image=image, strength=1.0)
        server.finished(first)
        picture = server.picture(first)
        path = f"/api/pictures/{server.job(first)['pictures'][0]['id']}"
        assert picture.startswith(b"\x89PNG")
        assert server.ask("GET", path).headers["content-length"] == str(len(picture))
        assert server.ask("GET", f"{path}/thumbnail").body.startswith(b"\x89PNG")
        assert server.ask("GET", f"{path}?width=64&height=64").status == 200
        bucket.leave()
        second = server.submit(**QUICK)
        wait_for(lambda: server.ask("GET", "/readyz").status == 503)
        answers = [
            server.ask("GET", path),
            server.ask("GET", f"{path}/thumbnail"),
            server.ask("DELETE", f"/api/jobs/{first}"),
            server.ask("POST", "/api/jobs", {**QUICK, "image": image}),
        ]
        assert [answer.status for answer in answers] == [503] * 4
        for answer in answers:
            told = answer.json()
            assert told["code"] == "storage_away"
            assert "cannot be used" in told["detail"]
            assert place not in told["detail"]
            assert "127.0.0.1" not in told["detail"]
            assert "\n" not in told["detail"]
        wait_for(lambda: server.hub._stuck is not None)
        assert server.job(second)["status"] == "running"
        bucket.come_back()
        assert server.finished(second)["status"] == "succeeded"
        assert server.job(second)["attempts"] == 1
        assert server.ask("GET", path).body == picture
        drawn = [server.job(one)["pictures"][0]["id"] for one in (first, second)]
        kept = {f"pictures/{one}.png" for one in drawn} | {f"thumbnails/{drawn[0]}.png"}
        assert bucket.names(place) == {*kept, f"inputs/{first}-image.png", "folder.id"}
        for one in (first, second):
            assert server.ask("DELETE", f"/api/jobs/{one}").status < 300
        assert bucket.names(place) == {"folder.id"}
        assert not [*(tmp_path / "data").rglob("*.png")]


@pytest.mark.soak
def test_a_server_and_a_worker_that_share_no_folder(
    bucket: Bucket, tmp_path: Path, postgres: str
) -> None:
    """Pictures are equal to the byte, and no line of a log has credentials."""
    import psycopg

    with psycopg.connect(postgres.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    place = bucket.url()
    arguments = ["--workers", "0", "--database", postgres, "--storage", place]
    with (
        Serving(tmp_path, *arguments) as server,
        Working(postgres, place, tmp_path / "worker.log") as worker,
    ):
        started = server.submit(seed=7, image=_png(), strength=0.9, **QUICK)
        job = server.finished(started)
        assert job["status"] == "succeeded"
        picture = server.client.get(f"/api/pictures/{job['pictures'][0]['id']}").content
        assert worker.stop() == 0
        assert server.client.delete(f"/api/jobs/{started}").status_code < 300
        assert bucket.names(place) == {"folder.id"}
        logs = server.log() + worker.log()
    assert SECRET not in logs
    (tmp_path / "kept.png").write_bytes(picture)
    how = {**QUICK, "image": Image.open(io.BytesIO(base64.b64decode(_png()))), "strength": 0.9}
    alone = safelight.load(dtype="float32").generate(seed=7, **how).images[0]
    with Image.open(tmp_path / "kept.png") as drawn:
        assert drawn.tobytes() == alone.tobytes()


def _png() -> str:
    """A picture to start from, in base64."""
    out = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()
