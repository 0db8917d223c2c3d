"""`safelight serve`."""

import gc
import os
from importlib.util import find_spec
from pathlib import Path
from socket import socket
from typing import Annotated, Any

from typer import Option

from safelight.cli import options
from safelight.cli.groups import Serving, spread
from safelight.cli.output import note
from safelight.errors import SafelightError
from safelight.server import private
from safelight.server.callers import network
from safelight.server.keep import Keep
from safelight.server.listening import hold, host_name, listen, origin_of
from safelight.server.process import spawn
from safelight.server.scaling import IDLE, WorkerPlan, bounds
from safelight.server.served import Served
from safelight.server.settings import WorkerSettings
from safelight.server.tokens import AUTO, hide_argument, read_token


@spread
def serve(
    *,
    host: Annotated[str, Option(help="Where to listen; beyond loopback only with a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, Option(min=0, max=65535, help="0 takes a free one.")] = 7860,
    data_dir: options.DataDir = None,
    storage: Annotated[
        str | None,
        Option(
            help="Pictures, as s3://bucket/prefix, or another folder [in --data-dir].",
            show_default=False,
        ),
    ] = None,
    model: Annotated[str, Option(help="As `generate --model`.")] = "embedded",
    serving: Serving,
    token: Annotated[
        str | None,
        Option(
            help="`auto` makes one. Others are better given by --token-file or SAFELIGHT_TOKEN.",
            show_default=False,
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        Option(help="File with the token that every request needs.", show_default=False),
    ] = None,
    database: Annotated[
        str | None,
        Option(help="SQLAlchemy's URL of a PostgreSQL [SQLite in --data-dir].", show_default=False),
    ] = None,
    allow_host: Annotated[
        list[str] | None, Option(help="A name that this server is reached by.", show_default=False)
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        Option(help="Origin of other web pages that may use this server.", show_default=False),
    ] = None,
    trust_proxy: Annotated[
        list[str] | None,
        Option(help="Address or network whose X-Forwarded-… is believed.", show_default=False),
    ] = None,
    short_addresses: Annotated[
        bool, Option("--short-addresses", help="Log only the network part of clients' addresses.")
    ] = False,
    webhooks_to_private: Annotated[
        bool,
        Option(
            "--webhooks-to-private", help="Webhooks may go to this machine and private networks."
        ),
    ] = False,
    workers: Annotated[
        str,
        Option(
            metavar="N|MIN:MAX",
            help="0 leaves all drawing to `safelight worker`; with --ray: how many.",
        ),
    ] = "1",
    ray: Annotated[
        str | None,
        Option(
            metavar="ADDRESS",
            help="Keep workers on a Ray cluster; local starts one on this machine.",
            show_default=False,
        ),
    ] = None,
    cpus_per_worker: Annotated[
        float | None,
        Option(
            min=0.1,
            help="CPUs of each worker on Ray [all CPUs divided by MAX].",
            show_default=False,
        ),
    ] = None,
    gpus_per_worker: Annotated[
        float | None,
        Option(
            min=0,
            help="GPUs of each worker on Ray, as 0.5 [1 where there are some].",
            show_default=False,
        ),
    ] = None,
    idle_timeout: Annotated[
        float | None,
        Option(min=1, help="With --ray: seconds until a worker goes [60].", show_default=False),
    ] = None,
    queue: Annotated[int, Option(help="Most pictures that may wait.")] = 1000,
    keep: Annotated[
        str | None,
        Option(
            help="Finished jobs to keep: an age, a size, a number, as 90d,50GB,10000 [all].",
            show_default=False,
        ),
    ] = None,
    exact: options.Exact = False,
) -> None:
    """Serve pictures over HTTP.

    The server has an API of its own, OpenAI's and AUTOMATIC1111's.
    """
    if queue < 1:
        raise SafelightError(f"--queue {queue}: expected 1 or more")
    least, most = bounds(workers)
    plan = None
    if ray is not None:
        idle = IDLE if idle_timeout is None else idle_timeout
        plan = WorkerPlan(least, most, ray, cpus_per_worker, gpus_per_worker, idle=idle)
        make_sure_of_ray(plan)
    elif {cpus_per_worker, gpus_per_worker, idle_timeout} != {None}:
        raise SafelightError(
            "--cpus-per-worker, --gpus-per-worker and --idle-timeout are for workers of --ray"
        )
    elif ":" in workers or most > 1:
        raise SafelightError(
            f"--workers {workers} needs --ray, as --ray local; without it there is 1 or 0"
        )
    if (plan is not None or not most) and not (database or "").startswith("postgresql"):
        given = f"--workers {workers}" if plan is None else "--ray"
        raise SafelightError(f"{given} needs a --database of PostgreSQL, which workers can join")
    kept = None if keep is None else Keep.parse(keep)
    hosts = frozenset(map(host_name, allow_host or ()))
    origins = frozenset(map(origin_of, allow_origin or ()))
    proxies = tuple(map(network, trust_proxy or ()))
    secret, made = token_of(token, token_file)
    if secret is None and trust_proxy:
        raise SafelightError(
            "--trust-proxy lets other machines in: add --token auto, or give a token by "
            "--token-file or SAFELIGHT_TOKEN; an empty one is none"
        )
    if secret is None and allow_host:
        note("--allow-host without a token: whoever reaches this server by that name may use it")
    if secret is None and allow_origin:
        note("--allow-origin without a token: every page of that origin may use this server")
    from safelight.storage import checked

    private.keep()
    root = data_folder(data_dir)
    url = database or private.database_url(root)
    elsewhere = None if storage is None else checked(storage)
    settings = serving.settings(model, url, str(root), exact=exact, storage=elsewhere)
    listening = listen(host, port, secret)
    hold(root, listening)
    start(
        settings,
        listening,
        draws=plan or bool(most),
        host=host,
        token=secret,
        auto=made,
        hosts=hosts,
        origins=origins,
        proxies=proxies,
        short_addresses=short_addresses,
        webhooks_to_private=webhooks_to_private,
        bound=queue,
        keep=kept,
    )


def start(
    settings: WorkerSettings, listening: socket, *, draws: bool | WorkerPlan = True, **how: Any
) -> None:
    """Serve with the studio's page until told to end.

    draws: True for a worker of its own, a WorkerPlan for workers on Ray, False for none. how:
    arguments of `server.run.serve`.
    """
    make_sure_of_server()
    Served(settings).check()
    child = draws if isinstance(draws, WorkerPlan) else None
    if draws is True:
        child = spawn(settings)  # it loads its model during the imports below
    gc.disable()  # it takes a tenth of the imports' time, for objects that stay
    from safelight.server.run import serve as run
    from safelight.studio.mount import Studio

    gc.freeze()
    gc.enable()
    run(settings, child, listening, page=Studio, **how)


def make_sure_of_ray(plan: WorkerPlan) -> None:
    """Raise SafelightError if Ray is not installed, or if the plan keeps no worker."""
    if find_spec("ray") is None:
        raise SafelightError("--ray needs Ray: pip install 'safelight[ray]'", code="not_installed")
    if not plan.least:
        raise SafelightError("--ray keeps one worker at least: --workers 1:8")


def make_sure_of_server() -> None:
    """Raise SafelightError if the packages that serving needs are not installed."""
    needed = ("alembic", "fastapi", "sqlalchemy", "uvicorn")
    if any(find_spec(name) is None for name in needed):
        raise SafelightError("serving needs more: pip install 'safelight[server]'")


def token_of(argument: str | None, file: Path | None) -> tuple[str | None, bool]:
    """Return the server's token, and whether it was made here.

    A token among the arguments is removed from the process list.
    """
    secret, made = read_token(argument, file)
    if argument is not None and argument != AUTO:
        note(
            "--token: all users of this machine can read arguments for a moment; "
            "--token-file or SAFELIGHT_TOKEN takes its place in the next version"
        )
        hide_argument(secret)
    return secret, made


def data_folder(given: Path | None, *, make: bool = True) -> Path:
    """Return the named folder, or the user's own by the XDG base directories.

    make: whether to make it if it does not exist.
    """
    own = Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share") / "safelight"
    try:
        root = (given or own).expanduser().resolve()
    except RuntimeError:
        raise SafelightError("there is no home directory: give --data-dir as a full path") from None
    if not make:
        return root
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SafelightError(f"--data-dir {root} cannot be made: {error.strerror}") from None
    return root
