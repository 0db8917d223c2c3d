"""A disk that is full or fails, at each write in turn.

No file is left half written, and nothing blocks what comes after.
"""

from __future__ import annotations

import base64
import errno
import io
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from inside import Inside, size
from PIL import Image
from serving import Serving, wait_for
from sqlalchemy.exc import OperationalError

from safelight import picture
from safelight.errors import StorageError
from safelight.server.database import Database
from safelight.server.store import Store

pytestmark = pytest.mark.xdist_group("storage")  # one server for them all
QUICK = {"prompt": "a cat", "steps": 2, "sampler": "euler", "width": 64, "height": 64}
FILE = ("write", "fsync", "rename", "sync folder")
SITES = [
    *(f"keep_input: {part}" for part in FILE),
    *(f"submit: {part}" for part in ("begin", "commit")),
    *(f"claim: {part}" for part in ("begin", "commit")),
    *(f"keep: {part}" for part in FILE),
    *(f"add_picture: {part}" for part in ("begin", "commit")),
    *(f"finish: {part}" for part in ("begin", "commit")),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    with Inside(tmp_path_factory.mktemp("storage"), dtype="float32", rows=8) as running:
        yield running


def png() -> str:
    out = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


class Fault:
    """Raises once, at one site: a function of ours, and the number of its write."""

    def __init__(self, patch: pytest.MonkeyPatch, site: str, code: int) -> None:
        self.function, self.part = site.split(": ")
        self.code, self.met = code, False
        real_bytes, real_sync, real_link = picture._write, os.fsync, Path.hardlink_to
        real_rename = Path.replace
        real_write: Any = Database._write

        def write_bytes(file: Any, data: bytes) -> None:
            if self.here("write"):
                file.write(data[: len(data) // 2])
                self.strike()
            real_bytes(file, data)

        def fsync(descriptor: int) -> None:
            folder = Path(f"/proc/self/fd/{descriptor}").resolve().is_dir()
            if self.here("sync folder" if folder else "fsync"):
                self.strike()
            real_sync(descriptor)

        def link(path: Path, to: Path) -> None:
            if self.here("rename"):
                self.met = False  # what comes after it, where there are no links, fails as well
                raise OSError(code, os.strerror(code))
            real_link(path, to)

        def rename(path: Path, to: Path) -> Path:
            if self.here("rename"):
                self.strike()
            return real_rename(path, to)

        @contextmanager
        def write(store: Database) -> Iterator[Any]:
            with real_write(store) as db:
                if self.here("begin"):
                    self.strike_database()
                yield db
                if self.here("commit"):
                    self.strike_database()

        patch.setattr(picture, "_write", write_bytes)
        patch.setattr(os, "fsync", fsync)
        patch.setattr(Path, "hardlink_to", link)
        if self.part == "rename":
            patch.setattr(Path, "replace", rename)
        patch.setattr(Database, "_write", write)

    def here(self, part: str) -> bool:
        if self.met or part != self.part:
            return False
        frame: Any = sys._getframe(1)
        while frame is not None and frame.f_code.co_name != self.function:
            frame = frame.f_back
        return frame is not None

    def strike(self) -> None:
        self.met = True
        raise OSError(self.code, os.strerror(self.code))

    def strike_database(self) -> None:
        self.met = True
        said = "database or disk is full" if self.code == errno.ENOSPC else "disk I/O error"
        raise OperationalError("", None, sqlite3.OperationalError(said))


@pytest.mark.parametrize("site", SITES)
def test_each_write_in_turn(server: Inside, monkeypatch: pytest.MonkeyPatch, site: str) -> None:
    codes = (errno.ENOSPC, errno.EIO)
    first = SITES.index(site) % 2
    for code in codes[first : first + size(1, 2)] + codes[: size(0, first)]:
        with monkeypatch.context() as patch:
            fault = Fault(patch, site, code)
            before = {job["id"] for job in server.ask("GET", "/api/jobs?limit=200").json()}
            answer = server.ask("POST", "/api/jobs", QUICK | {"image": png()})
            if fault.function in ("keep_input", "submit"):
                assert answer.status == 507
                assert "\n" not in answer.json()["detail"]
                jobs = {job["id"] for job in server.ask("GET", "/api/jobs?limit=200").json()}
                assert jobs == before
            else:
                job = server.finished(answer.json()["id"], 20)
                assert job["status"] == "succeeded"  # it waited
                assert len(job["pictures"]) == 1
            assert fault.met
        whole(server.data)
        assert server.finished(server.submit(**QUICK, image=png()))["status"] == "succeeded"


def whole(data: Path) -> None:
    """Check that files match rows and can be read to the end."""
    with sqlite3.connect(data / "jobs.sqlite3") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        rows = {row[0] for row in database.execute("SELECT id FROM pictures")}
        jobs = {row[0] for row in database.execute("SELECT id FROM jobs")}
    database.close()
    assert {path.name for path in (data / "pictures").iterdir()} == {f"{row}.png" for row in rows}
    assert {path.name.split("-")[0] for path in (data / "inputs").iterdir()} <= jobs
    for folder in ("pictures", "inputs", "thumbnails"):  # not quarantine: inputs of no job
        for path in (data / folder).glob("*.png"):
            with Image.open(path) as image:
                image.load()


def test_a_thumbnail_that_cannot_be_kept(server: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    job = server.finished(server.submit(**QUICK))
    place = f"/api/pictures/{job['pictures'][0]['id']}/thumbnail"
    with monkeypatch.context() as patch:
        Fault(patch, "thumbnail: fsync", errno.ENOSPC)
        assert server.ask("GET", place).status == 507
    assert server.ask("GET", place).status == 200


def test_jobs_of_a_dead_worker_are_put_back_when_the_database_takes_it_again(
    server: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    real: Any = Store.release

    def release(store: Store, worker: str | None = None, **how: Any) -> Any:
        calls.append(str(worker))
        if len(calls) == 1:
            raise server_is_full
        return real(store, worker, **how)

    server_is_full = StorageError("full")
    monkeypatch.setattr(Store, "release", release)
    server.hub.supervisor.release("gone")
    assert calls == ["gone", "gone"]


def test_an_input_that_was_away_holds_up_no_suspect_job_and_none_after_it(
    server: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A suspect job is drawn alone. It is put back because its input cannot be read."""
    worker, read = server.worker, list[str]()
    assert worker is not None
    real_claim: Any = Store.claim
    real_input: Any = worker._files.input

    def claim(*given: Any, **how: Any) -> Any:
        found = real_claim(*given, **how)
        return found and replace(found, suspect=True)

    def away_once(job_id: str, name: str) -> Any:
        read.append(job_id)
        if len(read) == 1:
            raise StorageError("the storage is away")
        return real_input(job_id, name)

    monkeypatch.setattr(Store, "claim", claim)
    monkeypatch.setattr(worker._files, "input", away_once)
    jobs = [server.submit(**QUICK, image=png()), server.submit(**QUICK)]
    assert [server.finished(job, 20)["status"] for job in jobs] == ["succeeded"] * 2
    assert read == [jobs[0]] * 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)], capture_output=True
    )
    if done.returncode:
        pytest.skip("a file system of one's own can be mounted by root alone")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_a_full_disk_end_to_end(small_disk: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    serving = Serving(small_disk, log=tmp_path_factory.mktemp("log") / "server.log")
    with serving:
        serving.ready()
        assert serving.finished(serving.submit(**QUICK))["status"] == "succeeded"
        running = serving.submit(prompt="a cat", steps=40, sampler="euler")
        wait_for(lambda: serving.job(running)["progress"]["step"] > 0)
        filler = small_disk / "filler"
        fill(filler)
        answer = serving.client.post("/api/jobs", json=QUICK | {"image": png()})
        assert answer.status_code == 507, answer.text
        assert serving.client.get("/healthz").status_code == 200
        wait_for(lambda: serving.job(running)["progress"]["step"] in (0, 40))
        filler.unlink()
        assert serving.finished(running, 30)["status"] == "succeeded"
        assert serving.finished(serving.submit(**QUICK, image=png()))["status"] == "succeeded"
        whole(serving.data)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for piece in (65536, 4096, 512):
            try:
                while True:
                    file.write(b"x" * piece)
            except OSError:
                pass
