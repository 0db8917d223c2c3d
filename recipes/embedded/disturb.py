"""Mix words without a meaning into captions, so that a model passes over what it does not know."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

ADJECTIVES = (
    "cute", "beautiful", "happy", "sad", "old", "new", "funny", "pretty", "lovely", "nice",
    "modern", "colorful", "cool", "amazing", "realistic", "detailed", "simple", "adorable", "sweet",
    "angry", "lonely", "magical", "fluffy", "shiny", "golden", "wooden", "fast", "young", "strange",
    "elegant", "friendly", "fantastic", "single", "lazy", "royal", "epic",
)  # fmt: skip
VERBS = (
    "sitting", "standing", "running", "flying", "sleeping", "eating", "playing", "dancing",
    "jumping", "swimming", "smiling", "walking", "lying", "looking at the camera", "wearing a hat",
    "reading a book", "holding a flower", "driving", "floating", "singing", "waiting",
)  # fmt: skip
TAGS = (
    "4k", "8k", "hd", "high quality", "masterpiece", "best quality", "highly detailed",
    "digital art", "concept art", "studio light", "close up", "wide shot", "bright colors",
    "soft light", "trending", "wallpaper", "minimalist", "vibrant", "by a famous artist", "style",
)  # fmt: skip
OPENINGS = ("draw me", "please draw", "i want", "show me", "generate", "make", "draw", "create")


def disturb(rng: np.random.Generator, caption: str, unknown: Sequence[str]) -> str:
    """Return the caption with one or two additions that change nothing of the picture.

    unknown: words that no caption uses otherwise.
    """

    def word() -> str:
        return pick(rng, unknown if len(unknown) and rng.random() < 0.6 else ADJECTIVES)

    way = rng.random()
    if way < 0.4 and re.search(r"\ba ", caption):
        # An adjective, before one of the nouns.
        starts = [found.end() for found in re.finditer(r"\ban? ", caption)]
        at = starts[int(rng.integers(len(starts)))]
        new = word()
        head = re.sub(r"\ban? $", "an " if new[0] in "aeiou" else "a ", caption[:at])
        return f"{head}{new} {caption[at:]}"
    if way < 0.55:
        return f"{caption}, {pick(rng, TAGS)}"
    if way < 0.65:
        return f"{caption}, {word()}, {pick(rng, TAGS)}"
    if way < 0.8:
        return f"{caption} {pick(rng, VERBS)}"
    if way < 0.88:
        return f"{pick(rng, OPENINGS)} {caption}"
    if way < 0.94:
        return f"{word()} {caption}"
    return f"{caption} {pick(rng, ('in a', 'with a', 'of', 'from', 'for', 'like a'))} {word()}"


def pick(rng: np.random.Generator, words: Sequence[str]) -> str:
    """Return one of the words."""
    return words[int(rng.integers(len(words)))]
