"""What AUTOMATIC1111's API tells about the server: samplers, models, options."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest

from safelight.errors import SafelightError
from safelight.sampling import SAMPLERS
from safelight.server.apis.sdapi_errors import Route
from safelight.server.apis.sdapi_models import OPTION, choose, chosen
from safelight.server.apis.sdapi_names import (
    AUTOMATIC,
    SCHEDULERS,
    model_hash,
    model_title,
    sampler_label,
    scheduler_label,
)
from safelight.server.bodies import turn
from safelight.server.callers import hub_of
from safelight.server.names import Names
from safelight.weights.matching import last_part

MAX_TOLD = 4 << 20
"""The most characters of LoRAs' metadata in one answer: each file may hold megabytes."""

router = APIRouter(prefix="/sdapi/v1", route_class=Route, tags=["AUTOMATIC1111"])


@router.get("/samplers")
async def samplers() -> list[dict[str, Any]]:
    return [
        {
            "name": label,
            "aliases": [name] if name != label else [],
            "options": {"scheduler": AUTOMATIC[name]} if name in AUTOMATIC else {},
        }
        for name in SAMPLERS
        for label in (sampler_label(name),)
    ]


@router.get("/schedulers")
async def schedulers() -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "label": scheduler_label(name),
            "aliases": None,
            "default_rho": 7.0 if name == "karras" else -1.0,
            "need_inner_model": False,
        }
        for name in SCHEDULERS
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
        for model in await hub_of(http).models()
    ]


@router.get("/options")
async def get_options(http: HttpRequest) -> dict[str, Any]:
    hub = hub_of(http)
    models = await hub.models()
    name, _ = await chosen(http)
    model = next((one for one in models if one.name == name), models[0])
    return {
        OPTION: model_title(model),
        "sd_checkpoint_hash": model.sha256,
        "sd_vae": hub.names.vae or "Automatic",
        "samples_format": "png",
        "CLIP_stop_at_last_layers": 1,
    }


@router.post("/options")
async def set_options(http: HttpRequest, options: dict[str, Any]) -> None:
    """Choose the model of the caller's requests. Other options are accepted and change nothing."""
    wanted = options.get(OPTION)
    if wanted is not None:
        await choose(http, wanted)


@router.get("/loras")
async def loras(http: HttpRequest) -> list[dict[str, Any]]:
    async with turn(http):
        return await asyncio.to_thread(_loras, hub_of(http).names)


def _loras(names: Names) -> list[dict[str, Any]]:
    """Return the LoRAs of the models folder. `path` is a name: no path of the server is shown."""
    found: list[dict[str, Any]] = []
    told = 0
    for entry in names.entries("lora"):
        metadata = names.metadata(entry)
        told += sum(len(key) + len(value) for key, value in metadata.items())
        metadata = metadata if told < MAX_TOLD else {}
        name = last_part(entry.name)
        alias = metadata.get("ss_output_name") or name
        found.append({"name": name, "alias": alias, "path": entry.file_name, "metadata": metadata})
    return found


@router.get("/embeddings")
async def embeddings(http: HttpRequest) -> dict[str, Any]:
    model, _ = await chosen(http)
    async with turn(http):
        return await asyncio.to_thread(_embeddings, hub_of(http).names, model)


def _embeddings(names: Names, model: str | None) -> dict[str, Any]:
    """Return the models folder's embeddings: those that fit the model, and the others."""
    found: dict[str, dict[str, Any]] = {"loaded": {}, "skipped": {}}
    for name, one in names.embeddings(model).items():
        fits = not isinstance(one, SafelightError)
        found["loaded" if fits else "skipped"][name] = {
            "step": None,
            "sd_checkpoint": None,
            "sd_checkpoint_name": None,
            "shape": sum(one.widths) if fits else 0,
            "vectors": one.count if fits else 0,
        }
    return found


@router.get("/sd-vae")
async def sd_vae(http: HttpRequest) -> list[dict[str, Any]]:
    entries = await asyncio.to_thread(hub_of(http).names.entries, "vae")
    return [{"model_name": entry.file_name, "filename": entry.file_name} for entry in entries]


@router.get("/prompt-styles")
async def prompt_styles(http: HttpRequest) -> list[dict[str, Any]]:
    styles = await asyncio.to_thread(hub_of(http).names.styles)
    return [
        {"name": name, "prompt": style.prompt, "negative_prompt": style.negative_prompt}
        for name, style in styles.items()
    ]


_UNKNOWN = {"error": "not measured by this server"}
_EMPTY = """
    extensions face-restorers hypernetworks latent-upscale-modes realesrgan-models script-info
"""
_FIXED: dict[str, Any] = {
    "cmd-flags": {"api": True},
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
