"""What the small models learn from: captioned pictures of one object on a plain background."""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Collection, Mapping
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from safelight.errors import SafelightError
from safelight.train.cutouts import Pixels, above, build, load, notice

__all__ = ["COLOURS", "STYLES", "Scenes", "backgrounds", "bare", "build", "notice", "split_words"]

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
ALSO_SPELT = {"gray": "grey"}

STYLES = {"cartoon": "cartoon", "flat": "flat icon", "3d": "3d render"}

# {a} is the name with its article, {n} without, {bg} the background. Values are weights.
PLAIN = {
    "{a}{bg}": 70,
    "{n}{bg}": 12,
    "the {n}{bg}": 6,
    "a picture of {a}{bg}": 8,
    "an image of {a}{bg}": 4,
}
STYLED = {
    "a {kind} of {a}{bg}": 40,
    "{a}{bg}, {kind}": 38,
    "{art}{style} {n}{bg}": 12,
    "{n}{bg}, {kind}": 6,
    "{kind} of {a}{bg}": 4,
}
BACKGROUND = {" on {c} background": 76, " with {c} background": 12, ", {b} background": 12}

WHITE_SHARE = 0.55
WHITE_NAMED = 0.2
STYLE_NAMED = 0.5
SYNONYM = 0.25
TURNED = 0.12
LARGE = (0.72, 0.92)  # the object's longer side as a share of the frame
# Smallest mean Oklab distance between an object's edge and the background.
CONTRAST = 0.14
CONTRAST_WHITE = 0.06  # lower: a bare "a ghost" should stand on white like every other object

T = TypeVar("T")


class Scenes:
    """Captioned pictures of one object on a plain background, endless and reproducible.

    Every method that draws takes a NumPy generator; without one, the generator made from `seed`
    is used and moves on. Pictures are uint8 RGB [size, size, 3]. `styles` are those to draw from;
    with `steady` an object has one size and place, upright in the middle, and is not mirrored.
    """

    def __init__(
        self,
        cutouts_path: str | Path,
        size: int = 64,
        seed: int = 0,
        styles: Collection[str] = tuple(STYLES),
        steady: bool = False,
    ) -> None:
        pictures, about = load(cutouts_path)
        self.size = size
        self.steady = steady
        self.rng = np.random.default_rng(seed)
        self.rows: list[dict[str, str]] = about["pictures"]
        self.names: dict[str, list[str]] = {c["names"][0]: c["names"] for c in about["concepts"]}
        self._images = [Image.fromarray(picture) for picture in pictures]
        self._flips = {c["names"][0]: c.get("flip", True) for c in about["concepts"]}
        self._index = {(row["concept"], row["style"]): i for i, row in enumerate(self.rows)}
        self._concepts = list(self.names)
        self._styles = {
            name: [style for concept, style in self._index if concept == name and style in styles]
            for name in self._concepts
        }
        self._concept_of = {
            said: first
            for first, names in self.names.items()
            for name in names
            for said in (name, bare(name))
        }
        self._spoken = [style for style in STYLES if style in styles]
        self._scaled: dict[tuple[int, int], tuple[Pixels, Pixels]] = {}
        self.allowed = [backgrounds(picture) for picture in pictures]
        """For each picture, the backgrounds that it stands out from."""
        self._on_white = [i for i, names in enumerate(self.allowed) if WHITE in names]

    def batch(self, n: int, rng: np.random.Generator | None = None) -> tuple[Pixels, list[str]]:
        """`n` pictures, uint8 [n, size, size, 3], and their captions."""
        samples = [self.sample(rng) for _ in range(n)]
        return np.stack([picture for picture, _ in samples]), [caption for _, caption in samples]

    def sample(
        self,
        rng: np.random.Generator | None = None,
        concept: str | None = None,
        style: str | None = None,
        background: str | None = None,
    ) -> tuple[Pixels, str]:
        """One picture, uint8 [size, size, 3], and its caption; what is not given is drawn.

        `concept` is any name or synonym, with or without article. A background that is asked for
        is used even if the object hardly stands out from it.
        """
        rng = rng or self.rng
        concept = _choose(rng, self._concepts) if concept is None else self._find(concept)
        style = _choose(rng, self._styles[concept]) if style is None else style
        if (concept, style) not in self._index:
            raise SafelightError(f"no style {style!r}: the styles are {', '.join(STYLES)}")
        index = self._index[concept, style]
        if background is None:
            background = self._background(rng, index)
        elif background not in COLOURS:
            raise SafelightError(f"no background {background!r}: there are {', '.join(COLOURS)}")
        caption = self._caption(rng, concept, style, background)
        return self._compose(rng, index, background, self.size), caption

    def plain(self, n: int, rng: np.random.Generator | None = None, size: int = 32) -> Pixels:
        """`n` objects on white without captions, uint8 [n, size, size, 3]."""
        rng = rng or self.rng
        picked = [_choose(rng, self._on_white) for _ in range(n)]
        return np.stack([self._compose(rng, index, WHITE, size) for index in picked])

    def captions_corpus(self) -> list[str]:
        """Captions, sorted, that together hold every word that a caption can hold."""
        grounds = [
            ground
            for colour in COLOURS
            for word in {colour, ALSO_SPELT.get(colour, colour)}
            for ground in (_ground(template, word) for template in BACKGROUND)
        ]
        found = set()
        for names in self.names.values():
            for name in names:
                for style in self._spoken:
                    found.update(_say(template, name, style) for template in (*PLAIN, *STYLED))
        first = self._concepts[0]
        found.update(_say("{a}{bg}", first, "flat", ground) for ground in grounds)
        return sorted(found)

    def words(self) -> frozenset[str]:
        """Every word that a caption can hold."""
        return frozenset(word for text in self.captions_corpus() for word in split_words(text))

    def _find(self, said: str) -> str:
        if said not in self._concept_of:
            raise SafelightError(f"no concept {said!r}: see concepts.json for those there are")
        return self._concept_of[said]

    def _background(self, rng: np.random.Generator, index: int) -> str:
        colours = [name for name in self.allowed[index] if name != WHITE]
        if not colours or (WHITE in self.allowed[index] and rng.random() < WHITE_SHARE):
            return WHITE
        return _choose(rng, colours)

    def _caption(self, rng: np.random.Generator, concept: str, style: str, background: str) -> str:
        names = self.names[concept]
        synonym = len(names) > 1 and rng.random() < SYNONYM
        name = _choose(rng, names[1:]) if synonym else concept
        ground = ""
        if background != WHITE or rng.random() < WHITE_NAMED:
            other = background in ALSO_SPELT and rng.random() < 0.3
            word = ALSO_SPELT[background] if other else background
            ground = _ground(_weighted(rng, BACKGROUND), word)
        templates = STYLED if rng.random() < STYLE_NAMED else PLAIN
        return _say(_weighted(rng, templates), name, style, ground)

    def _compose(self, rng: np.random.Generator, index: int, background: str, size: int) -> Pixels:
        side = _choose(rng, _sides(size)[-4:-3] if self.steady else _sides(size))
        turned = not self.steady and rng.random() < TURNED
        angle = float(rng.uniform(-15, 15)) if turned else 0.0
        colours, light = self._turned(index, side, angle) if angle else self._upright(index, side)
        mirrored = not self.steady and rng.random() < 0.5
        if mirrored and self._flips[self.rows[index]["concept"]]:
            colours, light = colours[:, ::-1], light[:, ::-1]
        colour = np.array(COLOURS[background])
        if background != WHITE:
            colour = np.clip(colour + rng.integers(-6, 7, 3), 0, 255)
        height, width = colours.shape[:2]
        shift = 0.0 if self.steady else 0.5
        top, left = (
            round((size - extent) / 2 + rng.uniform(-shift, shift) * min(size - extent, size / 10))
            for extent in (height, width)
        )
        out = np.empty((size, size, 3), np.uint8)
        out[:] = colour
        under = (light.astype(np.uint16) * colour.astype(np.uint16) + 127) // 255
        out[top : top + height, left : left + width] = np.minimum(under + colours, 255)
        return out

    def _upright(self, index: int, side: int) -> tuple[Pixels, Pixels]:
        if (index, side) not in self._scaled:
            self._scaled[index, side] = _shrink(self._images[index], side)
        return self._scaled[index, side]

    def _turned(self, index: int, side: int, angle: float) -> tuple[Pixels, Pixels]:
        turned = self._images[index].rotate(angle, Image.Resampling.BILINEAR, expand=True)
        return _shrink(turned.crop(turned.getbbox()), side)


@cache
def _sides(size: int) -> list[int]:
    # A dozen sizes look continuous and keep the scaled cut-outs in memory small.
    return np.unique(np.linspace(LARGE[0] * size, LARGE[1] * size, 12).round().astype(int)).tolist()


def _shrink(image: Image.Image, side: int) -> tuple[Pixels, Pixels]:
    """Premultiplied colours [h, w, 3] and transparency [h, w, 1], longer side `side` pixels."""
    scale = side / max(image.size)
    shape = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # Hamming averages like a box but without its steps, and does not ring like Lanczos.
    small = np.asarray(image.convert("RGBa").resize(shape, Image.Resampling.HAMMING))
    return small[..., :3], 255 - small[..., 3:]


def backgrounds(picture: Pixels) -> tuple[str, ...]:
    """The colours from which the edge of a cut-out, uint8 [h, w, 4], stands out on average."""
    alpha = Image.fromarray(picture[..., 3])
    solid = above(alpha, 127)
    edge = (np.asarray(solid) > 0) & (np.asarray(solid.filter(ImageFilter.MinFilter(5))) == 0)
    if not edge.any():
        return tuple(COLOURS)
    seen = _oklab(picture[edge][:, :3])
    wanted = {name: CONTRAST_WHITE if name == WHITE else CONTRAST for name in COLOURS}
    return tuple(
        name
        for name, colour in COLOURS.items()
        if np.linalg.norm(seen - _oklab(np.array(colour)), axis=-1).mean() >= wanted[name]
    )


def _oklab(rgb: NDArray[Any]) -> NDArray[np.float64]:
    """sRGB bytes [..., 3] in Oklab, where distances match the eye (B. Ottosson, 2020)."""
    value = rgb / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _TO_CONES.T) @ _TO_LAB.T


_TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def bare(name: str) -> str:
    """A name without its article: "a cat" is "cat"."""
    return re.sub(r"^(a|an|the) ", "", name)


def split_words(text: str) -> list[str]:
    """The words of a caption, without punctuation."""
    return re.findall(r"[a-z0-9]+", text.lower())


def _say(template: str, name: str, style: str, ground: str = "") -> str:
    noun = bare(name)
    article = "" if noun == name else "a "
    return template.format(a=name, n=noun, art=article, style=style, kind=STYLES[style], bg=ground)


def _ground(template: str, colour: str) -> str:
    article = "an" if colour[0] in "aeiou" else "a"
    return template.format(c=f"{article} {colour}", b=colour)


def _choose(rng: np.random.Generator, items: list[T]) -> T:
    return items[int(rng.integers(len(items)))]


def _weighted(rng: np.random.Generator, weights: Mapping[str, int]) -> str:
    totals = list(accumulate(weights.values()))
    return list(weights)[bisect(totals, rng.random() * totals[-1])]
