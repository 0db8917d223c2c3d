"""The web UI's ControlNet extension: what a body asks of it, and the routes that clients look at.

The server has a few ControlNets or none, and no preprocessors: pictures are edges, depth or poses.
The extension draws with IP-Adapters, too, of which the server has one or none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from PIL import Image, ImageOps

from safelight.controls import OFF, blank, matched
from safelight.errors import SafelightError
from safelight.hires import final_size
from safelight.recipe import IP_ADAPTER_MODULE, is_ip_adapter
from safelight.request import Request
from safelight.request_pictures import MAX_TOGETHER, changed
from safelight.server.apis.sdapi_bodies import DrawBody, ImageToImage, plain_number
from safelight.server.apis.sdapi_errors import Route
from safelight.server.callers import hub_of
from safelight.server.names import Names
from safelight.settings import settings_of, shown
from safelight.sizes import size_of

router = APIRouter(prefix="/controlnet", route_class=Route, tags=["AUTOMATIC1111"])

_FIELDS = {"weight": "scale", "guidance_start": "start", "guidance_end": "end"}
"""The ends of our settings' names, by the extension's names."""

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
    brings the picture to a size; None if it is a prompt, for an IP-Adapter. place: of a ControlNet,
    which of the server's it is for.
    """

    picture: str
    settings: dict[str, Any]
    resize: Callable[..., Image.Image] | None
    place: int = 0

    def fitted(
        self, request: Request, picture: Image.Image | None, native: tuple[int, int]
    ) -> Image.Image:
        """Return the unit's picture, at the size at which it guides a request.

        picture: None if the one to start from guides. native: the model's width and height. Raises
        SafelightError for a picture that is too narrow.
        """
        picture = picture or request.image
        assert picture is not None
        if self.resize is None:
            return picture
        size = _guiding_size(request, native)
        if picture.size != size:
            scale = min(size[0] / picture.width, size[1] / picture.height)
            if self.resize is ImageOps.pad and min(picture.size) * scale < 1:
                raise SafelightError(
                    f"controlnet: its picture of {picture.width}x{picture.height} is too narrow to "
                    f"be brought to {size[0]}x{size[1]}: crop it first"
                )
            picture = self.resize(picture, size, Image.Resampling.LANCZOS)
        return picture


def _guiding_size(request: Request, native: tuple[int, int]) -> tuple[int, int]:
    """Return the size that pictures guide a request at. native: the model's width and height."""
    if request.image is None:
        # The second pass is guided by the picture at its size.
        return final_size(request.replace(**_sides(request, native)), native)
    # Of a request that is cropped, width and height are those of the part that is drawn.
    size = request.image.size
    return size if request.is_cropped else size_of(size, request.width, request.height)


def check_room(units: Sequence[Unit], request: Request, native: tuple[int, int]) -> None:
    """Raise SafelightError if the units' pictures have too many pixels at the size they guide at.

    native: the model's width and height.
    """
    count = sum(unit.resize is not None for unit in units)
    if count < 2:
        return
    width, height = _guiding_size(request, native)
    if count * width * height > MAX_TOGETHER:
        raise SafelightError(
            f"controlnet: the pictures of {count} units at {width}x{height} have more than "
            f"{MAX_TOGETHER // 10**6} million pixels together: send fewer, or draw smaller"
        )


def _sides(request: Request, native: tuple[int, int]) -> dict[str, int]:
    """Return width and height of a request without a picture to start from, by these names."""
    return {"width": request.width or native[0], "height": request.height or native[1]}


def guided(
    units: Sequence[tuple[Unit, Image.Image]],
    request: Request,
    native: tuple[int, int],
    count: int,
) -> Request:
    """Return a request with the pictures and the settings of units.

    units: each with its `fitted` picture. native: the model's width and height. count: how many
    ControlNets it has. One without a unit has scale 0, and a blank picture.
    """
    prompts = [(unit, picture) for unit, picture in units if unit.resize is None]
    guides = {unit.place: (unit, picture) for unit, picture in units if unit.resize is not None}
    if guides:
        settings = [guides[i][0].settings if i in guides else OFF for i in range(count)]
        defaults = {name: settings_of(Request)[name].default for name in OFF}
        found: dict[str, Any] = {
            name: [one.get(name, default) for one in settings] for name, default in defaults.items()
        }
        pictures = [guides[i][1] if i in guides else blank() for i in range(count)]
        found |= _sides(request, native) if request.image is None else {}
        request = request.replace(**found)
        request = request.with_pictures(**changed({"control_image": pictures}, lambda _, one: one))
    for unit, picture in prompts:
        request = request.replace(**unit.settings).with_pictures(ip_adapter_image=picture)
    return request


def units_of(
    body: DrawBody, controlnets: Sequence[str], ip_adapter: str | None
) -> tuple[list[Unit], list[str]]:
    """Return the units that a body asks for, at most one for each of ours, and warnings.

    controlnets, ip_adapter: the names of ours. Raises SafelightError as `guiding_units` does.
    """
    guiding, warnings = guiding_units(body, controlnets, ip_adapter)
    prompting, more = ip_adapter_unit_of(body, ip_adapter)
    return [*guiding, *([] if prompting is None else [prompting])], warnings + more


def ip_adapter_unit_of(body: DrawBody, there: str | None) -> tuple[Unit | None, list[str]]:
    """Return the unit of a body that is for an IP-Adapter, and warnings. there: the name of ours.

    In img2img the picture to start from is the prompt if the unit has none. Raises SafelightError
    for an adapter that is not here, or a value that is none of the extension's.
    """
    units = [u for u in _units(body.alwayson_scripts) if _enabled(u) and _prompts(u, there)]
    if not units:
        return None, []
    if there is None:
        return None, ["alwayson_scripts: a unit of an IP-Adapter needs a server with --ip-adapter"]
    unit, warnings = units[0], list[str]()
    if not _picture(unit) and not isinstance(body, ImageToImage):
        return None, ["alwayson_scripts: the unit of an IP-Adapter has no picture"]
    if len(units) > 1:
        warnings.append(f"controlnet: the first of {len(units)} IP-Adapter units counts alone")
    asked = str(unit.get("model") or there).partition(" [")[0]
    if asked.casefold() not in ("none", "auto", there.casefold()):
        raise SafelightError(f"controlnet: there is no model {asked!r:.60}, only {there!r:.60}")
    return Unit(_picture(unit), _settings(unit, "ip_adapter"), None), warnings


def _prompts(unit: Any, there: str | None) -> bool:
    """Return whether a unit is for an IP-Adapter, by its module or its model.

    there: the name of ours, which may have any name.
    """
    if not isinstance(unit, dict):
        return False
    module, model = (str(cast("dict[str, Any]", unit).get(name)) for name in ("module", "model"))
    ours = there is not None and model.partition(" [")[0].casefold() == there.casefold()
    return ours or is_ip_adapter(module, model)


def guiding_units(
    body: DrawBody, there: Sequence[str], ip_adapter: str | None = None
) -> tuple[list[Unit], list[str]]:
    """Return the units of a body that are for ControlNets, and warnings.

    there, ip_adapter: the names of our ControlNets and of our IP-Adapter, whose units are left out.
    A unit that names none of ours takes the first that no other unit has. In img2img the picture to
    start from guides if a unit has none. Raises SafelightError for a preprocessor or a ControlNet
    that is not here, or a value that is none of the extension's.
    """
    given = [
        u for u in _units(body.alwayson_scripts) if _enabled(u) and not _prompts(u, ip_adapter)
    ]
    starts = isinstance(body, ImageToImage)
    units = [unit for unit in given if _picture(unit) or (starts and isinstance(unit, dict))]
    if given and not there:
        return [], ["alwayson_scripts: ControlNet needs a server with --controlnet"]
    warnings = list[str]()
    if len(units) < len(given):
        warnings.append("alwayson_scripts: ControlNet has a unit without a picture")
    places, left = _places(units, there)
    if left:
        warnings.append(
            f"controlnet: {len(places)} of {len(units)} units guide, one for each ControlNet here"
        )
    found: list[Unit] = []
    for unit, place in places:
        if unit.get("control_mode") not in _BALANCED:
            warnings.append("controlnet: control_mode is Balanced here")
        module = str(unit.get("module") or "none")
        if module.casefold() != "none":
            raise SafelightError(
                f"controlnet: there is no preprocessor {module!r:.40} here: send its result, such "
                'as the edges themselves, with the module "none"'
            )
        picture, resize = _picture(unit), _resize(unit.get("resize_mode"))
        resize = resize if picture else Image.Image.resize
        found.append(Unit(picture, _settings(unit, "control"), resize, place))
    return found, [*dict.fromkeys(warnings)]


def _places(
    units: Sequence[dict[str, Any]], there: Sequence[str]
) -> tuple[list[tuple[dict[str, Any], int]], int]:
    """Return units with the places of their ControlNets among ours, and how many are left over.

    there: the names of ours. Raises SafelightError for a name that is none of them.
    """
    names = [str(unit.get("model") or "none").partition(" [")[0] for unit in units]
    names = ["" if name.casefold() in ("none", "auto") else name for name in names]
    for name in names:
        if name and not matched([name], there)[0]:
            ours = ", ".join(map(repr, there))
            raise SafelightError(f"controlnet: there is no model {name!r:.60}, only {ours:.200}")
    taken, left = matched(names, there)
    for i, name in enumerate(names):
        if not name and left:
            taken[i] = left.pop(0)
    return [(units[i], place) for i, place in sorted(taken.items())], len(units) - len(taken)


def _settings(unit: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return a unit's settings by our names. Raises SafelightError, with the unit's names.

    kind: how our names begin.
    """
    for name in _FIELDS:
        if isinstance(unit.get(name), list):
            raise SafelightError(f"controlnet: {name} must be a number, not a list")
    given = {f"{kind}_{end}": unit.get(name) for name, end in _FIELDS.items()}
    found: dict[str, Any] = {
        ours: plain_number(value) for ours, value in given.items() if value is not None
    }
    try:
        Request(**found)
    except SafelightError as error:
        told = str(error)
        for name, end in _FIELDS.items():
            setting = settings_of(Request)[f"{kind}_{end}"]
            told = told.replace(setting.accepts, setting.accepts_one)  # a unit has one of each
            told = told.replace(setting.name, name)
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
    """List the server's ControlNets and its IP-Adapter."""
    return {"model_list": _models(hub_of(http).names)}


@router.get("/module_list")
async def module_list(http: HttpRequest) -> dict[str, Any]:
    """List the preprocessors: there are none, but for an IP-Adapter's image encoder."""
    reads = hub_of(http).names.ip_adapter() is not None
    return {"module_list": ["none", *([IP_ADAPTER_MODULE] if reads else [])], "module_detail": {}}


@router.get("/settings")
async def settings(http: HttpRequest) -> dict[str, int]:
    """Return how many units a request may have."""
    return {"control_net_unit_count": max(1, len(_models(hub_of(http).names)))}


def _models(names: Names) -> list[str]:
    adapter = names.ip_adapter()
    return [*names.controlnets(), *([] if adapter is None else [adapter])]
