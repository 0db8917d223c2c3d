"""Puts textual inversions into a model's tokenizers and text encoders.

PyTorch is imported where vectors are read: a server counts tokens without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from safelight.adapters.embedding import EmbeddingFile
from safelight.prompt.learned import Learned, two_of_one_name


def with_embeddings(
    parts: Mapping[str, Any], tokenizers: Iterable[str], embeddings: Sequence[EmbeddingFile]
) -> dict[str, Any]:
    """Return the parts of a model with textual inversions. The parts that are given stay as they
    are, and share all weights with those that are returned.

    tokenizers: the tokenizers' names. Raises SafelightError for an embedding that does not fit.
    """
    import torch

    encoders = {encoder_of(name): parts[encoder_of(name)] for name in tokenizers}
    learned = words_of({name: net.config for name, net in encoders.items()}, embeddings)
    if not embeddings:
        return dict(parts)
    changed: dict[str, Any] = {}
    for name in tokenizers:
        encoder = encoders[encoder_of(name)]
        device = next(encoder.parameters()).device
        vectors = [one.read(mine) for one, mine in learned[encoder_of(name)].values()]
        changed[name] = parts[name].with_learned(list(learned[encoder_of(name)]))
        changed[encoder_of(name)] = encoder.with_learned(torch.cat(vectors).to(device))
    return {**parts, **changed}


def words_of(
    configs: Mapping[str, Any], embeddings: Sequence[EmbeddingFile]
) -> dict[str, dict[Learned, tuple[EmbeddingFile, Any]]]:
    """Return what embeddings are in the vocabulary of each text encoder, and their vectors there.

    configs: of the text encoders. Raises SafelightError for one that does not fit, and for two of
    one name.
    """
    widths = {name: config.hidden_size for name, config in configs.items()}
    fitting = [(one, one.fitting(widths)) for one in embeddings]
    names = [one.name for one in embeddings]
    for name in names:
        if names.count(name) > 1:
            raise two_of_one_name(name)
    found: dict[str, dict[Learned, tuple[EmbeddingFile, Any]]] = {}
    for encoder, config in configs.items():
        first, mine = config.vocab_size, found.setdefault(encoder, {})
        for one, vectors in fitting:
            after = first + vectors[encoder].count
            mine[Learned(one.name, one.token, tuple(range(first, after)))] = one, vectors[encoder]
            first = after
    return found


def encoder_of(tokenizer: str) -> str:
    """Return the name of the text encoder that reads what a tokenizer makes."""
    return tokenizer.replace("tokenizer", "text_encoder")
