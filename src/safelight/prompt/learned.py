"""Textual inversions in prompts, by each tool's rule.

- `plain` and `compel`, as diffusers: its token, anywhere in the text
- `a1111`: the token ids of its file's name, the longest name first
- `comfy`: `embedding:name`, at the beginning of a weighted piece or after a blank
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from safelight.errors import SafelightError
from safelight.prompt.reading import Reading, Syntax
from safelight.words import words_in

if TYPE_CHECKING:
    from safelight.prompt.tokenizer import Tokenizer

MARK = "embedding:"

_MARK = re.compile(rf"(?:(?<=\s)|\A){MARK}")
_NAME = re.compile(r"\s*+([^\s<\[]*+)")
_ENDINGS = (".safetensors", ".sft", ".pt", ".bin", ".png")

Group = list[int]
"""Token ids that a tool moves to another chunk together."""


@dataclass(frozen=True, slots=True)
class Learned:
    """A textual inversion in a vocabulary: a name that stands for vectors, each with an id.

    name: what A1111 and ComfyUI call it, its file's name. token: what its file calls it, which
    diffusers goes by. ids: beyond the vocabulary, one for each of its vectors.
    """

    name: str
    token: str | None
    ids: tuple[int, ...]


def two_of_one_name(name: str) -> SafelightError:
    """Return the error for two textual inversions of the same name."""
    return SafelightError(
        f"two embeddings are called {name[:60]!r}: rename the file of one", field="embeddings"
    )


def groups(tokenizer: Tokenizer, text: str, syntax: Syntax) -> list[Group]:
    """Return the token ids of a text of one weight, in the groups of each tool's rule.

    Raises SafelightError for `embedding:name` in ComfyUI's syntax if there is none of this name.
    """
    if syntax == "a1111":
        return list(_by_ids(tokenizer, tokenizer.ids(text)))
    if syntax == "comfy":
        return list(_by_mark(tokenizer, text))
    return [tokenizer.expanded_ids(text)]


def _by_ids(tokenizer: Tokenizer, ids: list[int]) -> Iterator[Group]:
    at = 0
    while at < len(ids):
        for name, one in tokenizer.learned_ids:
            if name and ids[at : at + len(name)] == name:
                yield list(one.ids)
                at += len(name)
                break
        else:
            yield [ids[at]]
            at += 1


def _by_mark(tokenizer: Tokenizer, text: str) -> Iterator[Group]:
    for name, words in marked(text, lambda name: find(tokenizer.learned, name) is not None):
        if name is not None:
            one = find(tokenizer.learned, name)
            if one is None:
                there = ", ".join(one.name for one in tokenizer.learned)[:120] or "none"
                raise SafelightError(
                    f"prompt has {MARK}{name[:60]}, and no such embedding is there: {there}",
                    field="prompt",
                )
            yield list(one.ids)
        if words:
            yield tokenizer.ids(words)


def marked(text: str, there: Callable[[str], bool]) -> Iterator[tuple[str | None, str]]:
    """Yield the name of each `embedding:name` of a text, with the text that follows it.

    The text before the first comes with None. there: returns whether an embedding of a name is
    there; commas around a name that is not there are text.
    """
    ends = [*(match.start() for match in _MARK.finditer(text)), len(text)]
    yield None, text[: ends[0]]
    for start, end in pairwise(ends):
        body = text[start + len(MARK) : end]
        match = _NAME.match(body)
        name, rest = ("", body) if match is None else (match[1], body[match.end() :])
        if not there(name) and (bare := name.strip(",")) != name:
            name, rest = bare, f"{name[len(bare) :]} {rest}"
        yield name, rest


def find(learned: Iterable[Learned], name: str) -> Learned | None:
    """Return the embedding of a name, or of the last part of a path, with or without an ending."""
    for ending in _ENDINGS:
        name = name.removesuffix(ending)
    last = name.replace("\\", "/").rpartition("/")[2]
    found = {one.name: one for one in learned}
    return found.get(name) or found.get(last)


def taught(known: Set[str], tokenizer: Tokenizer) -> Set[str]:
    """Return the words that a model knows, with those of its embeddings' names and added tokens."""
    names = {name for one in tokenizer.learned for name in (one.name, one.token) if name}
    names |= set(tokenizer.added.values())
    return known | {word for name in names for word in words_in(name)}


def unused(tokenizer: Tokenizer, readings: Iterable[Reading], syntax: Syntax) -> list[Learned]:
    """Return the embeddings that no text of the readings names."""
    pieces = {
        piece.text
        for reading in readings
        for part in reading.parts
        for stage in part.stages
        for piece in stage.pieces
    }
    used = {i for text in pieces for group in groups(tokenizer, text, syntax) for i in group}
    return [one for one in tokenizer.learned if not used.intersection(one.ids)]
