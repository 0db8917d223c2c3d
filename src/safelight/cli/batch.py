"""`safelight batch`: draw a file of requests."""

import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from typer import Argument, Exit, Option

from safelight.cli import options
from safelight.cli.groups import Loading, spread
from safelight.cli.loading import import_torch
from safelight.cli.output import bar, note, say, warn
from safelight.errors import SafelightError
from safelight.paths import expanded

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from safelight.batch.on_ray import Cluster
    from safelight.batch.output import Outcome
    from safelight.batch.run import How, Job, Report
    from safelight.batch.worklist import WorkList

FAILED = 1
"""The exit code if some rows failed."""

TOLD_EVERY = 60
"""Seconds between two lines of progress without a terminal."""

Format = Literal["png", "jpg", "webp"]
Shards = Literal["webdataset", "parquet"]
Index = Literal["jsonl", "parquet"]


@spread
def batch(
    settings: dict[str, Any],
    *,
    file: Annotated[
        str, Argument(help="Rows of settings: .jsonl, .csv, .tsv or .parquet.", show_default=False)
    ],
    out: Annotated[
        str,
        Option("--out", "-o", help="A folder, or a URL as s3://bucket/folder.", show_default=False),
    ],
    model: options.Model = None,
    loading: Loading,
    id_column: Annotated[
        str | None,
        Option(
            "--id",
            help="The column that names each row and its pictures [id, or the row's number].",
            show_default=False,
        ),
    ] = None,
    given: Annotated[
        list[str] | None,
        Option(
            "--set",
            help='A setting made of columns, as prompt="{animal} in {place}"; may be given more '
            "than once.",
            show_default=False,
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        Option(help="A column that is left out; may be given more than once.", show_default=False),
    ] = None,
    form: Annotated[Format, Option("--format", help="The pictures' format.")] = "png",
    shards: Annotated[
        Shards | None, Option(help="Write many pictures into one file.", show_default=False)
    ] = None,
    shard_rows: Annotated[
        int | None, Option(min=1, help="With --shards: rows of each [1000].", show_default=False)
    ] = None,
    index: Annotated[
        Index, Option(help="parquet writes the index as index.parquet, too, at the end.")
    ] = "jsonl",
    exact: Annotated[
        bool, Option("--exact", help="Draw each picture alone: equal to the byte, but slower.")
    ] = False,
    threads: Annotated[
        int | None, Option(min=1, help="Threads of each process.", show_default=False)
    ] = None,
    skip_invalid: Annotated[
        bool, Option("--skip-invalid", help="Rows that are not valid fail; the others are drawn.")
    ] = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Check all rows, draw three, and say what all would take.")
    ] = False,
    ray: Annotated[
        str | None,
        Option(
            metavar="ADDRESS",
            help="Draw with the workers of a Ray cluster; local starts one on this machine.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        Option(min=1, help="With --ray: how many [one for each GPU, or node].", show_default=False),
    ] = None,
    gpus: Annotated[
        float | None,
        Option(min=0, help="With --ray: GPUs of each worker, as 0.5.", show_default=False),
    ] = None,
    task_rows: Annotated[
        int | None,
        Option(
            min=1,
            help="With --ray: rows that a worker is given at once [8].",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Draw a file of requests, a row for each.

    The same command goes on where a run was killed. Options of settings hold for rows that do not
    name them. Prints the path of the index.
    """
    from safelight.batch.check import Rules
    from safelight.batch.run import How, Job
    from safelight.families.control import each
    from safelight.request_fields import PICTURES

    if shard_rows is not None and shards is None:
        raise SafelightError("--shard-rows needs --shards webdataset or parquet")
    settings = loading.with_words(settings)
    pictures = {
        name: [str(expanded(one).absolute()) for one in each(settings[name])]
        for name in PICTURES
        if name in settings
    }
    rules = Rules(
        defaults={**settings, **pictures},
        templates=_templates(given or []),
        id_column=id_column,
        ignored=frozenset(ignore or ()),
        model=model,
        folder=Path(file).absolute().parent if "://" not in file else Path.cwd(),
    )
    cluster = _cluster(ray, workers, gpus, task_rows)
    job = Job(
        file=file,
        out=out,
        rules=rules,
        how=How(loading.keywords, exact, threads, form),
        shards=shards,
        shard_rows=shard_rows or 1000,
        index=index,
        skip_invalid=skip_invalid,
    )
    if dry_run:
        _dry_run(job, workers or 1)
    else:
        _run(job, cluster)


def _templates(given: list[str]) -> dict[str, str]:
    found = {}
    for text in given:
        name, equals, template = text.partition("=")
        if not equals:
            raise SafelightError(
                f'--set must be as in prompt="{{animal}} in {{place}}", not {text!r:.60}'
            )
        name = name.strip().replace("-", "_")
        if name in found:
            raise SafelightError(f"--set {name} is given twice: give it once")
        found[name] = template
    return found


def _cluster(
    ray: str | None, workers: int | None, gpus: float | None, rows: int | None
) -> "Cluster | None":
    if ray is None:
        if {workers, gpus, rows} != {None}:
            raise SafelightError(
                "--workers, --gpus and --task-rows need --ray local, or a cluster's address"
            )
        return None
    from safelight.batch.on_ray import Cluster

    return Cluster(ray, workers, gpus, rows or 8)


def _run(job: "Job", cluster: "Cluster | None") -> None:
    from safelight.batch.run import run

    with Bar() as bar:
        try:
            report = run(
                job,
                _draw_here if cluster is None else cluster.draw,
                begin=bar.begin,
                on_row=bar.on_row,
                tell=bar.tell,
            )
        except KeyboardInterrupt:
            note("the same command goes on from here")
            raise
    say(report.index)
    _tell(report)
    if report.failed:
        raise Exit(FAILED)


def _draw_here(work: "WorkList", how: "How", tell: Callable[[str], object]) -> "Generator[Outcome]":
    import_torch()
    from safelight.batch.run import draw_here

    yield from draw_here(work, how, tell)


def _tell(report: "Report") -> None:
    before = f", {report.before} before" if report.before else ""
    note(f"{report.drawn} rows drawn{before}, {report.failed} failed, of {report.rows}")
    if report.failed:
        warn(f"{report.failed} rows failed: errors.jsonl beside the index says why")
    if report.warned:
        warn(f"{report.warned} rows were drawn with warnings, which the index has")
    if report.elsewhere:
        warn(f"the index has {report.elsewhere} rows that are not in the file")


def _dry_run(job: "Job", workers: int) -> None:
    from safelight.batch.run import find_models, leave_out_done, read
    from safelight.batch.worklist import WorkList

    with WorkList() as work:
        problems = read(job, work)
        leave_out_done(job, work)
        problems += find_models(job, work)
        import_torch()
        from safelight.batch.estimate import estimate, memory

        total, done = work.count(), work.count(done=True)
        say(f"rows: {total}, {done} of them done, {len(problems)} more not valid")
        seconds = 0.0
        for name, _ in work.models():
            found = estimate(work, name, job.how, note)
            more = f"; {found.failing} more will fail" if found.failing else ""
            say(f"{name}: {found.rows} rows, about {found.seconds / found.rows:.2f} s each{more}")
            seconds += found.seconds
    say(f"memory: {memory()}")
    said = f" with {workers} workers" if workers > 1 else ""
    say(f"time: about {seconds / workers / 3600:.2f} hours{said}")


class Bar(AbstractContextManager["Bar"]):
    """Shows progress and the time left on stderr: a bar on terminals, else a line a minute."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._total = self._done = self._failed = 0
        self._began = self._told = time.monotonic()

    def __enter__(self) -> Self:
        self._progress = bar(elapsed=True)
        if self._progress is not None:
            self._task = self._progress.add_task("reading", total=None)
            self._progress.start()
        return self

    def begin(self, report: "Report") -> None:
        """Show how many rows there are to draw."""
        self._total = report.rows - report.before - len(report.problems)
        self._began = self._told = time.monotonic()
        self.tell(f"{self._total} rows to draw, {report.before} are done")
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, total=self._total, description="rows")

    def on_row(self, outcome: "Outcome") -> None:
        """Count a row."""
        self._done += 1
        self._failed += outcome.error is not None
        if self._progress is not None and self._task is not None:
            failed = f", {self._failed} failed" if self._failed else ""
            self._progress.update(self._task, advance=1, description=f"rows{failed}")
            return
        now = time.monotonic()
        if now - self._told >= TOLD_EVERY:
            self._told = now
            left = (now - self._began) / self._done * (self._total - self._done)
            note(
                f"{self._done} of {self._total} rows, {self._failed} failed, "
                f"about {left / 60:.0f} minutes left"
            )

    def tell(self, text: str) -> None:
        """Print a line above the bar."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        else:
            note(text)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
