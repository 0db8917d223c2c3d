"""How much a model can take at once."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from safelight.model import Model

MEASURE_SECONDS = 1.5


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


@torch.inference_mode()
def largest_useful_batch(model: Model, most: int = 64) -> int:
    """Return the largest batch at which throughput still improves, measured for 1.5 seconds.

    A batch has pictures of the model's own size. It is doubled while each picture costs at most
    0.95 times as much as before.
    """

    def seconds(rows: int) -> float:
        began = time.monotonic()
        float(probe(model, rows).sum())  # waits for a GPU, too
        return time.monotonic() - began

    began = time.monotonic()
    seconds(2)  # packs weights
    rows, cost = 2, seconds(2) / 2
    while rows < most and time.monotonic() - began < MEASURE_SECONDS:
        wider = min(seconds(2 * rows), seconds(2 * rows)) / (2 * rows)
        if wider > 0.95 * cost:
            break
        rows, cost = 2 * rows, wider
    return rows


def probe(model: Model, rows: int) -> Tensor:
    """Return the network's outputs for `rows` pictures of the model's own size."""
    family = model.family
    x = torch.ones(family.latent_shape(model, model.native_size), device=model.device)
    return family.call(model, [x] * rows, [1.0] * rows, [family.example(model)] * rows)
