"""Record a network's attention to the text: where in the picture each word was used.

In attention every position of the picture weighs the tokens of the text by a softmax
(arXiv:1706.03762). A token's weights over all positions are a map of where it was used
(arXiv:2208.01626, arXiv:2210.04885). In a UNet's cross-attention a position weighs the text alone,
in a transformer the positions of the picture as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.nets.layers import Attention
from safelight.nets.unet import UNet2DConditionModel
from safelight.prompt.reading import Word


def telling_layers(unet: UNet2DConditionModel) -> list[Attention]:
    """Return the cross-attention layers whose maps show best where things are.

    They are the last of the up block whose maps have half the side of the latents, or of the block
    nearest to that. In `embedded` it is one layer; docs/inside.md compares it with the others.
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


@contextmanager
def recorded_jointly(
    products: Iterable[nn.Module], picture: int, places: Callable[[int, int], tuple[slice, slice]]
) -> Iterator[list[Tensor]]:
    """Record the attention of a picture to its text in these products of a transformer.

    Yields a list that has one tensor after the block: float32 [1, 1, positions, tokens], the mean
    over all heads of all products. What a position sums up to over the tokens is less than 1, as
    the rest is on the picture. picture: its number of tokens. places: see `FlowFamily.places`. One
    picture is drawn within the block; the products' results do not change.
    """
    found: list[Tensor] = []
    added: list[Tensor] = []  # one sum: those of all products take hundreds of megabytes
    calls = 0

    def look(product: Any, inputs: tuple[Tensor, ...]) -> None:
        nonlocal calls
        q, k, _ = inputs
        at, text = places(picture, k.shape[2])
        total = torch.zeros(picture, len(range(*text.indices(k.shape[2]))), device=q.device)
        for queries, keys in zip(q[0, :, at].float(), k[0].float(), strict=True):
            scores = queries @ keys.T * q.shape[-1] ** -0.5  # of one head: all may not fit
            total += torch.softmax(scores, dim=-1)[:, text]
        total /= q.shape[1]
        added[:] = [total + added[0] if added else total]
        calls += 1

    handles = [product.register_forward_pre_hook(look) for product in products]
    try:
        yield found
        found += [total[None, None] / calls for total in added]
    finally:
        for handle in handles:
            handle.remove()


def word_maps(
    weights: Sequence[Tensor], words: Sequence[Word], latents: tuple[int, int]
) -> Tensor | None:
    """Return where each word was used, from 0 to 1: float32 [words, h, w]; None without weights.

    weights: as `recorded` or `recorded_jointly` has them, of one picture. latents: its height and
    width in latents. A map is the mean over heads and layers of the sum over a word's tokens; h and
    w are the finest layer's.
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
