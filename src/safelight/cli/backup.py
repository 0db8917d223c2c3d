"""`safelight backup` and `safelight restore`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from safelight.cli import options
from safelight.cli.output import note, say
from safelight.cli.serve import data_folder, make_sure_of_server
from safelight.errors import SafelightError
from safelight.paths import expanded
from safelight.server import private


def backup(
    place: Annotated[Path, Argument(metavar="DEST", help="A new folder.", show_default=False)],
    data_dir: options.DataDir = None,
    database: Annotated[
        str | None, Option(help="As `serve --database` [SQLite in --data-dir].", show_default=False)
    ] = None,
    storage: Annotated[
        str | None, Option(help="As `serve --storage` [--data-dir].", show_default=False)
    ] = None,
    earlier: Annotated[
        Path | None,
        Option(help="A backup of before: what it has is linked, not copied.", show_default=False),
    ] = None,
) -> None:
    """Copy jobs and pictures to a new folder, while they are served."""
    make_sure_of_server()
    if data_dir is not None and not expanded(data_dir).is_dir():
        raise SafelightError(f"--data-dir {data_dir} is no folder")
    root = data_folder(data_dir, make=False)
    private.keep()
    from safelight.server.backup import back_up
    from safelight.storage import checked

    url = database or private.database_url(root)
    elsewhere = None if storage is None else checked(storage)
    before = None if earlier is None else expanded(earlier)
    made = back_up(root, url, place, earlier=before, storage=elsewhere)
    linked = f", {made.linked} of them linked" if earlier is not None else ""
    note(
        f"{made.jobs} jobs and {made.pictures} pictures: {made.files} files{linked}, "
        f"{made.size / 1e6:.1f} MB"
    )
    if made.lost:
        note(f"{made.lost} files are lost: the data folder does not have them any more, either")
    say(str(place))


def restore(
    place: Annotated[Path, Argument(metavar="SRC", help="A backup.", show_default=False)],
    data_dir: Annotated[
        Path | None, Option(help="An empty folder [the user's data folder].", show_default=False)
    ] = None,
    database: Annotated[
        str | None,
        Option(help="An empty database, as `serve --database` has it.", show_default=False),
    ] = None,
    storage: Annotated[
        str | None,
        Option(help="An empty storage, as `serve --storage` has it.", show_default=False),
    ] = None,
) -> None:
    """Copy a backup to an empty data folder.

    Each file is compared with its SHA-256.
    """
    make_sure_of_server()
    private.keep()
    root = data_folder(data_dir)
    from safelight.server.backup import restore as copy_back
    from safelight.storage import checked

    elsewhere = None if storage is None else checked(storage)
    made = copy_back(place, root, database, storage=elsewhere)
    note(f"{made.jobs} jobs and {made.pictures} pictures of {made.created}: {made.files} files")
    say(str(root))
