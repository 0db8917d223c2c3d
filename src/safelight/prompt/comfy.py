"""ComfyUI's dialect: round brackets alone. `(a)` multiplies by 1.1, `(a:1.3)` sets 1.3.

Text in a bracket with a number has that weight, whatever is around it: `((a:1.2))` is at 1.2. An
escaped bracket, `\\(`, is text. An opening bracket that is never closed makes the brackets after it
text. A closing bracket without a partner makes the next opening one text.
"""

from __future__ import annotations

import re

from safelight.prompt.reading import Piece, Section, unbalanced

FACTOR = 1.1

_TOKEN = re.compile(r"\\[()]|[()]|[^\\()]++|\\")
_NUMBER = re.compile(r"\s*+[+-]?(?:\d++\.?\d*+|\.\d++)(?:[eE][+-]?\d++)?\s*+")
_STRAY_MARK = re.compile(r"(?<=\S)embedding:")


class _Groups:
    """The brackets around pieces: each one's parent, and its weight, None for 1.1 times."""

    def __init__(self) -> None:
        self.parents: list[int] = [0]
        self.weights: list[float | None] = [1.0]

    def open(self, parent: int) -> int:
        self.parents.append(parent)
        self.weights.append(None)
        return len(self.parents) - 1

    def resolved(self) -> list[float]:
        """Return the weight of each group. A parent comes before its children."""
        found = [1.0]
        for parent, weight in list(zip(self.parents, self.weights, strict=True))[1:]:
            found.append(found[parent] * FACTOR if weight is None else weight)
        return found


def read(text: str) -> tuple[tuple[Section, ...], tuple[str, ...]]:
    """Return the one section of a prompt, and warnings."""
    literal, closing, warnings = _brackets(text)
    groups, pieces = _Groups(), list[tuple[str, int]]()
    inside = [(0, 0)]  # each open group, with the number of pieces before it
    words: list[str] = []
    depth = 0

    def flush() -> str:
        said = "".join(words)
        words.clear()
        return said

    for match in _TOKEN.finditer(text):
        token, at = match[0], match.start()
        if at == literal:
            pieces.append((flush(), inside[-1][0]))
        means_something = not literal <= at < closing
        if token == "(" and means_something:
            depth += 1
            if depth >= 1:
                pieces.append((flush(), inside[-1][0]))
                inside.append((groups.open(inside[-1][0]), len(pieces)))
                continue
        elif token == ")" and means_something:
            depth -= 1
            if depth >= 0:
                said, (group, before) = flush(), inside.pop()
                colon = said.rfind(":")
                # A colon right after the bracket, with nothing to weigh, is text.
                weighs = colon > 0 or (colon == 0 and len(pieces) > before)
                if weighs and _NUMBER.fullmatch(said, colon + 1):
                    groups.weights[group], said = float(said[colon + 1 :]), said[:colon]
                pieces.append((said, group))
                continue
        words.append(token[1:] if token in (r"\(", r"\)") else token)
    pieces.append((flush(), 0))
    weights = groups.resolved()
    if any(_STRAY_MARK.search(said) for said, _ in pieces):
        warnings += ("'embedding:' after something else than a blank: read as text",)
    return (tuple(Piece(said, weights[group]) for said, group in pieces if said),), warnings


def _brackets(text: str) -> tuple[int, int, tuple[str, ...]]:
    """Return the start and the end of the span in which brackets are text, and warnings.

    ComfyUI cuts a prompt into items: an item begins at a bracket that opens at depth 0, and ends
    where the depth is 0 again. The last item may not end. It still counts as one in brackets if its
    last character is a closing bracket, and the same holds for what is inside it. So its last
    closing brackets belong to its first opening ones. The span begins at the first opening bracket
    that is left over.
    """
    depth, stray = 0, 0
    opened: list[int] = []
    partners: list[int] = []  # of the closing brackets that end the text, the last one first
    end = len(text)
    for match in _TOKEN.finditer(text):
        if match[0] == "(":
            if depth >= 0:
                opened.append(match.start())
            depth += 1
        elif match[0] == ")":
            depth -= 1
            stray += depth < 0
            if depth >= 0:
                partners.append(opened.pop())
                continue
        partners.clear()
    warnings = unbalanced({"(": len(opened), ")": stray}, "text, and so is what they reach to")
    if not opened:
        return end, end, warnings
    first = [*opened, *reversed(partners)]
    return first[len(partners)], end - len(partners), warnings
