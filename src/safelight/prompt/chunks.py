"""From weighted texts to chunks of token ids, by each tool's rule.

A chunk is what the text encoder reads at once: a begin mark, at most `max_length − 2` tokens, an
end mark and padding. CLIP's `max_length` is 77.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from safelight.errors import SafelightError
from safelight.prompt.learned import groups
from safelight.prompt.reading import Reading, Section, Syntax
from safelight.prompt.tokenizer import Tokenizer

MAX_CHUNKS = 32
"""Chunks of one text: 2,400 tokens with CLIP. Each costs time and memory at every step."""

MAX_ENCODED = 512
"""Chunks that one prompt may ask a text encoder for, over all of its stages, and that the different
texts of its stages may have. Their states are in memory at once."""

COMMA_REACH = 20
"""If a full chunk's last comma is at most this many tokens before its end, A1111 moves what follows
the comma to the next chunk."""

WHOLE_BELOW = 8
"""ComfyUI moves pieces and embeddings with fewer tokens than this to the next chunk as a whole."""

_SENTENCE, _PHRASE = (".",), (".", ",", ";", ":")


@dataclass(frozen=True)
class Chunk:
    """What the text encoder reads at once.

    ids: `max_length` token ids. weights: one for each id. sources: the number of the piece that
    each id comes from. Marks and padding have weight 1 and piece −1. count: the tokens that are
    neither.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    sources: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class _Token:
    id: int
    weight: float
    source: int


def chunks_of(tokenizer: Tokenizer, text: Sequence[Section], syntax: Syntax) -> list[Chunk]:
    """Return the chunks of one text, at least one.

    Raises SafelightError for more than MAX_CHUNKS.
    """
    source, sections = 0, list[list[list[_Token]]]()
    for section in text:
        found: list[list[_Token]] = []
        for piece in section:
            for group in groups(tokenizer, piece.text, syntax):
                found.append([_Token(i, piece.weight, source) for i in group])
            source += 1
        sections.append(found)
    rows = _RULES[syntax](tokenizer, sections)
    if len(rows) > MAX_CHUNKS:
        room = tokenizer.max_length - 2
        raise SafelightError(
            f"prompt has {len(rows)} chunks of {room} tokens; at most {MAX_CHUNKS} can be used"
        )
    return [_chunk(tokenizer, row) for row in rows]


def chunks_by_text(
    tokenizer: Tokenizer, reading: Reading, syntax: Syntax
) -> dict[tuple[Section, ...], list[Chunk]]:
    """Return the chunks of each different text of a prompt.

    Raises SafelightError as `chunks_of` does, and for more than MAX_ENCODED chunks.
    """
    found: dict[tuple[Section, ...], list[Chunk]] = {}
    total = 0
    for text in reading.texts:
        if text not in found:
            found[text] = chunks_of(tokenizer, text, syntax)
            total += len(found[text])
            if total > MAX_ENCODED:
                raise too_many_chunks()
    return found


def too_many_chunks() -> SafelightError:
    """Return the error for a prompt of more than MAX_ENCODED chunks."""
    return SafelightError(
        f"prompt has more than {MAX_ENCODED} chunks over its steps: "
        "take fewer schedules, or a shorter text",
        field="prompt",
    )


def _chunk(tokenizer: Tokenizer, row: list[_Token]) -> Chunk:
    padding = tokenizer.max_length - 2 - len(row)
    ids = (tokenizer.bos, *(t.id for t in row), tokenizer.eos, *(tokenizer.pad,) * padding)
    ones, none = (1.0,) * (padding + 1), (-1,) * (padding + 1)
    weights = (1.0, *(t.weight for t in row), *ones)
    return Chunk(ids, weights, (-1, *(t.source for t in row), *none), len(row))


def _a1111(tokenizer: Tokenizer, sections: list[list[list[_Token]]]) -> list[list[_Token]]:
    """A new section begins a new chunk. A full chunk ends after a comma that is near its end.

    The tokens of an embedding stay together. Where the comma rule moves them, the web UI leaves the
    vectors behind; here they move along.
    """
    room, comma = tokenizer.max_length - 2, tokenizer.id_of(",</w>")
    rows: list[list[_Token]] = []
    row: list[_Token] = []
    for i, found in enumerate(sections):
        if i:
            rows.append(row)
            row = []
        last_comma = -1
        for group in found:
            if len(group) > room:
                raise SafelightError(
                    f"prompt has an embedding of {len(group)} vectors; a chunk has room for {room}"
                )
            if group[0].id == comma:
                last_comma = len(row)
            elif len(row) == room and last_comma >= 0 and room - last_comma <= COMMA_REACH:
                row, moved = row[: last_comma + 1], row[last_comma + 1 :]
                rows.append(row)
                row, last_comma = moved, -1
            if len(row) + len(group) > room:
                rows.append(row)
                # A comma that does not fit is the first token of the next chunk, but the web UI
                # does not count it as a comma there.
                row, last_comma = [], -1
            row += group
    if row or not rows:
        rows.append(row)
    return rows


def _comfy(tokenizer: Tokenizer, sections: list[list[list[_Token]]]) -> list[list[_Token]]:
    """A group of WHOLE_BELOW tokens or more is cut where the chunk is full; others stay whole."""
    room = tokenizer.max_length - 2
    rows: list[list[_Token]] = [[]]
    for group in (group for found in sections for group in found):
        rest = group
        while len(rest) > room - len(rows[-1]):
            if len(group) >= WHOLE_BELOW:
                free = room - len(rows[-1])
                rows[-1] += rest[:free]
                rest = rest[free:]
            elif not rows[-1]:
                # In a very short text encoder it does not fit into an empty chunk either.
                rows[-1] += rest[:room]
                rest = rest[room:]
            rows.append([])
        rows[-1] += rest
    return rows


def _compel(tokenizer: Tokenizer, sections: list[list[list[_Token]]]) -> list[list[_Token]]:
    """A full chunk ends after its last sentence, else after its last phrase, else word."""
    room = tokenizer.max_length - 2
    rest = [token for found in sections for group in found for token in group]
    ends: list[Callable[[str], bool]] = [
        lambda token: token in [f"{mark}</w>" for mark in _SENTENCE],
        lambda token: token in [f"{mark}</w>" for mark in _PHRASE],
        lambda token: token.endswith("</w>"),
    ]
    rows: list[list[_Token]] = []
    while len(rest) > room:
        names = [tokenizer.name(token.id) for token in rest[:room]]
        found = (
            max((i for i, name in enumerate(names) if is_end(name)), default=None)
            for is_end in ends
        )
        cut = next((i + 1 for i in found if i is not None), room)
        rows.append(rest[:cut])
        rest = rest[cut:]
    return [*rows, rest]


def _plain(tokenizer: Tokenizer, sections: list[list[list[_Token]]]) -> list[list[_Token]]:
    """One chunk; what finds no room is left out, as diffusers does."""
    room = tokenizer.max_length - 2
    return [[token for found in sections for group in found for token in group][:room]]


_RULES: dict[str, Callable[[Tokenizer, list[list[list[_Token]]]], list[list[_Token]]]] = {
    "plain": _plain,
    "a1111": _a1111,
    "comfy": _comfy,
    "compel": _compel,
}
