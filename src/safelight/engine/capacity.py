"""How much a model can take at once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from safelight.model import Model

FEWEST, MOST = 2, 64
"""Rows of a call, at first and at most."""

TRIES = 3
"""Calls of one size that are timed."""


def out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that memory ran out."""
    # On the CPU torch says so in words alone.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "t allocate memory" in str(error)
    )


def free_memory(device: torch.device) -> None:
    """Give the memory that PyTorch keeps for reuse back to a GPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


class Capacity:
    """The largest batch at which throughput still improves, learned from the calls themselves.

    It begins at 2 rows, and is doubled while a row costs at most 0.95 times what it did in calls of
    half as many. rows: the most rows of a call, of pictures of the model's own size; given, nothing
    is learned.
    """

    def __init__(self, rows: int | None = None) -> None:
        self.rows = rows or FEWEST
        self._learned = rows is not None
        self._costs: list[float] = []
        self._before = math.inf

    def note(self, load: float, seconds: float) -> None:
        """Learn from a call of `load` rows, of a network that computed all of itself."""
        if self._learned or not self.rows / 2 < load <= self.rows:
            return
        self._costs.append(seconds / load)
        if len(self._costs) < TRIES:
            return
        cost = min(self._costs)  # the first packs weights; others may have had the processor
        if cost > 0.95 * self._before:
            self.set(self.rows // 2)
        elif self.rows == MOST:
            self.set(MOST)
        else:
            self.rows, self._before, self._costs = 2 * self.rows, cost, []

    def set(self, rows: int) -> None:
        """Hold it at so many rows."""
        self.rows, self._learned = rows, True


def probe(model: Model, rows: int) -> Tensor:
    """Return the network's outputs for `rows` pictures of the model's own size."""
    family = model.family
    x = torch.ones(family.latent_shape(model, model.native_size), device=model.device)
    return family.call(model, [x] * rows, [1.0] * rows, [family.example(model)] * rows)
