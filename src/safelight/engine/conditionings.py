"""The conditionings of the latest prompts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from safelight.families.base import Conditioning

MAX_PROMPTS = 64
"""The most prompts whose conditioning is cached."""

MAX_CACHED = 1 << 28
"""The most bytes of conditioning that are cached, unless one prompt takes more."""


class Conditionings:
    """Conditionings by what they depend on; those that were used least recently are dropped."""

    def __init__(self) -> None:
        self.found: OrderedDict[Any, Conditioning] = OrderedDict()

    def get(self, own: Any, key: Any, make: Callable[[], Conditioning]) -> Conditioning:
        """Return what `make` returns, or returned before. own: what the key leaves out."""
        key = own, key
        if key not in self.found:
            made = make()
            if not made.is_finite:
                return made  # not cached: the next try may be finite
            self.found[key] = made
            while len(self.found) > MAX_PROMPTS or (
                len(self.found) > 1 and sum(map(_bytes, self.found.values())) > MAX_CACHED
            ):
                self.found.popitem(last=False)
        self.found.move_to_end(key)
        return self.found[key]


def _bytes(conditioning: Conditioning) -> int:
    """Return the bytes of a conditioning's states; its stages may share them."""
    stages = (conditioning, *(later for _, later in conditioning.later))
    states = [
        t for one in stages for t in (one.tokens, one.image, *one.references) if t is not None
    ]
    return sum({id(t): t.nbytes for t in states}.values())
