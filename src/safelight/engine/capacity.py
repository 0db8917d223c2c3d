"""How many rows a call of a model's network holds, learned from how long calls take."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safelight.errors import SafelightError

if TYPE_CHECKING:
    from safelight.model import Model

FEWEST, MOST = 2, 64
"""Rows of a call of the network: at first, and at most."""

TRIES = 3
"""Calls that are timed before the size changes."""


def out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that memory ran out."""
    # On the CPU only the message of torch's RuntimeError says so.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "t allocate memory" in str(error)
    )


def too_large() -> SafelightError:
    """Return the error for a picture that does not fit in memory."""
    return SafelightError("out of memory: ask for a smaller picture", code="out_of_memory")


def free_memory(device: torch.device) -> None:
    """Give the memory that PyTorch keeps for reuse back to the GPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


class Capacity:
    """The largest batch at which throughput still improves, learned from the calls themselves.

    It begins at 2 rows and doubles while a row takes at most 0.95 times as long as in calls of half
    the size. rows: the most rows of a call, in pictures of the model's own size; if given, nothing
    is learned.
    """

    def __init__(self, rows: int | None = None) -> None:
        self.rows = rows or FEWEST
        self._learned = rows is not None
        self._costs: list[float] = []
        self._before = math.inf

    def note(self, load: float, seconds: float) -> None:
        """Learn from a call of `load` rows: of the whole network, and without a ControlNet."""
        if self._learned or not self.rows / 2 < load <= self.rows:
            return
        self._costs.append(seconds / load)
        if len(self._costs) < TRIES:
            return
        cost = min(self._costs)  # the first call packs weights; other programs may slow one down
        if cost > 0.95 * self._before:
            self.set(self.rows // 2)
        elif self.rows == MOST:
            self.set(MOST)
        else:
            self.rows, self._before, self._costs = 2 * self.rows, cost, []

    def set(self, rows: int) -> None:
        """Fix the number of rows; nothing more is learned."""
        self.rows, self._learned = rows, True


def probe(model: Model, rows: int) -> Tensor:
    """Return the network's outputs for `rows` pictures of the model's own size.

    float32 [rows, channels, h, w].
    """
    family = model.family
    x = torch.ones(family.latent_shape(model, model.native_size), device=model.device)
    return family.call(model, [x] * rows, [1.0] * rows, [family.example(model)] * rows)
