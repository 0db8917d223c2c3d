"""The application: routes, errors as answers, the guard before all of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline

from safelight import __version__
from safelight.errors import SafelightError
from safelight.server import api, openai, sdapi
from safelight.server.guard import Guard, Rules
from safelight.server.hub import Hub
from safelight.server.jobs import BusyError, StoppingError, StorageError
from safelight.server.metrics import Metrics
from safelight.studio.mount import Studio


def application(hub: Hub, rules: Rules) -> Any:
    """The ASGI application that serves this hub."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        hub.start()
        yield
        await studio.close()
        await hub.stop()

    # Its /docs needs nothing from other hosts, as FastAPI's own does.
    app = FastAPIOffline(redoc_url=None, title="Safelight", version=__version__, lifespan=life)
    app.state.service, app.state.metrics = hub, Metrics()
    app.include_router(api.router, responses=problems(400, 422, model=api.Problem))
    app.include_router(openai.router, responses=problems(400, 404, 413, 422, 429, 500, 503))
    app.include_router(sdapi.router, responses=problems(404, 413, 422, 429, 500, model=api.Problem))
    app.add_exception_handler(SafelightError, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    studio = Studio(app, hub)
    return Guard(studio, rules, app.state.metrics.count)


def problems(*statuses: int, model: Any = None) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of answers that are errors."""
    about = {"description": "One line says what is wrong."}
    return {status: about | ({"model": model} if model else {}) for status in statuses}


async def refused(_: HttpRequest, error: Exception) -> JSONResponse:
    status = {BusyError: 429, StoppingError: 503, StorageError: 507}.get(type(error), 422)
    assert isinstance(error, SafelightError)
    return JSONResponse({"detail": str(error)}, status, api.retry_after(error))


async def invalid(_: HttpRequest, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body") or "the body"
    return JSONResponse({"detail": f"{where}: {first['msg']}"}, 422)
