"""Which words of a prompt a model has never seen."""

import re
from collections.abc import Set

MOST_NAMED = 5


def unknown_words(text: str, known: Set[str]) -> list[str]:
    """Words of the text that are not among the known, in order, each once, at most a few."""
    words = dict.fromkeys(re.findall(r"[^\W_]+", text.lower()))
    return [word for word in words if word not in known][:MOST_NAMED]
