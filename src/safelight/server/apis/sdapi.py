"""AUTOMATIC1111's API, /sdapi/v1, for the clients that speak it.

A call is answered when its pictures are drawn. That API knows one job at a time; here, progress,
interrupt and skip apply to the jobs that the same caller waits for.
"""

from __future__ import annotations

import asyncio
import base64
import json
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from PIL import Image
from starlette.exceptions import HTTPException

from safelight.hires import infotext
from safelight.recipe import first_size, recipe_text
from safelight.request_pictures import REFERENCES
from safelight.server.apis.sdapi_bodies import Asked, ImageToImage, PngInfo, Sent, TextToImage
from safelight.server.apis.sdapi_control import Unit, check_room, guided, units_of
from safelight.server.apis.sdapi_errors import Route
from safelight.server.apis.sdapi_hires import with_known_upscaler
from safelight.server.apis.sdapi_models import model_of
from safelight.server.apis.sdapi_names import model_hash, sampler_label
from safelight.server.apis.sdapi_shapes import (
    describe,
    first_picture,
    fitted,
    references_of,
    understand,
)
from safelight.server.bodies import decode_base64, decoded, decoded_pictures, turn
from safelight.server.callers import caller_of, hub_of
from safelight.server.disconnects import attended
from safelight.server.hub import Hub
from safelight.server.jobs import Job, ModelInfo, Picture, Status
from safelight.server.sizes import picture_at

router = APIRouter(prefix="/sdapi/v1", route_class=Route, tags=["AUTOMATIC1111"])


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
    """Return the caller's identity: key, address and the name in Basic credentials."""
    return f"{caller_of(http.scope).name} {http.headers.get('authorization', '')}"


def _calls(http: HttpRequest) -> list[_Call]:
    """Return all calls that wait, oldest first."""
    state = http.app.state
    if not hasattr(state, "sdapi_calls"):
        state.sdapi_calls = list[_Call]()
    return state.sdapi_calls


def _own_calls(http: HttpRequest) -> list[_Call]:
    return [call for call in _calls(http) if call.caller == caller(http)]


async def _finished(http: HttpRequest, job: Job, count: int) -> Job:
    """Return a job of `count` pictures once it has ended. It is cancelled if the client leaves."""
    hub, calls = hub_of(http), _calls(http)
    call = _Call(caller(http), job.id, count)
    calls.append(call)
    try:
        return await attended(http.receive, hub, job.id, hub.wait(job.id))
    finally:
        calls.remove(call)
        if call.watcher is not None:
            call.watcher.cancel()


async def _watch(hub: Hub, call: _Call) -> None:
    async for event in hub.events(call.job_id, previews=True):
        call.preview = event.preview or call.preview


# --- pictures ------------------------------------------------------------------------------------


@router.post("/txt2img")
async def txt2img(http: HttpRequest, body: TextToImage) -> dict[str, Any]:
    return await _draw(http, body)


@router.post("/img2img")
async def img2img(http: HttpRequest, body: ImageToImage) -> dict[str, Any]:
    return await _draw(http, body)


async def _draw(http: HttpRequest, body: TextToImage | ImageToImage) -> dict[str, Any]:
    """Return the answer to a call; an interrupted call has the pictures finished so far."""
    hub = hub_of(http)
    # Refuse at once what is not possible. Only the size may have to wait for a worker.
    name, warnings = await model_of(http, body)
    plan = await hub.plan(name)
    asked = await asyncio.to_thread(understand, body, plan)
    nets = await asyncio.to_thread(hub.names.controlnets, name)
    units, more = units_of(body, nets, await asyncio.to_thread(hub.names.ip_adapter, name))
    warnings += more
    if isinstance(body, ImageToImage):
        first_picture(body)
    referred = references_of(body)
    waits = units or referred or isinstance(body, ImageToImage)
    async with turn(http) if waits else nullcontext():
        if isinstance(body, ImageToImage):
            sent = await _sent(http, body)
            asked = await asyncio.to_thread(understand, body, plan, sent)
            del sent
        native = await hub.native_size(name)
        meant = await hub.find_model(name)
        if referred:  # first: if no size is asked for, theirs is drawn
            several = (await decoded_pictures(http, referred))[REFERENCES]
            several = asked.request.reference_images + several
            asked = replace(asked, request=asked.request.with_pictures(reference_images=several))
            del several
        asked = await asyncio.to_thread(fitted, asked, meant, native, plan)
        asked = await asyncio.to_thread(with_known_upscaler, asked, hub.names)
        if units:
            check_room(units, asked.request, native)
            given: list[tuple[Unit, Image.Image]] = []
            for unit in units:  # one after the other: each takes less memory at its size
                picture = await _picture_of(http, unit)
                picture = await asyncio.to_thread(unit.fitted, asked.request, picture, native)
                given.append((unit, picture))
            request = guided(given, asked.request, native, len(nets))
            asked = replace(asked, request=request)
            del given
        owner = caller_of(http.scope).owner
        job = await hub.submit(asked.request, client="sdapi", owner=owner, model=name)
        # Release the decoded pictures while the job waits.
        asked = replace(
            asked,
            request=asked.request.without_pictures(),
            warnings=warnings + asked.warnings,
        )
    job = await _finished(http, job, asked.request.count)
    if job.status is Status.FAILED:
        raise HTTPException(500, job.error or "the job failed")
    pictures = sorted(job.pictures, key=lambda picture: picture.index)
    # The recipe has the hash of the model that drew.
    drew = pictures[0].recipe["model"]["sha256"] if pictures else None
    model = ModelInfo(name=job.model or meant, sha256=drew, width=native[0], height=native[1])
    images: list[str] = []
    for picture in pictures if body.send_images else ():
        async with turn(http):
            data = await asyncio.to_thread(picture_at, hub, picture.id, asked.size)
        if data is None:
            raise HTTPException(500, f"picture {picture.index + 1} is no longer there")
        images.append(base64.b64encode(data).decode())
    return {"images": images, **_told(body, asked, job, pictures, model)}


def _told(
    body: TextToImage | ImageToImage,
    asked: Asked,
    job: Job,
    pictures: list[Picture],
    model: ModelInfo,
) -> dict[str, Any]:
    """Return what an answer says of a job and its pictures: `parameters` and `info`."""
    enlarged = {} if asked.size is None else {"enlarged": list(asked.size)}
    request, seeds = asked.request, [picture.seed for picture in pictures]
    # The settings drawn with: a level of `fast` and the model fill in what the body leaves open.
    drawn: dict[str, Any] = pictures[0].recipe["settings"] if pictures else job.settings
    sampler = drawn.get("sampler")
    width, height = asked.size or (
        (pictures[0].width, pictures[0].height)
        if pictures
        else (request.width or model.width, request.height or model.height)
    )
    extra = {"Schedule type": (drawn.get("schedule") or "").capitalize(), "Eta": drawn.get("eta")}
    extra["Spacing"] = drawn.get("spacing")
    again = infotext(drawn)
    strength = again.pop("Denoising strength", drawn.get("strength"))
    width, height = first_size(drawn, (width, height))
    # Styles and dynamic prompts give each picture a prompt of its own.
    prompts, negatives = (
        [picture.recipe["settings"][name] for picture in pictures]
        for name in ("prompt", "negative_prompt")
    )
    info = {
        "prompt": prompts[0] if prompts else request.prompt,
        "all_prompts": prompts,
        "negative_prompt": negatives[0] if negatives else request.negative_prompt,
        "all_negative_prompts": negatives,
        "seed": request.seed,
        "all_seeds": seeds,
        "subseed": request.seed,
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": width,
        "height": height,
        "sampler_name": sampler and sampler_label(sampler),
        "cfg_scale": drawn.get("guidance_scale"),
        "steps": drawn.get("steps"),
        "batch_size": body.batch_size,
        "sd_model_name": model.name,
        "sd_model_hash": model_hash(model),
        "denoising_strength": strength,
        "extra_generation_params": {name: v for name, v in (extra | again).items() if v},
        "index_of_first_image": 0,
        "infotexts": [recipe_text({**picture.recipe, **enlarged}) for picture in pictures],
        "styles": body.styles,
        "job_timestamp": _timestamp(job),
        "clip_skip": drawn.get("clip_skip") or 1,
        "warnings": asked.warnings + job.warnings,
    }
    silent = {"width", "height", "steps", "cfg_scale"} - body.model_fields_set
    parameters = asked.parameters | {name: info[name] for name in silent}
    return {"parameters": parameters, "info": json.dumps(info)}


async def _picture_of(http: HttpRequest, unit: Unit) -> Image.Image | None:
    """Return the picture of a unit of the ControlNet extension, decoded; None without one."""
    if not unit.picture:
        return None
    data = [decode_base64(unit.picture, "controlnet")]
    return await decoded(http, "picture", data, "controlnet", "controlnet's picture")


async def _sent(http: HttpRequest, body: ImageToImage) -> Sent:
    """Return the pictures of a body, decoded."""
    again, mask = body.include_init_images, None
    if body.mask:  # first: while it waits, it takes less memory
        data = [decode_base64(body.mask, "mask", again=again)]
        mask = await decoded(http, "strokes", data, "mask")
    data = [decode_base64(first_picture(body), "init_images", again=again)]
    what = "the picture of init_images"
    return Sent(await decoded(http, "picture", data, "init_images", what), mask)


def _timestamp(job: Job) -> str:
    return job.created_at.strftime("%Y%m%d%H%M%S")


@router.post("/png-info")
async def png_info(http: HttpRequest, body: PngInfo) -> dict[str, Any]:
    data = [decode_base64(body.image, "image")]
    texts = await decoded(http, "texts", data, "image", "the picture")
    return await asyncio.to_thread(describe, texts)


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

    Previews are requested from the first call on, so that none is made that nobody sees; the first
    answer has none yet.
    """
    hub, share, eta, state, preview = hub_of(http), 0.0, 0.0, _IDLE, None
    for call in _own_calls(http):
        job = await hub.get(call.job_id)
        if job is None or job.status.final or call not in _calls(http):
            continue
        if call.watcher is None and not skip_current_image:
            call.watcher = asyncio.create_task(_watch(hub, call))
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
    """Return a job's progress: (job_no + sampling_step / sampling_steps) / job_count."""
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
    return await _stop(http, "interrupt", _own_calls(http))


@router.post("/skip")
async def skip(http: HttpRequest) -> dict[str, Any]:
    """Cancel the caller's jobs of one picture. Others go on: no picture of them can be left out."""
    return await _stop(http, "skip", [call for call in _own_calls(http) if call.count == 1])


async def _stop(http: HttpRequest, how: str, calls: list[_Call]) -> dict[str, Any]:
    """Cancel the jobs of these calls; the calls answer with the finished pictures."""
    for call in calls:
        call.stopped = how
        await hub_of(http).cancel(call.job_id)
    return {}
