"""What the small models learn from: captioned scenes, composed of cut-outs on plain backgrounds."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from safelight.errors import SafelightError
from safelight.train.captions import (
    PLACES,
    RELATIONS,
    STYLES,
    bare,
    caption,
    coloured,
    corpus,
    ground,
    long_caption,
    several,
    small,
    split_words,
)
from safelight.train.colours import COLOURS, PAINTS, WHITE
from safelight.train.cutouts import Pixels, load
from safelight.train.drawing import Cutouts, Thing, paste

SIMPLE = {"one": 100}
MIXED = {"one": 45, "coloured": 20, "placed": 8, "pair": 17, "several": 10}
"""Kinds of scenes and their weights: one thing; in another colour; small, at a place; two things;
one thing two to four times."""

WHITE_SHARE = 0.55
WHITE_NAMED = 0.2
STYLE_NAMED = 0.5
SYNONYM = 0.25
TURNED = 0.12
HELD_OUT = 20
"""One in so many combinations is never trained on."""

# The object's longer side as a share of the frame.
LARGE = (0.72, 0.92)
SMALL = (0.36, 0.43)

T = TypeVar("T")


@dataclass(frozen=True)
class Scene:
    """What is on a picture. `said` tells it in words."""

    kind: str
    concepts: tuple[str, ...]
    style: str
    background: str = WHITE
    colour: str | None = None
    """Of a thing that does not have its own."""
    count: int = 1
    where: str | None = None
    """A place, or what the first thing is to the second."""
    said: str = ""


class Scenes:
    """Captioned pictures of things on a plain background, endless and reproducible.

    Every method that draws takes a NumPy generator; without one, the generator made from `seed`
    is used and moves on. Pictures are uint8 RGB [size, size, 3]. `styles` are those to draw from,
    `kinds` the weights of kinds of scenes; with `steady` things are upright, not mirrored, and of
    one size and place for what is said of them.
    """

    def __init__(
        self,
        cutouts_path: str | Path,
        size: int = 64,
        seed: int = 0,
        styles: Collection[str] = tuple(STYLES),
        kinds: Mapping[str, int] = SIMPLE,
        steady: bool = False,
    ) -> None:
        pictures, about = load(cutouts_path)
        self.size = size
        self.steady = steady
        self.rng = np.random.default_rng(seed)
        self.rows: list[dict[str, Any]] = about["pictures"]
        self.names: dict[str, list[str]] = {c["names"][0]: c["names"] for c in about["concepts"]}
        self._flips = {c["names"][0]: c.get("flip", True) for c in about["concepts"]}
        self._index = {(row["concept"], row["style"]): i for i, row in enumerate(self.rows)}
        self.styles = [style for style in STYLES if style in styles]
        self._concept_of = {
            said: first
            for first, names in self.names.items()
            for name in names
            for said in (name, bare(name))
        }
        self._kinds = list(kinds)
        self._chances = np.array(list(kinds.values())) / sum(kinds.values())
        self.cutouts = Cutouts(pictures, about["pictures"])

    def batch(self, n: int, rng: np.random.Generator | None = None) -> tuple[Pixels, list[str]]:
        """`n` pictures, uint8 [n, size, size, 3], and their captions."""
        samples = [self.sample(rng) for _ in range(n)]
        return np.stack([picture for picture, _ in samples]), [scene.said for _, scene in samples]

    def sample(self, rng: np.random.Generator | None = None, **given: Any) -> tuple[Pixels, Scene]:
        """One picture, uint8 [size, size, 3], and what is on it; `given` is as for `invent`."""
        rng = rng or self.rng
        scene = self.invent(rng, **given)
        return self.compose(rng, scene), scene

    def plain(self, n: int, rng: np.random.Generator | None = None, size: int = 32) -> Pixels:
        """`n` objects on white without captions, uint8 [n, size, size, 3]."""
        rng = rng or self.rng
        fit = [
            (concept, style)
            for concept in self.names
            for style in self.styles
            if WHITE in self.allowed(concept, style)
        ]
        scenes = [Scene("one", (c,), style) for c, style in (_choose(rng, fit) for _ in range(n))]
        return np.stack([self.compose(rng, scene, size) for scene in scenes])

    def captions_corpus(self) -> list[str]:
        """Captions, sorted, that together hold every word that a caption can hold."""
        return corpus([name for names in self.names.values() for name in names], self.styles)

    def words(self) -> frozenset[str]:
        """Every word that a caption can hold."""
        return frozenset(word for text in self.captions_corpus() for word in split_words(text))

    def allowed(self, concept: str, style: str, colour: str | None = None) -> tuple[str, ...]:
        """The backgrounds that a thing stands out from."""
        return self.cutouts.allowed(self._index[concept, style], colour)

    def paints(self, concept: str, style: str) -> list[str]:
        """The colours that a thing can be given, of a name that does not say another."""
        if self._colourless(concept) is None:
            return []
        index = self._index[concept, style]
        return [colour for colour in PAINTS if self.cutouts.paintable(index, colour)]

    def invent(
        self,
        rng: np.random.Generator,
        kind: str | None = None,
        concept: str | None = None,
        style: str | None = None,
        background: str | None = None,
        *,
        held_out: bool = False,
    ) -> Scene:
        """A scene to be composed; what is not given is drawn.

        `concept` is any name or synonym, with or without article. A background that is asked for
        is used even if the object hardly stands out from it. With `held_out` a coloured thing is
        of the combinations that are otherwise never drawn.

        Raises SafelightError for names that there are not.
        """
        if style is not None and style not in self.styles:
            raise SafelightError(f"no style {style!r}: the styles are {', '.join(self.styles)}")
        if background is not None and background not in COLOURS:
            raise SafelightError(f"no background {background!r}: there are {', '.join(COLOURS)}")
        kind = kind or self._kinds[int(rng.choice(len(self._kinds), p=self._chances))]
        while True:
            first = _choose(rng, list(self.names)) if concept is None else self._find(concept)
            chosen = style or _choose(rng, self.styles)
            scene = self._one(rng, kind, first, chosen, held_out)
            if scene is not None:
                break
            if concept is not None:
                raise SafelightError(f"{concept!r} cannot be shown as {kind!r}")
        if background is None:
            background = self._background(rng, scene)
        return self._said(rng, replace(scene, background=background))

    def _one(
        self, rng: np.random.Generator, kind: str, first: str, style: str, held_out: bool
    ) -> Scene | None:
        """A scene of this kind, yet without background and words; None if the thing is not fit."""
        scene = Scene(kind, (first,), style)
        if kind == "one":
            return scene
        if kind == "coloured":
            paints = [c for c in self.paints(first, style) if kept_back(c, first) == held_out]
            return replace(scene, colour=_choose(rng, paints)) if paints else None
        if kind == "placed":
            # A third is small in the middle.
            where = _choose(rng, list(PLACES)) if rng.random() < 0.67 else None
            return replace(scene, where=where) if bare(first) != first else None
        if kind == "several":
            return replace(scene, count=int(rng.integers(2, 5))) if bare(first) != first else None
        if kind == "pair":
            other = _choose(rng, [name for name in self.names if name != first])
            return replace(scene, concepts=(first, other), where=_choose(rng, list(RELATIONS)))
        raise SafelightError(f"no kind {kind!r}: there are {', '.join(MIXED)}")

    def _find(self, said: str) -> str:
        if said not in self._concept_of:
            raise SafelightError(f"no concept {said!r}: see concepts.json for those there are")
        return self._concept_of[said]

    def _background(self, rng: np.random.Generator, scene: Scene) -> str:
        each = [set(self.allowed(c, scene.style, scene.colour)) for c in scene.concepts]
        fit = [name for name in COLOURS if all(name in names for names in each)]
        colours = [name for name in fit if name != WHITE]
        if not colours or (WHITE in fit and rng.random() < WHITE_SHARE):
            return WHITE
        return _choose(rng, colours)

    def _said(self, rng: np.random.Generator, scene: Scene) -> Scene:
        first = self._name(rng, scene.concepts[0])
        named = scene.background != WHITE or rng.random() < WHITE_NAMED
        behind = ground(rng, scene.background) if named else ""
        style = scene.style if rng.random() < STYLE_NAMED else None
        if scene.kind == "one":
            return replace(scene, said=caption(rng, first, style, behind))
        if scene.kind == "coloured":
            assert scene.colour is not None
            name = self._colourless(scene.concepts[0])
            assert name is not None
            return replace(scene, said=caption(rng, coloured(name, scene.colour), style, behind))
        if scene.kind == "placed":
            things = f"{small(first)} {scene.where}" if scene.where else small(first)
            if scene.where and rng.random() < 0.5:
                things = f"{first} {scene.where}"
        elif scene.kind == "several":
            things = several(first, scene.count)
        else:
            things = f"{first} {scene.where} {self._name(rng, scene.concepts[1])}"
        return replace(scene, said=long_caption(rng, things, style, behind))

    def _name(self, rng: np.random.Generator, concept: str) -> str:
        names = self.names[concept]
        # A name without an article cannot be counted.
        others = [n for n in names[1:] if (bare(n) == n) == (bare(concept) == concept)]
        return _choose(rng, others) if others and rng.random() < SYNONYM else concept

    def _colourless(self, concept: str) -> str | None:
        """The first of its names that says no colour."""
        said = {word for colour in COLOURS for word in colour.split()}
        return next((n for n in self.names[concept] if not said & set(split_words(n))), None)

    def compose(self, rng: np.random.Generator, scene: Scene, size: int | None = None) -> Pixels:
        """A picture of a scene, uint8 [size, size, 3]."""
        size = size or self.size
        colour, things = self.arrange(rng, scene)
        out = np.empty((size, size, 3), np.uint8)
        out[:] = colour
        for thing in things:
            colours, light = self.cutouts.scaled(
                thing.index, thing.colour, round(thing.share * size), thing.angle
            )
            if thing.mirrored:
                colours, light = colours[:, ::-1], light[:, ::-1]
            paste(out, colours, light, thing.x, thing.y)
        return out

    def arrange(
        self, rng: np.random.Generator, scene: Scene
    ) -> tuple[NDArray[np.int64], list[Thing]]:
        """A scene in numbers: the background's colour, and its things, those behind first."""
        colour = np.array(COLOURS[scene.background])
        if scene.background != WHITE:
            colour = np.clip(colour + rng.integers(-6, 7, 3), 0, 255)
        places = self._places(rng, scene)
        # Things that come several times are alike.
        shares = _shares(LARGE if scene.kind in ("one", "coloured") else SMALL)
        share = shares[-4] if self.steady else _choose(rng, shares)
        mirrored = not self.steady and rng.random() < 0.5
        things = []
        for i, (x, y) in enumerate(places):
            concept = scene.concepts[i % len(scene.concepts)]
            turned = not self.steady and rng.random() < TURNED
            angle = float(rng.uniform(-15, 15)) if turned else 0.0
            flip = mirrored and self._flips[concept]
            index = self._index[concept, scene.style]
            things.append(Thing(index, scene.colour, x, y, share, angle, flip))
        return colour, things

    def _places(self, rng: np.random.Generator, scene: Scene) -> list[tuple[float, float]]:
        """The centres of its things, as shares of the picture's sides."""
        if scene.kind == "several":
            around = {
                2: [(0.27, 0.5), (0.73, 0.5)],
                3: [(0.27, 0.28), (0.73, 0.28), (0.5, 0.74)],
                4: [(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)],
            }[scene.count]
        elif scene.kind == "pair":
            assert scene.where is not None
            right, down = RELATIONS[scene.where]
            if scene.where == "next to" and rng.random() < 0.5:
                right = -right
            around = [(0.5 + 0.24 * s * right, 0.5 + 0.24 * s * down) for s in (1, -1)]
        else:
            around = [PLACES[scene.where] if scene.where else (0.5, 0.5)]
        reach = 0.05 if scene.kind in ("one", "coloured") else 0.025
        if self.steady:
            return around
        # All are moved alike: two that stand close must not touch.
        right, down = rng.uniform(-reach, reach), rng.uniform(-reach, reach)
        return [(x + right, y + down) for x, y in around]


def kept_back(colour: str, concept: str) -> bool:
    """Whether a coloured thing is held out from training."""
    digest = hashlib.sha256(f"{colour} {concept}".encode()).digest()
    return digest[0] % HELD_OUT == 0


def _shares(of: tuple[float, float]) -> list[float]:
    # A dozen sizes look continuous and keep the scaled cut-outs in memory small.
    return np.linspace(*of, 12).tolist()


def _choose(rng: np.random.Generator, items: list[T]) -> T:
    return items[int(rng.integers(len(items)))]
