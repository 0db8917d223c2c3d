"""Rows drawn by the engine: equal to `Model.generate`, whatever the order, and whoever draws."""

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

import safelight
from safelight import cli
from safelight.batch import drawing
from safelight.batch.check import Row, Rules
from safelight.batch.drawing import Drawer
from safelight.batch.estimate import estimate
from safelight.batch.on_ray import DrawingActor
from safelight.batch.output import Outcome
from safelight.batch.rows import Columns
from safelight.batch.run import How
from safelight.batch.worklist import WorkList
from safelight.engine import Engine
from safelight.errors import SafelightError
from safelight.machine import COMPANY
from safelight.model import Model
from safelight.picture import largest_difference
from safelight.recipe import read_recipe

EXACT = How({"device": "cpu", "dtype": "float32"}, exact=True)
FEW: dict[str, Any] = {"steps": 2, "sampler": "euler", "width": 64, "height": 64}
VALUES: list[dict[str, Any]] = [
    {"id": "a", "prompt": "a cat"},
    {"id": "b", "prompt": "a red apple", "count": 2, "sampler": "ddim"},
    {"id": "c", "prompt": "an owl", "guidance_scale": 1, "steps": 3},
    {"id": "d", "prompt": "a dog", "width": 72, "seed": 5},
]


@pytest.fixture(scope="module")
def model() -> Model:
    return safelight.load(device="cpu", dtype="float32")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    def run(*arguments: object) -> SimpleNamespace:
        code = cli.run(list(map(str, arguments)))
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    return run


def rows(values: list[dict[str, Any]] = VALUES) -> list[Row]:
    rules = Rules(defaults=FEW)
    return [rules.row(i, Columns(i, one)) for i, one in enumerate(values, 1)]


def drawer(model: Model, how: How = EXACT, **more: Any) -> Drawer:
    return Drawer("embedded", how, load=lambda name, **loading: model, **more)


def drawn(outcomes: Iterator[Outcome]) -> dict[str, list[bytes]]:
    return {one.row_id: one.pictures for one in outcomes if one.error is None}


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.fixture(scope="module")
def alone(model: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[bytes]]:
    """Return the files that `Model.generate` writes for these rows."""
    folder = tmp_path_factory.mktemp("alone")
    made = {row.id: model.generate(row.request()).save(folder / f"{row.id}.png") for row in rows()}
    return {row_id: [path.read_bytes() for path in paths] for row_id, paths in made.items()}


def test_exact_pictures_are_equal_to_the_byte_in_any_order(model, alone):
    assert drawn(drawer(model).draw(rows())) == alone
    assert drawn(drawer(model).draw(reversed(rows()))) == alone


def test_pictures_in_company_are_close(model, alone):
    made = drawn(drawer(model, How(EXACT.loading)).draw(rows()))
    assert made.keys() == alone.keys()
    for row_id, pictures in made.items():
        for one, other in zip(pictures, alone[row_id], strict=True):
            assert largest_difference(opened(one), opened(other)) <= COMPANY["float32"]
    recipe = read_recipe(made["a"][0])
    assert recipe["drawn"]["exact"] is False


def test_an_actor_of_ray_draws_the_same(model, alone, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(drawing, "Drawer", lambda name, how, tell: drawer(model, how))
    table = pa.table({"row": [json.dumps(asdict(row)) for row in rows()]})
    made = list(DrawingActor("embedded", EXACT)(table))
    assert [len(one) for one in made] == [1] * len(VALUES)
    outcomes = [
        Outcome(**json.loads(t["outcome"][0].as_py()), pictures=t["pictures"][0].as_py())
        for t in made
    ]
    assert drawn(iter(outcomes)) == alone


def test_rows_that_fail_leave_the_others(model, alone, monkeypatch: pytest.MonkeyPatch):
    """Three rows fail: one does not fit, one makes the engine fail, one fails at a step."""
    add, step = Engine.add, Engine.step

    def failing_add(self: Engine, request: Any, *more: Any) -> Any:
        if request.prompt == "boom":
            raise RuntimeError("boom")
        return add(self, request, *more)

    def failing_step(self: Engine) -> Any:
        if any(ticket.tag == 7 for ticket in self.tickets):
            raise KeyError("boom")
        return step(self)

    monkeypatch.setattr(Engine, "add", failing_add)
    monkeypatch.setattr(Engine, "step", failing_step)
    bad = [
        {"id": "lora", "prompt": "x", "loras": ["none"]},
        {"id": "add", "prompt": "boom"},
        {"id": "step", "prompt": "a cat"},
    ]
    told: list[str] = []
    for how in (EXACT, How(EXACT.loading)):
        outcomes = list(drawer(model, how, tell=told.append).draw(rows([*VALUES, *bad])))
        assert drawn(iter(outcomes)).keys() == alone.keys()
        errors = {one.row_id: one.error for one in outcomes if one.error is not None}
        assert errors.keys() == {"lora", "add", "step"}
        assert "none" in errors["lora"][1]
        assert errors["add"] == ("internal", "a fault of Safelight: RuntimeError")
        assert errors["step"] == ("internal", "a fault of Safelight: KeyError")
    assert len(told) == 4
    assert all("boom" in text for text in told)


def test_a_fault_of_every_row_ends_the_run(model, monkeypatch: pytest.MonkeyPatch):
    def failing(self: Engine, request: Any, *more: Any) -> Any:
        raise RuntimeError("boom")

    monkeypatch.setattr(Engine, "add", failing)
    many = rows([{"id": i, "prompt": "a cat"} for i in range(20)])
    with pytest.raises(RuntimeError, match="boom"):
        list(drawer(model).draw(many))


def test_weights_that_changed_end_the_run(model, monkeypatch: pytest.MonkeyPatch):
    def changed(self: Engine, request: Any, *more: Any) -> Any:
        raise SafelightError("the file was overwritten", code="weights_changed")

    monkeypatch.setattr(Engine, "add", changed)
    with pytest.raises(SafelightError, match="overwritten"):
        list(drawer(model).draw(rows()))


def test_an_estimate_grows_with_the_work(model, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("safelight.batch.estimate.Drawer", lambda name, how, tell: drawer(model))
    monkeypatch.setattr("time.perf_counter", partial(next, iter(range(0, 100, 6))))
    values = [{"id": str(i), "guidance_scale": 1.0} for i in range(3)]
    values += [{"id": "x", "width": 128, "height": 128, "guidance_scale": 1.0, "count": 2}]
    with WorkList() as work:
        columns = [Columns(i, one) for i, one in enumerate(values, 1)]
        assert not list(work.fill(columns, Rules(defaults={"prompt": "a cat", **FEW})))
        found = estimate(work, "embedded", EXACT, print)
    # Two rows of one unit and one of eight were measured, in 6 seconds; all rows are eleven units.
    assert (found.rows, found.seconds) == (4, pytest.approx(6 * 11 / 10))


def test_rows_that_the_model_refuses_are_estimated_as_failing(
    model, monkeypatch: pytest.MonkeyPatch
):
    def check(family, model, request) -> None:
        if request.sampler == "ddim":
            raise SafelightError("ddim is no sampler for it", field="sampler")

    monkeypatch.setattr("safelight.batch.estimate.Drawer", lambda name, how, tell: drawer(model))
    monkeypatch.setattr(type(model.family), "check_request", check)
    values = [{"id": str(i), "sampler": one} for i, one in enumerate(["euler", "ddim", "euler"])]
    with WorkList() as work:
        columns = [Columns(i, one) for i, one in enumerate(values, 1)]
        assert not list(work.fill(columns, Rules(defaults={"prompt": "a cat", "steps": 1})))
        found = estimate(work, "embedded", EXACT, print)
    assert (found.rows, found.failing) == (2, 1)
    assert found.seconds > 0


def test_the_command(run, tmp_path: Path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    (tmp_path / "rows.csv").write_text(
        "key,animal,image,strength\nfirst,cat,,\nsecond,dog,red.png,0.5\nthird,owl,none.png,\n"
    )
    out = tmp_path / "out"
    asked = ["batch", tmp_path / "rows.csv", "--out", out, "--id", "key", "--dtype", "float32"]
    asked += ["--set", "prompt=a {animal}", "--steps", 2, "--sampler", "euler"]
    asked += ["--width", 64, "--height", 64]
    refused = run(*asked)
    assert (refused.code, refused.out) == (2, "")
    assert "line 4: image: there is no file 'none.png'" in refused.err
    assert not out.exists()
    dry = run(*asked, "--skip-invalid", "--dry-run")
    assert dry.code == 0
    assert dry.out.splitlines()[0] == "rows: 2, 0 of them done, 1 more not valid"
    assert "embedded: 2 rows, about " in dry.out
    assert "memory: " in dry.out
    assert "time: about " in dry.out
    assert not out.exists()
    done = run(*asked, "--skip-invalid", "--index", "parquet")
    assert (done.code, done.out) == (1, f"{out}/index.parquet\n")
    assert "2 rows drawn, 1 failed, of 3" in done.err
    recipe = read_recipe(out / "pictures" / "second.png")
    assert (recipe["settings"]["prompt"], recipe["settings"]["strength"]) == ("a dog", 0.5)
    again = run(*asked, "--skip-invalid")
    assert "0 rows drawn, 2 before, 1 failed, of 3" in again.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--workers", 2], "need --ray local"),
        (["--task-rows", 2], "need --ray local"),
        (["--shard-rows", 2], "--shard-rows needs --shards"),
        (["--set", "negative-prompt=x", "--set", "negative_prompt=y"], "is given twice"),
        (["--set", "prompt"], "--set must be as in"),
        (["--set", "promt=x"], "did you mean prompt"),
        (["--ray", "local"], "--ray needs Ray: pip install"),
    ],
)
def test_what_the_command_refuses(run, tmp_path: Path, monkeypatch, more, said):
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a cat"}')
    done = run("batch", tmp_path / "rows.jsonl", "--out", tmp_path / "out", *more)
    assert done.code == 2
    assert said in done.err.splitlines()[-1]


def test_a_run_that_was_killed_goes_on(tmp_path: Path):
    lines = [json.dumps({"prompt": "a cat", **FEW}) for _ in range(200)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    asked = [sys.executable, "-m", "safelight", "batch", "rows.jsonl", "--out", "out", "--exact"]
    first = subprocess.Popen(asked, cwd=tmp_path, stderr=subprocess.DEVNULL)
    index = tmp_path / "out" / "index.jsonl"
    while not index.exists() or index.read_bytes().count(b"\n") < 3:
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = index.read_bytes()
    assert before.count(b"\n") < 200
    second = subprocess.Popen([*asked, "--threads", "1"], cwd=tmp_path, stderr=subprocess.PIPE)
    while index.read_bytes().count(b"\n") < before.count(b"\n") + 3:
        assert second.poll() is None
        time.sleep(0.01)
    second.send_signal(signal.SIGINT)
    assert second.communicate()[1].endswith(b"the same command goes on from here\nstopped\n")
    assert second.returncode == 130
    assert index.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    ids = [json.loads(line)["id"] for line in index.read_bytes().splitlines()]
    assert len({*ids}) == len(ids)
