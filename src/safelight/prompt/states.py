"""From chunks to the states that a network reads, with each tool's arithmetic for weights.

Let z be the states of a chunk, [length, width], w the weights of its tokens, and e the states of
the empty prompt. A1111 takes w·z, and scales all of it so that the mean stays; ComfyUI takes
e + w·(z − e); compel takes the same, and blends the result with the states of the prompt without
each phrase of a weight below 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, pairwise

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.prompt.chunks import MAX_ENCODED, Chunk, chunks_of, too_many_chunks
from safelight.prompt.reading import Blend, Emphasis, Part, Section, Stage, Syntax
from safelight.prompt.tokenizer import Tokenizer

Encode = Callable[[Tensor, Tensor | None], Tensor]
"""A text encoder: takes ids [1, length], and which of them attention may read, bool [1, length],
None for all. Returns states [1, length, width]."""

MAX_LENGTH = 5000
"""The most tokens that the network reads at a step, among them marks and repetitions: 64 chunks of
CLIP. Each costs time and memory in every attention to the text."""

_SMALLEST = 1e-5


class States:
    """The states of texts, for one text encoder.

    Each distinct chunk is encoded once, alone, so that no neighbour changes a last bit. Raises
    SafelightError for prompts of more than MAX_ENCODED chunks, over all parts.
    """

    def __init__(
        self, tokenizer: Tokenizer, encode: Encode, syntax: Syntax, emphasis: Emphasis = "original"
    ) -> None:
        self.tokenizer, self.emphasis = tokenizer, emphasis
        self.syntax: Syntax = syntax
        self._encode = encode
        self._known: dict[tuple[tuple[int, ...], frozenset[int]], Tensor] = {}
        self._held = 0  # chunks of all parts that were read

    def of_part(self, part: Part) -> list[Tensor]:
        """Return the states of each stage, [1, tokens, width], all of one length.

        Stages with the same text share one tensor.
        """
        if self.syntax == "a1111":
            return self._a1111([stage.blends[0].texts[0] for stage in part.stages])
        return [self._joined(stage.blends) for stage in part.stages]

    def _z(self, chunk: Chunk, without: frozenset[int] = frozenset()) -> Tensor:
        """Return the states of a chunk, float32 [1, length, width].

        without: places that attention does not read.
        """
        key = (chunk.ids, without)
        if key not in self._known:
            if len(self._known) >= MAX_ENCODED:
                raise too_many_chunks()
            seen = None
            if without:
                seen = torch.ones(1, len(chunk.ids), dtype=torch.bool)
                seen[0, list(without)] = False
            self._known[key] = self._encode(torch.tensor([chunk.ids]), seen)
        return self._known[key].float()

    def _empty(self) -> Tensor:
        return self._z(self._empty_chunk())

    def _empty_chunk(self) -> Chunk:
        return chunks_of(self.tokenizer, (), self.syntax)[0]

    # --- A1111 -------------------------------------------------------------------------------

    def _a1111(self, texts: Sequence[tuple[Section, ...]]) -> list[Tensor]:
        """Each chunk is scaled together with the same chunk of all texts, as the web UI does.

        Shorter texts are filled up with empty chunks.
        """
        times = Counter(texts)
        rows = {text: chunks_of(self.tokenizer, text, "a1111") for text in times}
        longest = max(map(len, rows.values()))
        self._held += longest * len(rows)
        if self._held > MAX_ENCODED:
            raise too_many_chunks()
        empty = self._empty_chunk()
        found: dict[tuple[Section, ...], list[Tensor]] = {text: [] for text in times}
        for i in range(longest):
            chunks = {text: row[i] if i < len(row) else empty for text, row in rows.items()}
            scale = None
            if self.emphasis == "original":
                scale = self._mean_ratio([(c, times[text]) for text, c in chunks.items()])
            for text, chunk in chunks.items():
                z = self._z(chunk)
                if self.emphasis != "ignore":
                    z = z * _column(chunk.weights, z)
                found[text].append(z if scale is None else z * scale)
        joined = {text: torch.cat(states, dim=1) for text, states in found.items()}
        return [joined[text] for text in texts]

    def _mean_ratio(self, chunks: Sequence[tuple[Chunk, int]]) -> Tensor | None:
        """Return mean(z) / mean(w·z) over all of these chunks; None if all weights are 1.

        chunks: each with how many times it counts.
        """
        if all(weight == 1 for chunk, _ in chunks for weight in chunk.weights):
            return None
        before = after = torch.zeros(())
        for chunk, times in chunks:
            z = self._z(chunk)
            before = before + z.mean() * times
            after = after + (z * _column(chunk.weights, z)).mean() * times
        return before / after

    # --- ComfyUI and compel ------------------------------------------------------------------

    def _joined(self, blends: Sequence[Blend]) -> Tensor:
        """Return the states of blends, one after the other."""
        return torch.cat([self._blend(blend) for blend in blends], dim=1)

    def _blend(self, blend: Blend) -> Tensor:
        of_one = self._comfy if self.syntax == "comfy" else self._compel
        texts = [of_one(chunks_of(self.tokenizer, text, self.syntax)) for text in blend.texts]
        states, longest = texts[0], max(text.shape[1] for text in texts)
        if len(texts) > 1:
            filled = (self._filled(text, longest) for text in texts)  # one at a time in memory
            states = _weighted_sum(filled, blend.weights, states.device, normalize=blend.normalize)
        if blend.weight != 1:
            empty = self._empty().repeat(1, states.shape[1] // self.tokenizer.max_length, 1)
            states = empty + (states - empty) * blend.weight
        return states

    def _filled(self, states: Tensor, length: int) -> Tensor:
        """Return the states filled up with those of the empty prompt, as compel does."""
        missing = (length - states.shape[1]) // self.tokenizer.max_length
        return torch.cat([states, *[self._empty()] * missing], dim=1) if missing else states

    def _comfy(self, chunks: Sequence[Chunk]) -> Tensor:
        return torch.cat([self._from_empty(chunk) for chunk in chunks], dim=1)

    def _from_empty(self, chunk: Chunk, without: frozenset[int] = frozenset()) -> Tensor:
        """Return e + w·(z − e), and z itself where w is 1."""
        z = self._z(chunk, without)
        if all(weight == 1 for weight in chunk.weights):
            return z
        w, empty = _column(chunk.weights, z), self._empty()
        return torch.where(w == 1, z, empty + (z - empty) * w)

    def _compel(self, chunks: Sequence[Chunk]) -> Tensor:
        """Blend with the states without each phrase of a weight below 1.

        The phrase stays in its place, and attention does not read it. At a weight w its share is
        tan((1 − w)·π/2): none at 1, half at 0.5, all of it at 0.
        """
        light = dict.fromkeys(
            (source, weight)
            for chunk in chunks
            for source, weight in zip(chunk.sources, chunk.weights, strict=True)
            if weight < 1
        )
        whole = self._comfy(chunks)

        def without(source: int) -> Tensor:
            places = [frozenset(i for i, s in enumerate(c.sources) if s == source) for c in chunks]
            return torch.cat(list(map(self._from_empty, chunks, places)), dim=1)

        shares = [math.tan((1 - max(_SMALLEST, weight)) * math.pi / 2) for _, weight in light]
        texts = chain([whole], (without(source) for source, _ in light))  # one at a time in memory
        return _weighted_sum(texts, [1.0, *shares], whole.device) if light else whole


def first_chunk(tokenizer: Tokenizer, stage: Stage, syntax: Syntax) -> Chunk:
    """Return the first chunk of a stage's first text."""
    return chunks_of(tokenizer, stage.blends[0].texts[0], syntax)[0]


def same_length(states: Sequence[Tensor]) -> list[Tensor]:
    """Return the states, each with its whole sequence of tokens repeated until all are as long.

    Each is [1, tokens, width]. Attention to repeated tokens gives the same as to one of each: the
    softmax shares the same weight among the copies. It is how ComfyUI pairs a long prompt with a
    short negative one, and equal to running them one after the other, as A1111 does.
    Raises SafelightError as `common_length` does.
    """
    length = common_length(s.shape[1] for s in states)
    return [s if s.shape[1] == length else s.repeat(1, length // s.shape[1], 1) for s in states]


def common_length(lengths: Iterable[int]) -> int:
    """Return the length in tokens to which states of these lengths are repeated.

    Raises SafelightError if it is more than MAX_LENGTH.
    """
    different = sorted(set(lengths))
    length = math.lcm(*different)
    if different[-1] > MAX_LENGTH:
        raise SafelightError(
            f"prompt or negative_prompt has {different[-1]:,} tokens with its marks; "
            f"at most {MAX_LENGTH:,} can be used",
            field="prompt",
        )
    if length > MAX_LENGTH:
        told = " and ".join(f"{one:,}" for one in different)
        raise SafelightError(
            f"prompt and negative_prompt have {told} tokens with their marks, in one length "
            f"{length:,}; at most {MAX_LENGTH:,} can be used: make them equally long, or shorter",
            field="prompt",
        )
    return length


def last_repeated(states: Sequence[Tensor]) -> list[Tensor]:
    """Return the states with their last token repeated: A1111's rule for the parts of AND."""
    length = max(s.shape[1] for s in states)
    return [torch.cat([s, s[:, -1:].expand(-1, length - s.shape[1], -1)], dim=1) for s in states]


def spans(parts: Sequence[Part]) -> list[tuple[int, int]]:
    """Return the spans of steps, (first, last) from 1, in which no part changes its stage."""
    ends = sorted({stage.until for part in parts for stage in part.stages})
    return [(before + 1, end) for before, end in pairwise([0, *ends])]


def _weighted_sum(
    states: Iterable[Tensor],
    weights: Sequence[float],
    device: torch.device,
    *,
    normalize: bool = True,
) -> Tensor:
    shares = torch.tensor(weights, dtype=torch.float32, device=device)
    if normalize:
        shares = shares / shares.sum()
    return sum((s * share for s, share in zip(states, shares, strict=True)), torch.zeros(()))


def _column(weights: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(weights, dtype=like.dtype, device=like.device)[:, None]
