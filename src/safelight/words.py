"""Words of captions and prompts."""

import re
from collections.abc import Set

MAX_NAMED = 5


def split_words(text: str) -> list[str]:
    """Return the words of a caption, in lower case and without punctuation."""
    return re.findall(r"[a-z0-9]+", text.lower())


def unknown_words(text: str, known: Set[str]) -> list[str]:
    """Return the first words of the text that are not known, each once, at most MAX_NAMED."""
    return [word for word in dict.fromkeys(words_in(text)) if word not in known][:MAX_NAMED]


def words_in(text: str) -> list[str]:
    """Return the words of a prompt, in lower case."""
    return re.findall(r"[^\W_]+", text.lower())
