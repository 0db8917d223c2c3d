"""`safelight studio`: the server, and its page in the browser."""

import os
import threading
import webbrowser
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from typer import Option

from safelight.cli import options
from safelight.cli.groups import Serving, spread
from safelight.cli.output import note
from safelight.cli.serve import data_folder, start
from safelight.errors import SafelightError
from safelight.server.listening import ServedError, hold, link, listen
from safelight.server.private import database_url
from safelight.server.tokens import AUTO, read_token


@spread
def studio(
    *,
    port: Annotated[
        int | None,
        Option(
            min=0, max=65535, help="[7860, or if that is taken a free one].", show_default=False
        ),
    ] = None,
    data_dir: options.DataDir = None,
    model: Annotated[str, Option(help="As `generate --model`.")] = "embedded",
    serving: Serving,
    token: Annotated[
        str | None,
        Option(
            help="auto: protect the page by a token; the opened link contains it.",
            show_default=False,
        ),
    ] = None,
    browser: Annotated[bool, Option(help="Open it in the browser.")] = True,
) -> None:
    """Open the page in the browser.

    It makes pictures and shows how they develop, finds and compares them, and looks inside.
    """
    if find_spec("gradio") is None:
        raise SafelightError("the studio needs more: pip install 'safelight[studio]'")
    if token not in (None, AUTO):
        raise SafelightError("--token must be auto: others go into the variable SAFELIGHT_TOKEN")
    secret, made = read_token(token, None)
    root = data_folder(data_dir)
    settings = serving.settings(model, database_url(root), str(root))
    host = "127.0.0.1"
    try:
        listening = listen(host, 7860 if port is None else port, secret)
    except SafelightError:
        if port is not None:
            raise
        listening = listen(host, 0, secret)
    try:
        hold(root, listening)
    except ServedError as served:
        note(str(served))
        if browser:
            webbrowser.open(f"{served.address}/studio")
        return
    if browser:  # in a thread: the call may wait for the browser
        address = _opened(root, link(listening, secret))
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
    start(settings, listening, host=host, token=secret, auto=made)


def _opened(root: Path, link: str) -> str:
    """Return what the browser is to open: the link, or a private file that leads to it.

    All users of the machine can read the arguments of the browser, so a link with a token must not
    be among them.
    """
    if "?" not in link:
        return link
    page = root / "open.html"
    page.unlink(missing_ok=True)
    with os.fdopen(os.open(page, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(f'<!doctype html><meta http-equiv="refresh" content="0; url={link}">')
    return page.as_uri()
