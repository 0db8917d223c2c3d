"""Routes of AUTOMATIC1111's API: errors in its shape, and bodies read within our limits."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request as HttpRequest
from fastapi import Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from safelight.errors import SafelightError
from safelight.server.apis.sdapi_names import their_name
from safelight.server.bodies import check_json, read_json_if_any
from safelight.server.jobs import retry_after, status_of
from safelight.server.wording import clipped, public

_OUR_DEFAULT = re.compile(r" \(left out: [^)]*\)")
"""What an error says of a setting that is left out. In this API that API's defaults hold."""


class Route(APIRoute):
    """Answers errors in AUTOMATIC1111's shape."""

    def get_route_handler(self) -> Callable[[HttpRequest], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(http: HttpRequest) -> Response:
            sent: dict[str, Any] | None = None
            try:
                if self.body_field is not None:
                    check_json(http)
                if http.method == "POST":  # FastAPI would parse it in the event loop
                    http._json = sent = await read_json_if_any(http, pictures=True)
                    http._body = b"" if sent is None else b"{}"
                return await handler(http)
            except (SafelightError, RequestValidationError, HTTPException) as error:
                return _refusal(error, sent or {})
            except ClientDisconnect:
                return Response(status_code=499)  # nobody is there to read it

        return handle


def _refusal(
    error: SafelightError | RequestValidationError | HTTPException, sent: dict[str, Any]
) -> JSONResponse:
    """Return the answer for an error. It names a setting as the body does."""
    status, headers, detail = 422, None, str(error)
    if isinstance(error, HTTPException):
        # FastAPI's 400 is for a body that cannot be parsed at all: bad UTF-8, or nested too deep.
        status = 422 if error.status_code == 400 else error.status_code
        headers, detail = error.headers, str(error.detail)
    elif isinstance(error, RequestValidationError):
        first = error.errors()[0]
        field = next((part for part in first["loc"][1:] if isinstance(part, str)), "the body")
        detail = f"{clipped(field)}: {clipped(first['msg'])}"
    else:
        status, headers = status_of(error), retry_after(error)
        if error.field is not None:
            detail = str(error.renamed(their_name(error.field, sent)))
            detail = _OUR_DEFAULT.sub("", detail, count=1)
    # A1111's errors repeat the whole body; ours may hold megabytes of pictures.
    detail = public(detail)
    content = {"error": type(error).__name__, "detail": detail, "body": "", "errors": detail}
    return JSONResponse(content, status, headers)
