"""A byte-pair vocabulary of our own, in the two files that CLIP's tokenizer reads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from safelight.weights.tokenizer import BOS, EOS, WORDS
from safelight.weights.tokenizer import Tokenizer as CLIPTokenizer

WORD_END = "</w>"


def train_vocabulary(
    captions: Iterable[str], size: int, folder: Path, length: int
) -> CLIPTokenizer:
    """The tokenizer of at most `size` tokens and prompts of `length` that suits the captions.

    Writes vocab.json, merges.txt and tokenizer_config.json into the folder.

    Every byte has a token, alone and as the end of a word, so no text is ever out of the
    vocabulary; the merges are learned from the captions.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = alphabet + [letter + WORD_END for letter in alphabet]
    learner = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    learner.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=size - 2,
            end_of_word_suffix=WORD_END,
            initial_alphabet=symbols,
            show_progress=False,
        ),
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    merges = merges[: size - len(symbols) - 2]
    tokens = symbols + ["".join(pair) for pair in merges] + [BOS, EOS]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges)
    )
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "unk_token": EOS,
        "model_max_length": length,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return CLIPTokenizer(vocabulary, merges, max_length=length)
