"""Print for people and for programs: lines, tables, a progress bar."""

import codecs
import io
import json
import os
import sys
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import typer

from safelight.errors import SafelightError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def printable(text: object) -> str:
    """Return text on one line, with control characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def escape_what_stdout_lacks() -> None:
    """Make stdout escape characters that its encoding lacks, as JSON does: JSON stays JSON."""
    codecs.register_error("json", _escaped)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="json")


def _escaped(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def say(text: object) -> None:
    """Print a line on stdout. If the reader is gone, end the command with exit code 1."""
    try:
        typer.echo(text)
    except OSError as error:
        # The rest of the buffer must not be written again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise typer.Exit(1) from None
        raise SafelightError(f"stdout cannot be written: {error.strerror}") from None


def help_alone(context: typer.Context) -> None:
    """Print the help of a group of commands if no command was given."""
    if context.invoked_subcommand is None:
        say(context.get_help())


def note(text: str) -> None:
    """Print a line on stderr. If it cannot be written, the work goes on."""
    with suppress(OSError):
        typer.echo(printable(text), err=True)


def warn(text: str) -> None:
    note(f"warning: {text}")


def fail(text: str) -> None:
    note(f"error: {text}")


def pairs(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Return `key: value` lines without empty values; nested dictionaries give dotted keys."""
    lines: list[str] = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += pairs(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple) and value:
            lines.append(printable(f"{prefix}{key}: {', '.join(map(str, value))}"))
        elif value not in (None, "", [], ()):
            lines.append(printable(f"{prefix}{key}: {value}"))
    return lines


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Return lines of left-aligned columns."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def bar(*, elapsed: bool = False) -> "Progress | None":
    """Return a progress bar on stderr, not yet started; None if stderr is no terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        return None
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *([TimeElapsedColumn()] if elapsed else []),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


class StepBar:
    """A progress bar on stderr that `Model.generate(on_step=…)` moves; shown on terminals only."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress = bar()
        if self._progress is not None:
            self._task = self._progress.add_task("loading", total=None)
            self._progress.start()
        return self

    def __call__(self, event: Any) -> None:
        if self._progress is not None and self._task is not None:
            which = f"picture {event.image_index + 1} of {self._count}, " if self._count > 1 else ""
            self._progress.update(
                self._task,
                description=f"{which}step {event.step}",
                total=event.steps * self._count,
                advance=1,
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
