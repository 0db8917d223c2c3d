"""How a prompt is read, as data: what `safelight tokens` shows."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from safelight.errors import SafelightError
from safelight.prompt.chunks import Chunk, chunks_by_text, chunks_of
from safelight.prompt.reading import Part, Piece, Reading, Section, Stage, Syntax
from safelight.prompt.tokenizer import Tokenizer
from safelight.prompt.whole import Reader
from safelight.words import unknown_words

MAX_SHOWN = 4096
"""Chunks that are shown of one prompt, over all of its stages."""


def describe(
    reading: Reading, tokenizer: Tokenizer, syntax: Syntax, known: Set[str] | None = None
) -> dict[str, Any]:
    """Return the parts of a reading with their stages, chunks, tokens and weights, as JSON has it.

    known: the words that the model was trained on; None if it does not say. Raises SafelightError
    as `chunks_by_text` does, and for more than MAX_SHOWN chunks.
    """
    tokenizer = tokenizer.with_words(known)
    chunks = {
        text: [_chunk(chunk, tokenizer) for chunk in found]
        for text, found in chunks_by_text(tokenizer, reading, syntax).items()
    }
    if (count := sum(len(chunks[text]) for text in reading.texts)) > MAX_SHOWN:
        raise SafelightError(
            f"prompt has {count} chunks over its steps; at most {MAX_SHOWN} are shown: "
            "take fewer steps, or a shorter text",
            field="prompt",
        )
    pieces = [p for part in reading.parts for s in part.stages for p in s.pieces]
    text = " ".join(dict.fromkeys(piece.text for piece in pieces))
    found: dict[str, Any] = {
        "syntax": syntax,
        "parts": [
            {
                "weight": part.weight,
                "stages": [_stage(stage, chunks) for stage in _that_hold(part)],
            }
            for part in reading.parts
        ],
        "networks": [":".join(network) for network in reading.networks],
        "unknown": [] if tokenizer.known is None else unknown_words(text, tokenizer.known),
        "warnings": list(reading.warnings),
    }
    if syntax == "plain" and (cut := tokenizer.encode(text).cut) is not None:
        found["warnings"].append(f"cut at {tokenizer.max_length} tokens; left out: {cut[:100]!r}")
    return found


def describe_whole(
    reading: Reading, text: str, reader: Reader | Tokenizer, syntax: Syntax
) -> dict[str, Any]:
    """Return the same of a model that reads a text whole, in one piece and without weights.

    text: the words that it reads. reader: what reads them.
    """
    if isinstance(reader, Reader):
        chunk, cut, most = reader.chunk(text), reader.cut(text), reader.most
    else:
        [first, *_] = chunks_of(reader, ((Piece(text),),), "plain")
        chunk, cut, most = _chunk(first, reader), reader.encode(text).cut, reader.max_length
    texts = [{"weight": 1.0, "chunks": [chunk]}]
    stage = {"until": reading.parts[0].stages[-1].until, "texts": texts}
    warnings = list(reading.warnings)
    if cut is not None:
        warnings.append(f"cut at {most} tokens; left out: {cut[:100]!r}")
    return {
        "syntax": syntax,
        "parts": [{"weight": 1.0, "stages": [stage]}],
        "networks": [":".join(network) for network in reading.networks],
        "unknown": [],
        "warnings": warnings,
    }


def _that_hold(part: Part) -> list[Stage]:
    before = (0, *(stage.until for stage in part.stages))
    return [stage for last, stage in zip(before, part.stages, strict=False) if stage.until > last]


def _stage(stage: Stage, chunks: Mapping[tuple[Section, ...], Any]) -> dict[str, Any]:
    texts = [
        {
            "weight": blend.weight if len(blend.texts) == 1 else weight,
            "chunks": chunks[text],
        }
        for blend in stage.blends
        for text, weight in zip(blend.texts, blend.weights, strict=True)
    ]
    return {"until": stage.until, "texts": texts}


def _chunk(chunk: Chunk, tokenizer: Tokenizer) -> dict[str, Any]:
    places = range(1, chunk.count + 1)
    return {
        "count": chunk.count,
        "room": tokenizer.max_length - 2,
        "tokens": [
            {
                "id": chunk.ids[i],
                "token": _name(tokenizer, chunk.ids[i]),
                "weight": chunk.weights[i],
            }
            for i in places
        ],
    }


def _name(tokenizer: Tokenizer, number: int) -> str:
    """Return a token's name. A vector of an embedding, or an added token, counts as a word."""
    name = tokenizer.name(number)
    alone = number in tokenizer.added or any(number in one.ids for one in tokenizer.learned)
    return f"{name}</w>" if alone else name


def lines(described: dict[str, Any]) -> list[str]:
    """Return what `describe` returns as lines for a person."""
    found: list[str] = []
    parts = described["parts"]
    for number, part in enumerate(parts, 1):
        if len(parts) > 1 or part["weight"] != 1:
            found.append(f"part {number}, weight {part['weight']:g}")
        first = 1
        for stage in part["stages"]:
            if len(part["stages"]) > 1:
                found.append(f"steps {first} to {stage['until']}")
            first = stage["until"] + 1
            for text in stage["texts"]:
                if len(stage["texts"]) > 1:
                    found.append(f"text, weight {text['weight']:g}")
                for place, chunk in enumerate(text["chunks"], 1):
                    found.append(f"chunk {place}: {chunk['count']} of {chunk['room']} tokens")
                    found.append(f"  {_words(chunk['tokens'])}")
    found += [f"<{network}> is no text" for network in described["networks"]]
    if described["unknown"]:
        found.append(f"never taught to the model, and left out: {', '.join(described['unknown'])}")
    return found + [f"warning: {said}" for said in described["warnings"]]


def _words(tokens: list[dict[str, Any]]) -> str:
    """Return the tokens, joined by a bar within a word, with weights other than 1."""
    said: list[str] = []
    for token in tokens:
        weight = "" if token["weight"] == 1 else f":{token['weight']:.3g}"
        name = token["token"]
        said.append(f"{name.removesuffix('</w>')}{weight}{' ' if name.endswith('</w>') else '|'}")
    return "".join(said).rstrip(" |") or "(empty)"
