"""The tables of a tokenizer in a model's folder: vocabulary, merges, and tokens added to it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, TypeGuard

from tokenizers import AddedToken

from safelight.weights.check import read_bytes, refusal
from safelight.weights.folder import Folder

LARGE = 2**23
"""Bytes of the largest table."""

_FLAGS = ("single_word", "lstrip", "rstrip", "special")


def mark(marks: Mapping[str, Any], name: str, default: str, part: str) -> str:
    """Return the token that begins, ends or fills a prompt. marks: of the tokenizer's config."""
    found = marks.get(name, default)
    found = found.get("content") if isinstance(found, dict) else found
    if not is_text(found):
        raise refusal(f"{part}/tokenizer_config.json", f"{name} is {found!r:.40}")
    return found


def merges_in(folder: Folder, name: str) -> list[tuple[str, str]]:
    """Return the merges in a text file, one a line."""
    path = folder.file(name)
    if path is None:
        raise refusal(folder.label, f"{name} is missing")
    try:
        lines = read_bytes(path, LARGE, name).decode().splitlines()
    except UnicodeDecodeError:
        raise refusal(name, "not valid UTF-8") from None
    return pairs((line for line in lines if line and not line.startswith("#version")), name)


def tokenizer_json(folder: Folder, part: str) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return the vocabulary and the merges of tokenizer.json."""
    name = f"{part}/tokenizer.json"
    content = folder.json(name, LARGE)
    if content is None:
        raise refusal(folder.label, f"{part}/vocab.json is missing, and tokenizer.json too")
    model = content.get("model")
    if not isinstance(model, dict) or model.get("end_of_word_suffix") != "</w>":
        raise refusal(name, "not a byte-pair tokenizer of CLIP's kind")
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise refusal(name, "no vocabulary and merges in it")
    return vocab, pairs(merges, name)


def pairs(merges: Iterable[Any], name: str) -> list[tuple[str, str]]:
    """Return the merges as pairs; each is written "a b" or [a, b]."""
    found: list[tuple[str, str]] = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2:
            raise refusal(name, f"{merge!r:.60} is not a pair of tokens")
        left, right = pair
        if not isinstance(left, str) or not isinstance(right, str):
            raise refusal(name, f"{merge!r:.60} is not a pair of tokens")
        found.append((left, right))
    return found


def is_text(value: Any) -> TypeGuard[str]:
    """Return whether a value of a JSON file is a text that is not empty, and valid Unicode."""
    if not isinstance(value, str):
        return False
    try:
        return bool(value.encode())
    except UnicodeEncodeError:  # half of a character pair, which JSON can hold
        return False


def check_id(number: Any, vocab_size: int, label: str) -> None:
    """Raise SafelightError for a token's id that the text encoder does not know."""
    if type(number) is not int or not 0 <= number < vocab_size:
        raise refusal(label, f"token id {number!r:.40}; the text encoder has {vocab_size}")


def check_ids(numbers: Collection[Any], vocab_size: int, label: str) -> None:
    """Raise SafelightError if one of a vocabulary's ids is not known to the text encoder."""
    known = range(vocab_size)
    if {*map(type, numbers)} <= {int} and all(map(known.__contains__, numbers)):
        return
    for number in numbers:
        check_id(number, vocab_size, label)


def added_tokens(
    folder: Folder, part: str, config: Mapping[str, Any], vocab_size: int
) -> dict[int, AddedToken]:
    """Return the tokens that were added to a vocabulary, by their ids.

    config: the content of tokenizer_config.json, which lists them in newer folders.
    """
    found: dict[int, AddedToken] = {}
    for number, told in _told(folder, part, config):
        check_id(number, vocab_size, folder.label)
        told = told if isinstance(told, dict) else {"content": told}
        text = told.get("content")
        if not is_text(text):
            raise refusal(folder.label, f"the added token {number} is {text!r:.40}; it is a text")
        flags = {flag: told.get(flag) is True for flag in _FLAGS}
        normalized = told.get("normalized", not flags["special"]) is True
        found[number] = AddedToken(text, normalized=normalized, **flags)
    return found


def _told(folder: Folder, part: str, config: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield the id of each added token, and its text or an object with it."""
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        for number, told in decoder.items():
            yield int(number) if re.fullmatch(r"\d{1,9}", number) else number, told
        return
    for text, number in (folder.json(f"{part}/added_tokens.json", LARGE) or {}).items():
        yield number, text
    listed = (folder.json(f"{part}/tokenizer.json", LARGE) or {}).get("added_tokens")
    for told in listed if isinstance(listed, list) else ():
        yield told.get("id") if isinstance(told, dict) else None, told
