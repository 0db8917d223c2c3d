"""AUTOMATIC1111's API, /sdapi/v1, for the clients that speak it.

A call is answered when its pictures are drawn. Where that API speaks of *the* job there are many
here: progress, interrupt and skip are about the jobs that this very caller waits for.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

from safelight.errors import SafelightError
from safelight.recipe import recipe_text
from safelight.sampling import SAMPLERS
from safelight.sampling.schedule import SCHEDULES
from safelight.server.jobs import BusyError, Job, Service, Status
from safelight.server.sdapi_shapes import (
    Asked,
    ImageToImage,
    PngInfo,
    TextToImage,
    describe,
    is_model,
    model_hash,
    model_title,
    picture_bytes,
    sampler_label,
    understand,
)

MOST_BYTES = 64 * 2**20
_ANSWERED = (SafelightError, BusyError)


# --- refusals ------------------------------------------------------------------------------------


class _Route(APIRoute):
    """Bounds what is read of a body, and answers errors in AUTOMATIC1111's shape."""

    def get_route_handler(self) -> Callable[[HttpRequest], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(http: HttpRequest) -> Response:
            try:
                return await handler(HttpRequest(http.scope, _bounded(http)))
            except (SafelightError, RequestValidationError, HTTPException) as error:
                if isinstance(error, SafelightError) and type(error) not in _ANSWERED:
                    raise  # the server's own troubles, whose status the app knows
                return _refusal(error)

        return handle


def _bounded(http: HttpRequest) -> Receive:
    """Receives until the body is longer than MOST_BYTES, or was announced to be."""
    length = http.headers.get("content-length", "")
    announced, taken = int(length) if length.isdecimal() else 0, 0

    async def receive() -> Message:
        nonlocal taken
        if announced <= MOST_BYTES:
            message = await http.receive()
            taken += len(message.get("body", b""))
            if taken <= MOST_BYTES:
                return message
        raise HTTPException(413, f"the body must have at most {MOST_BYTES >> 20} MiB")

    return receive


def _refusal(error: SafelightError | RequestValidationError | HTTPException) -> JSONResponse:
    status, headers, detail = 422, None, str(error)
    if isinstance(error, HTTPException):
        # FastAPI's 400 is for a body that cannot be parsed at all: bad UTF-8, endless nesting.
        status = 422 if error.status_code == 400 else error.status_code
        headers, detail = error.headers, str(error.detail)
    elif isinstance(error, RequestValidationError):
        first = error.errors()[0]
        field = next((part for part in first["loc"][1:] if isinstance(part, str)), "the body")
        detail = f"{field}: {first['msg']}"
    elif isinstance(error, BusyError):
        status, headers = 429, {"Retry-After": str(error.retry_after)}
    # That API sends the whole body back; ours may hold megabytes of pictures.
    content = {"error": type(error).__name__, "detail": detail, "body": "", "errors": detail}
    return JSONResponse(content, status, headers)


router = APIRouter(prefix="/sdapi/v1", route_class=_Route, tags=["AUTOMATIC1111"])


# --- callers and their jobs ----------------------------------------------------------------------


@dataclass(eq=False)
class _Call:
    """A call that waits for its job."""

    caller: str
    job_id: str
    count: int
    stopped: str = ""
    preview: str | None = None
    watcher: asyncio.Task[None] | None = None


def caller(http: HttpRequest) -> str:
    """Who asks: by their credentials, else by their address."""
    return http.headers.get("authorization") or (http.client.host if http.client else "")


def _service(http: HttpRequest) -> Service:
    return http.app.state.service


def _calls(http: HttpRequest) -> list[_Call]:
    """All calls that wait, oldest first."""
    state = http.app.state
    if not hasattr(state, "sdapi_calls"):
        state.sdapi_calls = list[_Call]()
    return state.sdapi_calls


def _own_calls(http: HttpRequest) -> list[_Call]:
    return [call for call in _calls(http) if call.caller == caller(http)]


async def _finished(http: HttpRequest, asked: Asked) -> Job:
    """The job of this request when it has ended, by itself or because nobody waits any more."""
    service, calls = _service(http), _calls(http)
    job = await service.submit(asked.request, client="sdapi")
    call = _Call(caller(http), job.id, asked.request.count)
    calls.append(call)
    end = asyncio.ensure_future(service.wait(job.id))
    gone = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait((end, gone), return_when=asyncio.FIRST_COMPLETED)
        if not end.done():
            await service.cancel(job.id)
        return await end
    finally:
        calls.remove(call)
        for task in (end, gone, call.watcher):
            if task is not None:
                task.cancel()


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _watch(service: Service, call: _Call) -> None:
    async for event in service.events(call.job_id, previews=True):
        call.preview = event.preview or call.preview


# --- pictures ------------------------------------------------------------------------------------


@router.post("/txt2img")
async def txt2img(http: HttpRequest, body: TextToImage) -> dict[str, Any]:
    return await _draw(http, body)


@router.post("/img2img")
async def img2img(http: HttpRequest, body: ImageToImage) -> dict[str, Any]:
    return await _draw(http, body)


async def _draw(http: HttpRequest, body: TextToImage | ImageToImage) -> dict[str, Any]:
    """The answer to a call; one that was interrupted has the pictures that were finished."""
    service = _service(http)
    asked = await asyncio.to_thread(understand, body, await service.model(), await service.taught())
    job = await _finished(http, asked)
    model = await _service(http).model()  # by now it is loaded, and has its hash
    if job.status is Status.FAILED:
        raise HTTPException(500, job.error or "the job failed")
    pictures = sorted(job.pictures, key=lambda picture: picture.index)
    images: list[str] = []
    for picture in pictures if body.send_images else ():
        path = _service(http).picture_file(picture.id)
        if path is None:
            raise HTTPException(500, f"picture {picture.index + 1} is no longer there")
        data = await asyncio.to_thread(path.read_bytes)
        images.append(base64.b64encode(data).decode())
    request, seeds = asked.request, [picture.seed for picture in pictures]
    width = pictures[0].width if pictures else request.width or model.width
    height = pictures[0].height if pictures else request.height or model.height
    extra = {"Schedule type": (request.schedule or "").capitalize(), "Eta": request.eta}
    info = {
        "prompt": request.prompt,
        "all_prompts": [request.prompt] * len(pictures),
        "negative_prompt": request.negative_prompt,
        "all_negative_prompts": [request.negative_prompt] * len(pictures),
        "seed": request.seed,
        "all_seeds": seeds,
        "subseed": request.seed,
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": width,
        "height": height,
        "sampler_name": sampler_label(request.sampler),
        "cfg_scale": request.guidance_scale,
        "steps": request.steps,
        "batch_size": body.batch_size,
        "sd_model_name": model.name,
        "sd_model_hash": model_hash(model),
        "denoising_strength": request.strength,
        "extra_generation_params": {name: value for name, value in extra.items() if value},
        "index_of_first_image": 0,
        "infotexts": [recipe_text(picture.recipe) for picture in pictures],
        "styles": [],
        "job_timestamp": _timestamp(job),
        "clip_skip": 1,
        "warnings": asked.warnings + job.warnings,
    }
    parameters = asked.parameters
    parameters["width"] = parameters["width"] or width
    parameters["height"] = parameters["height"] or height
    return {"images": images, "parameters": parameters, "info": json.dumps(info)}


def _timestamp(job: Job) -> str:
    return job.created_at.strftime("%Y%m%d%H%M%S")


@router.post("/png-info")
def png_info(body: PngInfo) -> dict[str, Any]:
    return describe(picture_bytes(body.image, "image"))


# --- progress ------------------------------------------------------------------------------------


_IDLE: dict[str, Any] = {
    "skipped": False,
    "interrupted": False,
    "stopping_generation": False,
    "job": "",
    "job_count": 0,
    "job_timestamp": "0",
    "job_no": 0,
    "sampling_step": 0,
    "sampling_steps": 0,
}


@router.get("/progress")
async def progress(http: HttpRequest, skip_current_image: bool = False) -> dict[str, Any]:
    """How far the caller's oldest job is.

    Previews are asked for from the first look on, so that nobody pays for those that no one
    sees; that first look has none yet.
    """
    service, share, eta, state, preview = _service(http), 0.0, 0.0, _IDLE, None
    for call in _own_calls(http):
        job = await service.get(call.job_id)
        if job is None or job.status.final or call not in _calls(http):
            continue
        if call.watcher is None and not skip_current_image:
            call.watcher = asyncio.create_task(_watch(service, call))
        share, state = job.progress.share, _state(job, call)
        preview = None if skip_current_image else call.preview
        if share and job.started_at:
            elapsed = (datetime.now(job.started_at.tzinfo) - job.started_at).total_seconds()
            eta = elapsed / share - elapsed
        break
    return {
        "progress": share,
        "eta_relative": eta,
        "state": state,
        "current_image": preview,
        "textinfo": None,
    }


def _state(job: Job, call: _Call) -> dict[str, Any]:
    """How far the job is, told as (job_no + sampling_step / sampling_steps) / job_count."""
    steps = job.progress.steps // call.count
    done = min(job.progress.step // max(steps, 1), call.count - 1)
    return _IDLE | {
        "skipped": call.stopped == "skip",
        "interrupted": call.stopped == "interrupt",
        "job": job.id,
        "job_count": call.count,
        "job_timestamp": _timestamp(job),
        "job_no": done,
        "sampling_step": job.progress.step - done * steps,
        "sampling_steps": steps,
    }


@router.post("/interrupt")
async def interrupt(http: HttpRequest) -> dict[str, Any]:
    return await _stop(http, "interrupt")


@router.post("/skip")
async def skip(http: HttpRequest) -> dict[str, Any]:
    return await _stop(http, "skip")


async def _stop(http: HttpRequest, how: str) -> dict[str, Any]:
    """Cancels all that the caller waits for; those calls answer with what they have."""
    for call in _own_calls(http):
        call.stopped = how
        await _service(http).cancel(call.job_id)
    return {}


# --- what there is -------------------------------------------------------------------------------


@router.get("/samplers")
async def samplers() -> list[dict[str, Any]]:
    return [
        {"name": label, "aliases": [name] if name != label else [], "options": {}}
        for name in SAMPLERS
        for label in (sampler_label(name),)
    ]


@router.get("/schedulers")
async def schedulers() -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "label": name.capitalize(),
            "aliases": None,
            "default_rho": 7.0 if name == "karras" else -1.0,
            "need_inner_model": False,
        }
        for name in ("automatic", *SCHEDULES)
    ]


@router.get("/sd-models")
async def sd_models(http: HttpRequest) -> list[dict[str, Any]]:
    model = await _service(http).model()
    return [
        {
            "title": model_title(model),
            "model_name": model.name,
            "hash": model_hash(model),
            "sha256": model.sha256,
            "filename": model.name,
            "config": None,
        }
    ]


@router.get("/options")
async def get_options(http: HttpRequest) -> dict[str, Any]:
    model = await _service(http).model()
    return {
        "sd_model_checkpoint": model_title(model),
        "sd_checkpoint_hash": model.sha256,
        "sd_vae": "Automatic",
        "samples_format": "png",
        "CLIP_stop_at_last_layers": 1,
    }


@router.post("/options")
async def set_options(http: HttpRequest, options: dict[str, Any]) -> None:
    """Nothing can be set. Only a wish for another model matters enough to be refused."""
    model, wanted = await _service(http).model(), options.get("sd_model_checkpoint")
    if wanted is not None and not is_model(wanted, model):
        raise HTTPException(
            404, f"Model not found: {wanted!r:.80}; this server serves {model_title(model)}"
        )


_UNKNOWN = {"error": "not measured by this server"}
_EMPTY = """
    extensions face-restorers hypernetworks latent-upscale-modes loras prompt-styles
    realesrgan-models script-info sd-vae upscalers
"""
_FIXED: dict[str, Any] = {
    "cmd-flags": {"api": True},
    "embeddings": {"loaded": {}, "skipped": {}},
    "memory": {"ram": _UNKNOWN, "cuda": _UNKNOWN},
    "scripts": {"txt2img": [], "img2img": []},
    **{name: [] for name in _EMPTY.split()},
}


def _give(answer: Any) -> Callable[[], Coroutine[Any, Any, Any]]:
    async def give() -> Any:
        return answer

    return give


for _name, _answer in _FIXED.items():
    router.add_api_route(f"/{_name}", _give(_answer), methods=["GET"], name=_name)
for _name in ("refresh-checkpoints", "refresh-embeddings", "refresh-loras", "refresh-vae"):
    router.add_api_route(f"/{_name}", _give(None), methods=["POST"], name=_name)
