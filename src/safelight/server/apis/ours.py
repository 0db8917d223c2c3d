"""Our own API: jobs, events, pictures, models and samplers; health, readiness and metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import nullcontext
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Response
from fastapi import Request as HttpRequest
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel, Field, TypeAdapter

from safelight.errors import SafelightError
from safelight.request import Request
from safelight.request_pictures import PICTURES
from safelight.sampling import SAMPLERS
from safelight.sampling.schedule import SCHEDULES
from safelight.server.bodies import (
    check_json,
    decoded_pictures,
    pictures_sent,
    read_json,
    turn,
)
from safelight.server.callers import caller_of, hub_of
from safelight.server.hub import Hub
from safelight.server.jobs import Event, Job, ModelInfo, Status, WorkerInfo
from safelight.server.sizes import picture_at
from safelight.server.streams import EventStream
from safelight.server.webhooks import check_url
from safelight.settings import json_schema, settings_of, shown
from safelight.sizes import MAX_SIDE, MIN_SIDE
from safelight.storage import Stored

router = APIRouter()

EXAMPLE = {"prompt": "a red apple", "steps": 20, "sampler": "dpmpp_2m", "seed": 7}

MODEL = "the name of a model of /api/models; the server's own if there is none"

_JOBS = TypeAdapter(list[Job])

JobId = Annotated[str, Path(pattern="^[0-9a-f]{32}$")]


class Problem(BaseModel):
    """An answer that is an error."""

    detail: str = Field(description="one line: what is wrong, and what would be right")
    code: str | None = Field(None, description="for programs")
    field: str | None = Field(None, description="the setting at fault, if it is one")


class Sampler(BaseModel):
    """A sampler by its own name."""

    name: str
    steps: int = Field(description="taken if neither request nor model says")


def body_of(request_type: type[Request]) -> dict[str, Any]:
    """Return the OpenAPI description of a body with a request's settings, and a working example."""
    schema = json_schema(request_type)
    schema["properties"]["model"] = {"type": ["string", "null"], "description": MODEL}
    told = "a URL that is told of the job's end, by a signed POST"
    schema["properties"]["webhook"] = {"type": "string", "description": told}
    content = {"application/json": {"schema": schema, "example": EXAMPLE}}
    return {"requestBody": {"required": True, "content": content}}


async def settings_of_body(http: HttpRequest, *, pictures: bool = False) -> dict[str, Any]:
    """Return the settings of a body of JSON, without those that are null: null leaves one out.

    pictures: as for `read_json`.
    """
    check_json(http)
    settings, known = await read_json(http, pictures=pictures), settings_of(Request)
    return {name: v for name, v in settings.items() if v is not None or name not in known}


def named(settings: dict[str, Any]) -> str | None:
    """Remove the model's name from a body's settings and return it; None if there is none."""
    model = settings.pop("model", None)
    if model is None or isinstance(model, str):
        return model
    raise SafelightError(f"model must be {MODEL}, not {shown(model)}", field="model")


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
    openapi_extra=body_of(Request),
    tags=["jobs"],
)
async def submit(
    request: HttpRequest,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> Job:
    """Accept a job. The answer comes once the job is durable; follow it by its id."""
    settings = await settings_of_body(request, pictures=True)
    model = named(settings)
    webhook = settings.pop("webhook", None)
    if webhook is not None:
        webhook = check_url(webhook, private=hub_of(request).webhooks.private)
    async with turn(request) if any(name in settings for name in PICTURES) else nullcontext():
        sent = pictures_sent(settings)
        given = {name: value for name, value in settings.items() if name not in PICTURES}
        del settings  # the pictures' texts
        asked = await asyncio.to_thread(lambda: Request(**given))
        pictures = await decoded_pictures(request, sent)
        asked = asked.with_pictures(**pictures)
        pictures.clear()
        return await hub_of(request).submit(
            asked,
            idempotency_key=idempotency_key,
            owner=caller_of(request.scope).owner,
            model=model,
            webhook=webhook,
        )


@router.get("/api/jobs", response_model=list[Job], tags=["jobs"])
async def list_jobs(
    request: HttpRequest,
    status: Status | None = None,
    search: Annotated[str, Query(max_length=200, description="words of the prompt")] = "",
    before: Annotated[datetime | None, Query(description="created before this")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> Any:
    """List jobs, newest first. Those with long prompts come fewer at a time than `limit`.

    If there may be more, the header `Link` has the address of the next ones.
    """
    jobs, more = await hub_of(request).list(
        status=status,
        search=search.replace("\0", ""),
        before=None if before is None else _seconds(before),
        limit=limit,
        owner=_sees(request),
    )
    body = await asyncio.to_thread(_JOBS.dump_json, jobs)
    headers = {}
    if more:
        at = jobs[-1].created_at.isoformat().replace("+00:00", "Z")
        link = request.url.include_query_params(before=at)
        headers["Link"] = f'<{link.path}?{link.query}>; rel="next"'
    return Response(body, media_type="application/json", headers=headers)


@router.get("/api/jobs/{job_id}", response_model=Job, responses={404: {}}, tags=["jobs"])
async def get_job(request: HttpRequest, job_id: JobId) -> Any:
    return await hub_of(request).get(job_id, owner=_sees(request)) or missing("job")


@router.get(
    "/api/jobs/{job_id}/events",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}}, 404: {}},
    tags=["jobs"],
)
async def events(request: HttpRequest, job_id: JobId) -> Any:
    """Stream server-sent events: progress, preview, picture, and a last one, end."""
    hub = hub_of(request)
    if await hub.get(job_id, owner=_sees(request)) is None:
        return missing("job")
    return EventStream(_stream(hub, job_id))


@router.delete("/api/jobs/{job_id}", response_model=Job, responses={404: {}}, tags=["jobs"])
async def cancel(request: HttpRequest, job_id: JobId) -> Any:
    """Cancel a job within one step. A job that is over is removed, with its pictures."""
    hub, owner = hub_of(request), _sees(request)
    job = await hub.get(job_id, owner=owner)
    if job is None:
        return missing("job")
    if not job.status.final:
        return await hub.cancel(job_id, owner=owner) or missing("job")
    await hub.delete(job_id, owner=owner)
    return job


@router.post(
    "/api/jobs/{job_id}/retry",
    status_code=202,
    response_model=Job,
    responses={404: {}, 429: {"model": Problem}, 503: {"model": Problem}, 507: {"model": Problem}},
    tags=["jobs"],
)
async def retry(request: HttpRequest, job_id: JobId) -> Any:
    """Put a job that failed or was cancelled into the queue again. Others stay as they are."""
    return await hub_of(request).retry(job_id, owner=_sees(request)) or missing("job")


@router.get(
    "/api/pictures/{picture_id}",
    response_class=FileResponse,
    responses={200: {"content": {"image/png": {}}}, 404: {}, 503: {"model": Problem}},
    tags=["pictures"],
)
async def picture(
    request: HttpRequest,
    picture_id: JobId,
    width: Annotated[int | None, Query(ge=MIN_SIDE, le=MAX_SIDE)] = None,
    height: Annotated[int | None, Query(ge=MIN_SIDE, le=MAX_SIDE)] = None,
) -> Any:
    """Get a PNG with its recipe inside. With a width or height, or both, it is resized by Lanczos;
    one alone keeps the picture's proportions.
    """
    hub = hub_of(request)
    # A silent bucket answers late: one client's calls must not take all threads.
    async with nullcontext() if hub.files.local else turn(request):
        found = await asyncio.to_thread(hub.files.picture, picture_id)
    if found is None or await _foreign(request, picture_id):
        return missing("picture")
    if width is None and height is None:
        return _png(found)
    async with turn(request):
        data = await asyncio.to_thread(picture_at, hub, picture_id, (width, height))
    return missing("picture") if data is None else Response(data, media_type="image/png")


@router.get(
    "/api/pictures/{picture_id}/thumbnail",
    response_class=FileResponse,
    responses={200: {"content": {"image/png": {}}}, 404: {}, 503: {"model": Problem}},
    tags=["pictures"],
)
async def thumbnail(request: HttpRequest, picture_id: JobId) -> Any:
    """Get a picture at no more than 256 pixels a side."""
    if await _foreign(request, picture_id):
        return missing("picture")
    async with turn(request):
        found = await asyncio.to_thread(hub_of(request).files.thumbnail, picture_id)
    return missing("picture") if found is None else _png(found)


def _png(found: Stored) -> Response:
    """Return the answer that is a PNG; from a storage elsewhere it is passed on part by part."""
    if found.path is not None:
        return FileResponse(found.path, media_type="image/png")
    size = {"content-length": str(found.size)}
    return StreamingResponse(found.parts(), headers=size, media_type="image/png")


@router.get("/api/webhook-secret", tags=["jobs"])
async def webhook_secret(request: HttpRequest) -> dict[str, str]:
    """Get the secret that webhooks of the caller's jobs are signed with."""
    owner = caller_of(request.scope).owner
    return {"secret": await asyncio.to_thread(hub_of(request).store.webhook_secret, owner)}


@router.get("/api/models", response_model=list[ModelInfo], tags=["models"])
async def models(request: HttpRequest) -> list[ModelInfo]:
    """List the models that can be drawn with; the first one draws where a job names none."""
    return await hub_of(request).models()


@router.get("/api/workers", response_model=list[WorkerInfo], tags=["models"])
async def workers(request: HttpRequest) -> list[WorkerInfo]:
    """The workers that joined from elsewhere (`safelight worker`) and are well."""
    return hub_of(request).fleet.workers


@router.get("/api/samplers", tags=["models"])
async def samplers() -> dict[str, Any]:
    return {
        "samplers": [Sampler(name=name, steps=s.steps) for name, s in SAMPLERS.items()],
        "schedules": list(SCHEDULES),
    }


@router.get("/healthz", response_class=PlainTextResponse, tags=["server"])
async def healthz(request: HttpRequest) -> Any:
    """Say that the process lives. Needs no token."""
    if not hub_of(request).alive:
        return PlainTextResponse("no worker can be started any more\n", 503)
    return "ok\n"


@router.get("/readyz", responses={503: {"model": Problem}}, tags=["server"])
async def readyz(request: HttpRequest) -> Any:
    """Say whether the worker takes a step right now, and which models are in its memory."""
    trouble = await hub_of(request).trouble()
    if trouble is None:
        return {"status": "ready", "models": hub_of(request).catalogue.loaded}
    return JSONResponse({"detail": trouble, "code": "not_ready", "field": None}, 503)


@router.get("/metrics", response_class=PlainTextResponse, tags=["server"])
async def metrics(request: HttpRequest) -> PlainTextResponse:
    """Get figures for Prometheus."""
    text = await request.app.state.metrics.text(hub_of(request))
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def _stream(hub: Hub, job_id: str) -> AsyncIterator[bytes]:
    async for event in hub.events(job_id):
        data = _brief(event).model_dump_json(exclude_none=True)
        yield f"event: {event.kind}\ndata: {data}\n\n".encode()


def _brief(event: Event) -> Event:
    """Return an event without recipes, except that of the picture it reports.

    Recipes of 64 pictures with long prompts take 2 MiB, and each step has an event. The event "end"
    has all recipes.
    """
    if event.kind == "end":
        return event
    pictures = [
        picture
        if event.kind == "picture" and picture.index == event.index
        else picture.model_copy(update={"recipe": {}})
        for picture in event.job.pictures
    ]
    return event.model_copy(update={"job": event.job.model_copy(update={"pictures": pictures})})


def _seconds(date: datetime) -> float:
    """Return the seconds since 1970 of any date, even the first and the last possible ones."""
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return (date - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds()


def _sees(request: HttpRequest) -> str | None:
    """Return the owner whose jobs the caller sees; None for all."""
    return caller_of(request.scope).sees


async def _foreign(request: HttpRequest, picture_id: str) -> bool:
    """Return whether a picture belongs to a job that the caller does not see."""
    owner = _sees(request)
    return owner is not None and await hub_of(request).job_of(picture_id, owner=owner) is None


def missing(what: str) -> JSONResponse:
    """Return the answer about a job or picture that is not there, or not the caller's."""
    body = {"detail": f"there is no such {what}", "code": "not_found", "field": None}
    return JSONResponse(body, 404)
