"""`safelight keys`: the keys of those who use a server, each with a name and limits of its own."""

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from safelight.cli.output import note, say, table
from safelight.cli.serve import data_folder
from safelight.errors import SafelightError
from safelight.server import private

if TYPE_CHECKING:
    from safelight.server.people import Key, People

app = typer.Typer(
    help="Give out keys to a server, take them back, and bound what each may ask for.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Name = Annotated[str, Argument(help="Whose key it is.", show_default=False)]
Data = Annotated[
    Path | None,
    Option("--data-dir", help="As `serve --data-dir` [the user's].", show_default=False),
]
Url = Annotated[str | None, Option("--database", help="As `serve --database`.", show_default=False)]
Pictures = Annotated[
    str | None,
    Option(help="The most pictures, as 100/day; none for no limit.", show_default=False),
]
PixelSteps = Annotated[
    str | None,
    Option(
        help="The most width × height × steps × pictures, as 2e9/day; none for no limit.",
        show_default=False,
    ),
]


@app.command()
def add(
    name: Name,
    pictures: Pictures = None,
    pixel_steps: PixelSteps = None,
    data_dir: Data = None,
    database: Url = None,
) -> None:
    """Make a key and print it. It is kept as a hash: it cannot be shown again."""
    limits = _limits(pictures, pixel_steps)
    with _People(data_dir, database) as people:
        secret = people.add_key(name)
        people.allow(name, limits)
    say(secret)
    note(f"This is the key of {name}. Keep it: it is not shown again.")


@app.command("list")
def list_keys(
    data_dir: Data = None,
    database: Url = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the keys with their limits, and what is left of these."""
    with _People(data_dir, database) as people:
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
def remove(name: Name, data_dir: Data = None, database: Url = None) -> None:
    """Remove a key. A running server refuses it within a second or two; its jobs stay."""
    with _People(data_dir, database) as people:
        people.remove_key(name)
    note(f"The key of {name} is no key any more.")


@app.command()
def limit(
    name: Name,
    pictures: Pictures = None,
    pixel_steps: PixelSteps = None,
    data_dir: Data = None,
    database: Url = None,
) -> None:
    """Set how much a key may ask for. What was used already stays counted."""
    limits = _limits(pictures, pixel_steps)
    if not limits:
        raise SafelightError("say which limit: --pictures 100/day, or --pixel-steps 2e9/day")
    with _People(data_dir, database) as people:
        people.allow(name, limits)


def _limits(pictures: str | None, pixel_steps: str | None) -> list[Any]:
    from safelight.server.allowances import parse

    given = {"pictures": pictures, "pixel_steps": pixel_steps}
    return [(kind, parse(kind, text)) for kind, text in given.items() if text is not None]


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


class _People:
    """The database of keys, opened and closed."""

    def __init__(self, data_dir: Path | None, database: str | None) -> None:
        private.keep()
        self._url = database or f"sqlite:///{data_folder(data_dir) / private.DATABASE}"

    def __enter__(self) -> "People":
        from safelight.server.people import People

        self._people = People(self._url)
        self._people.prepare()
        return self._people

    def __exit__(self, *_: object) -> None:
        self._people.close()
