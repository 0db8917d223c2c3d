"""The application: routes, errors as answers, and the guard before all of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.routing import Match

from safelight import __version__
from safelight.errors import SafelightError
from safelight.server.apis import (
    library,
    openai,
    ours,
    sdapi,
    sdapi_control,
    sdapi_extras,
    sdapi_facts,
)
from safelight.server.decoding import Decoders
from safelight.server.guard import Guard, Rules, is_stream
from safelight.server.hub import Hub
from safelight.server.jobs import retry_after, status_of
from safelight.server.metrics import Metrics
from safelight.server.retention import Retention
from safelight.server.sites import METHODS
from safelight.server.tracing import Traced, on
from safelight.server.wording import clipped, hide, problem, public


class Page(Protocol):
    """An ASGI application around another one; it serves a page beside that one's routes."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or pass it on."""
        ...

    async def close(self) -> None:
        """Release what it holds when the server ends."""
        ...


PageOf = Callable[[Any, Hub, Decoders], Page]
"""Wraps an application with a page. The command line passes the studio's."""


def application(
    hub: Hub, rules: Rules, *, page: PageOf | None = None, retention: Retention | None = None
) -> Any:
    """Return the ASGI application of a hub. retention: runs as long as the application does."""

    if isinstance(hub, Hub):
        hide(
            hub.settings.root,
            hub.settings.place,
            *([hub.settings.model] if "/" in hub.settings.model[:1] else ()),
        )
    decoders = Decoders()  # the processes start with the first picture

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        hub.start()
        if retention is not None:
            retention.start()
        yield
        if paged is not None:
            await paged.close()
        await asyncio.to_thread(decoders.close)
        if retention is not None:
            await asyncio.to_thread(retention.stop)
        await hub.stop()

    # FastAPI's own /docs loads files from another host; this one does not.
    app = FastAPIOffline(redoc_url=None, title="Safelight", version=__version__, lifespan=life)
    app.state.hub, app.state.metrics = hub, Metrics(retention)
    app.state.decoders = decoders
    app.include_router(ours.router, responses=problems(400, 422, model=ours.Problem))
    app.include_router(library.router, responses=problems(400, 422, model=ours.Problem))
    app.include_router(openai.router, responses=problems(400, 404, 413, 422, 429, 500, 503))
    for api in (sdapi, sdapi_facts, sdapi_control, sdapi_extras):
        router = api.router
        app.include_router(router, responses=problems(404, 413, 422, 429, 500, model=ours.Problem))
    app.add_api_route("/", root, methods=["GET", "HEAD"], include_in_schema=False)
    app.add_exception_handler(SafelightError, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, missed)
    paged = None if page is None else page(app, hub, decoders)
    guard = Guard(app if paged is None else paged, rules, app.state.metrics.count)
    return Traced(guard) if on() else guard


def problems(*statuses: int, model: Any = None) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of answers that are errors."""
    about = {"description": "One line says what is wrong."}
    return {status: about | ({"model": model} if model else {}) for status in statuses}


async def root() -> RedirectResponse:
    """Lead a browser to what can be seen without a page."""
    return RedirectResponse("/docs")


async def refused(_: HttpRequest, error: Exception) -> JSONResponse:
    """Answer a SafelightError in the shape of our own API."""
    assert isinstance(error, SafelightError)
    field = None if error.field is None else clipped(error.field)
    body = {"detail": public(str(error)), "code": error.code, "field": field}
    return JSONResponse(body, status_of(error), retry_after(error))


async def invalid(_: HttpRequest, error: Exception) -> JSONResponse:
    """Answer a query or header that is not valid in the shape of our own API.

    An id that is not valid is answered as one that is not there.
    """
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place, name = first["loc"][0], first["loc"][-1]
    if place == "path":
        return ours.missing(str(name).removesuffix("_id"))
    where = ".".join(str(part) for part in first["loc"] if part != "body") or "the body"
    told = f"{clipped(where)}: {clipped(first['msg'])}"
    field = None if place == "body" else clipped(name)
    return JSONResponse({"detail": told, "code": "invalid", "field": field}, 422)


async def missed(http: HttpRequest, error: Exception) -> JSONResponse:
    """Answer an HTTPException, such as that of an unknown address, in a form for all three APIs."""
    assert isinstance(error, HTTPException)
    status, text, headers = error.status_code, str(error.detail), dict(error.headers or {})
    if status == 404:
        text = "there is no such address: /docs lists all"
    elif status == 405:  # Starlette names the methods of one route; others may have the same path
        headers["Allow"] = ", ".join(_methods(http))
        text = f"the method must be {headers['Allow']}"
    return JSONResponse(problem(status, text), status, headers)


def _methods(http: HttpRequest) -> list[str]:
    """Return the methods that the address of a request is there for."""

    def there(method: str) -> bool:
        scope = {**http.scope, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in http.app.routes)

    found = [method for method in METHODS.split(", ") if there(method)]
    if "GET" in found and "HEAD" not in found and not is_stream(http.scope["path"]):
        found.insert(1, "HEAD")  # the guard answers it
    return found
