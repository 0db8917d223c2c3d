"""The editor's picture: read from an upload, and shown again, enlarged where it is small."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from safelight.errors import SafelightError
from safelight.server.bodies import MAX_BODY
from safelight.server.decoding import Decoders

MAX_LAYERS = 4
"""Layers of the editor's picture: each is held decoded. Ours has one."""

EASEL = 512
"""Pixels. The editor enlarges smaller pictures, so that a brush can hit something."""

_WHOLE = Image.Resampling.NEAREST


def turn(
    values: Sequence[Any], decoders: Decoders, client: str
) -> AbstractAsyncContextManager[None]:
    """Return the client's turn to hold the editor's decoded pictures; none without a picture."""
    picture = values[-2]
    empty = picture is None or picture.background is None
    return nullcontext() if empty else decoders.handling.turn(client)


async def read_easel(values: Sequence[Any], decoders: Decoders, client: str) -> list[Any]:
    """Return the values of all fields with the editor's pictures decoded.

    The editor's value is replaced by its background (RGB and alpha channel) and a list of its
    layers' alpha channels, or by None without a background. client: who asks. Raises
    SafelightError.
    """
    *others, picture, enlarged = values
    if picture is None or picture.background is None:
        return [*others, None, enlarged]
    if len(picture.layers or ()) > MAX_LAYERS:
        raise SafelightError(f"the editor's picture must have at most {MAX_LAYERS} layers")
    layers = [
        await read_file(decoders, "alpha", layer.path, client) for layer in picture.layers or ()
    ]
    background = await read_file(decoders, "with_alpha", picture.background.path, client)
    return [*others, (background, layers), enlarged]


async def read_file(decoders: Decoders, function: str, path: str | Path, client: str) -> Any:
    """Return the result of a function of `caged`, or of "module:name", for an uploaded file."""
    if Path(path).stat().st_size > MAX_BODY:
        raise SafelightError(f"the picture must have at most {MAX_BODY >> 20} MiB")
    data = [await asyncio.to_thread(Path(path).read_bytes)]
    name = function if ":" in function else f"safelight.server.caged:{function}"
    return await decoders.call(name, data, client=client, name="the picture")


def painted(picture: Any, enlarged: int) -> tuple[Image.Image | None, Image.Image | None]:
    """Return the editor's picture, and the mask if anything is painted. A picture that `on_easel`
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
    """Return the editor's value for a picture and its mask, and the factor of enlargement."""
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
