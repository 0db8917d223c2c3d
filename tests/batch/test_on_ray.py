"""What is ours around Ray: how many workers, and rows whose workers die. Ray itself: tests/soak."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from safelight.batch.check import Row, Rules
from safelight.batch.drawing import Drawer
from safelight.batch.on_ray import Cluster, DrawingActor, _Crew
from safelight.batch.output import Outcome
from safelight.batch.rows import Columns
from safelight.batch.run import How
from safelight.errors import SafelightError


def ray(nodes: int, cpus: float, gpus: float = 0) -> Any:
    """Replaces the module ray, connected to a cluster."""
    return SimpleNamespace(
        cluster_resources=lambda: {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus},
        nodes=lambda: [{"Alive": True}] * nodes + [{"Alive": False}],
    )


@pytest.mark.parametrize(
    ("cluster", "there", "how", "crew"),
    [
        (Cluster(), ray(1, 8), How(), _Crew(1, 1, 8, 0)),
        (Cluster(workers=2), ray(1, 9), How(), _Crew(2, 1, 4, 0)),
        (Cluster(), ray(3, 6), How(), _Crew(3, 3, 2, 0)),
        (Cluster(workers=2), ray(1, 8), How(threads=1), _Crew(2, 1, 1, 0)),
        (Cluster(), ray(2, 32, gpus=4), How(), _Crew(4, 2, 1, 1)),
        (Cluster(gpus=0.5), ray(2, 32, gpus=4), How(), _Crew(8, 2, 1, 0.5)),
        (Cluster(), ray(2, 32, gpus=4), How({"device": "cpu"}), _Crew(2, 2, 16, 0)),
    ],
)
def test_workers_share_a_cluster(cluster: Cluster, there: Any, how: How, crew: _Crew):
    assert cluster._crew(there, how) == crew


@pytest.mark.parametrize(
    ("cluster", "how"),
    [
        (Cluster(workers=9), How()),
        (Cluster(workers=2), How(threads=5)),
        (Cluster(workers=2, gpus=1), How()),
    ],
)
def test_more_workers_than_there_is_room_for_are_refused(cluster: Cluster, how: How):
    with pytest.raises(SafelightError, match="need more than the 8 CPUs and 1 GPUs"):
        cluster._crew(ray(1, 8, gpus=1), how)


def test_rows_whose_workers_die_are_tried_alone_and_then_fail(monkeypatch: pytest.MonkeyPatch):
    """A task is lost with all of its rows; one of them is at fault."""
    tasks: list[list[str]] = []

    def draw(self: _Crew, model: str, how: How, rows: list[Row], each: int) -> Iterator[Outcome]:
        for at in range(0, len(rows), each):
            task = rows[at : at + each]
            tasks.append([row.id for row in task])
            if all(row.id != "3" for row in task):
                yield from (Outcome(row.id, row.name, {"line": row.line}) for row in task)

    monkeypatch.setattr(_Crew, "_draw", draw)
    rules = Rules(defaults={"prompt": "a cat"})
    rows = [rules.row(i, Columns(i, {"id": str(i)})) for i in range(1, 7)]
    made = list(_Crew(1, 1, 1, 0).draw_all("embedded", How(), rows, 2))
    assert tasks == [["1", "2"], ["3", "4"], ["5", "6"], ["3"], ["4"]]
    assert [one.row_id for one in made] == ["1", "2", "5", "6", "4", "3"]
    failed = [(one.row_id, one.error[0]) for one in made if one.error is not None]
    assert failed == [("3", "worker_died")]


@pytest.mark.parametrize("spares", [True, False])
def test_a_model_that_cannot_be_loaded_fails_its_own_rows(spares: bool):
    """Other models go on. If there is only one model, the batch ends, as in one process."""
    values = {"prompt": "a cat", "model": "/none"}
    rows = [Rules().row(i, Columns(i, values)) for i in (1, 2)]
    table = pa.table({"row": [json.dumps(asdict(row)) for row in rows]})
    made = list(DrawingActor("/none", How({"device": "cpu"}), spares)(table))
    told = [json.loads(one["outcome"][0].as_py()) for one in made]
    assert [(one["row_id"], one["error"][0]) for one in told] == (
        [("1", "no_model"), ("2", "no_model")] if spares else [("", "fatal")]
    )


def test_a_fault_of_the_program_ends_the_batch(monkeypatch: pytest.MonkeyPatch):
    """Ray would leave the rows out, and they would be blamed on too little memory."""
    pytest.importorskip("ray")

    def fail(self: Drawer, row: Row) -> Any:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(Drawer, "_begin", fail)
    values = {"prompt": "a cat", "steps": 1}
    rows = [Rules().row(i, Columns(i, values)) for i in range(1, 9)]
    actor = DrawingActor("embedded", How({"device": "cpu"}))
    tables = []

    def data(drawn: list[pa.Table]) -> Any:
        tables.extend(drawn)
        mapped = SimpleNamespace(iter_batches=lambda **_: (o for t in tables for o in actor(t)))
        return SimpleNamespace(map_batches=lambda *_, **__: mapped)

    monkeypatch.setattr("ray.data.from_arrow", data)
    with pytest.raises(RuntimeError, match=r"a worker met a fault of Safelight\n(.*\n)*ZeroDiv"):
        list(_Crew(1, 1, 1, 0).draw_all("embedded", How(), rows, 8))
    assert len(tables) == 1
