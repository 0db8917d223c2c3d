"""`safelight keys`: the keys of people who use a server, each with a name and its own limits."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from safelight.cli.groups import spread
from safelight.cli.output import help_alone, note, say, table
from safelight.cli.serve import data_folder, make_sure_of_server
from safelight.errors import SafelightError
from safelight.server import private

if TYPE_CHECKING:
    from safelight.server.people import Key, People

app = typer.Typer(
    help="Add, limit and remove the keys of a server's users.",
    invoke_without_command=True,
    callback=help_alone,
    rich_markup_mode=None,
)

Name = Annotated[str, Argument(help="Whose key it is.", show_default=False)]


@dataclass(frozen=True)
class Where:
    """Where the keys are kept."""

    data_dir: Annotated[
        Path | None,
        Option(help="As `serve --data-dir` [the user's data folder].", show_default=False),
    ] = None
    database: Annotated[str | None, Option(help="As `serve --database`.", show_default=False)] = (
        None
    )

    @contextmanager
    def opened(self, *, make: bool = False) -> Iterator["People"]:
        """Open the database of keys for a `with` block. make: whether to make a data folder."""
        make_sure_of_server()
        private.keep()
        url = self.database
        if url is None:
            root = data_folder(self.data_dir, make=make)
            if not (root / private.DATABASE).exists():
                if not make:
                    raise SafelightError(
                        f"{root} has no server's jobs: give its --data-dir or --database"
                    )
                note(f"no server has used {root} so far")
            url = private.database_url(root)
        from safelight.server.people import People

        people = People(url)
        try:
            people.prepare()
            yield people
        finally:
            people.close()


@dataclass(frozen=True)
class Limits:
    """How much a key may ask for."""

    pictures: Annotated[
        str | None,
        Option(help="The most pictures, as 100/day; none for no limit.", show_default=False),
    ] = None
    pixel_steps: Annotated[
        str | None,
        Option(
            help="The most width × height × steps × pictures, as 2e9/day; none for no limit.",
            show_default=False,
        ),
    ] = None

    def parsed(self) -> list[Any]:
        """Return the limits that were given, by kind. Raises SafelightError for an invalid one."""
        make_sure_of_server()
        from safelight.server.allowances import parse

        given = {"pictures": self.pictures, "pixel_steps": self.pixel_steps}
        return [(kind, parse(kind, text)) for kind, text in given.items() if text is not None]


@app.command()
@spread
def add(name: Name, *, limits: Limits, where: Where) -> None:
    """Make a key and print it. It is kept as a hash: it cannot be shown again."""
    allowed = limits.parsed()
    with where.opened(make=True) as people:
        secret = people.add_key(name)
        people.allow(name, allowed)
    say(secret)
    note(f"This is the key of {name}. Keep it: it is not shown again.")


@app.command("list")
@spread
def list_keys(
    *,
    where: Where,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the keys with their limits, and what is left of these."""
    with where.opened() as people:
        found = people.all_keys()
    if as_json:
        say(json.dumps([_described(key) for key in found]))
        return
    rows = [("name", "since", "limits")]
    for key in found:
        told = _described(key)
        limits = [f"{one['left']:.12g} of {one['limit']} {one['kind']}" for one in told["limits"]]
        rows.append((key.name, told["created"][:10], ", ".join(limits) or "none"))
    for line in table(rows):
        say(line)


@app.command()
@spread
def remove(name: Name, *, where: Where) -> None:
    """Remove a key. A running server refuses it within a second or two; its jobs stay."""
    with where.opened() as people:
        people.remove_key(name)
    note(f"The key of {name} is no key any more.")


@app.command()
@spread
def limit(name: Name, *, limits: Limits, where: Where) -> None:
    """Set how much a key may ask for. What was used already stays counted."""
    allowed = limits.parsed()
    if not allowed:
        raise SafelightError("say which limit: --pictures 100/day, or --pixel-steps 2e9/day")
    with where.opened() as people:
        people.allow(name, allowed)


def _described(key: "Key") -> dict[str, Any]:
    from safelight.server.allowances import KINDS

    now = time.time()
    return {
        "name": key.name,
        "created": datetime.fromtimestamp(key.created, UTC).isoformat(timespec="seconds"),
        "limits": [
            {"kind": KINDS[one.kind], "limit": str(one), "left": one.left(now)}
            for one in key.allowances
        ],
    }
