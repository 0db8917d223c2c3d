"""A1111's schedules: `[from:to:when]`, `[to:when]`, `[from::when]`, and turns, `[a|b]`.

`when` is a step if it is a whole number, and a share of all steps if it has a point. Turns change
with every step. Brackets are matched with one stack. A bracket that has no partner, or is no
schedule, is text, and so are the brackets around it, as in the web UI's grammar.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_TOKEN = re.compile(r"\\.|[\[\]():|]|[^\\\[\]():|]++|\\", re.DOTALL)
_WHEN = re.compile(r"\s*+([+-]?(?:\d++\.?\d*+|\.\d++)(?:[eE][+-]?\d++)?)\s*+")
_CLOSES = {")": "(", "]": "["}


@dataclass
class _Switch:
    """`before` up to and including the step `when`, `after` from then on."""

    before: list[_Node]
    after: list[_Node]
    when: str


@dataclass
class _Turns:
    """One of the options at each step, in turn."""

    options: list[list[_Node]]


_Node = str | list["_Node"] | _Switch | _Turns


class _Open:
    """A bracket that was opened. parts: what stands between its separators, `marks`."""

    __slots__ = ("bracket", "marks", "parts")

    def __init__(self, bracket: str) -> None:
        self.bracket, self.marks = bracket, ""
        self.parts: list[list[_Node]] = [[]]

    def as_text(self) -> Iterator[_Node]:
        """Yield the bracket and what it holds, as text."""
        yield self.bracket
        for part, mark in zip(self.parts, (*self.marks, ""), strict=True):
            yield from part
            yield mark


def stages_of(text: str, steps: int) -> tuple[list[tuple[int, str]], tuple[str, ...]]:
    """Return (last step, text) of each stage of a prompt, and warnings.

    The steps are those of the web UI's own table. It counts from 0 when it looks them up: see
    `a1111.read`.
    """
    if "[" not in text:
        return [(steps, text)], ()
    tree, bar = _parse(text)
    if bar:
        # The web UI's grammar has no place for this bar, and takes the whole text as it is.
        scheduled = any(isinstance(node, _Switch | _Turns) for node in _walk(tree))
        said = "a | outside of [a|b]: the schedules of this prompt are read as text"
        return [(steps, text)], (said,) if scheduled else ()
    ends = {steps}
    for node in _walk(tree):
        if isinstance(node, _Switch):
            when = _step(node.when, steps)
            ends |= {when} if when >= 1 else set()
        elif isinstance(node, _Turns):
            ends |= set(range(1, steps + 1))
    return [(end, _text_at(tree, end, steps)) for end in sorted(ends)], ()


def _step(when: str, steps: int) -> int:
    """Return the step, at most `steps`, that a number of a schedule means."""
    value = float(when) * steps if "." in when else float(when)
    return int(min(float(steps), max(-1.0, value)))


def _parse(text: str) -> tuple[list[_Node], bool]:
    """Return the tree of a text, and whether it has a bar that separates no options."""
    root: list[_Node] = []
    stack: list[_Open] = []
    bar = False

    def fall_back() -> None:
        """Turn all open brackets, with what they hold so far, into text."""
        nonlocal bar
        for one in stack:
            bar = bar or "|" in one.marks
            root.extend(one.as_text())
        stack.clear()

    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in "([":
            stack.append(_Open(token))
        elif token in ":|" and stack:
            stack[-1].parts.append([])
            stack[-1].marks += token
        elif token in ")]" and stack and stack[-1].bracket == _CLOSES[token]:
            node = _closed(stack[-1], token)
            if node is None:
                fall_back()
                root.append(token)
            else:
                stack.pop()
                (stack[-1].parts[-1] if stack else root).append(node)
        elif token in ")]":
            fall_back()
            root.append(token)
        else:
            bar = bar or token == "|"
            (stack[-1].parts[-1] if stack else root).append(token)
    fall_back()
    return root, bar


def _closed(one: _Open, closing: str) -> _Node | None:
    """Return the node of a bracket that was closed, None if the grammar has none."""
    colons, bars = one.marks.count(":"), one.marks.count("|")
    if not bars and colons <= (1 if one.bracket == "(" else 0):
        return [*one.as_text(), closing]
    if one.bracket == "(" or (bars and colons):
        return None
    if bars:
        return _Turns(one.parts)
    if colons > 2 or not all(isinstance(node, str) for node in one.parts[-1]):
        return None
    when = _WHEN.fullmatch("".join(map(str, one.parts[-1])))
    if when is None:
        return None
    return _Switch(one.parts[0] if colons == 2 else [], one.parts[-2], when[1])


def _walk(tree: list[_Node]) -> Iterator[_Node]:
    """Yield every node."""
    rest: list[_Node] = list(tree)
    while rest:
        node = rest.pop()
        yield node
        if isinstance(node, list):
            rest += node
        elif isinstance(node, _Switch):
            rest += node.before + node.after
        elif isinstance(node, _Turns):
            rest += [inner for option in node.options for inner in option]


def _text_at(tree: Iterable[_Node], step: int, steps: int) -> str:
    """Return the text at a step, counted from 1."""
    found: list[str] = []
    rest: list[Iterator[_Node]] = [iter(tree)]
    while rest:
        node = next(rest[-1], None)
        if node is None:
            rest.pop()
        elif isinstance(node, str):
            found.append(node)
        elif isinstance(node, _Switch):
            rest.append(iter(node.before if step <= _step(node.when, steps) else node.after))
        elif isinstance(node, _Turns):
            rest.append(iter(node.options[(step - 1) % len(node.options)]))
        else:
            rest.append(iter(node))
    return "".join(found)
