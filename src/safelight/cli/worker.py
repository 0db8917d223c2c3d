"""`safelight worker`."""

from importlib.util import find_spec
from typing import Annotated

from typer import Argument, Option

from safelight.cli import options
from safelight.cli.groups import Serving, spread
from safelight.errors import SafelightError
from safelight.server import private
from safelight.server.process import spawn


@spread
def worker(
    model: Annotated[str, Argument(help="As `generate --model`.")] = "embedded",
    *,
    queue: Annotated[
        str, Option(help="The PostgreSQL that the server has as --database.", show_default=False)
    ],
    storage: Annotated[
        str,
        Option(
            help="The server's --storage, or its --data-dir as a shared folder.",
            show_default=False,
        ),
    ],
    serving: Serving,
    exact: options.Exact = False,
) -> None:
    """Draw the jobs of a server elsewhere, until SIGTERM."""
    if any(find_spec(name) is None for name in ("sqlalchemy", "psycopg")):
        raise SafelightError("a worker needs more: pip install 'safelight[server,postgresql]'")
    if not queue.startswith("postgresql"):
        raise SafelightError(
            "--queue must be the URL of a PostgreSQL, as postgresql://user@host/name"
        )
    from safelight.storage import checked

    private.keep()
    settings = serving.settings(model, queue, checked(storage), exact=exact, elsewhere=True)
    child = spawn(settings)  # it loads its model during the imports below
    from safelight.server.station import work

    work(settings, child)
