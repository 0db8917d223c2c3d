"""A worker that is stopped, hangs or is killed; a database that goes away: no job fails."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx2 as httpx
import pytest
import torch
import uvicorn
from inside import SOAK, Inside, figure, size
from postgresql import Postgres
from serving import Serving, wait_for
from sqlalchemy.exc import DatabaseError, OperationalError, ProgrammingError

from safelight import progress
from safelight.errors import StorageError
from safelight.server import claims, holder, supervisor, threads
from safelight.server import pulse as pulses
from safelight.server.database import open_engine
from safelight.server.process import Child
from safelight.server.pulse import Pulse
from safelight.server.run import Server
from safelight.server.settings import WorkerSettings
from safelight.server.station import Station
from safelight.server.store import Store, new_id

pytestmark = pytest.mark.xdist_group("hung")
SMALL = {"prompt": "a cat", "sampler": "euler", "width": 64, "height": 64}
QUICK = {**SMALL, "steps": 2}
LONG = {**SMALL, "steps": 40, "guidance_scale": 1.0}
GROUPS = next(
    (path for path in map(Path, ("/sys/fs/cgroup/memory", "/sys/fs/cgroup")) if path.is_dir()),
    Path("/nowhere"),
)
"""The memory groups of Linux: of the first version, or of the second."""
LIMITS = ("memory.limit_in_bytes", "memory.max")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with Serving(tmp_path_factory.mktemp("hung"), "--exact", "--dtype", "float32") as running:
        running.ready()
        yield running


def test_a_stopped_worker_is_replaced(server: Serving) -> None:
    """SIGSTOP stops it. The server says that it is not ready, and the job is drawn."""
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


def test_linux_ends_the_worker_first_where_memory_runs_out(server: Serving) -> None:
    worker, own = (
        int(Path(f"/proc/{pid}/oom_score_adj").read_text())
        for pid in (server.worker(), server.process.pid)
    )
    assert worker >= max(own, 500)


@pytest.mark.soak
def test_a_worker_that_linux_ends_for_want_of_memory_is_replaced(
    server: Serving, small: Callable[[int, int], None]
) -> None:
    """The worker is in a process group that allows little more memory than it has."""
    for _ in range(3):
        server.ready()
        ended = server.worker()
        small(ended, 60 << 20)
        job = server.submit(prompt="a cat", steps=2, width=512, height=512, sampler="euler")
        wait_for(lambda ended=ended: server.worker() != ended, 60)
        began = time.monotonic()
        wait_for(lambda ended=ended: server.worker() not in (0, ended), 60)
        wait_for(lambda: "safelight_ready 1.0" in server.client.get("/metrics").text)
        took = time.monotonic() - began
        figure(f"24: a worker ended by Linux for want of memory: another draws after {took:.1f} s")
        assert took < 15
        found = server.finished(job, 120)
        assert (found["status"], found["attempts"]) == ("succeeded", 2)  # its own fault
        assert "SIGKILL" in server.log()


@pytest.fixture
def small() -> Iterator[Callable[[int, int], None]]:
    """Put a process into a group that allows it `more` bytes beyond what it has."""
    if not os.access(GROUPS, os.W_OK):
        pytest.skip("no group of processes with less memory can be made here")
    group = GROUPS / f"safelight-{os.getpid()}"
    group.mkdir()
    limit = next(group / n for n in LIMITS if (group / n).exists())

    def limited(pid: int, more: int) -> None:
        # Memory that it has stays counted in its old group; this group counts what comes from now
        # on.
        limit.write_text(str(more))
        (group / "cgroup.procs").write_text(str(pid))

    yield limited
    group.rmdir()


def test_kills_from_outside_are_no_fault_of_the_job(server: Serving) -> None:
    """The suite kills twice, by two signals; test_store has the rest of promise 5."""
    job = server.submit(**LONG)
    for number in range(size(2, 4)):
        wait_for(lambda: server.job(job)["progress"]["step"] > 0)
        killed = server.worker()
        os.kill(killed, signal.SIGTERM if number % 2 else signal.SIGKILL)
        wait_for(lambda killed=killed: server.worker() not in (0, killed))
        wait_for(lambda: server.job(job)["progress"]["step"] == 0 or server.job(job)["pictures"])
    assert server.finished(job)["status"] == "succeeded"


@pytest.mark.soak  # the suite has those of each database under load
def test_the_database_away_for_a_while(server: Serving) -> None:
    """It is moved, locked, replaced by a text, and moved again while the worker is killed."""
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
        time.sleep(size(1, 3))
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
    """It is away like a disk that came loose: a job with a picture to start from waits for it."""
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


# --- workers that hang ---------------------------------------------------------------------------

SILENCE = size(3, 12)
HANGS = ["finish loops", "advance loops", "finish waits", "advance waits"]
HANGS += ["finish computes", "advance computes"]


@pytest.fixture(scope="module")
def hanging(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Serving, Path]]:
    folder = tmp_path_factory.mktemp("hanging")
    hang = folder / "hang"
    with Serving(folder, "--dtype", "float32", silence=size(SILENCE, 0), hang=hang) as running:
        running.ready()
        yield running, hang


@pytest.mark.parametrize("how", HANGS[: size(1, len(HANGS))])
def test_a_hung_worker_is_replaced(hanging: tuple[Serving, Path], how: str) -> None:
    """It hangs in the thread that steps, or in the one that decodes while the other goes on."""
    server, hang = hanging
    beside = server.submit(**LONG)
    wait_for(lambda: server.job(beside)["progress"]["step"] > 0)
    hung = server.worker()
    hang.write_text(how)
    job = server.submit(**QUICK)
    wait_for(lambda: not hang.exists())
    began = time.monotonic()
    wait_for(lambda: server.worker() not in (0, hung), 3 * SILENCE + 30)
    seconds = time.monotonic() - began
    for one in (job, beside):
        assert server.finished(one)["status"] == "succeeded", server.job(one)
    figure(f"24: {how}: another worker after {seconds:.1f} s")
    if SOAK:
        assert seconds < 15


@pytest.mark.soak
def test_a_worker_without_memory_costs_no_other_job(hanging: tuple[Serving, Path]) -> None:
    """It gets no more memory: what cannot be drawn fails, and the next job is drawn."""
    import resource

    server, _ = hanging
    waiting = [server.submit(**LONG), server.submit(**QUICK)]
    wait_for(lambda: server.job(waiting[0])["progress"]["step"] > 0)
    worker = server.worker()
    pages = int(Path(f"/proc/{worker}/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (64 << 20)
    resource.prlimit(worker, resource.RLIMIT_AS, (limit, limit))
    large = server.submit(**QUICK, width=2048, height=2048)
    began = time.monotonic()
    ended = server.finished(large)
    for job in (*waiting, server.submit(**QUICK)):
        assert server.finished(job)["status"] == "succeeded", server.job(job)
    figure(
        f"8: a worker without memory: the large job {ended['status']} ({ended['error']}), the "
        f"others succeeded; {'the same' if server.worker() == worker else 'another'} worker, "
        f"{time.monotonic() - began:.1f} s"
    )


# --- a database that is away under load ----------------------------------------------------------

AWAY = size(3, 60)


class Load:
    """Clients that submit jobs all the time. accepted: the ids of accepted jobs."""

    def __init__(self, server: Serving) -> None:
        self._server, self.accepted, self.refused = server, list[str](), 0
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._submit, args=(i,)) for i in range(3)]

    def _submit(self, number: int) -> None:
        with httpx.Client(base_url=self._server.url, timeout=60) as client:
            seed = number
            while not self._over.wait(0.2):
                seed += 10
                answer = client.post("/api/jobs", json={**QUICK, "seed": seed})
                assert answer.status_code in (202, 507), answer.text
                if answer.status_code == 202:
                    self.accepted.append(answer.json()["id"])
                else:
                    self.refused += 1

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


def survives(
    server: Serving, what: str, away: Callable[[], None], back: Callable[[], None]
) -> None:
    """Check that accepted jobs are drawn once, after the database was away under load."""
    workers = {server.worker()}
    with Load(server) as load:
        wait_for(lambda: len(load.accepted) >= 6)
        away()
        time.sleep(AWAY)
        workers.add(server.worker())
        assert server.client.get("/healthz").status_code == 200
        assert server.client.get("/readyz").status_code == 503
        back()
        before = len(load.accepted)
        wait_for(lambda: len(load.accepted) > before)
    for job in load.accepted:
        assert server.finished(job)["status"] == "succeeded", server.job(job)
        assert len(server.job(job)["pictures"]) == 1
    assert "Traceback" not in server.log()
    figure(
        f"25: {what} away for {AWAY} s under load: {len(load.accepted)} accepted jobs succeeded, "
        f"{load.refused} were refused with 507; {len(workers - {0})} worker"
    )


def test_sqlite_away_under_load(server: Serving) -> None:
    file = server.data / "jobs.sqlite3"
    away = server.data.parent / "away.sqlite3"
    survives(server, "SQLite's file", lambda: _move(file, away), lambda: _move(away, file))


@pytest.mark.soak
def test_sqlite_locked_under_load(server: Serving) -> None:
    file = server.data / "jobs.sqlite3"
    with closing(sqlite3.connect(file, isolation_level=None, check_same_thread=False)) as lock:

        def close() -> None:
            lock.execute("PRAGMA busy_timeout=30000")
            lock.execute("BEGIN EXCLUSIVE")

        survives(server, "SQLite (locked)", close, lambda: lock.execute("ROLLBACK") and None)


def _move(file: Path, to: Path) -> None:
    file.rename(to)


@pytest.fixture(scope="module")
def on_postgresql(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Postgres, Serving]]:
    database, folder = Postgres(), tmp_path_factory.mktemp("postgresql")
    try:
        with Serving(folder, "--exact", "--database", database.url) as running:
            running.ready()
            yield database, running
    finally:
        database.close()


@pytest.mark.parametrize("how", ["crashed", "frozen"][: size(1, 2)])
def test_postgresql_away_under_load(on_postgresql: tuple[Postgres, Serving], how: str) -> None:
    database, server = on_postgresql
    if how == "crashed":
        survives(server, "PostgreSQL", database.crash, database.start)
    else:
        survives(
            server,
            "PostgreSQL (frozen)",
            lambda: database.signal_all(signal.SIGSTOP),
            lambda: database.signal_all(signal.SIGCONT),
        )


# --- leases --------------------------------------------------------------------------------------


@pytest.mark.parametrize("long", ["_step", "_inputs"])
def test_a_job_stays_its_worker_s_while_it_is_read_and_drawn(
    long: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that hangs loses the job when the lease is over."""
    monkeypatch.setattr(claims, "LEASE", 0.6)
    monkeypatch.setattr(holder, "LEASE", 0.6)
    with Inside(tmp_path) as server:
        worker, begun, go_on = server.worker, threading.Event(), threading.Event()
        assert worker is not None

        def wait(*_: Any) -> list[None]:
            begun.set()
            go_on.wait()
            return [None, None]

        monkeypatch.setattr(worker, long, wait)
        server.submit(**QUICK)
        assert begun.wait(30)
        time.sleep(1)
        assert server.hub.store.claim("b" * 32, alone=True) is None
        worker._pulse.well = False
        wait_for(lambda: server.hub.store.claim("b" * 32, alone=True))
        go_on.set()


def test_a_worker_beats_whenever_it_waits_for_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Inside(tmp_path) as server:
        worker: Any = server.worker
        waits, seen = threading.Event(), set()
        within = worker._in_database

        def watched(call: Any, *given: Any, **how: Any) -> Any:
            waits.set()
            try:
                return within(call, *given, **how)
            finally:
                waits.clear()

        def watch(name: str) -> None:
            real = getattr(worker._store, name)

            def call(*given: Any, **how: Any) -> Any:
                seen.add((name, waits.is_set()))
                return real(*given, **how)

            monkeypatch.setattr(worker._store, name, call)

        for name in ("claim", "holds", "put_back", "add_picture", "finish", "has_picture"):
            watch(name)
        monkeypatch.setattr(worker, "_in_database", watched)
        server.finished(server.submit(**QUICK))
        cancelled = server.submit(**LONG)
        wait_for(lambda: server.job(cancelled)["status"] == "running")
        server.ask("DELETE", f"/api/jobs/{cancelled}")
        wait_for(lambda: ("holds", True) in seen)
    assert seen >= {("claim", True), ("add_picture", True), ("finish", True)}
    assert not {name for name, within in seen if not within}


# --- the pulse -----------------------------------------------------------------------------------


def beats(work: Any, seconds: float, *, aside: bool = False) -> int:
    """Return how many beats a process sends that works for `seconds`.

    aside: whether a second thread does the work, beside a main thread that gets on.
    """
    ours, theirs = Pipe(duplex=False)
    child = os.fork()
    if not child:
        pulses.EVERY = 0.4
        pulse = Pulse(theirs)
        pulse._patient = 0
        pulse.start()
        end = time.monotonic() + seconds

        def works() -> None:
            with pulse.working():
                while True:
                    work(pulse)

        if aside:
            threading.Thread(target=works, daemon=True).start()
        while time.monotonic() < end:
            counts(pulse) if aside else work(pulse)
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


def loops(_: Pulse) -> None:
    """Loop in Python."""
    for _ in range(100_000):
        pass


def calls(_: Pulse) -> None:
    """Loop over calls of native functions."""
    for i in range(100_000):
        str(abs(i))


def counts(pulse: Pulse) -> None:
    """Count a step."""
    pulse.count()
    time.sleep(0.1)


def sleeps(_: Pulse) -> None:
    """Block, as a write may."""
    # Otherwise the signal would wake it up.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    time.sleep(2)


@pytest.mark.parametrize("aside", [False, True])
@pytest.mark.parametrize(
    ("work", "most", "least"), [(loops, 1, 0), (calls, 1, 0), (counts, 99, 2), (sleeps, 1, 0)]
)
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
# On a busy machine, a thread without processor time does not seem to move, and may beat.
@pytest.mark.flaky(reruns=2)
def test_a_pulse_tells_work_from_none(work: Any, most: int, least: int, aside: bool) -> None:
    assert least <= beats(work, 2, aside=aside) <= most


@pytest.mark.parametrize("aside", [False, True])
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_long_call_of_native_code_is_work(aside: bool) -> None:
    a = torch.zeros(1000, 1000)

    def multiplies(_: Pulse) -> None:
        a.matrix_power(1 << 60)

    assert beats(multiplies, 2, aside=aside) >= 2


def test_work_within_work_is_the_same_thread() -> None:
    pulse = Pulse()
    with pulse.working():
        mine = dict(pulse._threads)
        with pulse.working():
            assert pulse._threads == mine
        assert pulse._threads == mine
    assert not pulse._threads


def test_long_loops_within_a_layer_get_on() -> None:
    """A convolution in strips can take longer than a worker may be silent."""
    told: list[int] = []
    progress.listen(lambda: told.append(1))
    try:
        progress.get_on()
        assert told == [1]
    finally:
        progress._listening.pop()


def test_silence_is_short_enough() -> None:
    """It takes SILENCE, the second counted last, and a second to start another process."""
    assert supervisor.SILENCE + 2 * pulses.EVERY <= 15


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


def test_a_database_that_does_not_answer_is_no_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "UNANSWERED", 0.2)
    go = threading.Event()
    with Inside(tmp_path / "data", draws=False) as server:
        monkeypatch.setattr(server.hub.store, "get", lambda *_: go.wait(30) and None)
        answer = server.ask("GET", f"/api/jobs/{new_id()}")
        go.set()
        assert (answer.status, answer.json()["code"]) == (507, "storage")


@pytest.mark.parametrize("refusal", [None, StorageError("taken")])
def test_a_server_ends_in_time_though_a_thread_waits_for_ever(
    ends: tuple[threading.Event, list[int]], refusal: StorageError | None
) -> None:
    go, codes = ends

    async def app(_: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await asyncio.to_thread(go.wait, 30)
        await send({"type": "lifespan.shutdown.complete"})

    hub = cast(Any, SimpleNamespace(refusal=refusal))
    server = Server(uvicorn.Config(app, log_config=None), hub)
    server.should_exit = True
    with socket.create_server(("127.0.0.1", 0)) as listening:
        asyncio.run(server.serve(sockets=[listening]))
    assert codes == [0 if refusal is None else 1]


def test_a_worker_ends_in_time_though_a_thread_waits_for_ever(
    ends: tuple[threading.Event, list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, codes = ends
    monkeypatch.setattr("safelight.server.station.belongs", lambda *_: go.wait(30) and False)
    settings = WorkerSettings("embedded", f"sqlite:///{tmp_path / 'jobs'}", str(tmp_path))
    child = Child(cast(Any, SimpleNamespace(kill=lambda: None)), Pipe()[0])
    before = signal.getsignal(signal.SIGTERM)

    async def work() -> None:
        asyncio.get_running_loop().call_later(0.05, signal.raise_signal, signal.SIGTERM)
        await Station(settings, child).run()

    try:
        asyncio.run(work())
    finally:
        signal.signal(signal.SIGTERM, before)
    assert codes == [0]


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, list[int]]:
    """An event that the end of the process would set, and the exit codes so far."""
    gone, codes = threading.Event(), list[int]()

    def leave(code: int) -> None:
        codes.append(code)
        gone.set()

    monkeypatch.setattr(threads, "ENDING", 0.2)
    monkeypatch.setattr(threads, "os", SimpleNamespace(_exit=leave))
    monkeypatch.setattr(threads, "multiprocessing", SimpleNamespace(active_children=list))
    return gone, codes


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


def test_postgresql_restarted(on_postgresql: tuple[Postgres, Serving]) -> None:
    """Its connections are cut again and again while jobs are drawn: none fails."""
    import psycopg

    database, server = on_postgresql
    plain = database.url.replace("+psycopg", "")
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
    time.sleep(size(2, 5))
    ended.set()
    thread.join()
    for job in jobs:
        assert server.finished(job)["status"] == "succeeded", server.job(job)
