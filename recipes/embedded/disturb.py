"""Mix words without a meaning into captions, so that a model ignores what it does not know."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from recipes.embedded.captions import choose

ADJECTIVES = (
    "cute", "beautiful", "new", "funny", "pretty", "lovely", "nice", "modern", "colorful",
    "amazing", "realistic", "detailed", "simple", "adorable", "lonely", "magical", "fluffy",
    "shiny", "golden", "fast", "young", "strange", "elegant", "friendly", "fantastic", "single",
    "lazy", "epic", "gentle", "brave", "clever", "curious", "rusty", "ancient",
)  # fmt: skip
"""None is part of a thing's name: "an angry face" is a thing, so "angry" is not here."""

VERBS = (
    "sitting", "standing", "running", "flying", "sleeping", "eating", "playing", "dancing",
    "jumping", "swimming", "smiling", "walking", "lying", "driving", "floating", "singing",
    "waiting", "resting", "hiding", "looking around", "looking at you",
)  # fmt: skip
"""They stand behind a whole caption; none names another thing, as "wearing a hat" would."""

TAGS = (
    "4k", "8k", "hd", "high quality", "masterpiece", "best quality", "highly detailed",
    "digital art", "concept art", "studio light", "close up", "wide shot", "bright colors",
    "soft light", "trending", "wallpaper", "minimalist", "vibrant", "award winning", "style",
)  # fmt: skip
OPENINGS = ("draw me", "please draw", "i want", "show me", "generate", "make", "draw", "create")


def disturb(rng: np.random.Generator, caption: str, unknown: Sequence[str]) -> str:
    """Return the caption with one or two additions that do not change the picture.

    All words of the caption stay, in their order; "a" may become "an". unknown: words that no
    caption uses otherwise.
    """

    def word() -> str:
        return choose(rng, unknown if len(unknown) and rng.random() < 0.6 else ADJECTIVES)

    way = rng.random()
    starts = [found.end() for found in re.finditer(r"\ban? ", caption)]
    if way < 0.4 and starts:
        # An adjective, before one of the nouns.
        at = starts[int(rng.integers(len(starts)))]
        new = word()
        head = re.sub(r"\ban? $", "an " if new[0] in "aeiou" else "a ", caption[:at])
        return f"{head}{new} {caption[at:]}"
    if way < 0.55:
        return f"{caption}, {choose(rng, TAGS)}"
    if way < 0.65:
        return f"{caption}, {word()}, {choose(rng, TAGS)}"
    if way < 0.8:
        return f"{caption} {choose(rng, VERBS)}"
    if way < 0.88:
        return f"{choose(rng, OPENINGS)} {caption}"
    if way < 0.94:
        return f"{word()} {caption}"
    link, last = choose(rng, ("in a", "with a", "of", "from", "for", "like a")), word()
    link += "n" if link.endswith(" a") and last[0] in "aeiou" else ""
    return f"{caption} {link} {last}"
