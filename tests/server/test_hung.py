"""A worker that is stopped, hangs or is killed; a database that goes away: no job fails."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from inside import Inside
from serving import Serving, wait_for
from sqlalchemy.exc import DatabaseError, OperationalError, ProgrammingError

from safelight.server import pulse as pulses
from safelight.server.database import open_engine
from safelight.server.jobs import StorageError
from safelight.server.pulse import Pulse
from safelight.server.store import Store, new_id
from safelight.server.supervisor import SILENCE

pytestmark = pytest.mark.xdist_group("hung")
QUICK = {"prompt": "a cat", "steps": 2, "sampler": "euler"}
LONG = {"prompt": "a cat", "steps": 80, "sampler": "euler", "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with Serving(tmp_path_factory.mktemp("hung"), "--exact", "--dtype", "float32") as running:
        running.ready()
        yield running


def test_a_stopped_worker_is_replaced(server: Serving) -> None:
    """By SIGSTOP. The server says that it is not ready, and the job is drawn."""
    job = server.submit(**LONG)
    wait_for(lambda: server.job(job)["progress"]["step"] > 0)
    stopped = server.worker()
    os.kill(stopped, signal.SIGSTOP)
    began = time.monotonic()
    wait_for(lambda: "safelight_ready 0.0" in server.client.get("/metrics").text, 15)
    assert server.client.get("/readyz").status_code == 503
    assert server.client.get("/healthz").status_code == 200
    wait_for(lambda: server.worker() not in (0, stopped), 30)
    assert time.monotonic() - began < 20  # SILENCE, and another process on a busy machine
    assert server.finished(job)["status"] == "succeeded"
    assert server.job(job)["attempts"] == 1


def test_kills_from_outside_are_no_fault_of_the_job(server: Serving) -> None:
    """Four of them; what is left of promise 5 is in test_store."""
    job = server.submit(**LONG)
    for number in range(4):
        wait_for(lambda: server.job(job)["progress"]["step"] > 0)
        killed = server.worker()
        os.kill(killed, signal.SIGTERM if number % 2 else signal.SIGKILL)
        wait_for(lambda killed=killed: server.worker() not in (0, killed))
        wait_for(lambda: server.job(job)["progress"]["step"] == 0 or server.job(job)["pictures"])
    assert server.finished(job)["status"] == "succeeded"


def test_the_database_away_for_a_while(server: Serving) -> None:
    """Moved, locked, exchanged for a text, moved again while the worker is killed."""
    file = server.data / "jobs.sqlite3"
    away = server.data.parent / "away.sqlite3"
    jobs = [server.submit(**LONG), server.submit(**QUICK, seed=1)]
    wait_for(lambda: server.job(jobs[0])["progress"]["step"] > 0)

    file.rename(away)
    assert server.client.post("/api/jobs", json=QUICK).status_code == 507
    assert server.client.get("/readyz").status_code == 503
    assert "safelight_ready 0.0" in server.client.get("/metrics").text
    assert server.client.get("/healthz").status_code == 200
    assert not file.exists()
    away.rename(file)

    with closing(sqlite3.connect(file, isolation_level=None)) as lock:
        lock.execute("BEGIN EXCLUSIVE")
        assert server.client.post("/api/jobs", json=QUICK).status_code == 507
        time.sleep(3)
    jobs.append(server.submit(**LONG))

    shutil.copy(file, away)
    good = away.read_bytes()
    file.rename(server.data.parent / "old.sqlite3")
    file.write_bytes(b"this is a text\n" * 10_000)
    os.kill(server.worker(), signal.SIGKILL)
    answer = server.client.post("/api/jobs", json=QUICK)
    assert answer.status_code == 507
    assert "\n" not in answer.json()["detail"]
    time.sleep(2)
    file.unlink()
    (server.data.parent / "old.sqlite3").rename(file)
    assert good
    for job in jobs:
        assert server.finished(job)["status"] == "succeeded", server.job(job)
    assert server.client.get("/readyz").status_code == 200
    assert "Traceback" not in server.log()


def test_the_data_folder_away(server: Serving) -> None:
    """As that of a disk that came loose: what starts from a picture waits for it."""
    from test_storage import png

    pictures = [server.data / name for name in ("pictures", "inputs", "folder.id")]
    running = server.submit(**LONG)
    wait_for(lambda: server.job(running)["progress"]["step"] > 0)
    waiting = server.submit(**LONG, image=png())
    for path in pictures:
        path.rename(server.data.parent / path.name)
    assert server.client.post("/api/jobs", json=QUICK | {"image": png()}).status_code == 507
    assert server.client.get("/readyz").status_code == 503
    time.sleep(2)
    assert not (server.data / "pictures").exists()
    for path in pictures:
        (server.data.parent / path.name).rename(path)
    for job in (running, waiting):
        assert server.finished(job)["status"] == "succeeded", server.job(job)


# --- the pulse -----------------------------------------------------------------------------------


def beats(work: Any, seconds: float) -> int:
    """Return how many beats a process has in which the main thread works for so long."""
    ours, theirs = Pipe(duplex=False)
    child = os.fork()
    if not child:
        pulse = Pulse(theirs)
        pulse._patient = 0
        pulse.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            work(pulse)
        os._exit(0)
    theirs.close()
    os.waitpid(child, 0)
    heard = 0
    while True:
        try:
            ours.recv_bytes()
        except EOFError:
            return heard
        heard += 1


def nothing(_: Pulse) -> None:
    """An endless loop in Python."""


def counts(pulse: Pulse) -> None:
    """Steps."""
    pulse.count()
    time.sleep(0.1)


def sleeps(_: Pulse) -> None:
    """A write that blocks."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])  # else it would wake up in Python
    time.sleep(10)


def multiplies(_: Pulse) -> None:
    """A long call of native code, which does not look at signals."""
    sum(range(400_000_000))


@pytest.mark.parametrize(
    ("work", "most", "least"), [(nothing, 1, 0), (counts, 99, 2), (sleeps, 1, 0)]
)
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_pulse_tells_work_from_none(work: Any, most: int, least: int) -> None:
    assert least <= beats(work, 5) <= most


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_long_call_of_native_code_is_work() -> None:
    a = torch.zeros(1500, 1500)

    def multiplies(_: Pulse) -> None:
        a.matrix_power(1 << 60)

    assert beats(multiplies, 5) >= 2


def test_silence_is_short_enough() -> None:
    """SILENCE, the second that is counted last, and a second to start another process."""
    assert SILENCE + 2 * pulses.EVERY <= 15


# --- the database --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OperationalError("SELECT 1", {"prompt": "a secret"}, sqlite3.OperationalError("locked")),
        DatabaseError("SELECT 1", {"prompt": "a secret"}, sqlite3.DatabaseError("malformed")),
        ProgrammingError("SELECT 1", {"p": "a secret"}, Exception("column\nDETAIL: a secret")),
        RuntimeError("anything"),
        KeyError(),
    ],
)
def test_no_error_ends_the_thread_that_keeps_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    with Inside(tmp_path / "data", draws=False) as server:
        calls: list[str] = []

        def put_back(worker: str, killed: bool) -> None:
            calls.append(worker)
            if len(calls) == 1:
                raise error

        monkeypatch.setattr(server.hub.supervisor, "_put_back", put_back)
        server.hub.supervisor.release("gone")
        assert calls == ["gone", "gone"]


def test_errors_of_the_database_are_one_line_without_values(database: str) -> None:
    engine = open_engine(database)
    assert engine.hide_parameters
    engine.dispose()
    store = Store(database)  # without tables
    with pytest.raises(StorageError) as told:
        store.submit(new_id(), {"prompt": "a secret", "count": 1}, client="a", cost=1, bound=9)
    assert "secret" not in str(told.value)
    assert "\n" not in str(told.value)
    store.close()


def test_postgresql_restarted(tmp_path: Path, postgres: str) -> None:
    """Its connections are cut, again and again, under jobs that are drawn: none fails."""
    import psycopg

    plain = postgres.replace("+psycopg", "")
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    with Serving(tmp_path, "--exact", "--database", postgres) as server:
        server.ready()
        jobs = [server.submit(**QUICK, seed=i, count=2) for i in range(12)]
        ended = threading.Event()

        def cut() -> None:
            with psycopg.connect(plain, autocommit=True) as connection:
                while not ended.wait(0.2):
                    connection.execute(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                        "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
                    )

        thread = threading.Thread(target=cut)
        thread.start()
        time.sleep(5)
        ended.set()
        thread.join()
        for job in jobs:
            assert server.finished(job)["status"] == "succeeded", server.job(job)
