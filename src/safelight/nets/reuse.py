"""What one call of a UNet keeps for the next, which then need not compute it again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass
class Reuse:
    """What a call reuses from an earlier one, or keeps for a later one.

    skips: the number of outermost skip connections that are computed when the deep part is reused
      (DeepCache, arXiv:2312.00858, whose branch is one less); 0: no deep part is reused or kept.
    deep: the state that joins the deepest of those skips, [k·batch, channels, h, w]. taken: whether
      it is reused; otherwise the call keeps it here.
    texts: output of cross-attention in each block, [k·batch, tokens, channels] (T-GATE,
      arXiv:2404.02747). None: none is reused or kept. told: whether they are reused.
    """

    skips: int = 0
    deep: Tensor | None = None
    texts: dict[nn.Module, Tensor] | None = None
    told: bool = False
    taken: bool = False

    def meet(self, x: Tensor, skips: int) -> None:
        """Keep x, which joins the last of so many skips, if that is where a later call begins."""
        if self.skips == skips and not self.taken:
            self.deep = x

    def text(self, block: nn.Module, attend: Callable[[], Tensor]) -> Tensor:
        """Return the output of cross-attention in a block, computed or reused."""
        if self.texts is None:
            return attend()
        if not self.told or block not in self.texts:
            self.texts[block] = attend()
        return self.texts[block].clone()  # the caller adds to it in place
