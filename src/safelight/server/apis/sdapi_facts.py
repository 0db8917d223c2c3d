"""What AUTOMATIC1111's API says of the server: samplers, models, options."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.exceptions import HTTPException

from safelight.sampling import SAMPLERS
from safelight.sampling.schedule import SCHEDULES
from safelight.server.apis.sdapi_errors import Route
from safelight.server.apis.sdapi_names import is_model, model_hash, model_title, sampler_label
from safelight.server.jobs import Service

router = APIRouter(route_class=Route)


def _service(http: HttpRequest) -> Service:
    return http.app.state.service


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


@router.get("/loras")
async def loras(http: HttpRequest) -> list[dict[str, Any]]:
    """List the LoRAs of the models folder. A client is told no path."""
    return [
        {"name": one["name"], "alias": one["alias"] or one["name"], "path": "", "metadata": {}}
        for one in await _service(http).listed("lora")
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
    extensions face-restorers hypernetworks latent-upscale-modes prompt-styles
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
