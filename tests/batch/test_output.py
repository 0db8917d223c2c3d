"""What a batch writes, when its process is killed at any write, on a disk and at a URL."""

import errno
import io
import json
import os
import sys
import tarfile
import time
import uuid
from collections import Counter
from collections.abc import Generator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from safelight.batch.check import Rules
from safelight.batch.lines import Lines
from safelight.batch.output import Outcome, Output
from safelight.batch.patient import WAITS
from safelight.batch.run import How, Job, leave_out_done, read, run
from safelight.batch.worklist import WorkList
from safelight.errors import AwayError, SafelightError
from safelight.storage import Folder, Remote, Storage, storage_at

ROWS = 7


class KilledError(BaseException):
    """Replaces a kill: nothing catches it."""


@pytest.fixture
def file(tmp_path: Path) -> str:
    lines = [json.dumps({"id": f"row {i}", "count": 1 + i % 2}) for i in range(ROWS)]
    lines.append(json.dumps({"id": "bad"}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "rows.jsonl")


@pytest.fixture(params=["disk", "url"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "out") if request.param == "disk" else f"memory://{uuid.uuid4().hex}/out"


def job(file: str, out: str, **more: Any) -> Job:
    return Job(file, out, Rules(defaults={"prompt": "a cat"}), How(), **more)


def draw(work: Any, how: How, tell: object) -> Generator[Outcome]:
    """Draw what no model could: pictures that are texts."""
    for model, _ in work.models():
        for row in work.rows(model):
            if row.id == "bad":
                yield Outcome(row.id, row.name, {"line": row.line}, error=("bad", "it is bad"))
                continue
            record = {"id": row.id, "line": row.line, "model": model, "request": row.digest}
            record |= {"seeds": [1], "width": 8, "height": 8, "warnings": []}
            count = row.settings.get("count", 1)
            settings = {"prompt": row.id, "negative_prompt": "", "seed": 1}
            recipe = {"size": [8, 8], "settings": settings}
            pictures = [f"{row.id} {i}".encode() for i in range(count)]
            yield Outcome(row.id, row.name, record, pictures, [recipe] * count)


def found(job: Job) -> Counter[bytes]:
    """Return all pictures at the places that the index names, each as often as it is there."""
    storage = storage_at(job.out)
    records = [json.loads(line) for line in (storage.read("index.jsonl") or b"").splitlines()]
    assert sorted(r["id"] for r in records) == [f"row {i}" for i in range(ROWS)]
    named = [name for record in records for name in record["files"]]
    if job.shards is None:
        assert {f"pictures/{name}" for name in storage.names("pictures")} == {*named}
        return Counter(storage.read(name) or b"" for name in named)
    shards = sorted({record["shard"] for record in records})
    assert {f"shards/{name}" for name in storage.names("shards")} == {*shards}
    assert not storage.names("pending")
    made = {}
    for shard in shards:
        inside = pictures_of(job.shards, storage.read(shard) or b"")
        assert {n for r in records if r["shard"] == shard for n in r["files"]} == {*inside}
        assert not made.keys() & inside.keys()
        made |= inside
    return Counter(made.values())


def pictures_of(kind: str, data: bytes) -> dict[str, bytes]:
    if kind == "parquet":
        rows = pq.read_table(io.BytesIO(data)).to_pylist()
        return {row["image"]["path"]: row["image"]["bytes"] for row in rows}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}  # pyright: ignore[reportOptionalMemberAccess]
    assert {name.partition(".")[2] for name in members} == {"png", "json", "txt"}
    return {name: data for name, data in members.items() if name.endswith(".png")}


WANTED = Counter(f"row {i} {n}".encode() for i in range(ROWS) for n in range(1 + i % 2))
KINDS = pytest.mark.parametrize("kind", [None, "webdataset", "parquet"])


@KINDS
def test_each_row_is_there_once(file: str, out: str, kind: str | None):
    asked = job(file, out, shards=kind, shard_rows=3, index="parquet")
    report = run(asked, draw)
    assert (report.rows, report.drawn, report.failed, report.before) == (8, 7, 1, 0)
    assert found(asked) == WANTED
    errors = (storage_at(out).read("errors.jsonl") or b"").splitlines()
    assert [json.loads(line) for line in errors] == [
        {"id": "bad", "line": 8, "code": "bad", "message": "it is bad"}
    ]
    table = pq.read_table(io.BytesIO(storage_at(out).read("index.parquet") or b""))
    assert len(table) == ROWS
    again = run(asked, draw)
    assert (again.drawn, again.before, again.failed) == (0, 7, 1)
    assert found(asked) == WANTED


@KINDS
def test_a_kill_at_any_write_loses_and_doubles_nothing(
    file: str, out: str, kind: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Lines, "PART", 2)
    calls = {"left": 0}

    def killing(method: Any) -> Any:
        def call(self: Any, *given: Any) -> Any:
            calls["left"] -= 1
            if calls["left"] == 0:
                raise KilledError
            done = method(self, *given)
            calls["left"] -= 1
            if calls["left"] == 0:
                raise KilledError
            return done

        return call

    names = ("write", "write_with", "remove")
    kinds = [(kind, name) for kind in (Folder, Remote) for name in names]
    for owner, method in [*kinds, (Lines, "append"), (Lines, "flush")]:
        monkeypatch.setattr(owner, method, killing(getattr(owner, method)))
    monkeypatch.setattr(Output, "flush", lambda self: None)  # a killed process writes nothing more
    monkeypatch.setattr(os, "fsync", lambda file: None)
    at, kills = 0, 0
    while True:
        at += 3 if kind is None else 5
        asked = job(file, f"{out}-{at}", shards=kind, shard_rows=3)
        calls["left"] = at
        try:
            run(asked, draw)
            break
        except KilledError:
            kills += 1
        calls["left"] = 2 * at  # and once more, later
        try:
            run(asked, draw)
        except KilledError:
            calls["left"] = 0
            run(asked, draw)
        calls["left"] = 0
        assert found(asked) == WANTED, at
    assert kills > 6


def test_a_torn_line_is_cut_away_and_its_row_drawn_again(file: str, tmp_path: Path):
    asked = job(file, str(tmp_path / "out"))
    run(asked, draw)
    index = tmp_path / "out" / "index.jsonl"
    index.write_bytes(index.read_bytes()[:-20])
    half = tmp_path / "out" / "pictures" / ".safelight-0123.part"
    half.write_text("half a picture")
    report = run(asked, draw)
    assert (report.before, report.drawn) == (6, 1)
    assert not half.exists()
    assert found(asked) == WANTED


def test_a_line_that_is_not_ours_is_named(file: str, out: str):
    run(job(file, out), draw)
    storage_at(out).write("index.jsonl", b"hello\n")
    with pytest.raises(SafelightError, match="has a line that is not ours"):
        run(job(file, out), draw)


def test_a_picture_that_is_gone_is_drawn_again(file: str, out: str):
    asked = job(file, out)
    run(asked, draw)
    storage_at(out).remove(["pictures/row%201@2.png"])
    report = run(asked, draw)
    assert (report.before, report.drawn) == (6, 1)
    assert found(asked) == WANTED


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
@pytest.mark.parametrize("number", [0, 2])
def test_a_shard_that_is_gone_is_drawn_again(file: str, out: str, kind: str, number: int):
    asked = job(file, out, shards=kind, shard_rows=3)
    run(asked, draw)
    shards = sorted(storage_at(out).names("shards"))
    storage_at(out).remove([f"shards/{shards[number]}"])
    report = run(asked, draw)
    lost = 3 if number == 0 else 1
    assert (report.before, report.drawn) == (ROWS - lost, lost)
    assert found(asked) == WANTED


@pytest.mark.parametrize(
    "line",
    [
        {"id": "row 0", "caption": "x"},
        {"id": "row 0", "request": "x", "files": "x"},
        {"id": "row 0", "request": "x", "files": [[]]},
        {"id": 3, "request": "x", "files": []},
        {"id": "\ud800", "request": "x", "files": []},
    ],
)
def test_an_object_that_is_not_ours_is_named(file: str, out: str, line: dict[str, Any]):
    run(job(file, out), draw)
    data = storage_at(out).read("index.jsonl") or b""
    storage_at(out).write("index.jsonl", data + json.dumps(line).encode() + b"\n")
    with pytest.raises(SafelightError, match=r"index\.jsonl in .* has a line that is not ours"):
        run(job(file, out), draw)


@pytest.mark.parametrize("shard", [None, "x.tar", "shards/x.tar"])
def test_a_row_of_a_strange_shard_is_named(file: str, out: str, shard: str | None):
    asked = job(file, out, shards="webdataset")
    run(asked, draw)
    lines = (storage_at(out).read("index.jsonl") or b"").splitlines()
    storage_at(out).write("shards/x.tar", b"")
    line = {**json.loads(lines[0]), "shard": shard}
    storage_at(out).write("index.jsonl", json.dumps(line).encode() + b"\n")
    with pytest.raises(SafelightError, match=r"index\.jsonl in .* has a line that is not ours"):
        run(asked, draw)


@pytest.mark.parametrize("data", [b"{", b"[]", b"{}", b'{"files": [], "record": 3, "recipes": []}'])
def test_a_file_among_those_that_wait_that_is_not_ours_is_named(file: str, out: str, data: bytes):
    asked = job(file, out, shards="webdataset")
    run(asked, draw)
    storage_at(out).write("pending/x.json", data)
    with pytest.raises(SafelightError, match=r"pending/x\.json in .* is not ours: remove it"):
        run(asked, draw)
    assert storage_at(out).read("pending/x.json") == data


def test_a_full_disk_leaves_no_half_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines = Lines(Folder(tmp_path), "index")
    lines.append({"id": "a"})
    whole = (tmp_path / "index.jsonl").read_bytes()

    class Full:
        """A file on a disk that has room for five more bytes."""

        room = 5

        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def write(self, data: bytes) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = self._file.write(data[: self.room])
            self.room -= written
            return written

    file = lines._file
    monkeypatch.setattr(lines, "_file", Full(file))
    with pytest.raises(SafelightError, match="cannot be written: No space left"):
        lines.append({"id": "b"})
    assert (tmp_path / "index.jsonl").read_bytes() == whole
    monkeypatch.setattr(lines, "_file", file)  # another program makes room
    lines.append({"id": "c"})
    lines.close()
    assert [one["id"] for one in Lines(Folder(tmp_path), "index").load()] == ["a", "c"]


@KINDS
@pytest.mark.parametrize("outage", [3, len(WAITS) + 1])
def test_a_store_that_is_away_is_waited_for(
    file: str, kind: str | None, outage: int, monkeypatch: pytest.MonkeyPatch
):
    """outage: the calls in a row that fail, in the middle of a run."""
    monkeypatch.setattr(Lines, "PART", 2)
    waited: list[float] = []
    told: list[str] = []
    away = {"in": 9, "for": outage}
    monkeypatch.setattr(time, "sleep", waited.append)

    def failing(method: Any) -> Any:
        def call(self: Any, *given: Any) -> Any:
            away["in"] -= 1
            if away["in"] < 0 and away["for"]:
                away["for"] -= 1
                raise AwayError("the storage cannot be used: SlowDown")
            return method(self, *given)

        return call

    for method in ("write", "write_with", "remove"):
        monkeypatch.setattr(Remote, method, failing(getattr(Remote, method)))
    asked = job(file, f"memory://{uuid.uuid4().hex}/out", shards=kind, shard_rows=3)
    if outage > len(WAITS):
        with pytest.raises(AwayError, match="SlowDown"):
            run(asked, draw, tell=told.append)
        assert waited == list(WAITS)
    else:
        run(asked, draw, tell=told.append)
        assert waited == [1, 2, 4]
    assert told == ["the storage cannot be used: SlowDown; it is tried again for 5 minutes"]
    away["for"] = 0
    run(asked, draw)
    assert found(asked) == WANTED


def test_a_store_that_never_worked_is_not_waited_for(file: str, monkeypatch: pytest.MonkeyPatch):
    def fail(self: Remote, name: str, data: bytes) -> None:
        raise AwayError("the key is wrong")

    monkeypatch.setattr(Remote, "write", fail)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits"))
    with pytest.raises(AwayError, match="the key is wrong"):
        run(job(file, f"memory://{uuid.uuid4().hex}/out"), draw)


def test_a_batch_may_go_on_with_low_memory(file: str, out: str):
    def stop(work: Any, how: How, tell: object) -> Generator[Outcome]:
        yield next(draw(work, how, tell))
        raise SafelightError("out of memory", code="out_of_memory")

    asked = replace(job(file, out), how=How(loading={"low_memory": False, "dtype": None}))
    with pytest.raises(SafelightError, match="out of memory"):
        run(asked, stop)
    asked = replace(asked, how=How(loading={"low_memory": True, "dtype": None}))
    assert run(asked, draw).before == 1
    assert found(asked) == WANTED
    with pytest.raises(SafelightError, match="a batch with another dtype"):
        run(replace(asked, how=How(loading={"low_memory": True, "dtype": "float32"})), draw)


def test_new_rows_are_added_and_changed_ones_refused(file: str, out: str):
    run(job(file, out), draw)
    rows = Path(file).read_text().splitlines()
    Path(file).write_text("\n".join([*rows[1:], '{"id": "new"}']))
    report = run(job(file, out), draw)
    assert (report.drawn, report.before, report.elsewhere) == (1, 6, 1)
    Path(file).write_text("\n".join([rows[0].replace("}", ', "steps": 3}'), *rows[1:]]))
    with pytest.raises(SafelightError, match="line 1: row 'row 0' was drawn with other settings"):
        run(job(file, out), draw)
    with pytest.raises(SafelightError, match="a batch with another shards"):
        run(job(file, out, shards="webdataset"), draw)


@KINDS
def test_a_run_that_drew_nothing_binds_nobody(file: str, out: str, kind: str | None):
    def fail(work: Any, how: How, tell: object) -> Generator[Outcome]:
        raise SafelightError("there is no device 'foo'")
        yield

    asked = replace(job(file, out, shards=kind), how=How(loading={"device": "cpu"}))
    wrong = replace(asked, how=How(loading={"device": "foo"}))
    with pytest.raises(SafelightError, match="foo"):
        run(wrong, fail)
    run(asked, draw)
    assert found(asked) == WANTED
    with pytest.raises(SafelightError, match="a batch with another device"):
        run(wrong, draw)


def test_a_batch_whose_rows_all_wait_is_not_another_s(file: str, out: str):
    def stop(work: Any, how: How, tell: object) -> Generator[Outcome]:
        yield next(draw(work, how, tell))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(job(file, out, shards="webdataset"), stop)
    with pytest.raises(SafelightError, match="a batch with another shards"):
        run(job(file, out), draw)


def test_a_second_run_into_the_same_folder_waits_its_turn(file: str, tmp_path: Path):
    asked = job(file, str(tmp_path / "out"))

    def twice(work: Any, how: How, tell: object) -> Generator[Outcome]:
        with pytest.raises(SafelightError, match="another run writes into"):
            run(asked, draw)
        yield from draw(work, how, tell)

    assert run(asked, twice).drawn == ROWS


def test_rows_that_are_not_valid_stop_the_run_or_fail(file: str, out: str):
    text = Path(file).read_text()
    Path(file).write_text(text + '\n{"steps": 0}\n{"id": "row 1"}\n')
    with pytest.raises(SafelightError, match=r"^2 rows are not valid.*line 9: steps must.*line 10"):
        run(job(file, out), draw)
    assert not storage_at(out).names("pictures")
    report = run(job(file, out, skip_invalid=True), draw)
    assert (report.rows, report.drawn, report.failed) == (10, 7, 3)
    errors = (storage_at(out).read("errors.jsonl") or b"").splitlines()
    told = [(e["id"], e["line"], e["code"]) for e in map(json.loads, errors)]
    assert told == [("9", 9, "invalid"), ("row 1", 10, "same_id"), ("bad", 8, "bad")]


def test_an_index_of_something_else_is_left_alone(file: str, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "index.jsonl").write_text("hello")
    with pytest.raises(SafelightError, match=r"has an index\.jsonl and no batch\.json"):
        run(job(file, str(tmp_path / "out")), draw)
    assert (tmp_path / "out" / "index.jsonl").read_text() == "hello"


@pytest.mark.parametrize("out", ["none://x", "/dev/null/x"])
def test_a_folder_that_cannot_be_is_one_line(file: str, out: str):
    with pytest.raises(SafelightError, match=r"^[^\n]*cannot be[^\n]*$"):
        run(job(file, out), draw)


def test_no_rows_and_no_model_are_errors(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n")
    with pytest.raises(SafelightError, match="no row in the file"):
        run(job(str(path), str(tmp_path / "out")), draw)
    path.write_text('{"model": "none"}\n')
    for skip in (False, True):
        with pytest.raises(SafelightError, match=r"^no model 'none'"):
            run(job(str(path), str(tmp_path / "out"), skip_invalid=skip), draw)


def test_a_model_that_is_not_there_fails_its_own_rows(file: str, out: str):
    text = Path(file).read_text()
    Path(file).write_text('{"id": "a", "model": "none"}\n' + text)
    with pytest.raises(
        SafelightError, match=r"^1 rows are not valid .*: line 1: .*no model 'none'"
    ):
        run(job(file, out), draw)
    report = run(job(file, out, skip_invalid=True), draw)
    assert (report.rows, report.drawn, report.failed) == (9, 7, 2)


def test_rows_that_are_done_need_no_model(file: str, out: str, monkeypatch: pytest.MonkeyPatch):
    def find(model: str, **_: Any) -> None:
        raise SafelightError(f"no model {model!r}")

    Path(file).write_text('{"id": "a"}\n{"id": "b"}\n')
    run(job(file, out), draw)
    monkeypatch.setattr("safelight.weights.find.find", find)
    report = run(job(file, out), draw)
    assert (report.rows, report.before, report.drawn, report.failed) == (2, 2, 0, 0)
    with Path(file).open("a") as rows:
        rows.write('{"id": "c"}\n')
    with pytest.raises(SafelightError, match=r"^1 rows are not valid .*: line 3: no model"):
        run(job(file, out), draw)
    report = run(job(file, out, skip_invalid=True), draw)
    assert (report.rows, report.before, report.drawn, report.failed) == (3, 2, 0, 1)


def test_looking_into_a_folder_without_a_batch_leaves_nothing(file: str, tmp_path: Path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.png").write_bytes(b"a picture")
    for folder in ("photos", "none"):
        asked = job(file, str(tmp_path / folder))
        with WorkList() as work:
            read(asked, work)
            leave_out_done(asked, work)
            assert work.count(done=True) == 0
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["one.png"]
    assert not (tmp_path / "none").exists()


def test_what_parquet_needs_is_missed_before_the_work(
    file: str, out: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for more in ({"index": "parquet"}, {"shards": "parquet"}):
        with pytest.raises(SafelightError, match="Parquet needs pyarrow"):
            run(job(file, out, **more), draw)
    assert not storage_at(out).names()


def test_looking_changes_nothing(file: str, out: str):
    """A dry run looks into the messy folder of a killed run."""
    for kind in (None, "webdataset"):
        asked = job(file, f"{out}-{kind}", shards=kind, shard_rows=3)
        run(asked, draw)
        storage = storage_at(asked.out)
        if kind is None:
            storage.remove(["pictures/row%201@2.png"])
            storage.write("pictures/.safelight-0.part", b"half")
        storage.write("index.jsonl", (storage.read("index.jsonl") or b"")[:-5])
        storage.write("pending/9.png", b"a picture")

        def all_of(storage: Storage = storage) -> dict[str, bytes | None]:
            folders = ("", "pictures/", "pending/", "shards/")
            names = [f"{f}{name}" for f in folders for name in storage.names(f.rstrip("/"))]
            return {name: storage.read(name) for name in names}

        before = all_of()
        with WorkList() as work:
            read(asked, work)
            leave_out_done(asked, work)
            assert 0 < work.count(done=True) < ROWS
        assert all_of() == before
        if kind is None:
            storage.remove(["pending/9.png"])
        run(asked, draw)
        assert found(asked) == WANTED


def outcome(number: int) -> Outcome:
    record = {"id": str(number), "line": number, "model": "m", "request": "x", "warnings": []}
    recipe = {"size": [8, 8], "settings": {"prompt": "", "negative_prompt": "", "seed": 1}}
    return Outcome(str(number), str(number), record, [b"picture %d" % number], [recipe])


def output(storage: Storage) -> Output:
    """Open a folder for writing, as a run does; as it says, all rows are done or none."""
    made = Output(storage, {}, shards="webdataset", shard_rows=3)
    with WorkList() as work:
        made.resume(work)
    made.begin([])
    return made


def test_two_kills_lose_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One kill comes while a shard is written, one while its waiting rows are removed."""
    storage = Folder(tmp_path)
    first = output(storage)

    def killed(*_: Any) -> None:
        raise KilledError

    monkeypatch.setattr(first._shards, "_write", killed)
    for number in (1, 2, 3):
        first.keep(outcome(number))
    with pytest.raises(KilledError):
        first.keep(outcome(4))
    remove = storage.remove
    second = output(storage)

    def remove_one(names: Iterable[str]) -> None:
        remove([next(iter(names))])
        raise KilledError

    monkeypatch.setattr(storage, "remove", remove_one)
    with pytest.raises(KilledError):
        second.keep(outcome(4))
    monkeypatch.setattr(storage, "remove", remove)
    third = output(storage)
    for number in (4, 5):
        third.keep(outcome(number))
    third.finish()
    for one in (first, second, third):
        one.close()
    inside = [pictures_of("webdataset", (storage.read(f"shards/{n}") or b""))
        for n in sorted(storage.names("shards"))]  # fmt: skip
    assert [sorted(one) for one in inside] == [["1.png", "2.png", "3.png"], ["4.png", "5.png"]]
    assert all(data == b"picture " + n[:1].encode() for one in inside for n, data in one.items())
    assert not storage.names("pending")


def test_a_waiting_row_whose_picture_is_gone_is_drawn_again(tmp_path: Path):
    storage = Folder(tmp_path)
    first = output(storage)
    for number in (1, 2):
        first.keep(outcome(number))
    storage.remove(["pending/1.png"])
    with pytest.raises(SafelightError, match=r"pending/1\.png is gone .*: start the same command"):
        first.finish()
    second = output(storage)
    assert second._shards is not None
    assert [*second._shards.pending()] == ["2"]
    assert storage.names("pending") == {"2.png", "2.json"}
