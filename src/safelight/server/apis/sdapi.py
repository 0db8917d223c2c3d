"""AUTOMATIC1111's API, /sdapi/v1, for the clients that speak it.

A call is answered when its pictures are drawn. That API knows one job at a time: here progress,
interrupt and skip are about the jobs that the same caller waits for.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from safelight.errors import SafelightError
from safelight.recipe import recipe_text
from safelight.sampling import SAMPLERS
from safelight.sampling.schedule import SCHEDULES
from safelight.server.apis.sdapi_names import is_model, model_hash, model_title, sampler_label
from safelight.server.apis.sdapi_shapes import (
    Asked,
    ImageToImage,
    PngInfo,
    TextToImage,
    describe,
    fitted,
    understand,
)
from safelight.server.bodies import decode_base64
from safelight.server.disconnects import attended
from safelight.server.jobs import Job, Service, Status, retry_after, status_of
from safelight.server.sizes import enlarged_png

# --- refusals ------------------------------------------------------------------------------------


class _Route(APIRoute):
    """Answers errors in AUTOMATIC1111's shape."""

    def get_route_handler(self) -> Callable[[HttpRequest], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(http: HttpRequest) -> Response:
            try:
                return await handler(http)
            except (SafelightError, RequestValidationError, HTTPException) as error:
                return _refusal(error)
            except ClientDisconnect:
                return Response(status_code=499)  # nobody is there to read it

        return handle


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
    else:
        status, headers = status_of(error), retry_after(error)
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
    """Return who asks: their credentials, else their address."""
    return http.headers.get("authorization") or (http.client.host if http.client else "")


def _service(http: HttpRequest) -> Service:
    return http.app.state.service


def _calls(http: HttpRequest) -> list[_Call]:
    """Return all calls that wait, oldest first."""
    state = http.app.state
    if not hasattr(state, "sdapi_calls"):
        state.sdapi_calls = list[_Call]()
    return state.sdapi_calls


def _own_calls(http: HttpRequest) -> list[_Call]:
    return [call for call in _calls(http) if call.caller == caller(http)]


async def _finished(http: HttpRequest, asked: Asked) -> Job:
    """Return the job of a request when it has ended. It is cancelled if the client leaves."""
    service, calls = _service(http), _calls(http)
    job = await service.submit(asked.request, client="sdapi")
    call = _Call(caller(http), job.id, asked.request.count)
    calls.append(call)
    try:
        return await attended(http.receive, service, job.id, service.wait(job.id))
    finally:
        calls.remove(call)
        if call.watcher is not None:
            call.watcher.cancel()


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
    """Return the answer to a call; one that was interrupted has the pictures that were finished."""
    service = _service(http)
    # What cannot be is refused at once; only its size has to wait until the model is loaded.
    served = (await service.models())[0]
    asked = await asyncio.to_thread(understand, body, served, await service.defaults())
    model = await service.loaded()
    asked = fitted(asked, model)
    job = await _finished(http, asked)
    if job.status is Status.FAILED:
        raise HTTPException(500, job.error or "the job failed")
    pictures = sorted(job.pictures, key=lambda picture: picture.index)
    images: list[str] = []
    for picture in pictures if body.send_images else ():
        path = service.picture_file(picture.id)
        if path is None:
            raise HTTPException(500, f"picture {picture.index + 1} is no longer there")
        data = await asyncio.to_thread(_picture, path, asked.size)
        images.append(base64.b64encode(data).decode())
    enlarged = {} if asked.size is None else {"enlarged": list(asked.size)}
    request, seeds = asked.request, [picture.seed for picture in pictures]
    width, height = asked.size or (
        (pictures[0].width, pictures[0].height)
        if pictures
        else (request.width or model.width, request.height or model.height)
    )
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
        "infotexts": [recipe_text({**picture.recipe, **enlarged}) for picture in pictures],
        "styles": [],
        "job_timestamp": _timestamp(job),
        "clip_skip": 1,
        "warnings": asked.warnings + job.warnings,
    }
    parameters = asked.parameters
    parameters["width"] = parameters["width"] or width
    parameters["height"] = parameters["height"] or height
    return {"images": images, "parameters": parameters, "info": json.dumps(info)}


def _picture(path: Path, size: tuple[int, int] | None) -> bytes:
    return enlarged_png(path.read_bytes(), size)


def _timestamp(job: Job) -> str:
    return job.created_at.strftime("%Y%m%d%H%M%S")


@router.post("/png-info")
def png_info(body: PngInfo) -> dict[str, Any]:
    return describe(decode_base64(body.image, "image"))


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
    """Return how far the caller's oldest job is.

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
    """Return how far a job is: (job_no + sampling_step / sampling_steps) / job_count."""
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
    """Cancel all jobs that the caller waits for. Their calls answer with the finished pictures."""
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
    return [
        {
            "title": model_title(model),
            "model_name": model.name,
            "hash": model_hash(model),
            "sha256": model.sha256,
            "filename": model.name,
            "config": None,
        }
        for model in await _service(http).models()
    ]


@router.get("/options")
async def get_options(http: HttpRequest) -> dict[str, Any]:
    model = (await _service(http).models())[0]
    return {
        "sd_model_checkpoint": model_title(model),
        "sd_checkpoint_hash": model.sha256,
        "sd_vae": "Automatic",
        "samples_format": "png",
        "CLIP_stop_at_last_layers": 1,
    }


@router.post("/options")
async def set_options(http: HttpRequest, options: dict[str, Any]) -> None:
    """Accept options, and change nothing. A model that is not served is refused."""
    models, wanted = await _service(http).models(), options.get("sd_model_checkpoint")
    if wanted is not None and not any(is_model(wanted, model) for model in models):
        served = ", ".join(model_title(model) for model in models)
        raise HTTPException(404, f"Model not found: {wanted!r:.80}; this server serves {served}")


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
