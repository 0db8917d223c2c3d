"""Turn words into token ids by a folder's tokenizer.json, as those of T5 and Qwen have it.

The file is a stranger's, and describes a program: how a text is normalised and split, and tables
of tokens. `pipeline` passes on the steps that it knows and that take bounded time. The `tokenizers`
library runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from tokenizers import Tokenizer as Backend

from safelight.errors import SafelightError, first_line
from safelight.prompt.gguf_tokenizer import qwen_content
from safelight.prompt.pipeline import LARGEST, MAX_ADDED, affixes, check_token, library_json
from safelight.prompt.tables import LARGE, added_tokens, mark, merges_in
from safelight.prompt.tokenizer import Encoded, check_unicode
from safelight.weights.check import refusal
from safelight.weights.folder import Folder

_T = TypeVar("_T")
_QWEN = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
_SIDES = ("padding_side", "truncation_side")


@dataclass(frozen=True, slots=True)
class Text(Encoded):
    """A prompt as the text encoder reads it. used: how many of the ids are not padding."""

    used: int


class Piece(NamedTuple):
    """A token of a text, and from where to where it stands there."""

    id: int
    name: str
    start: int
    end: int


class TextTokenizer:
    """The tokenizer of a tokenizer.json.

    backend: splits a text. prefix, suffix: the ids before and after every text. pad: the id that
    fills a text up; None if the folder names none. label: the name of the tokenizer in errors.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        prefix: list[int],
        suffix: list[int],
        pad: int | None,
        label: str,
    ) -> None:
        self._backend = backend
        self.prefix, self.suffix, self.pad = prefix, suffix, pad
        self.label = label

    def encode(self, text: str, max_length: int, pad: bool) -> Text:
        """Return the ids of a text, at most max_length with those before and after it.

        The end of a text that does not fit is left out, and its suffix stays: T5's `</s>` ends
        every text. pad: fill up to max_length. A special token that the text spells out is that
        token, as in transformers.

        Raises SafelightError if the text is not valid Unicode, if max_length leaves no room for a
        token, or if padding is asked of a tokenizer without a padding token.
        """
        room, found = self.room(max_length), self._encoded(text)
        ids = [*self.prefix, *found.ids[:room], *self.suffix]
        used = len(ids)
        if pad:
            if self.pad is None:
                raise refusal(self.label, "the tokenizer has no pad_token")
            ids += [self.pad] * (max_length - used)
        count = len(found.ids)
        cut = text[found.offsets[room][0] :].strip() if count > room else None
        return Text(ids, cut, count, used)

    def room(self, max_length: int) -> int:
        """Return the most tokens of a text itself. Raises SafelightError if there is no room."""
        room = max_length - len(self.prefix) - len(self.suffix)
        if room < 1:
            raise SafelightError(f"a text length of {max_length} leaves no room for a word")
        return room

    def pieces(self, text: str) -> list[Piece]:
        """Return all tokens of a text, without those before and after it."""
        found = self._encoded(text)
        places = zip(found.ids, found.tokens, found.offsets, strict=True)
        return [Piece(number, name, start, end) for number, name, (start, end) in places]

    def _encoded(self, text: str) -> Any:
        check_unicode(text)
        return _run(
            lambda: self._backend.encode(text, add_special_tokens=False),
            self.label,
            "this text fails",
        )


def folder_text_tokenizer(
    folder: Folder, vocab_size: int, part: str, marks: Collection[str] = ()
) -> TextTokenizer:
    """Return the tokenizer in a part of a model folder, from its tokenizer.json.

    Qwen's may be in vocab.json and merges.txt instead. tokenizer_config.json is read too, for the
    padding token and for tokens that were added.
    vocab_size: how many ids the text encoder knows. marks: texts that must be one token each, such
      as those of a chat.

    Raises SafelightError, one line, for a file that is unusable or asks for a step that Safelight
    does not run.
    """
    name = f"{part}/tokenizer.json"
    config = folder.json(f"{part}/tokenizer_config.json") or {}
    content = folder.json(name, LARGEST)
    if content is None and (content := _qwen(folder, part, config)) is None:
        raise refusal(folder.label, f"{name} is missing; {_remedy(folder, part)}")
    for side in _SIDES:
        if config.get(side, "right") != "right":
            raise refusal(f"{part}/tokenizer_config.json", f"{side} {config[side]!r:.40}")
    prepared = library_json(content, name, vocab_size)
    backend = _run(lambda: Backend.from_str(prepared), name, "not usable as a tokenizer")
    _add_tokens(backend, folder, part, _listed(content, name), config, vocab_size)
    prefix, suffix = affixes(content.get("post_processor"), name, vocab_size)
    pad = _pad(backend, folder, part, content, config)
    found = TextTokenizer(backend, prefix=prefix, suffix=suffix, pad=pad, label=name)
    for text in marks:
        if [piece.name for piece in found.pieces(text)] != [text]:
            raise refusal(name, f"{text} is not a single token, as the model's text encoder needs")
    return found


def _qwen(folder: Folder, part: str, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what tokenizer.json would be for Qwen's older files, None if they are not there."""
    if config.get("tokenizer_class") not in _QWEN:
        return None
    vocab = folder.json(f"{part}/vocab.json", LARGE)
    if vocab is None or folder.file(f"{part}/merges.txt") is None:
        return None
    merges = merges_in(folder, f"{part}/merges.txt")
    return qwen_content(vocab, map(list, merges))


def _remedy(folder: Folder, part: str) -> str:
    """Return how to make tokenizer.json from the older files of a tokenizer."""
    older = next((f for f in ("spiece.model", "vocab.json") if folder.file(f"{part}/{f}")), None)
    if older is None:
        return "a tokenizer in that form is needed"
    return f"{older} becomes one by transformers: AutoTokenizer.from_pretrained, save_pretrained"


def _listed(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the added tokens of tokenizer.json by their ids, as tokenizer_config.json has them."""
    listed = content.get("added_tokens") or []
    if not isinstance(listed, list) or not all(isinstance(told, dict) for told in listed):
        raise refusal(name, "added_tokens is not a list of tokens")
    return {str(told.get("id")): told for told in listed}


def _add_tokens(
    backend: Backend,
    folder: Folder,
    part: str,
    listed: Mapping[str, Any],
    config: Mapping[str, Any],
    vocab_size: int,
) -> None:
    """Add the tokens that are found wherever their text stands.

    listed: those of tokenizer.json. Where tokenizer_config.json has the same id, it decides.
    """
    found = {}
    for decoder in (listed, config.get("added_tokens_decoder")):
        if isinstance(decoder, dict):
            told = {"added_tokens_decoder": decoder}
            found |= added_tokens(folder, part, told, vocab_size)
    tokens = [found[number] for number in sorted(found)]
    for token in tokens:
        check_token(token.content, f"{part}/tokenizer.json")
    if sum(len(token.content) for token in tokens) > MAX_ADDED:
        raise refusal(folder.label, f"the added tokens have over {MAX_ADDED} characters")
    _run(lambda: backend.add_tokens(tokens), f"{part}/tokenizer.json", "unusable added tokens")
    for number, token in found.items():
        if backend.token_to_id(token.content) != number:
            raise refusal(
                f"{part}/tokenizer.json",
                f"the added token {token.content!r:.40} has id {number}, "
                f"but would be {backend.token_to_id(token.content)}",
            )


def _pad(
    backend: Backend,
    folder: Folder,
    part: str,
    content: Mapping[str, Any],
    config: Mapping[str, Any],
) -> int | None:
    """Return the id of the padding token, None if no file names one."""
    marks = config
    if marks.get("pad_token") is None:
        marks = folder.json(f"{part}/special_tokens_map.json") or {}
    if marks.get("pad_token") is None:
        padding = content.get("padding")
        marks = padding if isinstance(padding, dict) else {}
    if marks.get("pad_token") is None:
        return None
    token = mark(marks, "pad_token", "", part)
    number = backend.token_to_id(token)
    if number is None:
        raise refusal(f"{part}/tokenizer_config.json", f"pad_token {token!r:.40} is no token")
    return number


def _run(call: Callable[[], _T], name: str, why: str) -> _T:
    """Return what a call of the `tokenizers` library returns.

    Raises SafelightError for whatever the library raises. Where its Rust code panics, that is no
    Exception, and its class has no public name.
    """
    try:
        return call()
    except BaseException as e:
        if isinstance(e, Exception) or type(e).__name__ == "PanicException":
            raise refusal(name, f"{why}: {first_line(e)}") from None
        raise
