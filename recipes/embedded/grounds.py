"""Draw the backgrounds that are scenes: grass, beach, night, snow, and so on."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from recipes.embedded.captions import SCENES
from recipes.embedded.colours import Pixels

SIDE = 512
"""Pixels a side while drawing; the result is made smaller, which smooths its edges."""

VARIANTS = 20
"""Pictures of each scene."""

Colour = tuple[int, int, int]
Draw = ImageDraw.ImageDraw


def draw_all(size: int, variants: int = VARIANTS) -> Pixels:
    """Return pictures of all scenes, uint8 [scenes, variants, size, size, 3], always the same."""
    return np.stack(
        [np.stack([draw(name, size, number) for number in range(variants)]) for name in SCENES]
    )


def draw(name: str, size: int, number: int) -> Pixels:
    """Return picture `number` of a scene, uint8 [size, size, 3]."""
    rng = np.random.default_rng([list(SCENES).index(name), number])
    image = Image.new("RGB", (SIDE, SIDE))
    _DRAWN[name](image, ImageDraw.Draw(image), rng)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def _near(rng: np.random.Generator, colour: Colour, reach: int = 10) -> Colour:
    r, g, b = (int(np.clip(c + rng.integers(-reach, reach + 1), 0, 255)) for c in colour)
    return r, g, b


def _gradient(
    image: Image.Image, top: Colour, bottom: Colour, start: int = 0, end: int = SIDE
) -> None:
    rows = np.linspace(0, 1, max(1, end - start))[:, None]
    colours = np.array(top) * (1 - rows) + np.array(bottom) * rows
    band = np.repeat(colours[:, None], SIDE, axis=1).round().astype(np.uint8)
    image.paste(Image.fromarray(band), (0, start))


def _hills(d: Draw, rng: np.random.Generator, level: float, height: float, colour: Colour) -> None:
    """Fill below a wavy line at `level`, both as shares of the side."""
    phase, waves = rng.uniform(0, 2 * math.pi), rng.uniform(0.7, 1.6)
    x = np.arange(0, SIDE + 8, 8)
    y = SIDE * (level + height * np.sin(phase + waves * 2 * math.pi * x / SIDE))
    line = [(float(a), float(b)) for a, b in zip(x, y, strict=True)]
    d.polygon([*line, (SIDE, SIDE), (0, SIDE)], fill=colour)


def _cloud(d: Draw, rng: np.random.Generator, x: float, y: float, r: float, colour: Colour) -> None:
    for dx, dy, scale in ((-1.0, 0.15, 0.65), (0, -0.2, 1.0), (1.0, 0.1, 0.75), (0.4, 0.3, 0.8)):
        s = r * scale * rng.uniform(0.9, 1.1)
        cx, cy = x + r * dx, y + r * dy
        d.ellipse((cx - s, cy - s * 0.75, cx + s, cy + s * 0.75), fill=colour)


def _clouds(d: Draw, rng: np.random.Generator, colour: Colour, count: int, below: float) -> None:
    for _ in range(count):
        x, y = rng.uniform(0, SIDE), rng.uniform(0.04, below) * SIDE
        _cloud(d, rng, x, y, rng.uniform(24, 48), colour)


def _stars(d: Draw, rng: np.random.Generator, count: int, below: float) -> None:
    for _ in range(count):
        x, y, r = rng.uniform(0, SIDE), rng.uniform(0, below * SIDE), rng.uniform(1.5, 4.5)
        d.ellipse((x - r, y - r, x + r, y + r), fill=(255, 250, 220))


def _disc(d: Draw, x: float, y: float, r: float, colour: Colour) -> None:
    d.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def _grass(image: Image.Image, d: Draw, rng: np.random.Generator) -> None:
    _gradient(image, _near(rng, (120, 200, 245)), (200, 235, 252))
    _clouds(d, rng, (255, 255, 255), int(rng.integers(1, 4)), 0.3)
    _hills(d, rng, rng.uniform(0.5, 0.6), 0.04, _near(rng, (120, 200, 90)))
    _hills(d, rng, rng.uniform(0.66, 0.74), 0.03, _near(rng, (92, 178, 70)))
    for _ in range(40):
        x, y = rng.uniform(0, SIDE), rng.uniform(0.76, 1.0) * SIDE
        d.line((x, y, x + rng.uniform(-5, 5), y - 14), fill=(66, 148, 52), width=4)


def _beach(image: Image.Image, d: Draw, rng: np.random.Generator) -> None:
    _gradient(image, _near(rng, (110, 195, 245)), (205, 238, 252))
    _disc(d, rng.uniform(0.1, 0.9) * SIDE, 0.14 * SIDE, 38, (255, 222, 90))
    level = rng.uniform(0.45, 0.52)
    d.rectangle((0, level * SIDE, SIDE, SIDE), fill=_near(rng, (44, 150, 205)))
    for k in range(3):
        y = (level + 0.04 + 0.05 * k) * SIDE
        x = rng.uniform(0, 0.7) * SIDE
        d.line((x, y, x + 90, y), fill=(150, 215, 240), width=5)
    _hills(d, rng, level + 0.2, 0.02, (245, 250, 250))
    _hills(d, rng, level + 0.22, 0.02, _near(rng, (240, 214, 150)))


def _night(image: Image.Image, d: Draw, rng: np.random.Generator) -> None:
    _gradient(image, _near(rng, (10, 14, 50), 5), _near(rng, (44, 50, 112)))
    _stars(d, rng, 60, 0.75)
    if rng.random() < 0.7:
        x = rng.choice([0.15, 0.85]) * SIDE
        _disc(d, x, 0.16 * SIDE, 36, (250, 240, 200))
    _hills(d, rng, rng.uniform(0.76, 0.82), 0.03, _near(rng, (20, 40, 52), 5))


def _snow(image: Image.Image, d: Draw, rng: np.random.Generator) -> None:
    _gradient(image, _near(rng, (150, 190, 225)), (220, 234, 246))
    for _ in range(int(rng.integers(2, 5))):
        _pine(d, rng.uniform(0, SIDE), rng.uniform(0.55, 0.66) * SIDE, 60, (84, 130, 120))
    _hills(d, rng, rng.uniform(0.58, 0.64), 0.03, (232, 240, 248))
    _hills(d, rng, rng.uniform(0.72, 0.78), 0.02, (248, 251, 255))
    for _ in range(50):
        _disc(d, rng.uniform(0, SIDE), rng.uniform(0, SIDE), rng.uniform(3, 6), (255, 255, 255))


def _pine(d: Draw, x: float, base: float, r: float, colour: Colour) -> None:
    d.rectangle((x - r * 0.1, base - r * 0.3, x + r * 0.1, base), fill=(100, 70, 50))
    for k in range(3):
        y = base - r * (0.2 + 0.5 * k)
        w = r * (0.62 - 0.14 * k)
        d.polygon([(x - w, y), (x + w, y), (x, y - r * 0.8)], fill=colour)


def _underwater(image: Image.Image, d: Draw, rng: np.random.Generator) -> None:
    _gradient(image, _near(rng, (60, 180, 220)), _near(rng, (10, 70, 140)))
    _hills(d, rng, rng.uniform(0.84, 0.9), 0.02, _near(rng, (196, 178, 120)))
    for _ in range(int(rng.integers(4, 9))):
        x, h = rng.uniform(0, SIDE), rng.uniform(50, 130)
        line = [(x + 9 * math.sin(k * 1.2), 0.93 * SIDE - h * k / 6) for k in range(7)]
        d.line(line, fill=_near(rng, (40, 150, 100)), width=12, joint="curve")
    for _ in range(16):
        x, y, r = rng.uniform(0, SIDE), rng.uniform(0, 0.85) * SIDE, rng.uniform(4, 11)
        d.ellipse((x - r, y - r, x + r, y + r), outline=(190, 235, 250), width=3)


def _desert(image: Image.Image, d: Draw, rng: np.random.Generator) -> None:
    _gradient(image, _near(rng, (130, 200, 240)), (250, 232, 190))
    _disc(d, rng.uniform(0.1, 0.9) * SIDE, 0.15 * SIDE, 40, (255, 236, 140))
    _hills(d, rng, rng.uniform(0.54, 0.6), 0.05, _near(rng, (226, 176, 104)))
    _hills(d, rng, rng.uniform(0.68, 0.74), 0.04, _near(rng, (238, 196, 122)))


def _table(image: Image.Image, d: Draw, rng: np.random.Generator) -> None:
    walls = [(238, 226, 206), (206, 224, 232), (216, 232, 210), (236, 214, 214)]
    wall = walls[int(rng.integers(len(walls)))]
    image.paste(_near(rng, wall), (0, 0, SIDE, SIDE))
    top = rng.uniform(0.68, 0.72) * SIDE
    wood = _near(rng, (176, 116, 66))
    d.rectangle((0, top, SIDE, SIDE), fill=wood)
    dark = (wood[0] - 28, wood[1] - 22, wood[2] - 16)
    for k in range(1, 4):
        d.line((0, top + k * 42, SIDE, top + k * 42), fill=dark, width=3)
    d.rectangle((0, top, SIDE, top + 8), fill=dark)


def _room(image: Image.Image, d: Draw, rng: np.random.Generator) -> None:
    walls = [(246, 224, 180), (190, 214, 230), (226, 200, 220), (200, 224, 190)]
    image.paste(_near(rng, walls[int(rng.integers(len(walls)))]), (0, 0, SIDE, SIDE))
    level = rng.uniform(0.66, 0.72) * SIDE
    x = rng.choice([0.06, 0.68]) * SIDE
    d.rectangle((x, 56, x + 130, 196), fill=(255, 255, 255))
    d.rectangle((x + 8, 64, x + 122, 188), fill=(150, 208, 242))
    d.line((x + 65, 60, x + 65, 192), fill=(255, 255, 255), width=7)
    d.line((x + 4, 126, x + 126, 126), fill=(255, 255, 255), width=7)
    d.rectangle((0, level, SIDE, SIDE), fill=_near(rng, (190, 140, 96)))
    d.rectangle((0, level - 14, SIDE, level), fill=(255, 255, 255))


def _sunset(image: Image.Image, d: Draw, rng: np.random.Generator) -> None:
    _gradient(image, _near(rng, (92, 60, 140)), (255, 120, 90), 0, SIDE // 3)
    _gradient(image, (255, 120, 90), (255, 210, 110), SIDE // 3, int(0.7 * SIDE))
    level = 0.68 * SIDE
    _disc(d, rng.uniform(0.2, 0.8) * SIDE, level - 20, 62, (255, 240, 170))
    d.rectangle((0, level, SIDE, SIDE), fill=_near(rng, (110, 60, 100)))
    _hills(d, rng, rng.uniform(0.76, 0.8), 0.02, _near(rng, (64, 36, 70)))


def _forest(image: Image.Image, d: Draw, rng: np.random.Generator) -> None:
    _gradient(image, _near(rng, (186, 226, 200)), (222, 242, 214))
    for row, colour in enumerate([(100, 160, 116), (60, 124, 80), (36, 96, 60)]):
        for k in range(6):
            x = (k + rng.uniform(-0.3, 0.3)) * SIDE / 5
            base = (0.66 + 0.03 * row) * SIDE
            _pine(d, x, base, (150 - 10 * row) * rng.uniform(0.9, 1.25), colour)
    _hills(d, rng, rng.uniform(0.7, 0.74), 0.02, _near(rng, (84, 120, 60)))


def _city(image: Image.Image, d: Draw, rng: np.random.Generator) -> None:
    _gradient(image, _near(rng, (150, 205, 240)), (226, 240, 248))
    x = 0.0
    while x < SIDE:
        w, h = rng.uniform(56, 100), rng.uniform(0.25, 0.58) * SIDE
        gray = int(rng.integers(110, 190))
        colour = _near(rng, (gray, gray, gray + 18), 14)
        top = 0.74 * SIDE - h
        d.rectangle((x, top, x + w, 0.74 * SIDE), fill=colour)
        for wy in np.arange(top + 14, 0.72 * SIDE - 16, 30):
            for wx in np.arange(x + 12, x + w - 14, 24):
                lit = (250, 232, 150) if rng.random() < 0.5 else (224, 236, 244)
                d.rectangle((wx, wy, wx + 11, wy + 15), fill=lit)
        x += w + 4
    d.rectangle((0, 0.74 * SIDE, SIDE, SIDE), fill=(96, 98, 106))
    for k in range(5):
        d.rectangle((k * 120 - 20, 0.86 * SIDE, k * 120 + 46, 0.88 * SIDE), fill=(240, 240, 236))


def _space(image: Image.Image, d: Draw, rng: np.random.Generator) -> None:
    _gradient(image, _near(rng, (14, 8, 36), 4), _near(rng, (40, 20, 76), 8))
    _stars(d, rng, 110, 1.0)
    for _ in range(int(rng.integers(1, 4))):
        x, y = rng.choice([0.1, 0.9]) * SIDE, rng.uniform(0.05, 0.95) * SIDE
        planets = [(220, 140, 90), (120, 170, 220), (190, 120, 190), (230, 200, 130)]
        _disc(d, x, y, rng.uniform(20, 46), planets[int(rng.integers(len(planets)))])


def _sky(image: Image.Image, d: Draw, rng: np.random.Generator) -> None:
    _gradient(image, _near(rng, (70, 160, 235)), _near(rng, (170, 220, 250)))
    _disc(d, rng.choice([0.14, 0.86]) * SIDE, 0.14 * SIDE, 44, (255, 226, 100))
    _clouds(d, rng, (255, 255, 255), int(rng.integers(4, 7)), 0.95)
    for k in range(5):
        _cloud(d, rng, k * SIDE / 4, 0.97 * SIDE, 60, (255, 255, 255))


def _mountains(image: Image.Image, d: Draw, rng: np.random.Generator) -> None:
    _gradient(image, _near(rng, (120, 190, 240)), (220, 238, 248))
    for k in range(3):
        x, w = (k * 0.42 + rng.uniform(-0.1, 0.2)) * SIDE, rng.uniform(150, 210)
        top, base = rng.uniform(0.14, 0.3) * SIDE, 0.72 * SIDE
        d.polygon([(x - w, base), (x + w, base), (x, top)], fill=_near(rng, (112, 120, 140)))
        cap = 0.28
        d.polygon(
            [
                (x - w * cap, top + (base - top) * cap),
                (x, top),
                (x + w * cap, top + (base - top) * cap),
                (x, top + (base - top) * cap * 0.7),
            ],
            fill=(248, 250, 255),
        )
    _hills(d, rng, rng.uniform(0.68, 0.73), 0.03, _near(rng, (104, 164, 84)))


def _rain(image: Image.Image, d: Draw, rng: np.random.Generator) -> None:
    _gradient(image, _near(rng, (98, 112, 132)), (170, 184, 200))
    for k in range(6):
        _cloud(d, rng, k * SIDE / 5, rng.uniform(0, 0.08) * SIDE, 64, (78, 88, 106))
    _hills(d, rng, rng.uniform(0.74, 0.8), 0.02, _near(rng, (92, 122, 96)))
    for _ in range(110):
        x, y = rng.uniform(0, SIDE), rng.uniform(0.1, 1) * SIDE
        d.line((x, y, x - 7, y + 22), fill=(206, 222, 240), width=3)


_DRAWN: dict[str, Callable[[Image.Image, Draw, np.random.Generator], None]] = {
    "grass": _grass,
    "beach": _beach,
    "night": _night,
    "snow": _snow,
    "underwater": _underwater,
    "desert": _desert,
    "table": _table,
    "room": _room,
    "sunset": _sunset,
    "forest": _forest,
    "city": _city,
    "space": _space,
    "sky": _sky,
    "mountains": _mountains,
    "rain": _rain,
}
