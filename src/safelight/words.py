"""Words of captions and prompts."""

import re
from collections.abc import Set

MAX_NAMED = 5

_WORD = r"[^\W_]+"


def split_words(text: str) -> list[str]:
    """Return the words of a caption, in lower case and without punctuation."""
    return re.findall(r"[a-z0-9]+", text.lower())


def unknown_words(text: str, known: Set[str]) -> list[str]:
    """Return the first words of the text that are not known, each once, at most MAX_NAMED."""
    return [w for w in dict.fromkeys(words_in(text)) if not _is_known(w, known)][:MAX_NAMED]


def known_alone(text: str, known: Set[str]) -> str:
    """Return a text in which each unknown word is replaced by as many blanks as it has letters."""

    def kept(match: re.Match[str]) -> str:
        word = match[0]
        mark = word.startswith("<|")  # one of CLIP's own
        return word if mark or _is_known(word.lower(), known) else " " * len(word)

    return re.sub(rf"<\|\w+\|>|{_WORD}", kept, text)


def words_in(text: str) -> list[str]:
    """Return the words of a prompt, in lower case."""
    return re.findall(_WORD, text.lower())


def _is_known(word: str, known: Set[str]) -> bool:
    # Captions were once split at letters beyond a to z.
    parts = split_words(word)
    return word in known or (bool(parts) and all(part in known for part in parts))
