"""Puts textual inversions into a model's tokenizers and text encoders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from safelight.adapters.embedding import EmbeddingFile
from safelight.prompt.tokenizer import Learned


def with_embeddings(
    parts: Mapping[str, Any], tokenizers: Iterable[str], embeddings: Sequence[EmbeddingFile]
) -> dict[str, Any]:
    """Return the parts of a model with textual inversions. The parts that are given stay as they
    are, and share all weights with those that are returned.

    tokenizers: names of the tokenizers; each belongs to the text encoder of the same number.
    Raises SafelightError for an embedding that does not fit.
    """
    encoders = {_encoder_of(name): name for name in tokenizers}
    widths = {encoder: parts[encoder].config.hidden_size for encoder in encoders}
    fitting = [(one, one.fitting(widths)) for one in embeddings]
    changed: dict[str, Any] = {}
    for encoder, tokenizer in encoders.items():
        first = parts[encoder].config.vocab_size
        learned: list[Learned] = []
        vectors: list[Tensor] = []
        for one, found in fitting:
            mine = found[encoder]
            learned.append(Learned(one.name, one.token, tuple(range(first, first + mine.count))))
            vectors.append(one.read(mine))
            first += mine.count
        if learned:
            device = next(parts[encoder].parameters()).device
            changed[tokenizer] = parts[tokenizer].with_learned(learned)
            changed[encoder] = parts[encoder].with_learned(torch.cat(vectors).to(device))
    return {**parts, **changed}


def _encoder_of(tokenizer: str) -> str:
    """Return the name of the text encoder that reads what a tokenizer makes."""
    return tokenizer.replace("tokenizer", "text_encoder")
