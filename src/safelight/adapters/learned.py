"""Puts textual inversions into a model's tokenizers and text encoders.

PyTorch is imported where vectors are read: a server counts tokens without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safelight.adapters.embedding import EmbeddingFile
from safelight.prompt.learned import Learned, two_of_one_name

TextParts = Sequence[tuple[str, str]]
"""Tokenizer and text encoder, by their parts' names, as `Family.text_parts` has them."""


def with_embeddings(
    parts: Mapping[str, Any], text_parts: TextParts, embeddings: Sequence[EmbeddingFile]
) -> dict[str, Any]:
    """Return the parts of a model with textual inversions.

    The given parts stay as they are, and share all weights with the returned ones. Raises
    SafelightError for an embedding that does not fit, or cannot be read.
    """
    import torch

    if not embeddings:
        return dict(parts)
    learned = words_of({name: parts[name].config for _, name in text_parts}, embeddings)
    changed: dict[str, Any] = {}
    for tokenizer, name in text_parts:
        encoder = parts[name]
        device = next(encoder.parameters()).device
        vectors = [one.read(mine) for one, mine in learned[name].values()]
        changed[tokenizer] = parts[tokenizer].with_learned(list(learned[name]))
        changed[name] = encoder.with_learned(torch.cat(vectors).to(device))
    return {**parts, **changed}


def words_of(
    configs: Mapping[str, Any], embeddings: Sequence[EmbeddingFile]
) -> dict[str, dict[Learned, tuple[EmbeddingFile, Any]]]:
    """Return, for each text encoder, the embeddings as words of its vocabulary, with the vectors.

    configs: of the text encoders. Raises SafelightError for one that does not fit, and for two of
    the same name.
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
