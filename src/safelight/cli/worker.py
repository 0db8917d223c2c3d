"""`safelight worker`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from safelight.cli import options
from safelight.errors import SafelightError
from safelight.server import private
from safelight.server.process import Settings, spawn


def worker(
    model: Annotated[str, Argument(help="As `generate --model`.")] = "embedded",
    *,
    queue: Annotated[
        str, Option(help="The PostgreSQL that the server has as --database.", show_default=False)
    ],
    storage: Annotated[
        Path, Option(help="The server's --data-dir, shared with this machine.", show_default=False)
    ],
    models_dir: options.ModelsDir = None,
    vae: options.Vae = None,
    refiner: options.Refiner = None,
    preview_vae: options.PreviewVae = None,
    wildcards: options.Wildcards = None,
    styles_file: options.StylesFile = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    low_memory: options.LowMemory = False,
    exact: Annotated[
        bool, Option("--exact", help="One picture at a time: equal to the byte.")
    ] = False,
) -> None:
    """Draw the jobs of a server elsewhere, until SIGTERM."""
    if any(find_spec(name) is None for name in ("sqlalchemy", "psycopg")):
        raise SafelightError("a worker needs more: pip install 'safelight[server,postgresql]'")
    if not queue.startswith("postgresql"):
        raise SafelightError(
            "--queue must be the URL of a PostgreSQL, as postgresql://user@host/name"
        )
    private.keep()
    options.with_words({}, styles_file=styles_file, wildcards=wildcards)
    settings = Settings(
        model=model,
        models_dir=models_dir,
        vae=vae,
        refiner=refiner,
        preview_vae=preview_vae,
        wildcards_dir=wildcards,
        styles_file=styles_file,
        url=queue,
        root=str(storage.resolve()),
        device=device,
        dtype=dtype,
        low_memory=low_memory,
        exact=exact,
    )
    child = spawn(settings)  # loads its model while the imports below go on
    from safelight.server.station import work

    work(settings, child)
