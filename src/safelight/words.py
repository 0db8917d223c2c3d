"""Words of captions and prompts."""

import re
from collections.abc import Set

MAX_NAMED = 5


def split_words(text: str) -> list[str]:
    """Return the words of a caption, in lower case and without punctuation."""
    return re.findall(r"[a-z0-9]+", text.lower())


def unknown_words(text: str, known: Set[str]) -> list[str]:
    """Return the first words of the text that are not known, each once, at most MAX_NAMED."""
    words = dict.fromkeys(re.findall(r"[^\W_]+", text.lower()))
    return [word for word in words if word not in known][:MAX_NAMED]
