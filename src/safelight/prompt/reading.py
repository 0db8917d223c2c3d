"""What a prompt says, in any dialect: weighted texts, changing by step, composed of parts.

A dialect is read into a `Reading` (`safelight.prompt.dialects`) without PyTorch and without a
tokenizer. The time is linear in the length of the prompt. The only errors are weights and lists
that cannot be used.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

Syntax = Literal["plain", "a1111", "comfy", "compel"]
Emphasis = Literal["original", "no-norm", "ignore", "none"]


class Piece(NamedTuple):
    """A text with one weight for all of its tokens."""

    text: str
    weight: float = 1.0


Section = tuple[Piece, ...]
"""Pieces that follow each other. The next section begins with a new chunk (A1111's BREAK)."""


@dataclass(frozen=True)
class Blend:
    """Texts whose states are added up: compel's `.blend()`. Other dialects: one text of weight 1.

    texts: each a tuple of sections. normalize: the weights are divided by their sum. weight: how
    far the result is from the states of the empty prompt (compel's `.and(0.5, 1)`).
    """

    texts: tuple[tuple[Section, ...], ...]
    weights: tuple[float, ...] = (1.0,)
    normalize: bool = True
    weight: float = 1.0


@dataclass(frozen=True)
class Stage:
    """The texts that hold up to and including a step, counted from 1.

    A stage with the same last step as the one before never holds, but counts in A1111's mean of all
    stages. blends: their states follow each other along the tokens (compel's `.and()`).
    """

    until: int
    blends: tuple[Blend, ...]

    @property
    def pieces(self) -> Iterator[Piece]:
        """All pieces, in order."""
        for blend in self.blends:
            for text in blend.texts:
                for section in text:
                    yield from section


@dataclass(frozen=True)
class Part:
    """One of the prompts that A1111's AND composes. weight: its share of the guidance."""

    stages: tuple[Stage, ...]
    weight: float = 1.0

    def index_at(self, step: int) -> int:
        """Return which stage holds at a step, counted from 1."""
        place = bisect_left(self.stages, step, key=lambda stage: stage.until)
        return min(place, len(self.stages) - 1)


@dataclass(frozen=True)
class Reading:
    """A prompt that was read.

    warnings: what may have been meant otherwise. networks: what stood in each `<…>`, A1111's way to
    name LoRAs: the kind, then the parts between colons.
    """

    parts: tuple[Part, ...]
    warnings: tuple[str, ...] = ()
    networks: tuple[tuple[str, ...], ...] = ()

    @property
    def texts(self) -> Iterator[tuple[Section, ...]]:
        """The texts of all stages, in order."""
        for part in self.parts:
            for stage in part.stages:
                for blend in stage.blends:
                    yield from blend.texts


def one_part(steps: int, sections: tuple[Section, ...]) -> Part:
    """Return a part with one text that holds for all steps."""
    return Part((Stage(steps, (Blend((sections,)),)),))


def unbalanced(found: dict[str, int], text: str) -> tuple[str, ...]:
    """Return the warning about brackets that have no partner, if there are any.

    found: how many of each. text: what they are read as.
    """
    listed = " and ".join(f"{count} '{mark}'" for mark, count in found.items() if count)
    return (f"{listed} without a partner: read as {text}",) if listed else ()


@dataclass(frozen=True)
class Word:
    """One word of a prompt. tokens: the places of its tokens among the text encoder's states."""

    text: str
    tokens: list[int]
