"""Make a tokenizer.json from what a GGUF file of a text encoder, or Qwen's tables, hold.

The result is a stranger's still: `text_tokenizer` reads it as it reads one from a folder. Keys and
types of tokens: github.com/ggml-org/llama.cpp, `gguf.constants`. Steps: those of transformers'
T5Tokenizer and Qwen2Tokenizer.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping
from typing import Any

from safelight.prompt.pipeline import LARGEST, MAX_TOKEN, QWEN_WORDS
from safelight.weights.check import refusal

_GGML = "tokenizer.ggml."
LISTS = tuple(
    f"{_GGML}{key}" for key in ("tokens", "scores", "token_type", "merges", "precompiled_charsmap")
)
"""The lists of the metadata that are read."""

_NORMAL, _UNKNOWN, _CONTROL, _ADDED, _UNUSED, _BYTE = range(1, 7)
"""The types of tokens. Those that are unused fill the vocabulary up."""

_EXTRA = 100
"""T5's marks of left-out words. They follow its vocabulary, and SentencePiece's file lacks them."""

_CHARSMAP = 2**20
"""Bytes of the largest table of characters. T5's has a quarter of that."""

_MARK = "▁"


def gguf_class(metadata: Mapping[str, str]) -> str | None:
    """Return which of transformers' tokenizers a GGUF file holds, None if it holds none of ours."""
    model, pre = metadata.get(f"{_GGML}model"), metadata.get(f"{_GGML}pre")
    if model == "t5":
        return "T5Tokenizer"
    return "Qwen2Tokenizer" if (model, pre) == ("gpt2", "qwen2") else None


def gguf_files(
    metadata: Mapping[str, str], lists: Mapping[str, Any], name: str
) -> dict[str, dict[str, Any]]:
    """Return the files of a tokenizer's folder, by their names, from a GGUF file's metadata.

    lists: those of LISTS that are there. name: of the file, in errors.

    Raises SafelightError for a list that is missing, or not what it should be.
    """
    tokens = _texts(lists, "tokens", name)
    types = _numbers(lists, "token_type", name, len(tokens))
    if gguf_class(metadata) == "T5Tokenizer":
        content = _t5(metadata, lists, tokens, types, name)
    else:
        vocab = {token: i for i, token in enumerate(tokens) if types[i] in (_NORMAL, _BYTE)}
        content = qwen_content(vocab, _texts(lists, "merges", name))
        content["added_tokens"] = [
            _added(i, token, special=types[i] == _CONTROL)
            for i, token in enumerate(tokens)
            if types[i] in (_CONTROL, _ADDED)
        ]
    config: dict[str, Any] = {"tokenizer_class": gguf_class(metadata)}
    pad = _id(metadata, "padding_token_id", tokens, "<pad>", name)
    if pad is not None:
        config["pad_token"] = tokens[pad]
    if (end := _id(metadata, "eos_token_id", tokens, "</s>", name)) is not None:
        config["eos_token"] = tokens[end]
    if gguf_class(metadata) == "T5Tokenizer":
        config["unk_token"] = content["model"]["vocab"][content["model"]["unk_id"]][0]
    return {"tokenizer.json": content, "tokenizer_config.json": config}


def qwen_content(vocab: Mapping[str, int], merges: Iterable[Any]) -> dict[str, Any]:
    """Return a tokenizer.json as Qwen 2's and 3's, without added tokens.

    vocab: ids by tokens, whose bytes stand as characters. merges: pairs, each "a b" or [a, b].
    """
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": QWEN_WORDS},
                    "behavior": "Isolated",
                    "invert": False,
                },
                _bytes(trim=False),
            ],
        },
        "post_processor": _bytes(trim=False),
        "decoder": _bytes(trim=False),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": dict(vocab),
            "merges": list(merges),
        },
    }


def _bytes(*, trim: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": trim,
        "use_regex": False,
    }


def _t5(
    metadata: Mapping[str, str],
    lists: Mapping[str, Any],
    tokens: list[str],
    types: list[Any],
    name: str,
) -> dict[str, Any]:
    """Return a tokenizer.json as T5's. Whatever the file says, each text ends in `</s>`."""
    scores = _numbers(lists, "scores", name, len(tokens))
    normal = [scores[i] for i in range(len(tokens)) if types[i] in (_NORMAL, _BYTE)]
    if not all(math.isfinite(score) for score in normal):
        raise refusal(name, "a score of a token is not finite")
    count = 1 + max((i for i, kind in enumerate(types) if kind != _UNUSED), default=-1)
    # The score of what is unknown follows from the least of all, which fillers must not lower.
    least = min(normal, default=0.0)
    kinds = {_NORMAL: None, _BYTE: None, _UNUSED: least}
    vocab = [
        [token, scores[i] if (fixed := kinds.get(types[i], 0.0)) is None else fixed]
        for i, token in enumerate(tokens[:count])
    ]
    added = [i for i in range(count) if types[i] in (_UNKNOWN, _CONTROL, _ADDED)]
    if len(tokens) - count >= _EXTRA and not any(t.startswith("<extra_id_") for t in tokens):
        added += range(count, count + _EXTRA)
        vocab += [[f"<extra_id_{i}>", 0.0] for i in reversed(range(_EXTRA))]
    unknown = _id(metadata, "unknown_token_id", tokens, "<unk>", name)
    end = _id(metadata, "eos_token_id", tokens, "</s>", name)
    if unknown is None or end is None or max(unknown, end) >= count:
        raise refusal(name, "its tokenizer has no <unk> or no </s>")
    charsmap = lists.get(f"{_GGML}precompiled_charsmap")
    if charsmap is not None and not isinstance(charsmap, bytes):
        raise refusal(name, "precompiled_charsmap is no list of bytes")
    if charsmap and len(charsmap) > _CHARSMAP:
        raise refusal(name, f"precompiled_charsmap has over {_CHARSMAP} bytes")
    normalizer = None
    if charsmap:
        text = base64.b64encode(charsmap).decode()
        normalizer = {"type": "Precompiled", "precompiled_charsmap": text}
    scheme = "never" if metadata.get(f"{_GGML}add_space_prefix") == "False" else "always"
    metaspace = {"type": "Metaspace", "replacement": _MARK, "prepend_scheme": scheme, "split": True}
    splitters = [{"type": "WhitespaceSplit"}, metaspace]
    if metadata.get(f"{_GGML}remove_extra_whitespaces") == "False":
        splitters = [metaspace]
    last = tokens[end]
    text = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": last, "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, vocab[i][0], special=True) for i in added],
        "normalizer": normalizer,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": splitters,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": list(text),
            "pair": [*text, {"Sequence": {"id": "B", "type_id": 0}}, text[1]],
            "special_tokens": {last: {"id": last, "ids": [end], "tokens": [last]}},
        },
        "decoder": metaspace,
        "model": {"type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": False},
    }


def _added(number: int, content: str, *, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, **flags, "special": special}


def _texts(lists: Mapping[str, Any], key: str, name: str) -> list[str]:
    """Return a list of texts, after a check of its size; tokens differ."""
    found = lists.get(f"{_GGML}{key}")
    if not isinstance(found, list) or not found or not isinstance(found[0], str):
        raise refusal(name, f"{_GGML}{key} is no list of texts")
    if sum(map(len, found)) > LARGEST:
        raise refusal(name, f"{_GGML}{key} has over {LARGEST} characters")
    if key == "tokens":
        seen: set[str] = set()
        for token in found:
            if token in seen or not token or len(token) > MAX_TOKEN:
                right = f"each is there once, and has 1 to {MAX_TOKEN} characters"
                raise refusal(name, f"the token {token!r:.40}: {right}")
            seen.add(token)
    return found


def _numbers(lists: Mapping[str, Any], key: str, name: str, count: int) -> list[Any]:
    found = lists.get(f"{_GGML}{key}")
    if not isinstance(found, list) or not all(isinstance(one, int | float) for one in found):
        raise refusal(name, f"{_GGML}{key} is no list of numbers")
    if len(found) != count:
        raise refusal(name, f"{_GGML}{key} has {len(found)} numbers for {count} tokens")
    return found


def _id(
    metadata: Mapping[str, str], key: str, tokens: list[str], default: str, name: str
) -> int | None:
    """Return the id of a mark. default: the token that it is where the file does not say."""
    stated = metadata.get(f"{_GGML}{key}")
    if stated is None:
        return tokens.index(default) if default in tokens else None
    number = int(stated) if stated.isascii() and stated.isdigit() and len(stated) < 10 else -1
    if not 0 <= number < len(tokens):
        raise refusal(name, f"{_GGML}{key} {stated!r:.20} is no token's")
    return number
