"""Our own routes: jobs, events, pictures, models, samplers; and those that watch the server."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query
from fastapi import Request as HttpRequest
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, create_model

from safelight import Request
from safelight.errors import SafelightError
from safelight.picture import open_mask, open_picture
from safelight.request import Request as _Request
from safelight.sampling import SAMPLERS
from safelight.sampling.schedule import SCHEDULES
from safelight.server.hub import Hub
from safelight.server.jobs import BusyError, Event, Job, ModelInfo, Status

router = APIRouter()

KEEP_ALIVE = 15.0
"""Seconds after which a stream without events says that it is still there."""

_PICTURE = "a PNG, JPEG or WebP in base64"
_SETTINGS: dict[str, Any] = {
    name: (field.annotation, field)
    for name, field in _Request.model_fields.items()
    if name not in ("image", "mask", "seed")
}
JobRequest = create_model(
    "JobRequest",
    __config__=ConfigDict(extra="forbid", strict=True),
    __doc__="What to draw: the settings of a Safelight Request, as JSON.",
    **_SETTINGS,
    seed=(
        int | None,
        Field(None, ge=0, le=2**63 - 1, description="left out: drawn at random"),
    ),
    image=(str | None, Field(None, description=f"{_PICTURE}: a picture to start from")),
    mask=(str | None, Field(None, description=f"{_PICTURE}: white where to repaint")),
)

JobId = Annotated[str, Path(pattern="^[0-9a-f]{32}$")]


class Problem(BaseModel):
    detail: str


class Sampler(BaseModel):
    name: str
    steps: int = Field(description="taken if a request does not say")


def hub(request: HttpRequest) -> Hub:
    return request.app.state.service


@router.post(
    "/api/jobs",
    status_code=202,
    response_model=Job,
    responses={
        422: {"model": Problem},
        429: {"model": Problem},
        503: {"model": Problem},
        507: {"model": Problem},
    },
    tags=["jobs"],
)
async def submit(
    request: HttpRequest,
    body: JobRequest,  # type: ignore[valid-type]
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> Job:
    """Take a request in. The answer comes once the job is durable; follow it by its id."""
    settings: dict[str, Any] = body.model_dump(exclude_unset=True)
    for name, read in (("image", open_picture), ("mask", open_mask)):
        if settings.get(name) is not None:
            data = decoded(settings[name], name)
            settings[name] = await asyncio.to_thread(read, data, name)
    if settings.get("seed", 0) is None:
        del settings["seed"]
    return await hub(request).submit(Request(**settings), idempotency_key=idempotency_key)


@router.get("/api/jobs", response_model=list[Job], tags=["jobs"])
async def list_jobs(
    request: HttpRequest,
    status: Status | None = None,
    search: Annotated[str, Query(max_length=200, description="words of the prompt")] = "",
    before: Annotated[datetime | None, Query(description="created before this")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> list[Job]:
    """Newest first."""
    return await hub(request).list(
        status=status,
        search=search.replace("\0", ""),
        before=None if before is None else before.timestamp(),
        limit=limit,
    )


@router.get("/api/jobs/{job_id}", response_model=Job, responses={404: {}}, tags=["jobs"])
async def get_job(request: HttpRequest, job_id: JobId) -> Any:
    return await hub(request).get(job_id) or _missing("job")


@router.get(
    "/api/jobs/{job_id}/events",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}}, 404: {}},
    tags=["jobs"],
)
async def events(request: HttpRequest, job_id: JobId) -> Any:
    """Server-sent events: progress, preview, picture, and at last end."""
    service = hub(request)
    if await service.get(job_id) is None:
        return _missing("job")
    return StreamingResponse(_stream(service, job_id), media_type="text/event-stream")


@router.delete("/api/jobs/{job_id}", response_model=Job, responses={404: {}}, tags=["jobs"])
async def cancel(request: HttpRequest, job_id: JobId) -> Any:
    """Cancel a job, within one step; one that is final is removed, with its pictures."""
    service = hub(request)
    job = await service.get(job_id)
    if job is None:
        return _missing("job")
    if not job.status.final:
        return await service.cancel(job_id) or _missing("job")
    await service.delete(job_id)
    return job


@router.post(
    "/api/jobs/{job_id}/retry",
    status_code=202,
    response_model=Job,
    responses={404: {}, 429: {"model": Problem}, 503: {"model": Problem}, 507: {"model": Problem}},
    tags=["jobs"],
)
async def retry(request: HttpRequest, job_id: JobId) -> Any:
    """Let a job that failed or was cancelled wait again, if the queue has room for it; others stay
    as they are.
    """
    return await hub(request).retry(job_id) or _missing("job")


@router.get(
    "/api/pictures/{picture_id}",
    response_class=FileResponse,
    responses={200: {"content": {"image/png": {}}}, 404: {}},
    tags=["pictures"],
)
async def picture(request: HttpRequest, picture_id: JobId) -> Any:
    path = hub(request).picture_file(picture_id)
    return _missing("picture") if path is None else FileResponse(path, media_type="image/png")


@router.get(
    "/api/pictures/{picture_id}/thumbnail",
    response_class=FileResponse,
    responses={200: {"content": {"image/png": {}}}, 404: {}},
    tags=["pictures"],
)
async def thumbnail(request: HttpRequest, picture_id: JobId) -> Any:
    """The picture at no more than 256 pixels a side."""
    path = await asyncio.to_thread(hub(request).files.thumbnail, picture_id)
    return _missing("picture") if path is None else FileResponse(path, media_type="image/png")


@router.get("/api/models", response_model=list[ModelInfo], tags=["models"])
async def models(request: HttpRequest) -> list[ModelInfo]:
    return [await hub(request).model()]


@router.get("/api/samplers", tags=["models"])
async def samplers() -> dict[str, Any]:
    return {
        "samplers": [Sampler(name=name, steps=s.steps) for name, s in SAMPLERS.items()],
        "schedules": list(SCHEDULES),
    }


@router.get("/healthz", response_class=PlainTextResponse, tags=["server"])
async def healthz() -> str:
    """That the process lives; needs no token."""
    return "ok\n"


@router.get("/readyz", responses={503: {"model": Problem}}, tags=["server"])
async def readyz(request: HttpRequest) -> Any:
    """Whether the worker takes a step right now."""
    if await hub(request).check():
        return {"status": "ready"}
    return JSONResponse({"detail": "the worker is not ready"}, 503)


@router.get("/metrics", response_class=PlainTextResponse, tags=["server"])
async def metrics(request: HttpRequest) -> PlainTextResponse:
    """For Prometheus."""
    text = await request.app.state.metrics.text(hub(request))
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def _stream(service: Hub, job_id: str) -> AsyncIterator[str]:
    source = service.events(job_id).__aiter__()
    coming: asyncio.Task[Event] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(source))
            done, _ = await asyncio.wait({coming}, timeout=KEEP_ALIVE)
            if not done:
                yield ": still here\n\n"
                continue
            try:
                event = coming.result()
            except StopAsyncIteration:
                return
            coming = None
            data = json.dumps(event.model_dump(mode="json", exclude_none=True))
            yield f"event: {event.kind}\ndata: {data}\n\n"
    finally:
        if coming is not None:
            coming.cancel()


def decoded(text: str, name: str) -> bytes:
    """The bytes of base64, with or without a data URI's prefix."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise SafelightError(f"{name} must be {_PICTURE}; addresses are not fetched") from None


def _missing(what: str) -> JSONResponse:
    return JSONResponse({"detail": f"there is no such {what}"}, 404)


def retry_after(error: SafelightError) -> dict[str, str]:
    return {"Retry-After": str(error.retry_after)} if isinstance(error, BusyError) else {}
