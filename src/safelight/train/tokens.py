"""A byte-pair vocabulary of our own, in the two files that CLIP's tokenizer reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from safelight.prompt.tokenizer import BOS, EOS, WORDS
from safelight.prompt.tokenizer import Tokenizer as CLIPTokenizer
from safelight.train.loop import progress

WORD_END = "</w>"


def train_vocabulary(
    captions: Iterable[str], size: int, folder: Path | None, length: int
) -> CLIPTokenizer:
    """Return a tokenizer made for the captions: at most `size` tokens, prompts of `length`.

    Writes vocab.json, merges.txt and tokenizer_config.json into the folder, if one is given.

    Every byte has a token, alone and as the end of a word, so no text is ever out of the
    vocabulary; the merges are learned from the captions.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = alphabet + [letter + WORD_END for letter in alphabet]
    # If the word's end is a suffix, the trainer numbers the letters that have it in a hash map's
    # order, and breaks ties by number. As letters of their own they have a fixed order, and the
    # same captions give the same merges.
    marked = {letter: chr(0xE000 + i) for i, letter in enumerate(alphabet)}
    suffixed = {mark: letter + WORD_END for letter, mark in marked.items()}
    lower = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )

    def words() -> Iterator[str]:
        for caption in captions:
            for word, _ in split.pre_tokenize_str(lower.normalize_str(caption)):
                yield word[:-1] + marked[word[-1]]

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    learner.train_from_iterator(
        words(),
        trainers.BpeTrainer(
            vocab_size=size - 2,
            initial_alphabet=[*alphabet, *suffixed],
            show_progress=False,
        ),
    )
    learned = json.loads(learner.to_str())["model"]["merges"]
    merges = [tuple(p[:-1] + suffixed.get(p[-1], p[-1]) for p in pair) for pair in learned]
    merges = merges[: size - len(symbols) - 2]
    tokens = symbols + ["".join(pair) for pair in merges] + [BOS, EOS]
    found = CLIPTokenizer({t: i for i, t in enumerate(tokens)}, merges, max_length=length)
    if folder is not None:
        found.save(folder)
    return found


def token_ids(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> torch.Tensor:
    """Return the ids of captions, int32 [n, length], and say how many captions are cut."""
    encoded = [tokenizer.encode(caption) for caption in captions]
    cut = sum(one.cut is not None for one in encoded)
    if cut:
        progress(
            f"{cut} of {len(captions)} captions are longer than the {tokenizer.max_length - 2} "
            "tokens that the text encoder reads: their ends are not learned"
        )
    return torch.tensor([one.ids for one in encoded], dtype=torch.int32)
