"""Turn words into CLIP's token ids: byte-pair encoding of lower-cased text (arXiv:2103.00020).

The splitting itself is done by the `tokenizers` library. Only the tables of a model's tokenizer
are read, vocabulary and merges; the pipeline around them is always CLIP's.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence, Set
from copy import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from safelight.errors import SafelightError
from safelight.prompt.learned import Learned, taught, two_of_one_name
from safelight.prompt.tables import (
    LARGE,
    added_tokens,
    check_ids,
    mark,
    merges_in,
    pairs,
    tokenizer_json,
)
from safelight.weights.check import refusal
from safelight.weights.folder import Folder
from safelight.words import known_alone

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# What CLIP calls a word: the two marks, runs of letters, single digits, runs of other marks, and
# the English contractions.
WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
_ENDS = ("bos", "eos")
_CLIP_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
_CLIP_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
_CLIP_MERGES = 49408 - 2 * 256 - 2


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt as the text encoder reads it.

    ids: as many as the model's text length, begin and end marks and padding included.
    cut: the end of the prompt that did not fit, None if all of it did.
    count: the prompt's own tokens, those that were cut included.
    """

    ids: list[int]
    cut: str | None
    count: int


class Tokenizer:
    """CLIP's tokenizer with a model's own vocabulary.

    learned: textual inversions, which `encode` and `expanded_ids` look for. words: those that the
    model was taught; others are left out of a text. With None the model reads all words.

    vocab: token to id. merges: pairs of tokens, the most frequent first. bos, eos, pad: the
      tokens that begin, end and fill a prompt. max_length: ids per prompt, the marks included.
    added: by id, tokens that are found wherever their text stands. The attribute has their texts.

    Raises SafelightError if the tables do not fit each other.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        bos: str = BOS,
        eos: str = EOS,
        pad: str = EOS,
        max_length: int = 77,
        added: Mapping[int, AddedToken] | None = None,
    ) -> None:
        added = added or {}
        vocab = {**{one.content: number for number, one in added.items()}, **vocab}
        self._added = {i: one for i, one in added.items() if one.content not in (bos, eos, pad)}
        for token in (bos, eos, pad):
            if token not in vocab:
                raise SafelightError(
                    f"the token {token!r:.40} is not in the tokenizer's vocabulary"
                )
        self.added = {vocab[one.content]: one.content for one in self._added.values()}
        if max_length < 3:
            raise SafelightError(f"a text length of {max_length} leaves no room for a word")
        try:
            model = BPE(
                vocab=vocab,
                merges=list(merges),
                unk_token=eos,
                continuing_subword_prefix="",
                end_of_word_suffix="</w>",
            )
        except Exception as e:  # the library raises nothing more precise
            raise SafelightError(f"the tokenizer's merges do not fit its vocabulary: {e}") from None
        self.bos, self.eos, self.pad = vocab[bos], vocab[eos], vocab[pad]
        self.max_length = max_length
        self._marks = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": eos}
        self._vocab, self._merges = vocab, merges
        self._model = model
        self._backend = self._new_backend()
        self.learned: tuple[Learned, ...] = ()
        self.words: Set[str] | None = None

    def _new_backend(self, marks: Sequence[str] = ("bos", "eos", "pad")) -> Backend:
        backend = Backend(self._model)
        backend.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        # A mark that a user types is that mark, as in diffusers. So "!" in a prompt for SD 2.x,
        # which pads with "!", is id 0 and not the id of a "!" that ends a word.
        texts = dict.fromkeys(self._marks[f"{name}_token"] for name in marks)
        backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in texts])
        backend.add_tokens(list(self._added.values()))
        return backend

    @cached_property
    def _words(self) -> Backend:
        """A backend that reads the padding token's text as text, as A1111 and ComfyUI do."""
        return self._backend if self.pad in (self.bos, self.eos) else self._new_backend(_ENDS)

    def with_learned(self, learned: Sequence[Learned]) -> Tokenizer:
        """Return a tokenizer that also knows these textual inversions. This one stays as it is."""
        other = copy(self)
        other.learned = (*self.learned, *learned)
        for name in ("learned_ids", "_expanding", "known"):
            other.__dict__.pop(name, None)
        return other

    def with_words(self, words: Set[str] | None) -> Tokenizer:
        """Return a tokenizer that reads only these words, None for all. This one stays as it is."""
        other = copy(self)
        other.words = words
        other.__dict__.pop("known", None)
        return other

    @cached_property
    def known(self) -> Set[str] | None:
        """The words that are read, with embeddings' names and added tokens; None for all words."""
        return None if self.words is None else taught(self.words, self)

    def _read(self, text: str) -> str:
        """Return a text without unknown words. Raises SafelightError if it is not valid Unicode."""
        check_unicode(text)
        return text if self.known is None else known_alone(text, self.known)

    def encode(self, text: str) -> Encoded:
        """Return the token ids of a prompt: begin, at most max_length − 2 tokens, end, padding.

        Textual inversions are found by diffusers' rule. Raises SafelightError if `text` is not
        valid Unicode (a lone surrogate).
        """
        found = self._expanded(text)
        room = self.max_length - 2
        ids = [self.bos, *(number for number, _ in found[:room]), self.eos]
        ids += [self.pad] * (self.max_length - len(ids))
        cut = text[found[room][1] :].strip() if len(found) > room else None
        return Encoded(ids, cut, len(found))

    def ids(self, text: str) -> list[int]:
        """Return all token ids of a text, without marks and padding.

        Textual inversions are read as text, and so is the padding token ("!" for SD 2.x). Raises
        SafelightError as `encode` does.
        """
        return self._words.encode(self._read(text), add_special_tokens=False).ids

    def expanded_ids(self, text: str) -> list[int]:
        """Return the ids of a text, with textual inversions found by diffusers' rule."""
        return [number for number, _ in self._expanded(text)]

    def _expanded(self, text: str) -> list[tuple[int, int]]:
        """Return the ids of a text, each with the place in the text where it begins.

        diffusers adds `t, t_1, …` to the vocabulary, one for each vector, and replaces `t` in a
        prompt by all of them.
        """
        backend, meant = self._expanding if self.learned else (self._backend, {})
        found = backend.encode(self._read(text), add_special_tokens=False)
        return [
            (number, start)
            for one, (start, _) in zip(found.ids, found.offsets, strict=True)
            for number in meant.get(one, (one,))
        ]

    @cached_property
    def learned_ids(self) -> list[tuple[list[int], Learned]]:
        """The token ids of the names of textual inversions, the longest first."""
        found = [(self.ids(one.name), one) for one in self.learned]
        return sorted(found, key=lambda pair: -len(pair[0]))

    @cached_property
    def _expanding(self) -> tuple[Backend, dict[int, tuple[int, ...]]]:
        """A backend that finds textual inversions, and the ids that each of its tokens means."""
        backend, tokens = self._new_backend(), dict[str, tuple[int, ...]]()
        for one in self.learned:
            for token in self.tokens_of(one):
                if token in tokens:
                    raise two_of_one_name(token)
                tokens[token] = one.ids
        for token, ids in list(tokens.items()):
            for i, number in enumerate(ids[1:], 1):
                if f"{token}_{i}" not in self._vocab:
                    tokens.setdefault(f"{token}_{i}", (number,))
        backend.add_tokens([AddedToken(t, special=False, normalized=True) for t in tokens])
        return backend, {
            number: ids
            for token, ids in tokens.items()
            if (number := backend.token_to_id(token)) is not None
        }

    def tokens_of(self, learned: Learned) -> list[str]:
        """Return the texts that stand for a textual inversion by diffusers' rule.

        They are found anywhere in a prompt, also within words, so none of them may be a word of the
        model's own. Raises SafelightError if no other text is left.
        """
        token, name = learned.token, learned.name
        found = [token] if token is not None and token not in self._vocab else []
        known = {name, name.lower(), f"{name.lower()}</w>"} & self._vocab.keys()
        if name not in found and not known:
            found.append(name)
        if not found:
            raise SafelightError(
                f"embedding {name[:60]!r} has the name of a word of the model's own: rename its "
                "file, or take prompt_syntax a1111 or comfy",
                field="embeddings",
            )
        return found

    def name(self, number: int) -> str:
        """Return a token as it stands in the vocabulary, where `</w>` ends a word.

        A vector of a textual inversion is named after it, as in `<ink 1/2>`.
        """
        for one in self.learned:
            if number in one.ids:
                return f"<{one.name} {one.ids.index(number) + 1}/{len(one.ids)}>"
        return self._backend.id_to_token(number) or ""

    def id_of(self, token: str) -> int | None:
        """Return the id of a token of the vocabulary, None if it is not in it."""
        return self._vocab.get(token)

    def text(self, ids: Sequence[int]) -> str:
        """Return the text that tokens stand for."""
        joined = "".join(map(self.name, ids)).replace("</w>", "Ġ")  # a blank, as a byte's letter
        return decoders.ByteLevel().decode([joined])

    def save(self, folder: Path) -> None:
        """Write the three files of a model folder's tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        merges = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in self._merges)
        config = {
            "tokenizer_class": "CLIPTokenizer",
            **self._marks,
            "model_max_length": self.max_length,
        }
        if self._added:
            told = {str(number): one.__getstate__() for number, one in self._added.items()}
            config["added_tokens_decoder"] = told
        for name, text in (
            ("vocab.json", json.dumps(dict(self._vocab), ensure_ascii=False)),
            ("merges.txt", merges),
            ("tokenizer_config.json", json.dumps(config, indent=2) + "\n"),
        ):
            (folder / name).write_text(text, encoding="utf-8", newline="\n")


def check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SafelightError("the prompt holds half of a character pair; send UTF-8") from None


def clip_tokenizer(pad: str, max_length: int) -> Tokenizer:
    """Return CLIP's own tokenizer, for single-file checkpoints, which hold no vocabulary."""
    return Tokenizer(*_clip_tables(), pad=pad, max_length=max_length)


def folder_tokenizer(
    folder: Folder, vocab_size: int, positions: int, part: str = "tokenizer"
) -> Tokenizer:
    """Return the tokenizer in a part of a model folder.

    Its tables are vocab.json and merges.txt, or the same two out of tokenizer.json, and the tokens
    that were added to them. vocab_size, positions: how many ids, and how long a text, the text
    encoder knows.
    """
    config = folder.json(f"{part}/tokenizer_config.json") or {}
    marks = {**(folder.json(f"{part}/special_tokens_map.json") or {}), **config}
    vocab = folder.json(f"{part}/vocab.json", LARGE)
    if vocab is not None:
        merges = merges_in(folder, f"{part}/merges.txt")
    else:
        vocab, merges = tokenizer_json(folder, part)
    check_ids(vocab.values(), vocab_size, folder.label)
    length = config.get("model_max_length", positions)
    if isinstance(length, bool) or not isinstance(length, int | float):
        raise refusal(f"{part}/tokenizer_config.json", f"model_max_length is {length!r:.40}")
    tables = set(folder.files)
    try:
        tokenizer = Tokenizer(
            vocab,
            merges,
            added=added_tokens(folder, part, config, vocab_size),
            bos=mark(marks, "bos_token", BOS, part),
            eos=mark(marks, "eos_token", EOS, part),
            pad=mark(marks, "pad_token", EOS, part),
            # Some configs give a huge length when they mean no limit.
            max_length=int(min(length, positions)),
        )
    except SafelightError as e:
        raise refusal(folder.label, str(e)) from None
    if not tokenizer.added:
        # Files that added nothing are no part of the model: recipes name its digest without them.
        for name in folder.files.keys() - tables:
            del folder.files[name]
    return tokenizer


@lru_cache(1)
def _clip_tables() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return CLIP's vocabulary and merges.

    The merges come from a package that ships them. The vocabulary follows from them: the 256
    bytes, the same at a word's end, one token a merge, and the two marks.
    """
    lines = _clip_file().decode().split("\n")[1 : 1 + _CLIP_MERGES]
    merges = pairs(lines, _CLIP_VOCABULARY)
    # Bytes that print come first, as themselves; the rest stand in as characters from U+0100.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(c + "</w>" for c in letters), *(a + b for a, b in merges), BOS, EOS]
    return {token: number for number, token in enumerate(tokens)}, merges


def _clip_file() -> bytes:
    for package in ("clip", "open_clip"):
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            path = Path(folder) / _CLIP_VOCABULARY
            if path.is_file():
                raw = path.read_bytes()
                if hashlib.sha256(raw).hexdigest() == _CLIP_SHA256:
                    return gzip.decompress(raw)
    raise SafelightError(
        "a single-file checkpoint holds no vocabulary, and CLIP's is not installed; "
        "run: pip install openai-clip"
    )
