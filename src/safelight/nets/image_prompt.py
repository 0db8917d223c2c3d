"""What the cross-attentions of a UNet read of pictures that are prompts (arXiv:2308.06721)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Seen(NamedTuple):
    """Keys and values of pictures' tokens for one cross-attention; see `ImagePrompt`."""

    keys: Tensor
    values: Tensor
    scale: float | Tensor


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """Keys and values of pictures' tokens for each cross-attention, one row for each evaluation.

    pairs: keys and values, [rows, tokens, channels] each, in the order of
    `UNetConfig.cross_attentions`. scale: factor of what is read of them, for all rows or as
    [rows, 1, 1].
    """

    pairs: tuple[tuple[Tensor, Tensor], ...]
    scale: float | Tensor = 1.0

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.pairs[0][0])

    def at(self, place: int) -> Seen:
        """Return what a cross-attention reads, by its place among all of them."""
        return Seen(*self.pairs[place], self.scale)

    @property
    def nbytes(self) -> int:
        """The bytes of all keys and values."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.pairs)

    @property
    def is_finite(self) -> bool:
        return all(bool(t.isfinite().all()) for pair in self.pairs for t in pair)

    def scaled(self, scale: float) -> ImagePrompt:
        """Return the same with another factor."""
        return replace(self, scale=scale)

    def last(self) -> ImagePrompt:
        """Return the last row alone. The scale must be one number."""
        return replace(self, pairs=tuple((k[-1:], v[-1:]) for k, v in self.pairs))


def joined(prompts: Sequence[ImagePrompt]) -> ImagePrompt:
    """Return the rows of all prompts, one after the other. Each has one number as its scale."""
    if len(prompts) == 1:
        return prompts[0]
    pairs = tuple(
        (torch.cat([k for k, _ in each]), torch.cat([v for _, v in each]))
        for each in zip(*(one.pairs for one in prompts), strict=True)
    )
    return ImagePrompt(pairs, _scales(prompts, pairs[0][0]))


def _scales(prompts: Iterable[ImagePrompt], like: Tensor) -> float | Tensor:
    """Return the scale of each row, or of all of them if they have the same."""
    scales = [(one.scale, len(one)) for one in prompts]
    if len({scale for scale, _ in scales}) == 1:
        return scales[0][0]
    rows = [scale for scale, count in scales for _ in range(count)]
    return torch.tensor(rows, dtype=like.dtype, device=like.device)[:, None, None]
