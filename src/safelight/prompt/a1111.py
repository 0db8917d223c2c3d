"""AUTOMATIC1111's dialect: emphasis, BREAK, AND; `safelight.prompt.schedule` has its schedules.

The order is the web UI's: what stands in `<…>` is taken out, AND splits the prompt, each part is
scheduled, and each stage of it is read for emphasis.
"""

from __future__ import annotations

import re

from safelight.prompt.networks import split_networks
from safelight.prompt.reading import (
    Blend,
    Emphasis,
    Part,
    Piece,
    Reading,
    Section,
    Stage,
    unbalanced,
)
from safelight.prompt.schedule import stages_of

ROUND, SQUARE = 1.1, 1 / 1.1

_NUMBER = r"[+-]?(?:\d++(?:\.\d*+)?|\.\d++)"
_MARK = re.compile(
    rf"\\[()\[\]\\]|\\|[(\[]|:\s*+(?P<weight>{_NUMBER})\s*+\)|[)\]]|[^\\()\[\]:]++|:"
)
_BREAK, _AND = re.compile(r"\bBREAK\b"), re.compile(r"\bAND\b")
_AND_WEIGHT = re.compile(r"[+-]?(?:\d++\.?|\d*\.\d++)")


def read(text: str, *, steps: int, emphasis: Emphasis, negative: bool) -> Reading:
    """Return what a prompt says; see `reading.read`."""
    text, networks = split_networks(text)
    warnings: list[str] = []
    parts: list[Part] = []
    for part, weight in [(text, 1.0)] if negative else split_and(text):
        scheduled, said = stages_of(part, steps)
        warnings += said
        stages: list[Stage] = []
        read_before: dict[str, tuple[Section, ...]] = {}
        for until, stage in scheduled:
            if stage not in read_before:
                read_before[stage], said = emphasised(stage, emphasis)
                warnings += said
            # The web UI counts from 0 when it looks a stage up, so each holds for one step more.
            stages.append(Stage(min(until + 1, steps), (Blend((read_before[stage],)),)))
        parts.append(Part(tuple(stages), weight))
    return Reading(tuple(parts), tuple(dict.fromkeys(warnings)), networks)


def split_and(text: str) -> list[tuple[str, float]]:
    """Return the parts between AND, each with the weight that ends it, as in `a cat : 0.5`."""
    found: list[tuple[str, float]] = []
    for part in _AND.split(text):
        part = part.rstrip()
        before, colon, number = part.rpartition(":")
        if colon and _AND_WEIGHT.fullmatch(number.strip()):
            found.append((before.rstrip(), float(number)))
        else:
            found.append((part, 1.0))
    return found


def emphasised(text: str, emphasis: Emphasis) -> tuple[tuple[Section, ...], tuple[str, ...]]:
    """Return the sections of a text, and warnings.

    `(a)` weighs 1.1 times as much, `(a:1.3)` 1.3 times, `[a]` 1/1.1 times; nested brackets
    multiply. A bracket that is not closed reaches to the end; one that closes nothing is text.
    Neighbours of equal weight become one piece. BREAK begins a section.
    """
    if emphasis == "none":
        return ((Piece(text),),), ()
    texts: list[str | None] = []  # None stands for BREAK
    opened: dict[str, list[int]] = {"(": [], "[": []}
    spans: dict[str, list[tuple[int, int, float]]] = {"(": [], "[": []}
    stray = {")": 0, "]": 0}
    for mark in _MARK.finditer(text):
        said, weight = mark[0], mark["weight"]
        if said[0] == "\\":
            texts.append(said[1:])
        elif said in opened:
            opened[said].append(len(texts))
        elif weight is not None and opened["("]:
            spans["("].append((opened["("].pop(), len(texts), float(weight)))
        elif said == ")" and opened["("]:
            spans["("].append((opened["("].pop(), len(texts), ROUND))
        elif said == "]" and opened["["]:
            spans["["].append((opened["["].pop(), len(texts), SQUARE))
        else:
            if said in stray or weight is not None:
                stray[said[-1]] += 1
            _append_words(texts, said)
    unclosed = {bracket: len(starts) for bracket, starts in opened.items()}
    for bracket, factor in (("(", ROUND), ("[", SQUARE)):
        spans[bracket] += [(start, len(texts), factor) for start in reversed(opened[bracket])]
    weights = zip(*(_products(spans[b], len(texts)) for b in ("(", "[")), strict=True)
    sections = _merged(texts, [a * b for a, b in weights], ignore=emphasis == "ignore")
    warnings = unbalanced(unclosed, "open to the end (\\( and \\[ are plain brackets)")
    return sections, warnings + unbalanced(stray, "text")


def _append_words(texts: list[str | None], said: str) -> None:
    """Append a text, with None for each BREAK in it and without the blanks around those."""
    words: list[str] = _BREAK.split(said)
    for i, part in enumerate(words):
        if i:
            texts.append(None)
            part = part.lstrip()
        texts.append(part.rstrip() if i < len(words) - 1 else part)


def _products(spans: list[tuple[int, int, float]], count: int) -> list[float]:
    """Return, for each place, the product of the factors of the spans around it.

    spans: (start, end, factor), properly nested, inner ones before outer ones.
    """
    starting: dict[int, list[tuple[int, float]]] = {}
    for start, end, factor in reversed(spans):
        if end > start:
            starting.setdefault(start, []).append((end, factor))
    found: list[float] = []
    open_ones: list[tuple[int, float]] = [(count, 1.0)]
    for place in range(count):
        while open_ones[-1][0] <= place:
            open_ones.pop()
        for end, factor in starting.get(place, ()):
            open_ones.append((end, open_ones[-1][1] * factor))
        found.append(open_ones[-1][1])
    return found


def _merged(texts: list[str | None], weights: list[float], *, ignore: bool) -> tuple[Section, ...]:
    """Return the sections, neighbours of equal weight merged."""
    sections: list[list[tuple[list[str], float]]] = [[]]
    for text, weight in zip(texts, weights, strict=True):
        section = sections[-1]
        if text is None:
            sections.append([])
        elif section and section[-1][1] == weight:
            section[-1][0].append(text)
        else:
            section.append(([text], weight))
    return tuple(
        tuple(Piece("".join(words), 1.0 if ignore else weight) for words, weight in section)
        for section in sections
    )
