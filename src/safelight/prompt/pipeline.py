"""The steps of a tokenizer.json that Safelight runs, and what bounds the time they take.

The `tokenizers` library runs what the file says. Here it is read first, and only these steps are
passed on. A regular expression must be one of REGEXES, which take time linear in the text: another
could take exponential time. No replacement is longer than what it replaces, so a text does not
grow step by step. Tokens are at most MAX_TOKEN characters, which bounds the search at each
position of a text.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Mapping
from typing import Any

from safelight.prompt.tables import check_id, pairs
from safelight.weights.check import refusal

LARGEST = 2**24
"""Bytes of the largest tokenizer.json. Qwen3's has 11 MB, T5's 2 MB."""

MAX_TOKEN = 512
"""Characters of the longest token. Qwen's longest, of blanks, has 256 or fewer."""

MAX_SCORED = 2**20
"""Bytes of all tokens of a Unigram model. T5's have a third of that. The library takes 350 times
as much memory for them."""

MAX_ADDED = 2**18
"""Characters of all added tokens. T5's have 1,300. The library takes a second for this many."""

MAX_WORD = 200
"""The most characters of a word for WordPiece, which takes time in the square of that."""

MAX_STEPS = 8
"""The most steps that normalise a text, and the most that split it."""

MAX_EXPANSION = 64
"""The most bytes that stand for one character. Unicode's compatibility forms have 33 or fewer."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_LINES}"
"""Qwen 2 and 3: words with one mark before them, single digits, runs of other marks, blanks."""

REGEXES = frozenset(
    {
        QWEN_WORDS,
        # Llama 3: the same with up to three digits together.
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_LINES}",
        # Those that transformers writes when it converts a SentencePiece model.
        " {2,}",
    }
)

_MODEL_KEYS = {
    "BPE": (
        "vocab",
        "merges",
        "unk_token",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "fuse_unk",
        "byte_fallback",
        "ignore_merges",
    ),
    "Unigram": ("vocab", "unk_id", "byte_fallback"),
    "WordPiece": ("vocab", "unk_token", "continuing_subword_prefix", "max_input_chars_per_word"),
}
"""The keys that are passed on, by the kind of model. Others draw at random or do not matter."""

_SHORT = ("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "prepend")
_NORMALIZERS = (
    *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Nmt", "BertNormalizer"),
    *("Precompiled", "Prepend", "Replace"),
)
_SPLITTERS = (
    *("BertPreTokenizer", "ByteLevel", "Digits", "Metaspace", "Punctuation", "Split"),
    *("Whitespace", "WhitespaceSplit"),
)


def library_json(content: Mapping[str, Any], name: str, vocab_size: int) -> str:
    """Return the tokenizer.json to give to the library: model, normalizer and pre-tokenizer.

    content: of the file. vocab_size: how many ids the text encoder knows.

    Raises SafelightError for steps that are not run, and for tables that cannot be.
    """
    normalizers = _steps(content, "normalizer", "normalizers", _NORMALIZERS, name)
    if sum(step["type"] == "Precompiled" for step in normalizers) > 1:
        raise refusal(name, "more than one Precompiled normalizer")
    splitters = _steps(content, "pre_tokenizer", "pretokenizers", _SPLITTERS, name)
    for step in (*normalizers, *splitters):
        _check_step(step, name)
    whole = {
        "version": "1.0",
        "model": _model(content.get("model"), name, vocab_size),
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splitters} if splitters else None,
        "added_tokens": [],
    }
    return json.dumps(whole)


def affixes(processor: Any, name: str, vocab_size: int) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer.json's post_processor puts before and after each text.

    Raises SafelightError for one that does anything else.
    """
    before: list[int] = []
    after: list[int] = []
    steps = [processor]
    if isinstance(processor, dict) and processor.get("type") == "Sequence":
        steps = processor.get("processors")
    if not isinstance(steps, list) or len(steps) > MAX_STEPS:
        raise refusal(name, "post_processor is not a list of a few steps")
    for step in steps:
        kind = step.get("type") if isinstance(step, dict) else step
        if kind == "TemplateProcessing":
            first, last = _template(step, name)
            before[:0], after[len(after) :] = first, last
        elif kind not in (None, "ByteLevel"):  # ByteLevel changes where tokens begin, not ids
            raise refusal(name, f"post_processor {kind!r:.40} is not supported")
    for number in (*before, *after):
        check_id(number, vocab_size, name)
    return before, after


def _template(step: Mapping[str, Any], name: str) -> tuple[list[Any], list[Any]]:
    """Return the ids before and after `A` in a template for one text."""
    found: tuple[list[Any], list[Any]] = ([], [])
    texts = 0
    pieces, special = step.get("single"), step.get("special_tokens")
    try:
        for piece in pieces if isinstance(pieces, list) and len(pieces) <= MAX_STEPS else ():
            if "Sequence" in piece:
                texts += 1 if piece["Sequence"]["id"] == "A" else MAX_STEPS
                continue
            ids = special[piece["SpecialToken"]["id"]]["ids"]  # type: ignore[index]
            found[min(texts, 1)].extend(ids[:MAX_STEPS])
    except (TypeError, KeyError):
        texts = 0
    if texts != 1:
        raise refusal(name, "post_processor is not a template with one text and a few tokens")
    return found


def _steps(
    content: Mapping[str, Any], key: str, members: str, known: tuple[str, ...], name: str
) -> list[dict[str, Any]]:
    """Return the steps under a key, a Sequence's or the only one, all of them of known kinds."""
    value = content.get(key)
    if value is None:
        return []
    if isinstance(value, dict) and value.get("type") == "Sequence":
        value = value.get(members)
    listed: list[Any] = value if isinstance(value, list) else [value]
    if len(listed) > MAX_STEPS:
        raise refusal(name, f"{key} has {len(listed)} steps; {MAX_STEPS} are the most")
    found: list[dict[str, Any]] = []
    for step in listed:
        kind = step.get("type") if isinstance(step, dict) else step
        if kind not in known or not isinstance(step, dict):
            raise refusal(name, f"{key} {kind!r:.40} is not supported")
        found.append(step)
    return found


def _check_step(step: Mapping[str, Any], name: str) -> None:
    """Raise SafelightError for a step that could take long, or make a text grow."""
    kind = step["type"]
    if kind in ("Replace", "Split"):
        _check_pattern(step, name)
    elif kind == "Prepend":
        _check_short(step, name)
    elif kind == "Precompiled":
        _check_charsmap(step.get("precompiled_charsmap"), name)


def _check_pattern(step: Mapping[str, Any], name: str) -> None:
    pattern = step.get("pattern")
    told = pattern if isinstance(pattern, dict) and len(pattern) == 1 else {"": None}
    how, text = next(iter(told.items()))
    if how not in ("String", "Regex") or not isinstance(text, str) or not text:
        raise refusal(name, f"{step['type']} has no pattern")
    if how == "Regex" and text not in REGEXES:
        raise refusal(name, f"the regular expression {text!r:.60} is not one that Safelight runs")
    if step["type"] == "Replace":
        new, most = step.get("content"), len(text) if how == "String" else 1
        if not isinstance(new, str) or len(new) > most:
            raise refusal(name, f"Replace makes {text!r:.30} longer, {new!r:.30}")


def _check_charsmap(charsmap: Any, name: str) -> None:
    """Check SentencePiece's table of characters: a trie, whose length comes first, and texts.

    The texts end in zero bytes. The trie may point into any of them.
    """
    try:
        raw = base64.b64decode(charsmap, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise refusal(name, "precompiled_charsmap is not Base64") from None
    texts = 4 + int.from_bytes(raw[:4], "little")
    if len(raw) < 4 or texts > len(raw) or texts % 4:
        raise refusal(name, "precompiled_charsmap is cut short")
    if max(map(len, raw[texts:].split(b"\0"))) > MAX_EXPANSION:
        raise refusal(name, f"precompiled_charsmap has a text over {MAX_EXPANSION} bytes")


def _model(model: Any, name: str, vocab_size: int) -> dict[str, Any]:
    """Return the model with the keys that are passed on, its tables checked."""
    kind = model.get("type") if isinstance(model, dict) else model
    if not isinstance(model, dict) or not isinstance(kind, str) or kind not in _MODEL_KEYS:
        raise refusal(name, f"model {kind!r:.40} is not supported; BPE, Unigram or WordPiece is")
    if model.get("dropout"):
        raise refusal(name, "dropout draws the tokens at random")
    _check_short(model, name)
    tables: dict[str, Callable[[Any, str, int], None]] = {"Unigram": _check_scores}
    tables.get(kind, _check_ids)(model.get("vocab"), name, vocab_size)
    found = {key: model[key] for key in _MODEL_KEYS[kind] if key in model}
    if kind == "BPE":
        merges = model.get("merges")
        if not isinstance(merges, list):
            raise refusal(name, "no list of merges")
        found["merges"] = pairs(merges, name)
        # The library cuts the prefix's bytes off every second token of a merge, whether or not it
        # begins so. Where that halves a character, the process ends.
        if model.get("continuing_subword_prefix"):
            raise refusal(name, "continuing_subword_prefix is not supported for BPE")
    if kind == "WordPiece":
        most = model.get("max_input_chars_per_word", 100)
        if type(most) is not int or not 1 <= most <= MAX_WORD:
            raise refusal(name, f"max_input_chars_per_word is {most!r:.20}")
    return {"type": kind, **found}


def _check_short(told: Mapping[str, Any], name: str) -> None:
    """Check texts that are put before or after others; a long one would take long."""
    for key in _SHORT:
        text = told.get(key)
        if text is not None and (not isinstance(text, str) or len(text) > 32):
            raise refusal(name, f"{key} is {text!r:.40}")


def _check_ids(vocab: Any, name: str, vocab_size: int) -> None:
    """Check a vocabulary that gives each token's id."""
    if not isinstance(vocab, dict) or not vocab:
        raise refusal(name, "no vocabulary in it")
    for token, number in vocab.items():
        check_token(token, name)
        check_id(number, vocab_size, name)


def _check_scores(vocab: Any, name: str, vocab_size: int) -> None:
    """Check a vocabulary that is a list of tokens with their scores; the place is the id."""
    if not isinstance(vocab, list) or not vocab:
        raise refusal(name, "no vocabulary in it")
    check_id(len(vocab) - 1, vocab_size, name)
    for entry in vocab:
        if not isinstance(entry, list) or len(entry) != 2 or type(entry[1]) not in (int, float):
            raise refusal(name, f"{entry!r:.60} is not a token with a score")
        check_token(entry[0], name)
    if sum(len(token.encode(errors="replace")) for token, _ in vocab) > MAX_SCORED:
        raise refusal(name, f"the tokens have over {MAX_SCORED} bytes")


def check_token(token: Any, name: str) -> None:
    """Raise SafelightError unless a token is a text of at most MAX_TOKEN characters."""
    if not isinstance(token, str) or len(token) > MAX_TOKEN:
        raise refusal(name, f"{token!r:.40} is not a token of at most {MAX_TOKEN} characters")
