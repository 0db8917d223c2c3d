"""What is said of a scene."""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Mapping
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np

from safelight.train.colours import ALSO_SPELT, COLOURS, PAINTS

STYLES = {"cartoon": "cartoon", "flat": "flat icon", "3d": "3d render"}

# {a} is what is shown, with its article, {n} without, {bg} the background. Values are weights.
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
# Of more than one thing there is no short form: "the cat and a dog" would be odd.
PLAIN_LONG = {"{a}{bg}": 88, "a picture of {a}{bg}": 8, "an image of {a}{bg}": 4}
STYLED_LONG = {"a {kind} of {a}{bg}": 48, "{a}{bg}, {kind}": 48, "{kind} of {a}{bg}": 4}
BACKGROUND = {" on {c} background": 76, " with {c} background": 12, ", {b} background": 12}

PLACES: dict[str, tuple[float, float]] = {
    "on the left": (0.27, 0.5),
    "on the right": (0.73, 0.5),
    "at the top": (0.5, 0.27),
    "at the bottom": (0.5, 0.73),
    "at the top on the left": (0.27, 0.27),
    "at the top on the right": (0.73, 0.27),
    "at the bottom on the left": (0.27, 0.73),
    "at the bottom on the right": (0.73, 0.73),
}
"""Where a small thing is, and its centre as shares of width and height."""

RELATIONS: dict[str, tuple[int, int]] = {
    "and": (-1, 0),
    "next to": (-1, 0),
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
"""Where the first of two things is, seen from their middle. "next to" may be either side."""

NUMBERS = {2: "two", 3: "three", 4: "four"}


def caption(rng: np.random.Generator, thing: str, style: str | None, ground: str) -> str:
    """Of one thing, with its article if it has one; style and background may be left out."""
    return _say(_weighted(rng, STYLED if style else PLAIN), thing, style, ground)


def long_caption(rng: np.random.Generator, things: str, style: str | None, ground: str) -> str:
    """Of more than a thing's name."""
    return _say(_weighted(rng, STYLED_LONG if style else PLAIN_LONG), things, style, ground)


def ground(rng: np.random.Generator, background: str) -> str:
    """How a background is said."""
    other = background in ALSO_SPELT and rng.random() < 0.3
    return _ground(_weighted(rng, BACKGROUND), ALSO_SPELT[background] if other else background)


def coloured(name: str, colour: str) -> str:
    """ "a cat" in red is "a red cat"; what has no article gets none."""
    noun = bare(name)
    return f"{colour} {noun}" if noun == name else f"{_article(colour)} {colour} {noun}"


def small(name: str) -> str:
    return f"a small {bare(name)}"


def several(name: str, count: int) -> str:
    """ "a cat" four times is "four cats"."""
    return f"{NUMBERS[count]} {_plurals().plural_noun(bare(name))}"


def corpus(names: list[str], styles: list[str]) -> list[str]:
    """Captions, sorted, that together hold every word that a caption of these things can hold."""
    words = [word for name in COLOURS for word in {name, ALSO_SPELT.get(name, name)}]
    found = set()
    for name in names:
        for style in styles:
            found.update(_say(template, name, style) for template in (*PLAIN, *STYLED))
        if bare(name) != name:
            found.update(several(name, count) for count in NUMBERS)
            found.add(small(name))
    first = names[0]
    found.update(_say("{a}{bg}", first, "flat", _ground(g, w)) for g in BACKGROUND for w in words)
    found.update(f"{first} {place}" for place in PLACES)
    found.update(f"{first} {relation} {first}" for relation in RELATIONS)
    found.update(coloured(first, colour) for colour in PAINTS)
    return sorted(found)


def bare(name: str) -> str:
    """A name without its article: "a cat" is "cat"."""
    return re.sub(r"^(a|an|the) ", "", name)


def split_words(text: str) -> list[str]:
    """The words of a caption, without punctuation."""
    return re.findall(r"[a-z0-9]+", text.lower())


@cache
def _plurals() -> Any:
    import inflect

    return inflect.engine()


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _say(template: str, thing: str, style: str | None, ground: str = "") -> str:
    noun = bare(thing)
    article = "" if noun == thing else "a "
    kind = STYLES[style] if style else ""
    return template.format(a=thing, n=noun, art=article, style=style, kind=kind, bg=ground)


def _ground(template: str, colour: str) -> str:
    return template.format(c=f"{_article(colour)} {colour}", b=colour)


def _weighted(rng: np.random.Generator, weights: Mapping[str, int]) -> str:
    totals = list(accumulate(weights.values()))
    return list(weights)[bisect(totals, rng.random() * totals[-1])]
