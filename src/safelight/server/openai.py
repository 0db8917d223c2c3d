"""The images API of OpenAI, which many programs speak already.

What its models have and Stable Diffusion has not (quality, style, moderation…) is taken and does
nothing. What Safelight has beyond it (seed, steps, sampler…) are further fields of the body.
"""

import asyncio
import base64
import contextlib
import io
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, Literal, Self, TypeVar

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from PIL import ExifTags, Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from safelight.errors import SafelightError
from safelight.picture import name_of, open_picture, opened, reason
from safelight.recipe import recipe_text
from safelight.request import Request, allowed_size
from safelight.server.jobs import (
    BusyError,
    Job,
    ModelInfo,
    Picture,
    Service,
    Status,
    StoppingError,
    StorageError,
)

MOST_UPLOAD = 64 * 2**20
MOST_JSON = 2**20
"""Two prompts of 16 KiB with every letter escaped fit several times."""
LONGEST_COMMENT = 65_000
"""JPEG holds EXIF in one segment of 64 KiB, other tags included."""
ANY_MODEL = ("dall-e-", "gpt-image-", "chatgpt-image-", "embedded")
"""Such names mean whatever is served: programs have one of OpenAI's written into them."""

T = TypeVar("T")


# --- what is asked for ---------------------------------------------------------------------------


def _field(description: str, **limits: Any) -> Any:
    return Field(None, description=description, **limits)


def _own(name: str) -> Any:
    """A setting of Safelight's; `Request` checks all but its type."""
    return _field(Request.model_fields[name].description or "")


_IDLE = "text; it has no effect"


class Wish(BaseModel):
    """The fields of both routes. A description is the text of the field's error message too."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=1, description="text of at most 16 KiB")
    model: str | None = _field("the served model's name, or any of OpenAI's")
    n: int | None = _field("a whole number from 1 to 10", ge=1, le=10)
    size: str | None = _field("WIDTHxHEIGHT or auto", pattern="^(auto|[0-9]{1,5}x[0-9]{1,5})$")
    response_format: Literal["url", "b64_json"] | None = _field("url or b64_json, the default")
    output_format: Literal["png", "jpeg", "webp"] | None = _field("png, the default, jpeg or webp")
    output_compression: int | None = _field("a whole number from 0 to 100", ge=0, le=100)
    stream: bool | None = _field("true or false")
    partial_images: int | None = _field("a whole number from 0 to 3", ge=0, le=3)
    quality: str | None = _field(_IDLE)
    complexity: str | None = _field(_IDLE)
    background: str | None = _field(_IDLE)
    style: str | None = _field(_IDLE)
    moderation: str | None = _field(_IDLE)
    input_fidelity: str | None = _field(_IDLE)
    user: str | None = _field(_IDLE)
    safety_identifier: str | None = _field(_IDLE)
    negative_prompt: str | None = _own("negative_prompt")
    seed: int | None = _own("seed")
    steps: int | None = _own("steps")
    guidance_scale: float | None = _own("guidance_scale")
    sampler: str | None = _own("sampler")
    schedule: str | None = _own("schedule")
    spacing: str | None = _own("spacing")
    eta: float | None = _own("eta")
    strength: float | None = _own("strength")

    @classmethod
    def read(cls, body: bytes | dict[str, str]) -> Self:
        """The wish in a body of JSON, or in the fields of a form."""
        try:
            if isinstance(body, bytes):
                return cls.model_validate_json(body)
            return cls.model_validate_strings(body)
        except ValidationError as error:
            raise _explained(error) from None

    @property
    def format(self) -> str:
        return self.output_format or "png"

    def settings(self) -> dict[str, Any]:
        """What to make the `Request` with, pictures apart."""
        settings = self.model_dump(include=set(Request.model_fields), exclude_none=True)
        settings["count"] = self.n or 1
        if self.size is not None and self.size != "auto":
            settings["width"], settings["height"] = map(int, self.size.split("x"))
        return settings


def _with_pictures(settings: dict[str, Any], image: bytes, mask: bytes | None) -> Request:
    """The request to edit a picture.

    Where no size is asked for, the picture keeps its own, or is brought in its proportions to the
    nearest one that is allowed.
    """
    picture = open_picture(image, "image")
    if mask is not None:
        holes = _transparent(mask, "mask")
        if holes is None:
            raise SafelightError("the mask must have an alpha channel: 0 where to repaint")
    else:
        holes = _transparent(image, "image")
        if holes is not None and holes.getbbox() is None:
            holes = None
    if "width" not in settings:
        width, height = allowed_size(picture.size)
        settings = {**settings, "width": width, "height": height}
    return Request(**settings, image=picture, mask=holes)


def _transparent(data: bytes, what: str) -> Image.Image | None:
    """White where a picture is wholly transparent, else black; None if it has no alpha channel.

    Upright, as `open_picture` makes the picture itself.
    """
    name = name_of(data, what)
    with opened(data, name) as image:
        if not image.has_transparency_data:
            return None
        try:
            alpha = ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")
        except Exception as error:  # decoders of broken files raise anything
            raise SafelightError(f"{name} is damaged or cut off ({reason(error)})") from None
    return alpha.point([255] + [0] * 255)


def _limited(http: HttpRequest, most: int) -> HttpRequest:
    """The same request; reading its body raises as soon as more than `most` bytes have come."""
    taken = 0

    async def receive() -> Message:
        nonlocal taken
        message = await http.receive()
        taken += len(message.get("body", b""))
        if taken > most:
            raise ApiError(413, f"the body must have at most {most >> 20} MiB")
        return message

    return HttpRequest(http.scope, receive)


async def _read_form(http: HttpRequest) -> tuple[Wish, bytes, bytes | None]:
    """The wish, the picture and the mask of a form."""
    if not http.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(400, "the body must be multipart/form-data, with the picture in it")
    fields: dict[str, str] = {}
    files: dict[str, bytes] = {}
    # Text may be as long as the whole, for a picture sent as text is to hear what is wrong.
    form = _limited(http, MOST_UPLOAD).form(max_files=32, max_fields=64, max_part_size=MOST_UPLOAD)
    async with form as parts:
        for name, value in parts.multi_items():
            plain = name.removesuffix("[]")
            if plain not in ("image", "mask"):
                if not isinstance(value, str):
                    raise ApiError(400, f"there is no file {_quoted(name)}; known: image, mask")
                if name in fields:
                    raise ApiError(400, f"{_quoted(name)} is there more than once")
                if value:  # empty is how forms, and the client, say null
                    fields[name] = value
            elif isinstance(value, str):
                raise ApiError(400, f"{plain} must be uploaded: no address is fetched", plain)
            elif plain in files:
                raise ApiError(400, f"{plain} must be one picture, not several", plain)
            else:
                files[plain] = await value.read()
    wish = Wish.read(fields)
    if "image" not in files:
        raise ApiError(400, "image is needed: a PNG, JPEG or WebP picture", "image")
    return wish, files["image"], files.get("mask")


# --- errors --------------------------------------------------------------------------------------


class ApiError(Exception):
    """An answer that is an error, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _failed(message: str) -> ApiError:
    # But for the header, the client would have a picture that fails drawn two times more.
    return ApiError(500, message, kind="server_error", headers={"x-should-retry": "false"})


def _refused(error: SafelightError | ApiError) -> ApiError:
    if isinstance(error, ApiError):
        return error
    message = str(error)
    if isinstance(error, BusyError):
        after = {"Retry-After": str(error.retry_after)}
        kind, code = "rate_limit_error", "rate_limit_exceeded"
        return ApiError(429, message, kind=kind, code=code, headers=after)
    if isinstance(error, StoppingError | StorageError):
        status = 503 if isinstance(error, StoppingError) else 507
        return ApiError(status, message, kind="server_error")
    # The first setting that a message names is the one at fault; values stand in quotes.
    named = next((word for word in message.split() if word in Request.model_fields), None)
    return ApiError(400, message, "size" if named in ("width", "height") else named)


def _explained(error: ValidationError) -> ApiError:
    """One line for the first of pydantic's findings."""
    first = error.errors(include_url=False, include_input=False)[0]
    if not first["loc"]:
        return ApiError(400, f"the body must be a JSON object ({first['msg']})")
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        message = f"there is no setting {_quoted(name)}; known: {', '.join(Wish.model_fields)}"
        return ApiError(400, message, name[:40], code="unknown_parameter")
    verb = "is needed:" if first["type"] == "missing" else "must be"
    return ApiError(400, f"{name} {verb} {Wish.model_fields[name].description}", name)


def _quoted(name: str) -> str:
    return repr(name[:40])


class _Route(APIRoute):
    """Answers errors in OpenAI's shape, whatever the app makes of those of other routes."""

    def get_route_handler(self) -> Callable[[HttpRequest], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answer(http: HttpRequest) -> Response:
            try:
                return await handle(http)
            except (ApiError, SafelightError) as raised:
                error = _refused(raised)
            except HTTPException as raised:  # a form that cannot be parsed
                error = ApiError(raised.status_code, str(raised.detail))
            except ClientDisconnect:
                return Response(status_code=499)  # nobody is there to read it
            return JSONResponse(error.body, error.status, error.headers)

        return answer


# --- the answer ----------------------------------------------------------------------------------


def _about(wish: Wish, size: tuple[int, int]) -> dict[str, Any]:
    """What is said of a picture. There is one quality, and no transparency."""
    about = {"size": f"{size[0]}x{size[1]}", "output_format": wish.format}
    return {**about, "quality": "high", "background": "opaque"}


def _totals(job: Job) -> dict[str, Any]:
    # Nothing is charged for, so no tokens are counted; clients need the fields to be there.
    usage: dict[str, Any] = dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), 0)
    usage["input_tokens_details"] = {"image_tokens": 0, "text_tokens": 0}
    return {"usage": usage} | ({"warnings": job.warnings} if job.warnings else {})


def _encoded(png: bytes, wish: Wish, text: str = "") -> dict[str, Any]:
    """A PNG as it is, or as JPEG or WebP with the text in its EXIF."""
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        about = _about(wish, image.size)
        if wish.format != "png":
            exif = Image.Exif()
            comment = b"UNICODE\0" + text.encode("utf-16-be")
            if text and len(comment) <= LONGEST_COMMENT:
                exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
            quality = 100 if wish.output_compression is None else wish.output_compression
            buffer = io.BytesIO()
            image.save(buffer, wish.format, quality=quality, exif=exif)
            png = buffer.getvalue()
    return {"b64_json": base64.b64encode(png).decode(), **about}


async def _finished(service: Service, picture: Picture, wish: Wish) -> dict[str, Any]:
    path = service.picture_file(picture.id)
    if path is None:
        raise _failed(f"picture {picture.index} was deleted before it could be sent")
    png = await asyncio.to_thread(path.read_bytes)
    return await asyncio.to_thread(_encoded, png, wish, recipe_text(picture.recipe))


def _check_succeeded(job: Job) -> None:
    if job.status is not Status.SUCCEEDED:
        raise _failed(job.error or f"the job was {job.status}")


async def _answer(http: HttpRequest, wish: Wish, request: Request, kind: str) -> Response:
    """The pictures of a request; kind is the first half of the names of a stream's events."""
    service: Service = http.app.state.service
    url = wish.response_format == "url"
    if url and wish.stream:
        raise ApiError(400, "response_format must be b64_json in a stream", "response_format")
    if url and wish.format != "png":
        raise ApiError(400, "output_format must be png with response_format url", "output_format")
    job = await service.submit(request, client="openai")
    if wish.stream:
        return _EventStream(service, job, _events(service, job, wish, kind))
    job = await _attended(http.receive, service, job, service.wait(job.id))
    _check_succeeded(job)
    data: list[dict[str, Any]] = []
    for picture in job.pictures:
        if url:
            shown = {"url": f"{http.base_url}api/pictures/{picture.id}"}
        else:
            shown = {"b64_json": (await _finished(service, picture, wish))["b64_json"]}
        data.append({**shown, "revised_prompt": None})
    created = int((job.finished_at or job.created_at).timestamp())
    about = _about(wish, (job.pictures[0].width, job.pictures[0].height))
    return JSONResponse({"created": created, "data": data, **about, **_totals(job)})


async def _attended(receive: Receive, service: Service, job: Job, work: Awaitable[T]) -> T:
    """What work returns. Cancels the job, and raises, if the client goes away before that."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    except BaseException:
        await asyncio.shield(service.cancel(job.id))
        raise
    finally:
        working.cancel()
        leaving.cancel()


class _EventStream(StreamingResponse):
    """Server-sent events about a job, which is cancelled if nobody is left to read them."""

    def __init__(self, service: Service, job: Job, events: AsyncIterator[bytes]) -> None:
        headers = {"Cache-Control": "no-store"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self.service, self.job = service, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientDisconnect):
            await _attended(receive, self.service, self.job, self.stream_response(send))


async def _events(service: Service, job: Job, wish: Wish, kind: str) -> AsyncIterator[bytes]:
    """Previews, evenly over the steps, and each picture once it is finished."""
    wanted = wish.partial_images or 0
    marks = [i / (wanted + 1) for i in range(1, wanted + 1)]
    shown = 0
    sent: set[str] = set()
    try:
        async for event in service.events(job.id, previews=wanted > 0):
            share = event.job.progress.share
            if event.preview is not None and marks and share >= marks[0]:
                marks = [mark for mark in marks if mark > share]
                png = base64.b64decode(event.preview)
                preview = await asyncio.to_thread(_encoded, png, wish)
                yield _event(f"{kind}.partial_image", {**preview, "partial_image_index": shown})
                shown += 1
            for picture in event.job.pictures:
                if picture.id not in sent:
                    sent.add(picture.id)
                    finished = await _finished(service, picture, wish)
                    yield _event(f"{kind}.completed", {**finished, **_totals(event.job)})
            if event.kind == "end":
                _check_succeeded(event.job)
    except (ApiError, SafelightError) as error:
        yield _event("error", _refused(error).body)


def _event(name: str, data: dict[str, Any]) -> bytes:
    told = json.dumps({"type": name, "created_at": int(time.time()), **data})
    return f"event: {name}\ndata: {told}\n\n".encode()


# --- the routes ----------------------------------------------------------------------------------

router = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=_Route)


def _takes(media_type: str, *files: str) -> dict[str, Any]:
    """The body, for the app's own description of its routes."""
    schema = Wish.model_json_schema()
    schema["properties"] |= {name: {"type": "string", "format": "binary"} for name in files}
    schema["required"] += files[:1]
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}


@router.post("/images/generations", openapi_extra=_takes("application/json"))
async def generate(http: HttpRequest) -> Response:
    """Pictures from words."""
    wish = Wish.read(await _limited(http, MOST_JSON).body())
    await _served(http, wish.model, *ANY_MODEL)
    return await _answer(http, wish, Request(**wish.settings()), "image_generation")


@router.post("/images/edits", openapi_extra=_takes("multipart/form-data", "image", "mask"))
async def edit(http: HttpRequest) -> Response:
    """Pictures from a picture: all of it, or where the mask, or itself, is transparent."""
    wish, image, mask = await _read_form(http)
    await _served(http, wish.model, *ANY_MODEL)
    request = await asyncio.to_thread(_with_pictures, wish.settings(), image, mask)
    return await _answer(http, wish, request, "image_edit")


@router.get("/models")
async def models(http: HttpRequest) -> dict[str, Any]:
    """The one model that is served."""
    return {"object": "list", "data": [_entry(await _served(http))]}


@router.get("/models/{name:path}")
async def model(http: HttpRequest, name: str) -> dict[str, Any]:
    return _entry(await _served(http, name))


def _entry(served: ModelInfo) -> dict[str, Any]:
    # When a model was made is not known.
    return {"id": served.name, "object": "model", "created": 0, "owned_by": "safelight"}


async def _served(http: HttpRequest, name: str | None = None, *also: str) -> ModelInfo:
    """The model that is served, if that is its name or the name begins like one of `also`."""
    service: Service = http.app.state.service
    served = await service.model()
    if name is None or name == served.name or name.startswith(also):
        return served
    message = f"there is no model {_quoted(name)}; served: {served.name}"
    raise ApiError(404, message, "model", code="model_not_found")
