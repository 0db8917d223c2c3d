"""The editors' pictures: read from an upload, and shown again, enlarged where they are small."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from safelight.errors import SafelightError
from safelight.request_pictures import MAX_REFERENCES, REFERENCES, check_area
from safelight.server.bodies import MAX_BODY
from safelight.server.decoding import Decoders
from safelight.studio.suits import Suits

EDITORS = 3
"""The editors of the form: of the picture to start from, the control image and the prompt.

A server of several ControlNets has one for each.
"""

MAX_LAYERS = 4
"""Layers of an editor's picture: each is held decoded. Ours has one."""

EASEL = 512
"""Pixels. An editor enlarges smaller pictures, so that a brush can hit something."""

_WHOLE = Image.Resampling.NEAREST


def editor(name: str, label: str) -> gr.ImageEditor:
    """Return the editor of a picture. name: its id on the page.

    Without a brush or an eraser Gradio's editor shows no buttons at all, so studio.css hides them
    where nothing is painted.
    """
    return gr.ImageEditor(
        label=label,
        type="pil",
        image_mode="RGBA",
        format="png",
        sources=("upload", "clipboard"),
        transforms=(),
        layers=False,
        brush=gr.Brush(default_size=40, colors=["#ff5a36"], color_mode="fixed"),
        eraser=gr.Eraser(default_size=40),  # Gradio's default is a fiftieth of the picture
        height=460,
        elem_id=name,
        elem_classes="easel",
    )


def references() -> gr.Gallery:
    """Return the gallery of the reference pictures, which takes several."""
    return gr.Gallery(
        label="Pictures to edit",
        format="png",
        file_types=["image"],
        columns=4,
        height=240,
        object_fit="contain",
        interactive=True,
        buttons=[],
        sources=["upload", "clipboard"],
        elem_id="references",
    )


def turn(
    values: Sequence[Any], decoders: Decoders, client: str, count: int = EDITORS
) -> AbstractAsyncContextManager[None]:
    """Return the client's turn to hold the editors' decoded pictures; none without a picture.

    count: of the editors, whose values are the last.
    """
    referred = files_of(values[_referred(count)])
    empty = not referred and not any(map(_filled, values[-2 * count :: 2]))
    return nullcontext() if empty else decoders.handling.turn(client)


def _referred(count: int) -> int:
    """Return the place of the reference pictures among the fields: before so many editors."""
    return -2 * count - 1


def _filled(picture: Any) -> bool:
    """Return whether an editor's value has a picture."""
    return picture is not None and picture.background is not None


async def read_easels(
    values: Sequence[Any], decoders: Decoders, client: str, suits: Suits, count: int = EDITORS
) -> list[Any]:
    """Return the values of all fields with the editors' pictures decoded.

    An editor's value is replaced by its background (RGB and alpha channel) and a list of its
    layers' alpha channels, or by None without a background. suits: of the model that is to draw;
    without a ControlNet, the control image is not read, nor the prompt's without an IP-Adapter. The
    reference pictures become a tuple; it is empty if the model does not edit.
    client: who asks. count: of the editors. Raises SafelightError.
    """
    found = [*values]
    paths = files_of(values[_referred(count)]) if suits.edits else []
    if len(paths) > MAX_REFERENCES:
        raise SafelightError(f"of pictures to edit there may be {MAX_REFERENCES}, not {len(paths)}")
    referred: list[Image.Image] = []
    for path in paths:
        name = "the picture to edit"
        referred.append(await read_file(decoders, "picture", path, client, name))
        check_area(REFERENCES, referred)
    found[_referred(count)] = tuple(referred)
    for place, name, read in (
        (-2 * count, "the picture", True),
        *((-2 * i, "the control image", suits.guided) for i in range(count - 1, 1, -1)),
        (-2, "the picture of the prompt", suits.prompted),
    ):
        found[place] = await _read(found[place] if read else None, decoders, client, name)
    return found


def files_of(pictures: Any) -> list[str]:
    """Return the paths of the pictures in a gallery, as Gradio's data of it names them."""
    shown = (getattr(one, "image", None) for one in getattr(pictures, "root", None) or ())
    return [one.path for one in shown if one is not None and one.path]


async def _read(picture: Any, decoders: Decoders, client: str, name: str) -> Any:
    """Return an editor's value for `painted`. name: of the picture, in errors."""
    if not _filled(picture):
        return None
    if len(picture.layers or ()) > MAX_LAYERS:
        raise SafelightError(f"{name} must have at most {MAX_LAYERS} layers in the editor")
    layers = [
        await read_file(decoders, "alpha", layer.path, client, name)
        for layer in picture.layers or ()
    ]
    path = picture.background.path
    return await read_file(decoders, "with_alpha", path, client, name), layers


async def read_file(
    decoders: Decoders, function: str, path: str | Path, client: str, name: str = "the picture"
) -> Any:
    """Return the result of a function of `caged`, or of "module:name", for an uploaded file.

    name: of the picture, in errors.
    """
    if Path(path).stat().st_size > MAX_BODY:
        raise SafelightError(f"{name} must have at most {MAX_BODY >> 20} MiB")
    data = [await asyncio.to_thread(Path(path).read_bytes)]
    called = function if ":" in function else f"safelight.server.caged:{function}"
    try:
        return await decoders.call(called, data, client=client, name=name)
    except SafelightError as error:
        text = str(error)
        raise SafelightError(f"{name}: {text}" if text.startswith("it ") else text) from None


def painted(picture: Any, enlarged: int) -> tuple[Image.Image | None, Image.Image | None]:
    """Return an editor's picture, and the mask if anything is painted. A picture that `on_easel`
    enlarged is reduced again, so that every pixel equals the original.
    """
    if picture is None:
        return None, None
    (image, alpha), layers = picture
    if alpha is not None and alpha.getbbox() is None:  # an empty canvas is transparent
        return None, None
    drawn = np.zeros((image.height, image.width), bool)
    for alpha in layers:
        if alpha is not None:
            drawn |= np.asarray(alpha.resize(image.size, _WHOLE)) > 127
    mask = Image.fromarray(drawn.astype(np.uint8) * 255) if drawn.any() else None
    if enlarged == 1 or max(image.size) > EASEL:
        return image, mask
    small = image.resize((image.width // enlarged, image.height // enlarged), _WHOLE)
    if small.resize(image.size, _WHOLE).tobytes() != image.tobytes():  # another picture since then
        return image, mask
    return small, mask and mask.resize(small.size, _WHOLE)


def on_easel(
    image: Image.Image | None, mask: Image.Image | None = None
) -> tuple[dict[str, Any] | None, int]:
    """Return an editor's value for a picture and its mask, and the factor of enlargement."""
    if image is None:
        return None, 1
    times = max(1, EASEL // max(image.size))
    size = (image.width * times, image.height * times)
    layers = []
    if mask is not None:
        layer = Image.new("RGBA", size, (255, 90, 54, 0))
        layer.putalpha(mask.convert("L").resize(size, _WHOLE))
        layers.append(layer)
    background = image.convert("RGBA").resize(size, _WHOLE)
    return {"background": background, "layers": layers, "composite": None}, times
