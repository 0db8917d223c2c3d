"""Mount the page at /studio of a running server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import (
    FileResponse,
    HTMLResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
)

from safelight.errors import SafelightError
from safelight.server.bodies import (
    MAX_JSON,
    MAX_MARKS,
    read_body,
    read_event,
)
from safelight.server.callers import Caller, caller_of
from safelight.server.decoding import Decoders
from safelight.server.hub import Hub
from safelight.server.uploads import Uploads
from safelight.studio.paths import KEPT_AT, PATH, folder_of
from safelight.studio.sessions import MAX_RUNNING, Sessions

log = logging.getLogger("safelight.studio")

# The page may contact no other host, whatever a prompt or a picture's text contains.
_POLICY = (
    b"default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    b"style-src 'self' 'unsafe-inline'; base-uri 'self'; form-action 'self'; object-src 'none'; "
    b"frame-ancestors 'self'"
)
_SHOWN = re.compile(
    r"(inside/([0-9a-f]{16}/)?[0-9a-f]{32}\.html|grids/([0-9a-f]{16}/)?[0-9a-f]{32}\.png)"
    r"|training/digits-\d{1,5}/step-\d{6}\.png"
)
# The routes of Gradio that the page needs. Others (a proxy, a code editor …) are not served.
_ASKED = re.compile(
    r"/studio(/(theme\.css|config|(assets|static)/.+|gradio_api/(queue/(join|data)|upload"
    r"|upload_progress|startup-events|app_id|file=(?!http).+))?)?"
)
SESSIONS = 40
"""The most pages whose state Gradio keeps, the ones used last; each takes a third of a megabyte. An
older page loses only the seed that it drew last.
"""

UPLOADS = "uploads"
UPLOAD = f"{PATH}/gradio_api/upload"
EVENT = f"{PATH}/gradio_api/queue/join"
MESSAGES = f"{PATH}/gradio_api/queue/data"

_MISSING = "The studio is not installed: pip install 'safelight[studio]'\n"
_ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" '
    'rx="4" fill="#231f1c"/><circle cx="8" cy="8" r="4.2" fill="#e0531f"/></svg>'
)
_COMING = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Safelight</title>
<meta http-equiv="refresh" content="1"><meta name="color-scheme" content="light dark"></head>
<body style="font: 1.1rem/1.6 system-ui, sans-serif; margin: 18vh auto; max-width: 24rem">
<main><h1>Safelight</h1><p>The studio is starting. This takes some seconds.</p></main></body></html>
"""


def available() -> bool:
    return find_spec("gradio") is not None


class Studio:
    """An ASGI application that serves /studio with Gradio and passes all else to `app`.

    / leads to the page if Gradio is installed.

    Gradio takes seconds and memory to import, so it is imported on the first request of the page.
    """

    def __init__(self, app: Any, hub: Hub, decoders: Decoders) -> None:
        self.app, self._hub, self._decoders = app, hub, decoders
        self._page: asyncio.Future[Any] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._uploaded: Uploads | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "")
        if path == "/favicon.ico":
            await Response(_ICON, media_type="image/svg+xml")(scope, receive, send)
            return
        if path == "/" and scope["method"] in ("GET", "HEAD") and available():
            await RedirectResponse(PATH)(scope, receive, send)
            return
        if scope["type"] != "http" or not (path == PATH or path.startswith(PATH + "/")):
            await self.app(scope, receive, send)
            return
        if self._page is None and not available():  # a look at the disk
            await PlainTextResponse(_MISSING, 404)(scope, receive, send)
            return
        if path.startswith(KEPT_AT):
            await _kept(self._hub.root, path, caller_of(scope))(scope, receive, send)
            return
        if not _ASKED.fullmatch(path):
            await PlainTextResponse("there is no such page\n", 404)(scope, receive, send)
            return
        if self._page is None or not self._page.done():
            self.begin()
            await HTMLResponse(_COMING, 503, {"retry-after": "1"})(scope, receive, send)
            return
        page = self._page.result()
        if path == UPLOAD:
            page = self._uploads(page)
        elif scope["method"] == "POST":
            receive = await self._bounded(scope, receive)
        elif path == MESSAGES:
            given = HttpRequest(scope).query_params.get("session_hash") or ""
            self._sessions.check(given, caller_of(scope).owner)
        await page(scope, receive, _with_policy(send))

    async def _bounded(self, scope: Any, receive: Any) -> Any:
        """Return an ASGI `receive` of a body of JSON that was read within our bounds.

        Gradio parses it in the event loop. Raises RefusedError.
        """
        body = await read_body(HttpRequest(scope, receive), MAX_JSON, marks=MAX_MARKS)
        if scope["path"] == EVENT:
            event = await asyncio.to_thread(read_event, body)
            caller = caller_of(scope)
            self._sessions.check(event.get("session_hash"), caller.owner)
            self._sessions.check_event(caller.name)
        elif body:
            await asyncio.to_thread(read_event, body)
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return waiting.pop() if waiting else await receive()

        return replay

    def _uploads(self, page: Any) -> Uploads:
        if self._uploaded is None:
            self._uploaded = Uploads(page, self._hub.root / UPLOADS)
        return self._uploaded

    def begin(self) -> None:
        """Start building Gradio's application in a thread, once."""
        if self._page is None:
            self._page = asyncio.get_running_loop().create_future()
            self._keeper = asyncio.create_task(self._keep(self._page))

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper

    async def _keep(self, ready: asyncio.Future[Any]) -> None:
        try:
            app, page = await asyncio.to_thread(
                _build, self._hub, await self._hub.defaults(), self._decoders
            )
            async with app.router.lifespan_context(app):
                uploads = self._uploads(app)
                await asyncio.to_thread(uploads.clean_up)  # of an earlier server
                self._sessions = Sessions(page._queue)
                ready.set_result(app)
                while True:
                    await asyncio.to_thread(uploads.forget)
                    await asyncio.sleep(600)
        except Exception as error:
            if ready.done():
                raise
            ready.set_exception(error)


def _build(hub: Hub, defaults: dict[str, Any], decoders: Decoders) -> tuple[Any, Any]:
    """Return the application that serves the page, and Gradio's page."""
    # Gradio reads this when it is imported; it switches off its telemetry.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # Gradio's default is a folder in /tmp that is never cleaned, and that another user may own.
    os.environ["GRADIO_TEMP_DIR"] = str(hub.root / UPLOADS)
    from fastapi import FastAPI
    from gradio import mount_gradio_app, processing_utils, queueing, route_utils, routes

    from safelight.studio.page import LOOK, blocks

    # An event may name a file in place of a value. If the name is an address, Gradio fetches it. If
    # the application was mounted instead of launched, Gradio opens any file of the machine without
    # checking that it was uploaded.
    processing_utils.async_ssrf_protected_download = _not_fetched
    for module in (queueing, routes, route_utils):
        vars(module)["traceback"] = _Logged()
    page = blocks(hub, defaults, decoders)
    page.has_launched = True
    page.max_threads = MAX_RUNNING
    page.queue(default_concurrency_limit=None)  # one client's slow event holds up no other's
    page.state_session_capacity = SESSIONS
    mounted = mount_gradio_app(
        FastAPI(openapi_url=None),
        page,
        path=PATH,
        ssr_mode=False,
        footer_links=[],
        run_history=False,
        max_file_size="64mb",
        **LOOK,
    )
    # Each tab's heartbeat would hold one of the six connections that a browser has to a host. It
    # ends the state of closed pages, which state_session_capacity does here.
    page.config["connect_heartbeat"] = False
    return mounted, page


async def _not_fetched(url: str, *_: Any, **__: Any) -> str:
    raise SafelightError("addresses are not fetched")


class _Logged:
    """Replaces Gradio's `traceback`: an exception may quote a prompt, and stderr has no limit."""

    def print_exc(self, *_: Any) -> None:
        log.exception("an event of the page failed")

    def __getattr__(self, name: str) -> Any:
        return getattr(traceback, name)


def _kept(root: Path, path: str, caller: Caller) -> Response:
    """Return a file that the page shows: of explain or compare only the caller's own.

    Files of a training are the server's: they contain no prompt.
    """
    name = path.removeprefix(KEPT_AT)
    found = _SHOWN.fullmatch(name)
    foreign = found and found[1] and caller.sees and f"/{folder_of(caller)}/" not in name
    if not found or foreign or not (root / name).is_file():
        return PlainTextResponse("there is no such file\n", 404)
    # A page of explain has a policy of its own; this header separates it from our origin.
    return FileResponse(root / name, headers={"content-security-policy": "sandbox allow-scripts"})


def _with_policy(send: Any) -> Any:
    async def reply(message: Any) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [
                *message["headers"],
                (b"content-security-policy", _POLICY),
            ]
        await send(message)

    return reply
