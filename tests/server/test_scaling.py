"""Workers that a server keeps on Ray: how many, who starts them, and what replaces lost ones."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import acting
import inside
import pytest
from acting import Acting
from serving import wait_for

from safelight import SafelightError
from safelight.ray_cluster import connect
from safelight.server import crew, on_ray
from safelight.server.files import Files
from safelight.server.jobs import ModelInfo
from safelight.server.on_ray import OnRay, on_nodes
from safelight.server.process import Child
from safelight.server.scaling import Load, WorkerPlan, bounds, change, room
from safelight.server.settings import WorkerSettings
from safelight.server.store import Store, new_id
from safelight.server.worker import Worker

pytestmark = pytest.mark.xdist_group("fleet")


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        (Load(), 1),  # from nothing to the fewest
        (Load(starting=1), 0),
        (Load(ready=1, drawn=2), 0),  # the worker keeps up
        (Load(late=1, ready=1, drawn=2), 1),
        (Load(late=5, ready=1, drawn=2), 3),  # two jobs a worker
        (Load(late=5, ready=1, starting=2, drawn=2), 1),  # two are starting already
        (Load(late=2, ready=1, starting=1, drawn=2), 0),
        (Load(late=900, ready=2, drawn=4), 2),  # no more than the most
        (Load(late=900, ready=4, drawn=8), 0),
        (Load(late=3, ready=1, starting=0, drawn=0, idle=[0.5]), 3),  # it has just begun
        (Load(late=3, ready=2, drawn=2, idle=[30.0]), 0),  # jobs that nobody here can draw
        (Load(late=3, ready=2, drawn=2, idle=[90.0]), -1),
        (Load(ready=3, drawn=2, idle=[59.0]), 0),
        (Load(ready=3, drawn=2, idle=[60.0, 3.0]), -1),
        (Load(ready=4, idle=[99.0] * 4), -3),  # the fewest stay
        (Load(ready=1, starting=1, idle=[99.0]), -1),
        (Load(ready=1, idle=[99.0]), 0),
    ],
)
def test_how_many_workers_are_started_or_let_go(load: Load, expected: int) -> None:
    assert change(load, WorkerPlan(1, 4, idle=60.0, patience=5.0)) == expected


@pytest.mark.parametrize(
    ("nodes", "plan", "device", "expected"),
    [
        ([{"CPU": 8}], WorkerPlan(1, 2), "auto", (4, 0)),
        ([{"CPU": 8}, {"CPU": 4}], WorkerPlan(1, 3), "auto", (4, 0)),
        ([{"CPU": 8}, {"CPU": 8}], WorkerPlan(1, 3), "auto", (4, 0)),
        ([{"CPU": 2}], WorkerPlan(1, 8), "auto", (1, 0)),
        ([{}], WorkerPlan(1, 8), "auto", (1, 0)),  # nodes are still to come
        ([{"CPU": 32, "GPU": 2}], WorkerPlan(1, 2), "auto", (1, 1)),
        ([{"CPU": 32, "GPU": 2}], WorkerPlan(1, 4, gpus=0.5), "cuda", (1, 0.5)),
        ([{"CPU": 32, "GPU": 2}], WorkerPlan(1, 4), "cpu", (8, 0)),
        ([{"CPU": 32, "GPU": 2}], WorkerPlan(1, 4, cpus=2, gpus=0), "auto", (2, 0)),
    ],
)
def test_what_each_worker_takes(
    nodes: list[Any], plan: WorkerPlan, device: str, expected: tuple[float, float]
) -> None:
    assert room(nodes, plan, device) == expected


@pytest.mark.parametrize(("text", "found"), [("0", (0, 0)), ("1:8", (1, 8)), (" 2 ", (2, 2))])
def test_bounds(text: str, found: tuple[int, int]) -> None:
    assert bounds(text) == found


@pytest.mark.parametrize("text", ["", "8:1", "1:", ":8", "-1", "1.5", "1:2:3", "٣"])
def test_bounds_that_are_none(text: str) -> None:
    with pytest.raises(SafelightError, match="--workers"):
        bounds(text)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--workers", "1:4"], "--workers 1:4 needs --ray"),
        (["--workers", "2"], "--workers 2 needs --ray"),
        (["--ray", "local"], "--ray needs a --database of PostgreSQL"),
        (["--ray", "local", "--workers", "0:4"], "--ray keeps one worker at least"),
        (["--gpus-per-worker", "0.5"], "are for workers of --ray"),
        (["--workers", "0"], "--workers 0 needs a --database of PostgreSQL"),
    ],
)
def test_what_is_refused(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from safelight.cli import BAD_INPUT, run

    assert run(["serve", "--data-dir", str(tmp_path / "data"), *arguments]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


def test_a_worker_has_the_paths_of_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("embedded", "models"):
        Path(name).mkdir()
    given = WorkerSettings(
        "embedded", "postgresql://db/x", "/data", models_dir="models", vae="org/vae"
    )
    found = on_nodes(replace(given, allowed=("./models", "embedded", "org/x")))
    assert found.allowed == (str(tmp_path / "models"), "embedded", "org/x")
    assert on_nodes(given).allowed is None
    assert (found.model, found.vae) == ("embedded", "org/vae")
    assert found.models_dir == str(tmp_path / "models")
    assert found.elsewhere


# --- the process that keeps them ------------------------------------------------------------------


class Scripted:
    """Takes the place of the process: sends given messages, then ends or waits for its end."""

    def __init__(self, *says: tuple[str, Any], stays: bool = False) -> None:
        self._says, self._stays = says, stays
        self.heard: list[Any] = []

    def start(self, plan: WorkerPlan, settings: WorkerSettings) -> tuple[Any, Connection]:
        ours, theirs = Pipe()
        thread = inside.Thread(target=self._run, args=(theirs,), daemon=True)
        thread.start()
        return thread, ours

    def _run(self, pipe: Connection) -> None:
        for said in self._says:
            pipe.send(said)
        if self._stays:
            self.heard.append(pipe.recv())
        pipe.close()


def test_ray_is_away_and_comes_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The server says so once and tries again; jobs of lost workers wait again at once."""
    caplog.set_level("INFO")
    away = Scripted(("refused", "the Ray cluster 'x:1' is not reached: no"))
    lost = Scripted(("trouble", None), ("workers", ["a", "b"]), ("workers", ["b"]))
    back = Scripted(("workers", ["c"]), ("trouble", None), stays=True)
    scripts = iter([away, away, lost, back])
    monkeypatch.setattr(on_ray, "start", lambda *how: next(scripts).start(*how))
    put_back: list[tuple[str, bool]] = []
    seen: list[str | None] = []
    fleet: Any = SimpleNamespace(workers=[])

    def take(worker: str, killed: bool) -> None:
        put_back.append((worker, killed))

    made = OnRay(WorkerSettings("m", "", ""), WorkerPlan(1, 2), fleet, take)
    monkeypatch.setattr(made._ended, "wait", lambda _: seen.append(made.trouble))
    assert made.trouble == "the workers on Ray are starting"
    made.start()
    wait_for(lambda: made._workers == {"c"})
    assert seen[:2] == ["Ray is away: the Ray cluster 'x:1' is not reached: no"] * 2
    assert "has ended (exit code 0)" in str(seen[2])
    assert put_back == [("a", True), ("b", True)]
    wait_for(lambda: made._away is None)
    assert made.trouble == "no worker has joined yet"
    fleet.workers = [object()]
    assert made.trouble is None
    assert made.alive
    import asyncio

    asyncio.run(made.stop())
    assert back.heard == ["stop"]
    assert not made.alive
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if "not reached" in line] == [
        "Ray is away: the Ray cluster 'x:1' is not reached: no; it is tried again"
    ]
    assert lines.count("Ray is there again") == 2


# --- an actor -------------------------------------------------------------------------------------


@pytest.fixture
def actor_of(
    shared: tuple[Files, Store, str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[Connection], None]], crew.Actor]:
    """Return a maker of actors whose drawing process is a thread."""
    files, _, url = shared

    def make(script: Callable[[Connection], None]) -> crew.Actor:
        def spawn(_: WorkerSettings) -> Child:
            ours, theirs = Pipe()
            thread: Any = inside.Thread(target=script, args=(theirs,), daemon=True)
            thread.start()
            return Child(thread, ours)

        for name, fake in (("spawn", spawn), ("log_to_stderr", bool), ("private.keep", bool)):
            monkeypatch.setattr(f"safelight.server.crew.{name}", fake)
        return crew.Actor(WorkerSettings("m", url, str(files.root), elsewhere=True))

    return make


def test_an_actor_finishes_what_it_has_before_it_goes(
    shared: tuple[Files, Store, str], actor_of: Callable[..., crew.Actor]
) -> None:
    _, store, _ = shared
    heard: list[Any] = []
    finished, mine = threading.Event(), new_id()

    def script(pipe: Connection) -> None:
        pipe.send(("worker", mine))
        pipe.send(("ready", ModelInfo(name="m", ready=True).model_dump(), 1))
        while not heard or heard[-1] != "drain":
            heard.append(pipe.recv()[0])
        finished.wait(30)
        pipe.close()

    actor = actor_of(script)
    wait_for(lambda: [one.id for one in store.fleet()] == [mine])
    assert actor.state() == crew.State(mine, ready=True)
    actor.end(drain=True)
    wait_for(lambda: "drain" in heard)
    assert not actor.state().ended  # it draws on
    assert [one.id for one in store.fleet()] == [mine]
    finished.set()
    wait_for(lambda: actor.state().ended)
    assert "stop" not in heard
    assert store.fleet() == []


def test_an_actor_says_why_it_cannot_draw(actor_of: Callable[..., crew.Actor]) -> None:
    def script(pipe: Connection) -> None:
        pipe.send(("refused", "there is no model m", "no_model"))
        pipe.close()

    actor = actor_of(script)
    wait_for(lambda: actor.state().ended)
    assert actor.state().refusal == "there is no model m"


def test_a_worker_that_is_let_go_finishes_its_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes no other job. As in a fleet, it takes in no more than it draws at once."""
    drawn = Worker._step

    def step(worker: Worker) -> None:
        """Draw nothing until it has two jobs and was told to end."""
        while len(worker._held) > 1 and not worker._draining:
            worker._on_messages(0.1)
        if worker._draining:
            drawn(worker)

    monkeypatch.setattr(Worker, "_step", step)
    with inside.Inside(tmp_path, elsewhere=True, exact=True) as server:

        def job(number: int) -> Any:
            return server.ask("GET", f"/api/jobs/{ids[number]}").json()

        how = {"prompt": "a cat", "steps": 2, "sampler": "euler"}
        ids = [server.ask("POST", "/api/jobs", how).json()["id"] for _ in range(4)]
        wait_for(lambda: job(1)["status"] == "running")
        assert [job(n)["status"] for n in range(4)] == ["running"] * 2 + ["queued"] * 2
        supervisor: Any = server.hub.supervisor
        supervisor.drain()
        assert supervisor.ended(60)
        assert [job(n)["status"] for n in range(4)] == ["succeeded"] * 2 + ["queued"] * 2
        assert job(2)["attempts"] == 0


# --- Ray itself -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A cluster on this machine."""
    pytest.importorskip("ray")
    handler = signal.getsignal(signal.SIGTERM)
    module = connect("local")
    module.cloudpickle.register_pickle_by_value(acting)  # its workers cannot import it
    yield module
    module.shutdown()
    signal.signal(signal.SIGTERM, handler)


def test_workers_come_with_the_queue_and_go_with_it(
    ray: Any, shared: tuple[Files, Store, str]
) -> None:
    """The number goes from one to two and back; one is killed, and every job is drawn once."""
    files, store, url = shared
    told: dict[str, Any] = {}
    plan = WorkerPlan(1, 2, cpus=0.5, patience=0.1, idle=4.0)
    settings = WorkerSettings("m", url, str(files.root), elsewhere=True)
    made = crew.Crew(ray, plan, settings, lambda kind, what: told.update({kind: what}), Acting)

    def looked(done: Callable[[], bool]) -> bool:
        made.look()
        return done()

    try:
        wait_for(lambda: looked(lambda: len(told["workers"]) == 1))
        assert told["trouble"] is None
        ids = [new_id() for _ in range(8)]
        for each in ids:
            store.submit(each, {"prompt": "a", "count": 1}, client="api", cost=1, bound=100)
        wait_for(lambda: looked(lambda: len(told["workers"]) == 2 and store.load(0)[0] == 6))
        lost, stays = store.fleet()
        with store.engine.connect() as db:
            found = f"SELECT place FROM workers WHERE id = '{lost.id}'"
            os.kill(int(db.exec_driver_sql(found).scalar_one()), signal.SIGKILL)
        wait_for(lambda: looked(lambda: lost.id not in told["workers"]))
        store.release(lost.id, killed=True)
        store.leave(lost.id)
        wait_for(lambda: looked(lambda: len(told["workers"]) == 2))
        assert stays.id in told["workers"]
        (files.root / "open").touch()
        wait_for(lambda: looked(lambda: store.counts() == {"succeeded": 8}))
        drawn: list[Any] = [store.get(each) for each in ids]
        assert [len(job.pictures) for job in drawn] == [1] * 8
        wait_for(lambda: looked(lambda: len(told["workers"]) == 1))
        wait_for(lambda: len(store.fleet()) == 1)
    finally:
        made.close()
