"""Invent captioned scenes of cut-outs: what is shown, where, and how it is said."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from recipes.embedded import captions
from recipes.embedded.captions import BIG, PLACES, RELATIONS, SCENES, SMALL, STYLES, bare, choose
from recipes.embedded.colours import COLOURS, OWN, PAINTS, WHITE
from recipes.embedded.cutouts import load
from recipes.embedded.disturb import disturb
from safelight.errors import SafelightError
from safelight.words import split_words

KINDS = {"one": 34, "coloured": 15, "sized": 8, "pair": 28, "several": 15}
"""Kinds of scenes and their weights: one thing; in another colour; big, small or at a place; two
things; one thing two to four times."""

KINDS_ALONE = {"one": 80, "coloured": 20}
"""The same for scenes of one thing alone."""

ON_SCENE = 0.36
"""Share of the things that stand in a scene rather than on a plain background."""

WHITE_SHARE = 0.5
"""Share of the plain backgrounds that are white, where white fits."""

WHITE_NAMED = 0.15
STYLE_NAMED, STYLE_NAMED_ALONE = 0.4, 0.8
SYNONYM = 0.3
DISTURBED = 0.2
"""Share of the captions with words that mean nothing for the picture."""

PAINTED_TOO = 0.2
"""Share of the pairs and groups whose things have a colour that the caption names."""

TURNED = 0.12
HELD_OUT = 20
"""One in so many combinations of a colour and a thing, or of a style and a thing, is never trained
on."""

LARGE_SHARE = (0.6, 0.9)
"""Longer side of a thing that is alone, as a share of the picture's side."""

STEADY_SHARE = (0.8, 0.8)
STANDING_SHARE = (0.46, 0.7)
BIG_SHARE = (0.88, 0.98)
SMALL_SHARE = (0.3, 0.42)
PAIR_SHARE = (0.4, 0.47)
REACH = 0.05
"""How far a thing may be from its place, as a share of the picture's side."""

TRIES = 10_000
"""Things that are tried before a kind of scene is taken to be impossible."""

FLOATING = frozenset({"underwater", "space", "sky"})
"""Scenes without a ground to stand on."""

GROUND = 0.9
"""Where things stand, as a share of the picture's height."""


@dataclass(frozen=True)
class Scene:
    """What is on a picture."""

    kind: str
    concepts: tuple[str, ...]
    style: str
    ground: str = WHITE
    """A colour or a scene."""
    paints: tuple[str | None, ...] = (None,)
    """The colour of each concept, or None for its own."""
    count: int = 1
    where: str | None = None
    """A place, or the relation of the first thing to the second."""
    size: str | None = None
    """A word of BIG or SMALL."""
    said: str = ""
    """The caption."""

    @property
    def colour(self) -> str | None:
        """The colour of the first thing, if it is not its own."""
        return self.paints[0]


@dataclass(frozen=True)
class Thing:
    """A cut-out on a picture."""

    index: int
    colour: str | None
    x: float
    y: float
    """Its middle, as shares of the picture's sides; it is moved until it is wholly inside."""
    share: float
    """Its longer side over the picture's side."""
    angle: float = 0.0
    """Degrees, counter-clockwise."""
    mirrored: bool = False


class Scenes:
    """An endless and reproducible supply of captioned scenes.

    alone: whether a scene is one thing on a plain background, mostly with its style named. steady:
    whether the thing is in the middle and has one size; by default as `alone`. What a thing looks
    like is learned from such scenes much faster. Every method that draws takes a NumPy generator.
    """

    def __init__(
        self, cutouts: str | Path, *, alone: bool = False, steady: bool | None = None
    ) -> None:
        self.pictures, about = load(cutouts)
        self.rows: list[dict[str, Any]] = about["pictures"]
        self.sha256: str = about["sha256"]
        self.names: dict[str, list[str]] = {c["names"][0]: c["names"] for c in about["concepts"]}
        self._flips = {c["names"][0]: c.get("flip", True) for c in about["concepts"]}
        self._paintable = {c["names"][0]: c.get("paint", True) for c in about["concepts"]}
        self._drawings: dict[tuple[str, str], list[int]] = {}
        for i, row in enumerate(self.rows):
            self._drawings.setdefault((row["concept"], row["style"]), []).append(i)
        self._concept_of = {
            said: first
            for first, names in self.names.items()
            for name in reversed(names)
            for said in (name, bare(name))
        }
        solid = self.pictures[..., 3] > 127
        self.extents = np.stack(
            [solid.any(axis=1).sum(axis=1), solid.any(axis=2).sum(axis=1)], axis=1
        ) / len(self.pictures[0])
        """Width and height of each cut-out over the side of its square, [n, 2]."""
        self.alone, self.steady = alone, alone if steady is None else steady
        words = Path(cutouts).with_name("words.json")
        lists = json.loads(words.read_text(encoding="utf-8")) if words.exists() else {}
        self.unknown: list[str] = lists.get("shown", [])
        """Words that are mixed into captions and mean nothing."""
        self.held_out_words: list[str] = lists.get("held_out", [])
        """Words that mean nothing, and that no training sees."""

    def captions_corpus(self) -> list[str]:
        """Return captions, sorted, that together hold every word with a meaning."""
        return captions.corpus([name for names in self.names.values() for name in names])

    def words(self) -> frozenset[str]:
        """Return every word with a meaning."""
        return frozenset(w for text in self.captions_corpus() for w in split_words(text))

    def invent(
        self,
        rng: np.random.Generator,
        kind: str | None = None,
        concept: str | None = None,
        style: str | None = None,
        ground: str | None = None,
        *,
        held_out: str | None = None,
        disturbed: bool | None = None,
    ) -> Scene:
        """Return a scene; what is not given is drawn.

        concept: any name or synonym. held_out: "colour" or "style" for a scene of the combinations
        that are otherwise never drawn. disturbed: whether words without a meaning are mixed in.
        Raises SafelightError for names that do not exist.
        """
        if style is not None and style not in STYLES:
            raise SafelightError(f"no style {style!r}: the styles are {', '.join(STYLES)}")
        if ground is not None and ground not in COLOURS and ground not in SCENES:
            raise SafelightError(
                f"no ground {ground!r}: there are {', '.join((*COLOURS, *SCENES))}"
            )
        kind = kind or captions.weighted(rng, KINDS_ALONE if self.alone else KINDS)
        for _ in range(TRIES):
            first = choose(rng, list(self.names)) if concept is None else self._find(concept)
            chosen = style or self._style(rng, first, held_out)
            scene = chosen and self._one(rng, kind, first, chosen, held_out == "colour")
            if scene:
                break
            if concept is not None:
                raise SafelightError(f"{concept!r} cannot be shown as {kind!r}")
        else:
            raise SafelightError(
                f"no thing of these can be shown as {kind!r}, held out: {held_out}"
            )
        scene = replace(scene, ground=ground or self._ground(rng, scene))
        scene = replace(scene, said=self._said(rng, scene, named=held_out == "style"))
        if rng.random() < DISTURBED if disturbed is None else disturbed:
            scene = replace(scene, said=disturb(rng, scene.said, self.unknown))
        return scene

    def paints(self, concept: str, style: str) -> list[str]:
        """Return the colours that a thing can be given; none if all of its names say a colour."""
        if self._colourless(concept) is None or not self._paintable[concept]:
            return []
        each = [self.rows[i]["clashes"] for i in self._drawings[concept, style]]
        return [colour for colour in PAINTS if all(colour in clashes for clashes in each)]

    def drawing(self, scene: Scene) -> int:
        """Return the index of the first drawing of the scene's first thing."""
        return self._drawings[scene.concepts[0], scene.style][0]

    def _style(self, rng: np.random.Generator, concept: str, held_out: str | None) -> str | None:
        fit = [s for s in STYLES if held_back(s, concept) == (held_out == "style")]
        return choose(rng, fit) if fit else None

    def _one(
        self, rng: np.random.Generator, kind: str, first: str, style: str, held_out: bool
    ) -> Scene | None:
        """Return a scene of this kind without ground and words; None if the thing is not fit."""
        scene = Scene(kind, (first,), style)
        counted = bare(first) != first
        if kind == "one":
            return scene
        if kind == "coloured":
            paint = self._paint(rng, first, style, held_out)
            return replace(scene, paints=(paint,)) if paint else None
        if kind == "sized":
            if not counted:
                return None
            if rng.random() < 0.3:
                return replace(scene, size=choose(rng, BIG))
            where = choose(rng, list(PLACES)) if rng.random() < 0.6 else None
            said = where is None or rng.random() < 0.5
            return replace(scene, where=where, size=choose(rng, SMALL) if said else None)
        if kind == "several":
            paint = self._paint(rng, first, style) if rng.random() < PAINTED_TOO else None
            count = int(rng.integers(2, 5))
            return replace(scene, count=count, paints=(paint,)) if counted else None
        if kind == "pair":
            fit = [n for n in self.names if n != first and not held_back(style, n)]
            other = choose(rng, fit)
            paints = tuple(
                self._paint(rng, name, style) if rng.random() < PAINTED_TOO else None
                for name in (first, other)
            )
            where = choose(rng, ["and", *RELATIONS])
            return replace(scene, concepts=(first, other), where=where, paints=paints)
        raise SafelightError(f"no kind {kind!r}: there are {', '.join(KINDS)}")

    def _paint(
        self, rng: np.random.Generator, concept: str, style: str, held_out: bool = False
    ) -> str | None:
        fit = [c for c in self.paints(concept, style) if held_back(c, concept) == held_out]
        return choose(rng, fit) if fit else None

    def _find(self, said: str) -> str:
        if said not in self._concept_of:
            raise SafelightError(f"no concept {said!r}: see concepts.json for those there are")
        return self._concept_of[said]

    def _ground(self, rng: np.random.Generator, scene: Scene) -> str:
        placed = scene.kind == "sized" and scene.where is not None
        if not self.alone and not placed and rng.random() < ON_SCENE:
            return choose(rng, list(SCENES))
        fit = set(COLOURS)
        for concept, paint in zip(scene.concepts, scene.paints, strict=False):
            for i in self._drawings[concept, scene.style]:
                fit -= set(self.rows[i]["clashes"][paint or OWN])
        colours = [name for name in COLOURS if name in fit and name != WHITE]
        if not colours or (WHITE in fit and rng.random() < WHITE_SHARE):
            return WHITE
        return choose(rng, colours)

    def _said(self, rng: np.random.Generator, scene: Scene, *, named: bool) -> str:
        things = [
            self._thing(rng, concept, paint)
            for concept, paint in zip(scene.concepts, scene.paints, strict=False)
        ]
        first, style = things[0], scene.style
        if scene.ground in SCENES:
            at = captions.scene(rng, scene.ground)
        elif scene.ground != WHITE or rng.random() < WHITE_NAMED:
            at = captions.background(rng, scene.ground)
        else:
            at = ""
        share = STYLE_NAMED_ALONE if self.alone else STYLE_NAMED
        said = style if named or rng.random() < share else None
        if scene.kind in ("one", "coloured"):
            return captions.caption(rng, first, said, at)
        if scene.kind == "several":
            thing = captions.several(rng, first, scene.count)
        elif scene.kind == "pair":
            thing = f"{first} {scene.where} {things[1]}"
        else:
            sized = captions.adjective(first, scene.size) if scene.size else first
            thing = f"{sized} {scene.where}" if scene.where else sized
        return captions.caption(rng, thing, said, at, short=False)

    def _thing(self, rng: np.random.Generator, concept: str, paint: str | None) -> str:
        if paint is not None:
            name = self._colourless(concept)
            assert name is not None
            return captions.adjective(name, captions.spelt(rng, paint))
        names = self.names[concept]
        # A name without an article cannot be counted.
        others = [n for n in names[1:] if (bare(n) == n) == (bare(concept) == concept)]
        return choose(rng, others) if others and rng.random() < SYNONYM else concept

    def _colourless(self, concept: str) -> str | None:
        """Return the first of its names that says no colour."""
        said = {word for colour in COLOURS for word in colour.split()}
        return next((n for n in self.names[concept] if not said & set(split_words(n))), None)

    def arrange(self, rng: np.random.Generator, scene: Scene) -> list[Thing]:
        """Return the scene's things and their places, those behind first."""
        shares = self._shares(scene)
        share = float(rng.uniform(*shares))
        mirrored = rng.random() < 0.5
        reach = 0.0 if self.steady else REACH
        right, down = rng.uniform(-reach, reach), rng.uniform(-reach, reach)
        turned = 0.0 if self.steady else TURNED
        things = []
        # Several things of a kind are all the same drawing.
        which = [choose(rng, self._drawings[c, scene.style]) for c in scene.concepts]
        paints = scene.paints + (None,) * len(which)
        for i, (x, y) in enumerate(self._places(rng, scene)):
            k = i % len(which)
            angle = float(rng.uniform(-15, 15)) if rng.random() < turned else 0.0
            flip = mirrored and self._flips[scene.concepts[k]]
            if scene.ground in SCENES and scene.ground not in FLOATING and len(which) == 1:
                # One thing stands on the ground; several of a kind keep their places.
                if scene.count == 1:
                    y = GROUND - share * self.extents[which[k]][1] / 2
                angle = 0.0
            things.append(Thing(which[k], paints[k], x + right, y + down, share, angle, flip))
        return things

    def _shares(self, scene: Scene) -> tuple[float, float]:
        if self.steady:
            return STEADY_SHARE
        if scene.size in BIG:
            return BIG_SHARE
        if scene.kind == "sized":
            return SMALL_SHARE
        if scene.kind in ("pair", "several"):
            return PAIR_SHARE if scene.count < 4 else (PAIR_SHARE[0] - 0.02, PAIR_SHARE[1] - 0.03)
        return STANDING_SHARE if scene.ground in SCENES else LARGE_SHARE

    def _places(self, rng: np.random.Generator, scene: Scene) -> list[tuple[float, float]]:
        """Return the centres of the things, as shares of the picture's sides."""
        if scene.kind == "several":
            return {
                2: [(0.26, 0.55), (0.74, 0.55)],
                3: [(0.26, 0.28), (0.74, 0.28), (0.5, 0.74)],
                4: [(0.26, 0.27), (0.74, 0.27), (0.26, 0.74), (0.74, 0.74)],
            }[scene.count]
        if scene.kind == "pair":
            assert scene.where is not None
            right, down = RELATIONS[scene.where]
            if scene.where in captions.EITHER_SIDE - {"and"} and rng.random() < 0.5:
                right = -right
            return [(0.5 + 0.24 * s * right, 0.52 + 0.24 * s * down) for s in (1, -1)]
        return [PLACES[scene.where] if scene.where else (0.5, 0.5)]


def held_back(word: str, concept: str) -> bool:
    """Return whether a thing in this colour or style is held out from training."""
    digest = hashlib.sha256(f"{word} {concept}".encode()).digest()
    return digest[0] % HELD_OUT == 0
