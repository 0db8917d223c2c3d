"""`safelight studio`: the server, and its page in the browser."""

import os
import threading
import webbrowser
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from typer import Option

from safelight.cli import options
from safelight.cli.output import note
from safelight.cli.serve import data_folder, start
from safelight.errors import SafelightError
from safelight.server.listening import ServedError, hold, link, listen
from safelight.server.process import Settings
from safelight.server.tokens import AUTO, read_token


def studio(
    port: Annotated[
        int | None,
        Option(
            min=0, max=65535, help="[7860, or if that is taken a free one].", show_default=False
        ),
    ] = None,
    data_dir: Annotated[
        Path | None, Option(help="Jobs and pictures [the user's data folder].", show_default=False)
    ] = None,
    model: Annotated[str, Option(help="As `generate --model`.")] = "embedded",
    models_dir: options.ModelsDir = None,
    allow_models: options.AllowModels = None,
    model_memory: options.ModelMemory = None,
    vae: options.Vae = None,
    refiner: options.Refiner = None,
    preview_vae: options.PreviewVae = None,
    wildcards: options.Wildcards = None,
    styles_file: options.StylesFile = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    low_memory: options.LowMemory = False,
    token: Annotated[
        str | None,
        Option(help="`auto` asks for a token, which the opened link has.", show_default=False),
    ] = None,
    browser: Annotated[bool, Option(help="Open it in the browser.")] = True,
) -> None:
    """Open the page: make pictures and watch them develop, find, compare, look inside."""
    if find_spec("gradio") is None:
        raise SafelightError("the studio needs more: pip install 'safelight[studio]'")
    if token not in (None, AUTO):
        raise SafelightError("--token must be auto: others go into the variable SAFELIGHT_TOKEN")
    secret = read_token(token, None)
    options.with_words({}, styles_file=styles_file, wildcards=wildcards)
    root = data_folder(data_dir)
    host = "127.0.0.1"
    try:
        listening = listen(host, 7860 if port is None else port, secret)
    except SafelightError:
        if port is not None:
            raise
        listening = listen(host, 0, secret)
    settings = Settings(
        model=model,
        models_dir=models_dir,
        vae=vae,
        refiner=refiner,
        preview_vae=preview_vae,
        wildcards_dir=wildcards,
        styles_file=styles_file,
        url=f"sqlite:///{root / 'jobs.sqlite3'}",
        root=str(root),
        device=device,
        dtype=dtype,
        low_memory=low_memory,
        allowed=options.names(allow_models),
        model_memory=options.memory_size(model_memory),
    )
    try:
        hold(root, listening)
    except ServedError as served:
        note(str(served))
        if browser:
            webbrowser.open(f"{served.address}/studio")
        return
    if browser:  # in a thread: some browsers are waited for
        address = _opened(root, link(listening, secret))
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
    start(settings, listening, host=host, token=secret, auto=token == AUTO)


def _opened(root: Path, link: str) -> str:
    """Return what the browser is to open: a link with a token through a file of ours alone.

    All users of the machine can read the arguments that the browser is started with.
    """
    if "?" not in link:
        return link
    page = root / "open.html"
    page.unlink(missing_ok=True)
    with os.fdopen(os.open(page, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(f'<!doctype html><meta http-equiv="refresh" content="0; url={link}">')
    return page.as_uri()
