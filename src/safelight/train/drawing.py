"""Cut-outs as they come onto pictures: painted, turned, scaled, pasted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from safelight.train.colours import COLOURS, PAINTS, backgrounds, main_colour, paint
from safelight.train.cutouts import Pixels


@dataclass(frozen=True)
class Thing:
    """One thing on a picture: which cut-out, in which colour if not its own, and where."""

    index: int
    colour: str | None
    x: float
    y: float
    """Its middle, as shares of the picture's sides; it is moved until it is wholly inside."""
    share: float
    """Its longer side over the picture's."""
    angle: float = 0.0
    """Degrees, counter-clockwise."""
    mirrored: bool = False


class Cutouts:
    """The drawings: painted, turned and scaled, each made once."""

    def __init__(self, pictures: Pixels, rows: Sequence[dict[str, Any]]) -> None:
        self.pictures, self._rows = pictures, rows
        self._painted: dict[tuple[int, str], Pixels | None] = {}
        self._allowed: dict[tuple[int, str | None], tuple[str, ...]] = {}
        self._scaled: dict[tuple[int, str | None, int], tuple[Pixels, Pixels]] = {}

    def paintable(self, index: int, colour: str) -> bool:
        if "clashes" in self._rows[index]:
            return colour in self._rows[index]["clashes"]
        return self.picture(index, colour) is not None

    def picture(self, index: int, colour: str | None) -> Pixels | None:
        """uint8 [side, side, 4]; None if it cannot have this colour."""
        if colour is None:
            return self.pictures[index]
        if (index, colour) not in self._painted:
            self._painted[index, colour] = paint(self.pictures[index], colour)
        return self._painted[index, colour]

    def allowed(self, index: int, colour: str | None) -> tuple[str, ...]:
        if (index, colour) not in self._allowed and "clashes" in self._rows[index]:
            clashes = self._rows[index]["clashes"][colour or OWN]
            self._allowed[index, colour] = tuple(c for c in COLOURS if c not in clashes)
        if (index, colour) not in self._allowed:
            picture = self.picture(index, colour)
            assert picture is not None
            self._allowed[index, colour] = backgrounds(picture)
        return self._allowed[index, colour]

    def scaled(
        self, index: int, colour: str | None, side: int, angle: float
    ) -> tuple[Pixels, Pixels]:
        """As `_shrink` returns it."""
        if angle:
            turned = self._image(index, colour).rotate(
                angle, Image.Resampling.BILINEAR, expand=True
            )
            return shrink(turned.crop(turned.getbbox()), side)
        key = (index, colour, side)
        if key not in self._scaled:
            self._scaled[key] = shrink(self._image(index, colour), side)
        return self._scaled[key]

    def _image(self, index: int, colour: str | None) -> Image.Image:
        picture = self.picture(index, colour)
        assert picture is not None
        return Image.fromarray(picture)


def shrink(image: Image.Image, side: int) -> tuple[Pixels, Pixels]:
    """Premultiplied colours [h, w, 3] and transparency [h, w, 1], longer side `side` pixels."""
    scale = side / max(image.size)
    shape = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # Hamming averages like a box but without its steps, and does not ring like Lanczos.
    small = np.asarray(image.convert("RGBa").resize(shape, Image.Resampling.HAMMING))
    return small[..., :3], 255 - small[..., 3:]


def paste(out: Pixels, colours: Pixels, light: Pixels, x: float, y: float) -> None:
    """Put a thing onto a picture, its middle at (x, y), but wholly inside."""
    size = len(out)
    height, width = colours.shape[:2]
    top, left = (
        int(np.clip(round(size * middle - extent / 2), 0, size - extent))
        for middle, extent in ((y, height), (x, width))
    )
    under = out[top : top + height, left : left + width]
    mixed = (light.astype(np.uint16) * under + 127) // 255 + colours
    out[top : top + height, left : left + width] = np.minimum(mixed, 255)


OWN = "own"
LOOKED_AT = 80  # pixels a side: colours need no more


def look(picture: Pixels) -> dict[str, Any]:
    """Of a cut-out, uint8 [h, w, 4]: its main colour, and, for its own colours and each that it
    can be given, the backgrounds that it would vanish on.
    """
    step = max(1, len(picture) // LOOKED_AT)
    picture = np.ascontiguousarray(picture[::step, ::step])
    main = main_colour(picture)
    clashes = {}
    for name in (OWN, *PAINTS):
        painted = picture if name == OWN else paint(picture, name, main)
        if painted is not None:
            fit = backgrounds(painted)
            clashes[name] = [ground for ground in COLOURS if ground not in fit]
    return {"main": [main.hue, *main.mean] if main else None, "clashes": clashes}
