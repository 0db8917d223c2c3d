"""AUTOMATIC1111's tab "Extras": pictures enlarged by upscalers, one or several in a call."""

from __future__ import annotations

import asyncio
import base64
import html
import re
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from PIL import Image
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from safelight.errors import SafelightError
from safelight.picture import MAX_PIXELS, encode, open_picture
from safelight.pixels import centre_crop, resized
from safelight.recipe import MAX_RECIPE
from safelight.server.apis.sdapi_bodies import Number, Whole
from safelight.server.apis.sdapi_errors import Route
from safelight.server.bodies import decode_base64, decoded, turn
from safelight.server.callers import caller_of, hub_of
from safelight.server.disconnects import while_there
from safelight.server.names import Names
from safelight.server.upscaling import Wanted
from safelight.upscaling.names import ALIASES, LANCZOS, check_size, installed, is_lanczos, scaled
from safelight.upscaling.record import entry, noted

NONE = "None"
MAX_PICTURES = 64
_SCALE = re.compile(
    r"^([1-8])x(?=[a-z])|(?<![0-9a-z])x?([1-8])x(?![a-z0-9])|x([1-8])(?![0-9])", re.IGNORECASE
)

router = APIRouter(prefix="/sdapi/v1", route_class=Route, tags=["AUTOMATIC1111"])


class Extras(BaseModel):
    """How pictures are enlarged, with AUTOMATIC1111's defaults."""

    resize_mode: Annotated[Whole, Field(ge=0, le=1)] = 0
    show_extras_results: bool = True
    gfpgan_visibility: Number = 0
    codeformer_visibility: Number = 0
    codeformer_weight: Number = 0
    upscaling_resize: Annotated[Number, Field(ge=1, le=8)] = 2
    upscaling_resize_w: Annotated[Whole, Field(ge=1)] = 512
    upscaling_resize_h: Annotated[Whole, Field(ge=1)] = 512
    upscaling_crop: bool = True
    upscaler_1: str | None = NONE
    upscaler_2: str | None = NONE
    extras_upscaler_2_visibility: Annotated[Number, Field(ge=0, le=1)] = 0
    upscale_first: bool = False

    def upscalers(self) -> tuple[tuple[str, float], ...]:
        """Return the names of the upscalers, and the share that each has of the picture."""
        first, second = (one or NONE for one in (self.upscaler_1, self.upscaler_2))
        if first == NONE:
            return ()
        share = float(self.extras_upscaler_2_visibility)
        return ((first, 1.0), *(((second, share),) if second != NONE and share else ()))

    def size_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the size that a picture of a size is enlarged to, before it is cropped."""
        if self.resize_mode == 0:
            return scaled(size, self.upscaling_resize)
        wanted = self.upscaling_resize_w, self.upscaling_resize_h
        check_size(wanted)
        times = max(side / own for side, own in zip(wanted, size, strict=True))
        width, height = (
            max(round(own * times), side if self.upscaling_crop else 1)
            for own, side in zip(size, wanted, strict=True)
        )
        check_size((width, height))
        return width, height

    def cropped(self, picture: Image.Image) -> Image.Image:
        """Return the middle of an enlarged picture, if a width and height are asked for."""
        if self.resize_mode == 0 or not self.upscaling_crop or not self.upscalers():
            return picture
        return centre_crop(picture, (self.upscaling_resize_w, self.upscaling_resize_h))

    def warnings(self) -> list[str]:
        """Return warnings about what is not done."""
        names = ("gfpgan_visibility", "codeformer_visibility")
        return [f"{name}: faces are not restored" for name in names if getattr(self, name)]


class SingleImage(Extras):
    image: str = ""


class NamedImage(BaseModel):
    data: str
    name: str = ""


class BatchImages(Extras):
    imageList: Annotated[list[NamedImage], Field(min_length=1, max_length=MAX_PICTURES)]  # noqa: N815


@router.post("/extra-single-image")
async def extra_single_image(http: HttpRequest, body: SingleImage) -> dict[str, Any]:
    images, warnings = await _enlarged(http, body, [("image", body.image)])
    return {"html_info": _as_html(warnings), "image": images[0], "warnings": warnings}


@router.post("/extra-batch-images")
async def extra_batch_images(http: HttpRequest, body: BatchImages) -> dict[str, Any]:
    sent = [("imageList", one.data) for one in body.imageList]
    images, warnings = await _enlarged(http, body, sent)
    return {"html_info": _as_html(warnings), "images": images, "warnings": warnings}


@router.get("/upscalers")
async def upscalers(http: HttpRequest) -> list[dict[str, Any]]:
    return [
        {"name": name, "model_name": None, "model_path": None, "model_url": None, "scale": scale}
        for name, scale in await asyncio.to_thread(_known, hub_of(http).names)
    ]


def _known(names: Names) -> list[tuple[str, float]]:
    """Return the upscalers, and how much each enlarges."""
    found = names.entries("upscaler") if installed() else ()
    return [(NONE, 4.0), (LANCZOS, 4.0), *((one.name, scale_of(one.name)) for one in found)]


def scale_of(name: str) -> float:
    """Return how much an upscaler enlarges, as its name says; 4 if it does not."""
    told = _SCALE.search(name)
    return float(next(filter(None, told.groups()))) if told else 4.0


@dataclass
class _Sent:
    """A picture of a call. data: it, in base64. texts: those that are kept."""

    field: str
    data: str
    texts: dict[str, str]
    size: tuple[int, int]


async def _enlarged(
    http: HttpRequest, body: Extras, sent: list[tuple[str, str]]
) -> tuple[list[str], list[str]]:
    """Return the pictures of a call enlarged, PNGs in base64, and warnings."""
    chosen = body.upscalers()
    for field, (name, _) in zip(("upscaler_1", "upscaler_2"), chosen, strict=False):
        await asyncio.to_thread(hub_of(http).names.upscaler, name, field)
    found: list[str] = []
    warnings = body.warnings()
    for one in await _looked_at(http, body, sent, warnings):
        png, more = await _answer(http, body, one)
        found.append(base64.b64encode(png).decode())
        warnings += [line for line in more if line not in warnings]
    return found, warnings


async def _looked_at(
    http: HttpRequest, body: Extras, sent: list[tuple[str, str]], warnings: list[str]
) -> list[_Sent]:
    """Return the pictures of a call, checked before any work. warnings: gets new ones.

    Raises SafelightError if all answers together would have too many pixels: they are in memory
    until the last one is made.
    """
    found: list[_Sent] = []
    pixels = 0
    for field, text in sent:
        async with turn(http):
            data = [decode_base64(text, field, again=True)]
            told, size = await decoded(http, "texts_and_size", data, field, "the picture")
        kept = {key: told[key] for key in ("parameters", "safelight") if key in told}
        if sum(map(len, kept.values())) > 2 * MAX_RECIPE:
            kept = {}
            line = "the picture's recipe is too long and was left out"
            warnings += [line] if line not in warnings else []
        found.append(_Sent(field, text, kept, (size[0], size[1])))
        width, height = body.size_of(found[-1].size) if body.upscalers() else size
        pixels += width * height
        if pixels > MAX_PIXELS:
            raise SafelightError(
                f"the pictures of a call may have {MAX_PIXELS // 10**6} million pixels once they "
                "are enlarged, all together: send fewer, or a smaller scale",
                field=field,
            )
    return found


async def _answer(http: HttpRequest, body: Extras, one: _Sent) -> tuple[bytes, list[str]]:
    """Return the PNG of a picture that is enlarged, and warnings.

    While the worker enlarges it, it is a file alone, so that turns bound the pictures in memory.
    """
    hub, chosen = hub_of(http), body.upscalers()
    wanted = Wanted(body.size_of(one.size) if chosen else one.size, chosen)
    async with turn(http):
        data = [decode_base64(one.data, one.field)]
        picture = await decoded(http, "picture", data, one.field, "the picture")
        if not wanted.needs_worker:
            made = await asyncio.to_thread(resized, picture, wanted.size) if chosen else picture
            del picture
            return await asyncio.to_thread(_as_png, body, one, made, [])
        begun = await hub.enlargements.begin(picture, wanted, caller_of(http.scope).name)
        del picture
    try:
        used = await while_there(http.receive, hub.enlargements.used(begun))
        async with turn(http):
            made = await asyncio.to_thread(open_picture, begun.made)
            return await asyncio.to_thread(_as_png, body, one, made, used)
    except SafelightError as error:
        if error.code in ("failed", "out_of_memory"):  # not the caller's fault
            raise HTTPException(500, str(error)) from None
        raise
    finally:
        await hub.enlargements.end(begun)


def _as_png(
    body: Extras, one: _Sent, picture: Image.Image, used: list[dict[str, str]]
) -> tuple[bytes, list[str]]:
    """Return the PNG of an enlarged picture, cropped if that is asked for, and warnings."""
    made = body.cropped(picture)
    # `verify` repeats neither a mixture of two nor what is cropped.
    again = len(body.upscalers()) < 2 and made.size == picture.size
    del picture
    kept = {key: text for key, text in one.texts.items() if again or key != "safelight"}
    told, warnings = _texts(kept, body.upscalers(), used, one.size, made.size)
    return encode(made, "PNG", told), warnings


def _texts(
    kept: dict[str, str],
    chosen: tuple[tuple[str, float], ...],
    used: list[dict[str, str]],
    before: tuple[int, int],
    after: tuple[int, int],
) -> tuple[dict[str, str], list[str]]:
    """Return the texts of an enlarged PNG, and warnings. kept: of the picture that was sent."""
    if not chosen:
        return kept, []
    by_name = {one["name"]: one for one in used}
    first = chosen[0][0]
    file = by_name.get(ALIASES.get(first, first)) or (used[0] if used else None)
    done = entry(None if is_lanczos(first) else file, before, after)
    try:
        return noted(kept, done), []
    except SafelightError as error:
        return noted({}, done), [f"the picture's recipe was left out: {error}"]


def _as_html(warnings: list[str]) -> str:
    return "".join(f"<p>{html.escape(line)}</p>" for line in warnings)
