"""Write what a caption says of a scene."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from recipes.embedded.colours import ALSO_SPELT, COLOURS, PAINTS

STYLES: dict[str, tuple[str, ...]] = {
    "cartoon": ("cartoon", "cartoon drawing"),
    "flat": ("flat icon", "flat drawing", "flat vector"),
    "3d": ("3d render", "3d model", "3d icon"),
}
"""Each style of drawing, and how a caption names it; the first is the commonest."""

PLAIN = {
    "{a}{at}": 62,
    "{n}{at}": 12,
    "the {n}{at}": 5,
    "a picture of {a}{at}": 5,
    "an image of {a}{at}": 2,
    "a photo of {a}{at}": 4,
    "a drawing of {a}{at}": 4,
    "an illustration of {a}{at}": 2,
    "a painting of {a}{at}": 2,
    "clip art of {a}{at}": 2,
}
"""Templates and their weights. {a} is the thing with its article, {n} without, {at} where it is."""

STYLED = {
    "a {kind} of {a}{at}": 45,
    "{a}{at}, {kind}": 35,
    "{n}{at}, {kind}": 8,
    "{kind} of {a}{at}": 7,
    "{kind}, {a}{at}": 5,
}
BACKGROUND = {
    " on {c} background": 64,
    " with {c} background": 10,
    ", {b} background": 10,
    " on {b}": 8,
    " in front of {c} background": 4,
    " against {c} background": 4,
}

SCENES: dict[str, tuple[str, ...]] = {
    "grass": (
        "on grass", "on the grass", "on green grass", "in a meadow", "in a field", "in the park",
        "in a garden", "in the garden", "on a lawn", "in the countryside",
    ),
    "beach": ("on the beach", "on a beach", "on the sand", "at the seaside", "by the sea"),
    "night": (
        "at night", "at night under the stars", "under the stars", "in the night",
        "under a starry sky", "in the dark", "in the moonlight",
    ),
    "snow": ("in the snow", "in snow", "on the snow", "in winter", "on a snowy field", "on ice"),
    "underwater": (
        "under water", "underwater", "under the sea", "in the ocean", "in the sea",
        "in the water",
    ),
    "desert": ("in the desert", "in a desert", "on a sand dune"),
    "table": ("on a table", "on the table", "on a wooden table", "on a desk"),
    "room": ("in a room", "in the room", "in a house", "indoors", "at home", "in the living room"),
    "sunset": (
        "at sunset", "at dusk", "in the evening", "in front of a sunset", "at sunrise",
        "in the morning",
    ),
    "forest": ("in a forest", "in the forest", "in the woods", "in the jungle", "among trees"),
    "city": (
        "in the city", "in a city", "in a town", "on the street", "on a street", "on the road",
    ),
    "space": ("in space", "in outer space", "among the stars", "in the galaxy"),
    "sky": ("in the sky", "in the clouds", "in the air", "above the clouds", "on a sunny day"),
    "mountains": ("in the mountains", "on a mountain", "in front of mountains", "on a hill"),
    "rain": ("in the rain", "on a rainy day", "in a storm"),
}  # fmt: skip
"""Scenes, and how a caption names them."""

PLACES: dict[str, tuple[float, float]] = {
    "on the left": (0.27, 0.5),
    "on the right": (0.73, 0.5),
    "at the top": (0.5, 0.27),
    "at the bottom": (0.5, 0.73),
    "at the top on the left": (0.27, 0.27),
    "at the top on the right": (0.73, 0.27),
    "at the bottom on the left": (0.27, 0.73),
    "at the bottom on the right": (0.73, 0.73),
    "in the middle": (0.5, 0.5),
}
"""Places of a small thing, and their centres as shares of width and height."""

RELATIONS: dict[str, tuple[int, int]] = {
    "and": (-1, 0),
    "next to": (-1, 0),
    "beside": (-1, 0),
    "with": (-1, 0),
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
    "above": (0, -1),
    "over": (0, -1),
    "below": (0, 1),
    "under": (0, 1),
}
"""Direction of the first of two things, seen from their middle."""

EITHER_SIDE = frozenset({"and", "next to", "beside", "with"})
"""Relations that leave open which thing is on the left: "and" is drawn in reading order."""

NUMBERS: dict[int, tuple[str, ...]] = {
    2: ("two", "two", "two", "2", "a couple of", "a pair of"),
    3: ("three", "three", "three", "3", "several", "some"),
    4: ("four", "four", "four", "4", "a group of"),
}
BIG = ("big", "large", "huge", "giant")
SMALL = ("small", "little", "tiny")


def caption(
    rng: np.random.Generator, thing: str, style: str | None, at: str, short: bool = True
) -> str:
    """Return a caption of `thing`, named with its article if it has one.

    style: a key of STYLES to name, or None. at: what `background` or `scene` returned, or "".
    short: whether the form without an article makes sense: "the cat and a dog" would be odd.
    """
    templates = STYLED if style else PLAIN
    if not short:
        templates = {t: w for t, w in templates.items() if "{n}" not in t}
    kind = choose(rng, _repeated(STYLES[style])) if style else ""
    return weighted(rng, templates).format(a=thing, n=bare(thing), kind=kind, at=at)


def background(rng: np.random.Generator, colour: str) -> str:
    """Return words for a plain background, with the blank or comma before them."""
    spelt = ALSO_SPELT.get(colour)
    word = spelt if spelt and rng.random() < 0.3 else colour
    return weighted(rng, BACKGROUND).format(c=f"{article(word)} {word}", b=word)


def scene(rng: np.random.Generator, name: str) -> str:
    """Return words for a scene, with the blank before them."""
    return " " + choose(rng, _repeated(SCENES[name]))


def adjective(name: str, word: str) -> str:
    """Return the name with an adjective: "a cat" and "red" make "a red cat"."""
    noun = bare(name)
    return f"{word} {noun}" if noun == name else f"{article(word)} {word} {noun}"


def several(rng: np.random.Generator, name: str, count: int) -> str:
    """Return the name in the plural: "a cat" four times is "four cats"."""
    return f"{choose(rng, NUMBERS[count])} {plural(bare(name))}"


def spelt(rng: np.random.Generator, colour: str) -> str:
    """Return a colour's name, now and then in its other spelling."""
    return ALSO_SPELT[colour] if colour in ALSO_SPELT and rng.random() < 0.3 else colour


def corpus(names: Sequence[str]) -> list[str]:
    """Return captions, sorted, that together hold every word that a caption can hold."""
    found = set()
    for name in names:
        found.add(name)
        if bare(name) != name:
            found.add(plural(bare(name)))
    first = names[0]
    for kinds in STYLES.values():
        found.update(t.format(a=first, n=bare(first), kind=k, at="") for t in STYLED for k in kinds)
    found.update(t.format(a=first, n=bare(first), at="") for t in PLAIN)
    for word in {*COLOURS, *PAINTS, *ALSO_SPELT.values()}:
        found.update(t.format(c=f"{article(word)} {word}", b=word) for t in BACKGROUND)
    found.update(phrase for phrases in SCENES.values() for phrase in phrases)
    found.update(PLACES)
    found.update(RELATIONS)
    found.update(word for words in NUMBERS.values() for word in words)
    found.update((*BIG, *SMALL))
    return sorted(found)


def bare(name: str) -> str:
    """Return a name without its article: "a cat" is "cat"."""
    return re.sub(r"^(a|an|the) ", "", name)


def article(word: str) -> str:
    """Return "an" before a vowel, else "a"."""
    return "an" if word[0] in "aeiou" else "a"


@cache
def plural(noun: str) -> str:
    """Return the plural of a noun."""
    return str(_inflect().plural_noun(noun))


@cache
def _inflect() -> Any:
    import inflect

    return inflect.engine()


def choose(rng: np.random.Generator, items: Sequence[Any]) -> Any:
    """Return one of `items`, each as likely."""
    return items[int(rng.integers(len(items)))]


def weighted(rng: np.random.Generator, weights: Mapping[str, int]) -> str:
    """Return a key of `weights`, as often as its weight says."""
    at = rng.random() * sum(weights.values())
    for key, weight in weights.items():
        at -= weight
        if at < 0:
            return key
    return list(weights)[-1]


@cache
def _repeated(words: tuple[str, ...]) -> tuple[str, ...]:
    """Return the words with the first repeated, so that half of the draws are that one."""
    return (words[0],) * max(1, len(words) - 1) + words[1:] if len(words) > 1 else words
