"""Small tokenizers of the kinds that T5 and Qwen have, and folders that hold them."""

import struct
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import Qwen2TokenizerFast, T5TokenizerFast

from safelight.prompt.text_tokenizer import TextTokenizer, folder_text_tokenizer
from safelight.weights.folder import Folder
from test_weights_tokenizer import PROMPTS
from weights_tiny import write

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def charsmap(characters: dict[str, str]) -> bytes:
    """Return SentencePiece's table of characters: a double array trie, then the texts."""
    array, free, texts = [0] * 65536, 512, b""
    array[0] = 256 << 10
    for one, text in characters.items():
        base = at = 256
        for byte in one.encode():
            at = base ^ byte
            if not array[at]:
                array[at] = byte | (at ^ free) << 10
                free += 256
            base = at ^ (array[at] >> 10)
        array[at] |= 1 << 8
        array[base] = len(texts) | 1 << 31
        texts += text.encode() + b"\0"
    raw = struct.pack(f"<{free}I", *array[:free])
    return struct.pack("<I", len(raw)) + raw + texts


@cache
def t5_like(form: str) -> str:
    """Return a tokenizer.json as T5's. form: which of the two in which it is published."""
    tokenizer = Tokenizer(models.Unigram())
    # Without its table the two forms of T5's file part at these blanks.
    blanks = dict.fromkeys("\t\n\r\u00a0\u2028\u3000", " ")
    table = normalizers.Precompiled(charsmap({**blanks, "ﬁ": "fi"}))
    metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    if form == "older":
        tokenizer.normalizer = table
        words = pre_tokenizers.WhitespaceSplit()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, metaspace])
    else:
        strip = normalizers.Strip(left=False, right=True)
        doubled = normalizers.Replace(Regex(" {2,}"), "▁")
        tokenizer.normalizer = normalizers.Sequence([table, strip, doubled])
        tokenizer.pre_tokenizer = metaspace
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>",
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(PROMPTS[2:8] * 3, trainer)
    tokenizer.add_special_tokens([f"<extra_id_{i}>" for i in range(100)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer.to_str()


@cache
def qwen_like() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(PROMPTS[2:8] * 3, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), "</think>"])
    return tokenizer.to_str()


def word_piece() -> str:
    """Return a tokenizer.json as BERT's, whose template has a token before the text too."""
    tokenizer = Tokenizer(
        models.WordPiece({"[UNK]": 0, "a": 1, "##p": 2, "red": 3, "[S]": 4}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[S] $A [S]", special_tokens=[("[S]", 4)]
    )
    return tokenizer.to_str()


def folder(path: Path, content: str | dict[str, Any], **config: Any) -> Folder:
    write(path / "model_index.json", {})
    write(path / "tokenizer/tokenizer.json", content)
    if config:
        write(path / "tokenizer/tokenizer_config.json", config)
    return Folder(path, "tiny")


def ours(path: Path, vocab_size: int = 600) -> TextTokenizer:
    return folder_text_tokenizer(Folder(path, "tiny"), vocab_size, "tokenizer")


def made(path: Path, kind: str) -> tuple[TextTokenizer, Any]:
    """Return our tokenizer of a folder, and transformers'."""
    if kind == "qwen":
        folder(path, qwen_like(), pad_token="<|endoftext|>", add_bos_token=False)
        return ours(path), Qwen2TokenizerFast.from_pretrained(path / "tokenizer")
    marks = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    folder(path, t5_like(kind), **marks)
    return ours(path), T5TokenizerFast.from_pretrained(path / "tokenizer")
