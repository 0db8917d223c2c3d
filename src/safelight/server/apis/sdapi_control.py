"""The web UI's ControlNet extension: what a body asks of it, and the routes that clients look at.

The server has one ControlNet or none, and no preprocessors: pictures are edges, depth or poses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from PIL import Image, ImageOps

from safelight.errors import SafelightError
from safelight.hires import final_size
from safelight.request import Request
from safelight.server.apis.sdapi_bodies import DrawBody, ImageToImage, plain_number
from safelight.server.apis.sdapi_errors import Route
from safelight.server.callers import hub_of
from safelight.settings import shown
from safelight.sizes import size_of

router = APIRouter(prefix="/controlnet", route_class=Route, tags=["AUTOMATIC1111"])

_FIELDS = {
    "weight": "control_scale",
    "guidance_start": "control_start",
    "guidance_end": "control_end",
}
_CROP = ("Crop and Resize", "Scale to Fit (Inner Fit)", "Inner Fit (Scale to Fit)")
_FILL = ("Resize and Fill", "Envelope (Outer Fit)", "Outer Fit (Shrink to Fit)")
_RESIZE: dict[object, Callable[..., Image.Image]] = {
    **dict.fromkeys((0, 3, "Just Resize"), Image.Image.resize),
    **dict.fromkeys((1, *_CROP), ImageOps.fit),
    **dict.fromkeys((2, *_FILL), ImageOps.pad),
}
"""The functions for the extension's modes, by number and by name, also of earlier versions."""

_PICTURES = ("image", "input_image")
_BALANCED = (None, 0, "Balanced")


@dataclass(frozen=True)
class Unit:
    """A unit of the extension.

    picture: in base64; empty if the picture to start from guides. settings: by our names. resize:
    brings the picture to a size.
    """

    picture: str
    settings: dict[str, Any]
    resize: Callable[..., Image.Image]

    def guided(
        self, request: Request, picture: Image.Image | None, native: tuple[int, int]
    ) -> Request:
        """Return the request with the unit's picture. native: the model's width and height.

        picture: None if the one to start from guides. Raises SafelightError for one too narrow.
        """
        start, sides = request.image, dict[str, int]()
        if start is None:
            size = request.width or native[0], request.height or native[1]
            sides = {"width": size[0], "height": size[1]}
            # The second pass is guided by the picture at its size.
            size = final_size(request.replace(**sides), native)
        else:
            size = size_of(start.size, request.width, request.height)
        picture = picture or start
        assert picture is not None
        if picture.size != size:
            scale = min(size[0] / picture.width, size[1] / picture.height)
            if self.resize is ImageOps.pad and min(picture.size) * scale < 1:
                raise SafelightError(
                    f"controlnet: its picture of {picture.width}x{picture.height} is too narrow to "
                    f"be brought to {size[0]}x{size[1]}: crop it first"
                )
            picture = self.resize(picture, size, Image.Resampling.LANCZOS)
        return request.replace(**self.settings, **sides).with_pictures(control_image=picture)


def unit_of(body: DrawBody, there: str | None) -> tuple[Unit | None, list[str]]:
    """Return the unit that a body asks for, and warnings. there: the name of our ControlNet.

    In img2img the picture to start from guides if the unit has none. Raises SafelightError for a
    preprocessor or a ControlNet that is not here, or a value that is none of the extension's.
    """
    given = [unit for unit in _units(body.alwayson_scripts) if _enabled(unit)]
    starts = isinstance(body, ImageToImage)
    units = [unit for unit in given if _picture(unit) or (starts and isinstance(unit, dict))]
    if given and there is None:
        return None, ["alwayson_scripts: ControlNet needs a server with --controlnet"]
    if not units or there is None:
        return None, ["alwayson_scripts: ControlNet has a unit without a picture"] if given else []
    unit, warnings = units[0], list[str]()
    if len(units) > 1:
        warnings.append(f"controlnet: the first of {len(units)} units guides, the others do not")
    if unit.get("control_mode") not in _BALANCED:
        warnings.append("controlnet: control_mode is Balanced here")
    module = str(unit.get("module") or "none")
    if module.casefold() != "none":
        raise SafelightError(
            f"controlnet: there is no preprocessor {module!r:.40} here: send its result, such as "
            'the edges themselves, with the module "none"'
        )
    asked = str(unit.get("model") or there).partition(" [")[0]
    if asked.casefold() not in ("none", "auto", there.casefold()):
        raise SafelightError(f"controlnet: there is no model {asked!r:.60}, only {there!r:.60}")
    picture, resize = _picture(unit), _resize(unit.get("resize_mode"))
    return Unit(picture, _settings(unit), resize if picture else Image.Image.resize), warnings


def _settings(unit: dict[str, Any]) -> dict[str, Any]:
    """Return a unit's settings by our names. Raises SafelightError, with the unit's names."""
    given = {ours: unit.get(name) for name, ours in _FIELDS.items()}
    found: dict[str, Any] = {
        ours: plain_number(value) for ours, value in given.items() if value is not None
    }
    try:
        Request(**found)
    except SafelightError as error:
        told = str(error)
        for name, ours in _FIELDS.items():
            told = told.replace(ours, name)
        raise SafelightError(f"controlnet: {told}") from None
    return found


def _resize(mode: object) -> Callable[..., Image.Image]:
    """Return the function for a unit's resize_mode; None is the extension's default."""
    mode = 1 if mode is None else plain_number(mode)
    found = _RESIZE.get(mode) if isinstance(mode, int | str) else None
    if found is None:
        raise SafelightError(
            f'controlnet: resize_mode must be 0 or "Just Resize", 1 or "{_CROP[0]}", or 2 or '
            f'"{_FILL[0]}", not {shown(mode)}'
        )
    return found


def without_pictures(scripts: dict[str, Any]) -> dict[str, Any]:
    """Return `alwayson_scripts` for the answer: pictures of units are null."""
    units = [
        {**unit, **{name: None for name in _PICTURES if name in unit}}
        if isinstance(unit, dict)
        else unit
        for unit in _units(scripts)
    ]
    name = next((one for one in scripts if one.casefold() == "controlnet"), "")
    return {**scripts, name: {**scripts[name], "args": units}} if units else scripts


def _units(scripts: dict[str, Any]) -> list[Any]:
    """Return the units in `alwayson_scripts`, enabled or not; they may be anything."""
    for name, script in scripts.items():
        if name.casefold() == "controlnet" and isinstance(script, dict):
            found = cast("dict[str, Any]", script).get("args")
            return cast("list[Any]", found) if isinstance(found, list) else []
    return []


def _enabled(unit: Any) -> bool:
    return not isinstance(unit, dict) or bool(cast("dict[str, Any]", unit).get("enabled", True))


def _picture(unit: Any) -> str:
    """Return a unit's picture in base64; empty if it has none."""
    if not isinstance(unit, dict):
        return ""
    given = next((one for name in _PICTURES if (one := cast("dict[str, Any]", unit).get(name))), "")
    if isinstance(given, dict):
        given = cast("dict[str, Any]", given).get("image") or ""
    return given if isinstance(given, str) else ""


@router.get("/version")
async def version() -> dict[str, int]:
    """Return the version of the extension's API."""
    return {"version": 3}


@router.get("/model_list")
async def model_list(http: HttpRequest) -> dict[str, list[str]]:
    """List the server's ControlNet."""
    name = hub_of(http).names.controlnet()
    return {"model_list": [] if name is None else [name]}


@router.get("/module_list")
async def module_list() -> dict[str, Any]:
    """List the preprocessors: there are none."""
    return {"module_list": ["none"], "module_detail": {}}


@router.get("/settings")
async def settings() -> dict[str, int]:
    """Return how many units a request may have."""
    return {"control_net_unit_count": 1}
