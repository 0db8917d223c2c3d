"""Colours by name, of backgrounds and of objects that are given another colour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Pixels = NDArray[np.uint8]

WHITE = "white"
COLOURS: dict[str, tuple[int, int, int]] = {
    WHITE: (255, 255, 255),
    "red": (214, 40, 40),
    "orange": (247, 140, 30),
    "yellow": (250, 216, 50),
    "green": (72, 180, 80),
    "dark green": (20, 84, 50),
    "light blue": (150, 212, 246),
    "blue": (40, 92, 212),
    "purple": (130, 64, 176),
    "pink": (250, 160, 200),
    "brown": (122, 76, 44),
    "gray": (140, 140, 140),
    "black": (14, 14, 14),
    "beige": (232, 214, 176),
}
ALSO_SPELT = {"gray": "grey", "purple": "violet"}

PAINTS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "white", "gray", "black",
)  # fmt: skip
"""Colours that an object may be given."""

# Smallest mean Oklab distance between an object's edge and the background.
CONTRAST = 0.14
CONTRAST_WHITE = 0.06  # lower: a bare "a ghost" should stand on white like every other object

PAINTED = 0.5  # smallest share of an object's pixels that must take the colour
ALREADY = 0.15  # an object nearer to a colour than this, in Oklab, has it


OWN = "own"
LOOKED_AT = 80
"""Pixels a side that `look` sees: colours need no more."""


def look(picture: Pixels) -> dict[str, Any]:
    """Return what composing needs to know of a cut-out, uint8 [h, w, 4].

    That is its main colour, and the backgrounds on which it would vanish, for its own colours and
    for each that it can be given.
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


def above(alpha: Image.Image, level: int) -> Image.Image:
    """Return a mask, mode L, that is 255 where `alpha` is above `level` and 0 elsewhere."""
    return alpha.point([255 * (value > level) for value in range(256)])


def backgrounds(picture: Pixels) -> tuple[str, ...]:
    """Return the colours from which a cut-out's edge stands out on average.

    picture: uint8 [h, w, 4].
    """
    alpha = Image.fromarray(picture[..., 3])
    solid = above(alpha, 127)
    edge = (np.asarray(solid) > 0) & (np.asarray(solid.filter(ImageFilter.MinFilter(5))) == 0)
    if not edge.any():
        return tuple(COLOURS)
    seen = oklab(picture[edge][:, :3])
    wanted = {name: CONTRAST_WHITE if name == WHITE else CONTRAST for name in COLOURS}
    return tuple(
        name
        for name, colour in COLOURS.items()
        if np.linalg.norm(seen - oklab(np.array(colour)), axis=-1).mean() >= wanted[name]
    )


@dataclass(frozen=True)
class Main:
    """The main colour of a cut-out: its hue in radians, and its mean in Oklab."""

    hue: float
    mean: tuple[float, float, float]

    def lacks(self, colour: str) -> bool:
        """Return whether this colour would change it."""
        return bool(np.linalg.norm(self.mean - oklab(np.array(COLOURS[colour]))) >= ALREADY)


def main_colour(picture: Pixels) -> Main | None:
    """Return the main colour of a cut-out, uint8 [h, w, 4]; None if too few pixels have it.

    It is the hue that most of the coloured pixels have, and the mean of the pixels near that hue.
    """
    solid = picture[..., 3] > 127
    seen = oklab(picture[..., :3])
    chroma = np.hypot(seen[..., 1], seen[..., 2])
    strong = solid & (chroma > 0.05)
    if not strong.any():
        return None
    hue = np.arctan2(seen[..., 2], seen[..., 1])
    counts, edges = np.histogram(hue[strong], bins=36, range=(-np.pi, np.pi))
    wide = counts + np.roll(counts, 1) + np.roll(counts, -1)
    main = float(edges[wide.argmax()] + np.pi / 36)
    of_main = solid & (_share(hue, chroma, main) > 0.5)
    if of_main.sum() < PAINTED * solid.sum():
        return None
    light, a, b = seen[of_main].mean(axis=0).tolist()
    return Main(main, (light, a, b))


def paint(picture: Pixels, colour: str, main: Main | None = None) -> Pixels | None:
    """Return a cut-out, uint8 [h, w, 4], with its main colour turned into another.

    The result is None if it has no main colour, or this one already. main: its main colour, if that
    is known. Pixels near its hue turn by the same angle, and their lightness and chroma move by as
    much as the main colour's have to: shading and highlights stay.
    """
    main = main or main_colour(picture)
    if main is None or not main.lacks(colour):
        return None
    mean = np.array(main.mean)
    seen = oklab(picture[..., :3])
    light, chroma = seen[..., 0], np.hypot(seen[..., 1], seen[..., 2])
    hue = np.arctan2(seen[..., 2], seen[..., 1])
    share = _share(hue, chroma, main.hue)
    target = oklab(np.array(COLOURS[colour]))
    scale, turn = towards(mean, target)
    new = np.stack(
        [
            # A little of the old contrast is lost, so that highlights do not all end at white.
            target[0] + 0.7 * (light - mean[0]),
            scale * chroma * np.cos(hue + turn),
            scale * chroma * np.sin(hue + turn),
        ],
        axis=-1,
    )
    mixed = seen + share[..., None] * (new - seen)
    return np.concatenate([srgb(mixed), picture[..., 3:]], axis=-1)


def towards(mean: NDArray[Any], target: NDArray[Any]) -> tuple[float, float]:
    """Return by which factor chroma grows, and by which angle hue turns, to another colour."""
    wanted = np.hypot(target[1], target[2])
    scale = wanted / max(np.hypot(mean[1], mean[2]), 1e-6)
    turn = 0.0 if wanted < 0.02 else np.arctan2(target[2], target[1]) - np.arctan2(mean[2], mean[1])
    return float(scale), float(turn)


def _share(hue: NDArray[Any], chroma: NDArray[Any], main: float) -> NDArray[Any]:
    """Return how much each pixel belongs to the main colour, from 0 to 1."""
    away = np.abs(np.angle(np.exp(1j * (hue - main))))
    return np.clip((1.2 - away) / 0.4, 0, 1) * np.clip((chroma - 0.02) / 0.04, 0, 1)


def oklab(rgb: NDArray[Any]) -> NDArray[np.float64]:
    """Return sRGB bytes [..., 3] in Oklab, where distances match the eye (B. Ottosson, 2020)."""
    value = rgb / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ TO_CONES.T) @ TO_LAB.T


def srgb(lab: NDArray[Any]) -> Pixels:
    """Return Oklab [..., 3] as sRGB bytes, clipped to what they can show."""
    linear = (lab @ np.linalg.inv(TO_LAB).T) ** 3 @ np.linalg.inv(TO_CONES).T
    linear = np.clip(linear, 0, 1)
    value = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(value * 255).astype(np.uint8)


TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
