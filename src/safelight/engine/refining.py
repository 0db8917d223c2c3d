"""The last steps of a picture, which a refiner takes over (arXiv:2307.01952, section 2.5).

As in diffusers (`denoising_end`, `denoising_start`), both models use the same grid of timesteps,
and no noise is added between them. A multistep sampler starts over with the refiner. diffusers
splits a step of two evaluations in the middle; here the model that begins a step completes it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from safelight.families.base import Conditioning
from safelight.sampling import SAMPLERS, Table

if TYPE_CHECKING:
    from safelight.model import Model
    from safelight.request import Request


@dataclass(frozen=True)
class Second:
    """The refiner that takes over, its first row, and its conditioning."""

    model: Model
    row: int
    conditioning: Conditioning


def table_of(model: Model, request: Request) -> tuple[Table, int]:
    """Return the table of a resolved request, and how many of its rows the model itself takes."""
    table, refiner = model.family.table(model, request), model.refiner
    if refiner is None or request.refiner_start == 1:
        return table, len(table.rows)
    assert request.steps is not None
    trained = model.scheduler.num_train_timesteps
    least = round(trained - request.refiner_start * trained)
    evaluations = SAMPLERS[request.sampler].evaluations
    begins = [row.timestep for row in table.rows[::evaluations]]
    taken = sum(timestep >= least for timestep in begins)
    if taken == len(begins):
        return table, len(table.rows)
    left_out = request.steps - request.steps_taken
    rest = refiner.family.table(refiner, request, left_out + taken)
    mine = taken * evaluations
    return replace(table, rows=table.rows[:mine] + rest.rows), mine
