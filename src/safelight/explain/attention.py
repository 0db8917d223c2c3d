"""Record the cross-attention of a UNet: where in the picture each word was used.

In cross-attention every position of the picture weighs the tokens of the text by a softmax
(arXiv:1706.03762). A token's weights over all positions are a map of where it was used
(arXiv:2208.01626, arXiv:2210.04885).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.nets.layers import Attention
from safelight.nets.unet import UNet2DConditionModel
from safelight.prompt.chunks import Chunk, chunks_of
from safelight.prompt.reading import Piece
from safelight.prompt.tokenizer import Tokenizer


@dataclass(frozen=True)
class Word:
    """One word of a prompt, in lower case. tokens: its places among the prompt's ids."""

    text: str
    tokens: slice


def words_of(tokenizer: Tokenizer, prompt: str) -> list[Word]:
    """Return the words of a prompt in the syntax "plain", up to where it is cut."""
    return words_of_chunks(tokenizer, chunks_of(tokenizer, ((Piece(prompt),),), "plain"))


def words_of_chunks(tokenizer: Tokenizer, chunks: Sequence[Chunk]) -> list[Word]:
    """Return the words of chunks that follow each other.

    A textual inversion is one word, its name. A token that was added to the tokenizer is one word,
    its text.
    """
    learned = {number: one for one in tokenizer.learned for number in one.ids}
    alone = {*learned, *tokenizer.added}
    marks = {tokenizer.bos, tokenizer.eos, tokenizer.pad}
    words: list[Word] = []
    for number, chunk in enumerate(chunks):
        start, first = 1, number * tokenizer.max_length
        for place in range(1, chunk.count + 1):
            here, after = chunk.ids[place], chunk.ids[place + 1]
            one = learned.get(here)
            if one is not None:
                text, ends = one.name, learned.get(after) is not one or after != here + 1
            elif here in tokenizer.added:
                text, ends = tokenizer.added[here], True
            else:
                text = tokenizer.text(chunk.ids[start : place + 1]).strip()
                ends = after in alone or place == chunk.count
                ends = ends or here in marks or tokenizer.name(here).endswith("</w>")
            if ends:
                words.append(Word(text, slice(first + start, first + place + 1)))
                start = place + 1
    return words


def telling_layers(unet: UNet2DConditionModel) -> list[Attention]:
    """Return the cross-attention layers whose maps show best where things are.

    They are the last of the up block whose maps have half the side of the latents, or of the block
    nearest to that. In `embedded` it is one layer. 82 % of its weight for a thing is on the half of
    the picture where the thing was asked for, and in each of 40 maps more than half. The other six
    layers are at 48 to 55 %, which is chance, and the mean of all seven is at 53 %. The share falls
    from 84 to 79 % over the steps, so that all steps can be shown (benchmarks/attention.py).
    """
    blocks: Any = list(unet.up_blocks)
    levels = {len(blocks) - 1 - i: block for i, block in enumerate(blocks) if block.attentions}
    nearest = min(levels, key=lambda level: abs(level - 1), default=None)
    if nearest is None:
        return []
    last = levels[nearest].attentions[-1]
    return [block.attn2 for block in last.transformer_blocks]


@contextmanager
def recorded(layers: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Record the attention of these layers of a UNet within the block, in the order of their calls.

    Yields a list that fills with float32 [batch, heads, positions, tokens], which sum to 1 over the
    tokens. The layers' results do not change, and the hooks are removed at the end. Queries and
    keys are computed once more, because fast layers do not show their softmax.
    """
    found: list[Tensor] = []

    def look(layer: Any, inputs: tuple[Any, ...]) -> None:
        x, context = inputs
        q, k = (
            t.float().unflatten(-1, (layer.heads, -1)).transpose(1, 2)
            for t in (layer.to_q(x), layer.to_k(context))
        )
        found.append(torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1))

    handles = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def word_maps(
    weights: Sequence[Tensor], words: Sequence[Word], latents: tuple[int, int]
) -> Tensor | None:
    """Return where each word was used, from 0 to 1: float32 [words, h, w]; None without weights.

    weights: as `recorded` has them, of one picture. latents: its height and width in latents. A map
    is the mean over heads and layers of the sum over a word's tokens; h and w are the finest
    layer's.
    """
    if not weights or not words:
        return None
    maps = []
    for one in weights:
        tokens = one[-1].mean(0).T  # [tokens, positions] of the prompt, which comes last
        height, width = _side(tokens.shape[1], latents)
        maps.append(torch.stack([tokens[word.tokens].sum(0) for word in words]))
        maps[-1] = maps[-1].unflatten(1, (height, width))
    finest = max((m.shape[1:] for m in maps), key=lambda size: size[0] * size[1])
    scaled = [F.interpolate(m[None], tuple(finest), mode="bilinear")[0] for m in maps]
    return torch.stack(scaled).mean(0).cpu()


def _side(positions: int, latents: tuple[int, int]) -> tuple[int, int]:
    """Return a map's height and width: the latents' sides, halved (rounded up) until they fit."""
    height, width = latents
    while height * width > positions:
        height, width = -(-height // 2), -(-width // 2)
    return height, width
