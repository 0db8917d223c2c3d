"""The images API of OpenAI, which many programs speak.

Fields that Stable Diffusion has nothing for (quality, style, moderation…) are accepted and have no
effect. Settings of Safelight that OpenAI lacks (seed, steps, sampler…) are further fields of the
body.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from safelight.errors import SafelightError
from safelight.hires import final_size
from safelight.recipe import read_recipe, recipe_text
from safelight.request import Request
from safelight.request_pictures import REFERENCES, by_input
from safelight.server.apis.openai_shapes import (
    DALL_E,
    ApiError,
    ImagesBody,
    about,
    body_of,
    check_files,
    edit_request,
    encoded,
    failed,
    no_such_model,
    read_form,
    read_settings,
    refused,
)
from safelight.server.bodies import decoded, decoded_pictures, read_json, turn
from safelight.server.callers import caller_of, hub_of
from safelight.server.disconnects import attended
from safelight.server.hub import Hub
from safelight.server.jobs import Job, ModelInfo, Picture, Status, StoppingError
from safelight.server.sizes import enlarging_note, fit_to_model, picture_at
from safelight.server.streams import EventStream

OPENAI_MODELS = (DALL_E, "gpt-image-", "chatgpt-image-")
"""A name that begins so means the server's own model: many programs have one built in."""


class _Route(APIRoute):
    """Answers errors in OpenAI's shape, while other routes answer them in their own."""

    def get_route_handler(self) -> Callable[[HttpRequest], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answer(http: HttpRequest) -> Response:
            try:
                return await handle(http)
            except ApiError as raised:
                error = raised
            except SafelightError as raised:
                error = refused(raised)
            except HTTPException as raised:  # a form that cannot be parsed, or a body too long
                error = ApiError(raised.status_code, str(raised.detail))
            except ClientDisconnect:
                return Response(status_code=499)  # nobody is there to read it
            return JSONResponse(error.body, error.status, error.headers)

        return answer


# --- the answer ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """A job and how its pictures are answered. size: to enlarge them to; None to keep them."""

    http: HttpRequest
    hub: Hub
    body: ImagesBody
    job: Job
    size: tuple[int, int] | None
    notes: list[str]

    async def picture(self, picture: Picture) -> dict[str, Any]:
        """Return a finished picture in the answer's form."""

        def read() -> dict[str, Any]:
            png = picture_at(self.hub, picture.id, self.size)
            if png is None:
                raise failed(f"picture {picture.index} was deleted before it could be sent")
            text = "" if self.body.form == "png" else recipe_text(read_recipe(png))
            return encoded(png, self.body, text)

        async with turn(self.http):
            return await asyncio.to_thread(read)

    async def preview(self, png: bytes) -> dict[str, Any]:
        """Return a preview in the answer's form, at the size of the finished picture.

        Where the part around a mask is drawn alone, it is the part, at the size that is drawn.
        """
        asked = self.job.settings
        if (size := self.size) is None:
            size = asked["width"], asked["height"]
            if None in size:
                size = await self.hub.native_size(self.job.model)
            size = final_size(Request(hires_scale=asked.get("hires_scale", 1)), size)
        async with turn(self.http):
            return await asyncio.to_thread(encoded, png, self.body, size=size)

    def totals(self, job: Job) -> dict[str, Any]:
        """Return usage and warnings. Nothing is charged for; clients need the fields."""
        usage: dict[str, Any] = dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), 0)
        usage["input_tokens_details"] = {"image_tokens": 0, "text_tokens": 0}
        warnings = self.notes + job.warnings
        return {"usage": usage} | ({"warnings": warnings} if warnings else {})


def _check_succeeded(job: Job) -> None:
    if job.status is not Status.SUCCEEDED:
        raise failed(job.error or f"the job was {job.status}")


def _check_form(body: ImagesBody) -> None:
    """Raise ApiError for forms of an answer that are not possible."""
    if body.response_format == "url" and body.stream:
        raise ApiError(400, "response_format must be b64_json in a stream", "response_format")
    if body.response_format == "url" and body.form != "png":
        raise ApiError(400, "output_format must be png with response_format url", "output_format")


async def _submitted(
    http: HttpRequest, body: ImagesBody, request: Request, model: str | None
) -> _Call:
    hub = hub_of(http)
    size, notes = None, list[str]()
    if request.width is not None:
        native = await hub.native_size(model)
        asked = request
        request, size = await asyncio.to_thread(fit_to_model, asked, native)
        notes = enlarging_note(asked, request, size, await hub.find_model(model), native)
    owner = caller_of(http.scope).owner
    job = await hub.submit(request, client="openai", owner=owner, model=model)
    return _Call(http, hub, body, job, size, notes)


async def _answer(call: _Call, kind: str) -> Response:
    """Answer with a job's pictures. kind: the first half of the names of the stream's events."""
    http, hub, body, job, size = call.http, call.hub, call.body, call.job, call.size
    if body.stream:
        return _EventStream(call, _events(call, kind))
    job = await attended(http.receive, hub, job.id, hub.wait(job.id))
    _check_succeeded(job)
    data: list[dict[str, Any]] = []
    for picture in job.pictures:
        shown: dict[str, Any] = {"revised_prompt": None}
        if body.has_urls:
            query = f"?width={size[0]}&height={size[1]}" if size else ""
            shown["url"] = f"{http.base_url}api/pictures/{picture.id}{query}"
        if body.response_format != "url":
            shown["b64_json"] = (await call.picture(picture))["b64_json"]
        data.append(shown)
    created = int((job.finished_at or job.created_at).timestamp())
    shown_size = size or (job.pictures[0].width, job.pictures[0].height)
    return JSONResponse(
        {"created": created, "data": data, **about(body, shown_size), **call.totals(job)}
    )


class _EventStream(EventStream):
    """Server-sent events about a job. The job is cancelled if the client leaves."""

    def __init__(self, call: _Call, events: AsyncIterator[bytes]) -> None:
        super().__init__(events)
        self.call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the end of the job, or until the client leaves."""
        with contextlib.suppress(ClientDisconnect):
            sending = self.stream_response(send)
            await attended(receive, self.call.hub, self.call.job.id, sending)


async def _events(call: _Call, kind: str) -> AsyncIterator[bytes]:
    """Yield previews, spread evenly over the steps, and each picture once it is finished."""
    wanted = call.body.partial_images or 0
    marks = [i / (wanted + 1) for i in range(1, wanted + 1)]
    shown = 0
    sent: set[str] = set()
    ended = False
    try:
        async for event in call.hub.events(call.job.id, previews=wanted > 0):
            share = event.job.progress.share
            if event.preview is not None and marks and share >= marks[0]:
                marks = [mark for mark in marks if mark > share]
                preview = await call.preview(base64.b64decode(event.preview))
                yield _event(f"{kind}.partial_image", {**preview, "partial_image_index": shown})
                shown += 1
            for picture in event.job.pictures:
                if picture.id not in sent:
                    sent.add(picture.id)
                    finished = await call.picture(picture)
                    yield _event(f"{kind}.completed", {**finished, **call.totals(event.job)})
            if event.kind == "end":
                ended = True
                _check_succeeded(event.job)
        if not ended:  # the client knows no way to get the pictures later
            await call.hub.cancel(call.job.id)
            raise StoppingError
    except ApiError as error:
        yield _event("error", error.body)
    except SafelightError as error:
        yield _event("error", refused(error).body)


def _event(name: str, data: dict[str, Any]) -> bytes:
    told = json.dumps({"type": name, "created_at": int(time.time()), **data})
    return f"event: {name}\ndata: {told}\n\n".encode()


# --- the routes ----------------------------------------------------------------------------------

router = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=_Route)


@router.post("/images/generations", openapi_extra=body_of(Request, "application/json"))
async def generate(http: HttpRequest) -> Response:
    """Make pictures from words."""
    body, settings = read_settings(await read_json(http), text=False)
    model = await _model_of(http, body)
    _check_form(body)
    call = await _submitted(http, body, Request(**settings), model)
    return await _answer(call, "image_generation")


@router.post(
    "/images/edits", openapi_extra=body_of(Request, "multipart/form-data", "image", "mask")
)
async def edit(http: HttpRequest) -> Response:
    """Redraw a picture: all of it, or where the mask, or the picture itself, is transparent.

    A model that edits by reference pictures takes several.
    """
    body, settings, files = await read_form(http)
    model = await _model_of(http, body)
    _check_form(body)
    hub = hub_of(http)
    plan = await hub.plan(model)
    family = None if plan is None else plan.family
    check_files(files, family, await hub.find_model(model))
    await asyncio.to_thread(lambda: Request(**settings))  # before a picture is decoded
    separate = "mask" in files
    async with turn(http):
        alpha = None
        if separate:  # the mask first: while it waits, it takes less memory
            alpha = await decoded(http, "alpha", files["mask"][0], "mask")
        first, *others = files.pop("image")
        if separate:
            pictures = [await decoded(http, "picture", first, "image")]
        else:
            picture, alpha = await decoded(http, "with_alpha", first, "image")
            pictures = [picture]
            del picture
        more = await decoded_pictures(http, by_input({REFERENCES: others}), "image")
        pictures += more.pop(REFERENCES, ())
        how = {"separate": separate, "family": family}
        request = await asyncio.to_thread(partial(edit_request, **how), settings, pictures, alpha)
        pictures.clear()
        del alpha
        call = await _submitted(http, body, request, model)
        del request  # so that it is not held while the job waits
    return await _answer(call, "image_edit")


@router.get("/models")
async def models(http: HttpRequest) -> dict[str, Any]:
    """List the models that are served."""
    return {"object": "list", "data": [_entry(model) for model in await _served(http)]}


@router.get("/models/{name:path}")
async def model(http: HttpRequest, name: str) -> dict[str, Any]:
    """Get a model that is served."""
    served = await _served(http)
    for one in served:
        if one.name == name:
            return _entry(one)
    names = ", ".join(one.name for one in served) or "none"
    raise no_such_model(f"no model {name[:40]!r} on this server; there are {names}")


def _entry(served: ModelInfo) -> dict[str, Any]:
    # When a model was made is not known.
    return {"id": served.name, "object": "model", "created": 0, "owned_by": "safelight"}


async def _served(http: HttpRequest) -> list[ModelInfo]:
    """Return the models that read a prompt: this API cannot ask for anything else."""
    hub = hub_of(http)
    hidden = await _hidden(hub)
    return [one for one in await hub.models() if one.name not in hidden]


async def _hidden(hub: Hub) -> set[str]:
    """Return the names of the models that read no prompt."""
    found = set(await asyncio.to_thread(hub.names.without_prompt))
    return found | {one.name for one in await hub.models() if not one.uses_prompt}


async def _model_of(http: HttpRequest, body: ImagesBody) -> str | None:
    """Return the served model that a body names; None for the server's own.

    OpenAI's own names mean the server's model. Raises ApiError if there is no such model, or if the
    model reads no prompt.
    """
    hub = hub_of(http)
    asked, hidden = body.model, await _hidden(hub)
    try:
        name = await hub.find_model(asked, hidden)
    except SafelightError as error:
        if error.code != "no_model":
            raise
        if asked is None or not asked.startswith(OPENAI_MODELS):
            raise no_such_model(str(error)) from None
        asked, name = None, await hub.find_model(None)
    if name in hidden:
        told = f"model must be one that reads a prompt; {name} draws from noise alone"
        raise ApiError(400, told, "model")
    return None if asked is None else name
