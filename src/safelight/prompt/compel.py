"""compel's dialect: `word++`, `word-`, `(some words)1.3`, `"some words"0.8`, `.blend()`, `.and()`.

Each `+` multiplies a weight by 1.1 and each `-` by 0.9; nested weights multiply. A whole prompt
may be a list: `("a cat", "a dog").blend(1, 0.5)` adds the states of its texts,
`("a cat", "a dog").and()` puts one after the other. Brackets and quotes that have no partner, or
hold what compel's grammar does not allow, are text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from safelight.prompt.reading import Blend, Piece, Section, unbalanced

PLUS, MINUS = 1.1, 0.9

_TOKEN = re.compile(
    r"(?P<space>\s++)|(?P<open>\()|(?P<close>\))|(?P<quote>\")|(?P<sign>\++|-++)|(?P<mark>[,.])"
    r"|(?P<word>(?:\\[()\",.+\-=]|[^\s()\",.+\-=\\]|\\)++)|(?P<other>=)"
)
# A word: no brackets, quotes, commas, points or equals signs, and no sign but before a letter.
_WORD = re.compile(r"(?:\\[()\",.+\-=]|[^\s()\",.+\-=]|[+-](?=[^\s()\",.+\-=]))++")
_SIGNS = re.compile(r"\++|-++")
_NUMBER = re.compile(r"(?:\d++\.\d*+|\.\d++)|\d++")
_OPTION = re.compile(r"-?(?:\d++\.?\d*+|\.\d++)")
_QUOTED = re.compile(r'"((?:[^"\\\n]|\\.)*+)"')
_BRACKET = re.compile(r"\\.|[()]")
_OPERATOR = re.compile(r"\)\s*+\.(?:blend|and|add|swap)\(")
_RUN = re.compile(r"\S++")
_SPACE = re.compile(r"\s*+")
_LIST_END = re.compile(r"\)\s*+\.(blend|and|add)\(([^()]*+)\)\s*+")


def read(text: str) -> tuple[tuple[Blend, ...], tuple[str, ...]]:
    """Return the blends that follow each other in a prompt, and warnings."""
    text = re.sub(r",(?=\S)", ", ", text)  # as compel does
    listed = _list(text)
    if listed is not None:
        entries, operator, weights, normalize = listed
        texts = tuple((_entry(entry),) for entry in entries)
        if operator == "blend":
            return (Blend(texts, tuple(weights), normalize),), ()
        return tuple(Blend((t,), weight=w) for t, w in zip(texts, weights, strict=True)), ()
    partners, lost = _matched(text)
    warnings = unbalanced(lost, "text")
    if _OPERATOR.search(text):
        warnings += ("an operator that cannot be read, .blend, .and or .swap: taken as text",)
    return (Blend(((_pieces(text, partners),),)),), warnings


def _list(text: str) -> tuple[list[str], str, list[float], bool] | None:
    """Return a list's entries, its operator, weights, and whether they are normalised.

    None if the prompt is no list. An entry is quoted, in brackets, or one word.
    """
    at = _skip(text, 0)
    if not text.startswith("(", at):
        return None
    entries: list[str] = []
    while text[at : at + 1] in ("(", ",") and text[at : at + 1]:
        at = _skip(text, at + 1)
        if quoted := _QUOTED.match(text, at):
            entries.append(quoted[1].replace('\\"', '"'))
            at = quoted.end()
        elif text.startswith("(", at):
            end = _balanced(text, at)
            entries.append(text[at + 1 : end - 1])
            at = end
        elif word := _WORD.match(text, at):
            entries.append(word[0])
            at = word.end()
        else:
            return None
        at = _skip(text, at)
    tail = _LIST_END.fullmatch(text, at)
    if tail is None:
        return None
    options = [option.strip() for option in tail[2].split(",") if option.strip()]
    normalize = options[-1:] != ["no_normalize"]
    numbers = options if normalize else options[:-1]
    if not all(_OPTION.fullmatch(number) for number in numbers):
        return None
    weights = [float(number) for number in numbers] or [1.0] * len(entries)
    return (entries, tail[1], weights, normalize) if len(weights) == len(entries) else None


def _skip(text: str, at: int) -> int:
    """Return the end of the blanks at this place."""
    blanks = _SPACE.match(text, at)
    return blanks.end() if blanks else at


def _balanced(text: str, at: int) -> int:
    """Return the end of the bracket that opens here; the text's end if it is not closed."""
    depth = 0
    for match in _BRACKET.finditer(text, at):
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    return len(text)


def _entry(entry: str) -> Section:
    """Return the pieces of a list's entry, read as a text in brackets if it can be one."""
    partners, _ = _matched(f"({entry})")
    if partners.get(0) == len(entry) + 1:
        return _pieces(f"({entry})", partners)
    return _pieces(entry, _matched(entry)[0])


def _matched(text: str) -> tuple[dict[int, int], dict[str, int]]:
    """Return where each bracket and quote that has a partner is closed, and counts of the others.

    A bracket holds words, marks and brackets. A sign that stands alone, or an equals sign, cannot
    be in one: it makes all open brackets text.
    """
    partners: dict[int, int] = {}
    stack: list[tuple[str, int]] = []
    lost = {"(": 0, ")": 0, '"': 0}

    quoted = False
    after = ""  # the kind of the token before

    def fall_back() -> None:
        nonlocal quoted
        for bracket, _ in stack:
            lost[bracket] += 1
        stack.clear()
        quoted = False

    for match in _TOKEN.finditer(text):
        kind, at = match.lastgroup, match.start()
        if kind == "open":
            stack.append(("(", at))
        elif kind == "close" and stack and stack[-1][0] == "(":
            partners[stack.pop()[1]] = at
        elif kind == "quote" and stack and stack[-1][0] == '"':
            partners[stack.pop()[1]] = at
            quoted = False
        elif kind == "quote" and not quoted:
            stack.append(('"', at))
            quoted = True
        elif kind in ("close", "quote"):
            lost[match[0]] += 1
            fall_back()
        elif (
            kind == "other"
            or (kind == "space" and quoted and "\n" in match[0])
            or (
                kind == "sign"
                and after not in ("word", "close", "quote")
                and not _WORD.match(text, at)
            )
        ):
            fall_back()
        after = kind or ""
    fall_back()
    return partners, lost


def _pieces(text: str, partners: dict[int, int]) -> Section:
    """Return the pieces of a text; those of equal weight are joined by blanks."""
    found: list[tuple[list[str], float]] = []
    for words, weight in _fragments(text, partners):
        words = words.replace("\\(", "(").replace("\\)", ")").replace('\\"', '"')
        if found and found[-1][1] == weight:
            found[-1][0].append(words)
        else:
            found.append(([words], weight))
    return tuple(Piece(" ".join(words), weight) for words, weight in found)


def _fragments(text: str, partners: dict[int, int]) -> Iterator[tuple[str, float]]:
    """Yield words and their weights, in order."""
    at = 0
    inside: list[tuple[int, float]] = [(len(text), 1.0)]  # where each bracket closes, its weight
    while True:
        at = _skip(text, at)
        end, weight = inside[-1]
        if at == end:
            if len(inside) == 1:
                return
            inside.pop()
            at = _operator(text, at + 1, numbers=True)[0]
        elif at in partners:
            closes = partners[at]
            factor = _operator(text, closes + 1, numbers=True)[1]
            inside.append((closes, weight * factor))
            at += 1
        elif word := _WORD.match(text, at):
            after, factor = _operator(text, word.end(), numbers=False)
            if after > word.end():
                yield word[0], weight * factor
                at = after
            elif len(inside) > 1:
                yield word[0], weight
                at = word.end()
            else:
                run = _run(text, at)
                yield run, weight
                at += len(run)
        else:
            run = text[at] if len(inside) > 1 else _run(text, at)
            yield run, weight
            at += len(run)


def _run(text: str, at: int) -> str:
    """Return the text from this place to the next blank."""
    run = _RUN.match(text, at)
    return run[0] if run else text[at:]


def _operator(text: str, at: int, *, numbers: bool) -> tuple[int, float]:
    """Return the end of the weight at this place, and its factor; 1 if there is none.

    numbers: whether a number is a weight here, as it is after a bracket.
    """
    if signs := _SIGNS.match(text, at):
        try:
            return signs.end(), (PLUS if signs[0][0] == "+" else MINUS) ** len(signs[0])
        except OverflowError:
            return signs.end(), math.inf
    if numbers and (number := _NUMBER.match(text, at)):
        return number.end(), float(number[0])
    return at, 1.0
