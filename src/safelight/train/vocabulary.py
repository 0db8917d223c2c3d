"""Names for the whole vocabulary: every thing that all three styles draw, as emojibase labels it.

What concepts.json names by hand keeps those names; the rest gets an article and, where the short
codes of chat programs know another noun, synonyms.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from safelight.train.captions import bare

GROUPS = {0: "faces", 1: "people", 3: "nature", 4: "food", 5: "places", 6: "play", 7: "objects"}
"""emojibase's groups that show things: no skin tones, symbols, flags."""

# Signs rather than things, one picture for many, or not for children.
LEFT_OUT = re.compile(
    r"^(family|kiss|couple)\b|^(men|women|woman and man|people) holding hands|o’clock|-thirty$"
    r"|middle finger|facing right$|\bNO$|^ZZZ$|gesturing OK$"
)

# Not counted, or names: no article.
UNCOUNTED = frozenset((
    "bacon", "broccoli", "butter", "fog", "garlic", "ice", "jeans", "lipstick", "luggage",
    "money", "polish", "popcorn", "rice", "rock", "salt", "soap", "spaghetti", "sushi", "wood",
    "feeding", "breast-feeding", "racing", "skating", "curling",
))  # fmt: skip
NAMES = frozenset({"santa claus", "mrs. claus", "mx claus", "mount fuji", "shaved ice"})
PLURALS = frozenset({"biceps", "clothes", "dice", "eyes", "scissors", "shorts"})
SINGULARS = frozenset((
    "abacus", "bus", "cactus", "canvas", "compass", "deer", "hibiscus", "hippopotamus",
    "jellyfish", "lens", "lotus", "minibus", "moose", "octopus", "rhinoceros", "tennis",
    "trolleybus", "blowfish", "fish",
))  # fmt: skip

# A mirror image of these is another thing, or has its writing the wrong way round.
ONE_WAY = re.compile(
    r"\b(left|right|leftwards|rightwards|book|books|calendar|clock|newspaper|globe|map|bank|"
    r"atm|store|hotel|hospital|post office|ball|medal|keyboard|page|abacus|ledger|input)\b"
)
SYNONYMS_OF = (3, 4, 5, 6, 7)
"""Groups whose short codes are nouns; of faces and people they are adjectives and verbs."""

ADJECTIVES = (59, 66)
"""Subgroups whose short codes are not: weather, and how loud."""


def whole(
    emoji: Iterable[Mapping[str, Any]],
    codes: Iterable[Mapping[str, str | list[str]]],
    by_hand: Iterable[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Concepts as in concepts.json: emojibase's data.json and its tables of short codes, named.

    by_hand: concepts that keep their names, and come first. No two concepts share a name.
    """
    found = [dict(concept) for concept in by_hand]
    known = {concept["code"] for concept in found}
    taken = {name for concept in found for name in map(bare, concept["names"])}
    rest = []
    for one in sorted(emoji, key=lambda one: one.get("order", 0)):
        code = one["hexcode"].lower().replace("-fe0f", "")
        label = one["label"]
        if one.get("group") not in GROUPS or code in known or LEFT_OUT.search(label):
            continue
        name = named(label)
        if bare(name) in taken:
            continue
        taken.add(bare(name))
        rest.append((code, name, label, one))
    tables = list(codes)
    others = {code: _short(one["hexcode"], tables) for code, _, _, one in rest}
    shared = Counter(word for words in others.values() for word in words)
    for code, name, label, one in rest:
        counted = bare(name) != name
        more = [
            w
            for w in others[code]
            if one["group"] in SYNONYMS_OF
            and one["subgroup"] not in ADJECTIVES
            and shared[w] == 1
            and w not in taken
        ]
        # A synonym is counted if the name is: "a red apple" must not become "apples".
        more = [w for w in more if (bare(named(w)) != named(w)) == counted]
        concept: dict[str, Any] = {"code": code, "names": [name, *map(named, more)]}
        if ONE_WAY.search(label.lower()):
            concept["flip"] = False
        found.append(concept)
    return found


def named(label: str) -> str:
    """A label as a noun with its article: "person: red hair" is "a person with red hair"."""
    label = label.lower().replace("’", "'").replace("piñata", "pinata").replace(" facing right", "")
    who, _, how = label.partition(": ")
    if how:
        if how == "bald":
            label = f"bald {who}"
        else:
            label = f"{who} with {'a ' if how == 'beard' else ''}{how}"
    if re.match(r"(person|man|woman) ", label):
        return f"a {label}"
    if re.match(r"(people|men|women|thumbs) |(performing|palms) ", label):
        return label
    head = re.split(r" (?:with|of|in|on|and|behind|at|from|showing|without|up|down) ", label)[0]
    last = head.split()[-1]
    if label in NAMES or last in UNCOUNTED:
        return label
    if label.startswith("statue of"):
        return f"the {label}"
    if last in PLURALS:
        return label
    if last not in SINGULARS and not last.endswith("ss") and _words().singular_noun(last):
        return label
    return _words().a(label)


def _short(hexcode: str, tables: Iterable[Mapping[str, str | list[str]]]) -> list[str]:
    """What chat programs call it, as words, in order and once each."""
    said: list[str] = []
    for table in tables:
        value = table.get(hexcode, [])
        said += [value] if isinstance(value, str) else value
    words = [word.replace("_", " ") for word in said]
    return list(dict.fromkeys(word for word in words if re.fullmatch(r"[a-z]{3,}( [a-z]+)?", word)))


@cache
def _words() -> Any:
    import inflect

    return inflect.engine()
