"""What one call of a UNet leaves for the next, which is then not computed again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass
class Reuse:
    """What a call takes from an earlier one, or keeps for a later one.

    skips: of the states that the way down leaves for the way up, how many are computed anew where
      the rest is taken from an earlier call; 0: nothing is taken or kept (DeepCache,
      arXiv:2312.00858, whose branch is one less).
    deep: the state that meets the deepest of those skips, [k·batch, channels, h, w]. taken: whether
      it is taken; otherwise the call keeps it here.
    texts: what attention to the text gave in each block, [k·batch, tokens, channels] (T-GATE,
      arXiv:2404.02747). None: nothing is taken or kept. told: whether it is taken.
    """

    skips: int = 0
    deep: Tensor | None = None
    texts: dict[nn.Module, Tensor] | None = None
    told: bool = False
    taken: bool = False

    def meet(self, x: Tensor, skips: int) -> None:
        """Keep x, which meets the last of so many skips, if a later call will take it."""
        if self.skips == skips and not self.taken:
            self.deep = x

    def text(self, block: nn.Module, attend: Callable[[], Tensor]) -> Tensor:
        """Return what attention to the text gives in a block, computed or taken."""
        if self.texts is None:
            return attend()
        if not self.told or block not in self.texts:
            self.texts[block] = attend()
        return self.texts[block].clone()  # who asks adds to it in place
