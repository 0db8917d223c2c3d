"""Run a batch, from its file of rows to its index."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from safelight import __version__
from safelight.batch.arrow import arrow
from safelight.batch.check import Rules
from safelight.batch.output import ABOUT, Outcome, Output
from safelight.batch.patient import Patient
from safelight.batch.rows import read_rows
from safelight.batch.worklist import Problem, WorkList
from safelight.errors import SafelightError
from safelight.storage import storage_at

MAX_TOLD = 10
"""The most problems that an error lists."""

_NOT_TOLD = {"on_plan", "low_memory"}
"""Keywords of `load_model` that change no picture."""

Draw = Callable[[WorkList, "How", Callable[[str], object]], Generator[Outcome]]
"""Draws all rows of a list that are not done, on this machine or with Ray."""


@dataclass(frozen=True)
class How:
    """How all rows of a batch are drawn.

    loading: keywords of `load_model`. exact: each picture is drawn alone, with the same bytes on
    every worker. threads: of PyTorch in each process; None for PyTorch's choice. ending: of the
    pictures' names, which gives their format.
    """

    loading: dict[str, Any] = field(default_factory=dict)
    exact: bool = False
    threads: int | None = None
    ending: str = "png"


@dataclass(frozen=True)
class Job:
    """What a batch is to do.

    file: of rows. out: a folder or a URL. shards, shard_rows, index: see `Output`. skip_invalid:
    whether invalid rows count as failed; otherwise they are an error before the work starts.
    """

    file: str
    out: str
    rules: Rules
    how: How
    shards: str | None = None
    shard_rows: int = 1000
    index: str = "jsonl"
    skip_invalid: bool = False


@dataclass
class Report:
    """The result of a run.

    rows: number of rows in the file. before: done by an earlier run. drawn, failed: by this run.
    warned: drawn with warnings. elsewhere: rows of the index that are not in the file. index: its
    full name.
    """

    rows: int
    before: int = 0
    drawn: int = 0
    failed: int = 0
    warned: int = 0
    elsewhere: int = 0
    index: str = ""
    problems: list[Problem] = field(default_factory=list)


def read(job: Job, work: WorkList) -> list[Problem]:
    """Read all rows of a batch into a list. Returns the problems of invalid rows.

    Raises SafelightError that lists the first problems, unless invalid rows are to be skipped, and
    if there is no row at all.
    """
    problems = list(work.fill(read_rows(job.file), job.rules))
    _stop_at(problems, job)
    if not work.count() and not problems:
        raise SafelightError("there is no row in the file")
    return problems


def find_models(job: Job, work: WorkList) -> list[Problem]:
    """Find the models of all rows that are not done; fetch them from the hub if needed.

    Removes rows whose model cannot be found, and returns their problems. Raises SafelightError as
    `read` does, and if no row is left.
    """
    from safelight.weights.find import find

    problems: list[Problem] = []
    total = work.count()
    for model, rows in work.models():
        try:
            find(model, models_dir=job.how.loading.get("models_dir"))
        except SafelightError as error:
            if rows == total:
                raise
            problems += work.fail(model, error)
    _stop_at(problems, job)
    return problems


def _stop_at(problems: list[Problem], job: Job) -> None:
    """Raise SafelightError for invalid rows, unless they are to be skipped."""
    problems.sort(key=lambda one: one.line)
    if problems and not job.skip_invalid:
        told = "; ".join(f"line {one.line}: {one.message}" for one in problems[:MAX_TOLD])
        more = f"; and {len(problems) - MAX_TOLD} more" if len(problems) > MAX_TOLD else ""
        raise SafelightError(
            f"{len(problems)} rows are not valid (--skip-invalid goes on without them): "
            f"{told}{more}",
            code=problems[0].code,
        )


def run(
    job: Job,
    draw: Draw,
    *,
    begin: Callable[[Report], object] = lambda report: None,
    on_row: Callable[[Outcome], object] = lambda outcome: None,
    tell: Callable[[str], object] = lambda text: None,
) -> Report:
    """Draw all rows that are not done yet. Returns a report.

    begin: called before the first row is drawn. on_row: called after each row. tell: called with
    messages for a person. Raises SafelightError for what stops the whole batch.
    """
    output = _output(job, tell)
    with WorkList() as work:
        problems = read(job, work)
        report = Report(rows=work.count() + len(problems), problems=problems)
        with output.locked():
            report.elsewhere = output.resume(work)
            problems += find_models(job, work)
            problems.sort(key=lambda one: one.line)
            report.before = work.count(done=True)
            begin(report)
            try:
                output.begin(problems)
                with contextlib.closing(draw(work, job.how, tell)) as outcomes:
                    for outcome in outcomes:
                        output.keep(outcome)
                        report.drawn += outcome.error is None
                        on_row(outcome)
                report.index = output.finish(index=job.index)
            finally:
                output.close()
    report.failed, report.warned = output.failed, output.warned
    return report


def leave_out_done(job: Job, work: WorkList) -> None:
    """Mark the rows of a list that an earlier run has drawn, as `run` does before it draws."""
    output = _output(job)
    # Do not write into a folder without a batch.
    with output.locked() if ABOUT in output.storage.names() else contextlib.nullcontext():
        output.resume(work)


def draw_here(work: WorkList, how: How, tell: Callable[[str], object]) -> Generator[Outcome]:
    """Draw all rows of a list in this process, one model after the other."""
    from safelight.batch.drawing import Drawer, failed

    models = work.models()
    for model, _ in models:
        try:
            drawer = Drawer(model, how, tell=tell)
        except SafelightError as error:
            if len(models) == 1:
                raise
            yield from (failed(row, error) for row in work.rows(model))
            continue
        yield from drawer.draw(work.rows(model))
        del drawer  # before the next one is loaded


def _output(job: Job, tell: Callable[[str], object] = lambda text: None) -> Output:
    if "parquet" in (job.shards, job.index):
        arrow()  # fail now if it is missing, not after the work
    storage = storage_at(job.out)
    return Output(
        storage if storage.local else Patient(storage, tell),
        _about(job),
        ending=job.how.ending,
        shards=job.shards,
        shard_rows=job.shard_rows,
    )


def _about(job: Job) -> dict[str, Any]:
    """Return what all rows of a batch have in common and their pictures depend on.

    A batch that ran out of memory may go on with low_memory, which changes no picture.
    """
    how = dataclasses.asdict(job.how)
    own = {name: how["loading"][name] for name in sorted(how["loading"].keys() - _NOT_TOLD)}
    return {
        "safelight": __version__,
        "format": how["ending"],
        "exact": how["exact"],
        "shards": job.shards,
        "shard_rows": job.shard_rows if job.shards else None,
        **own,
    }
