"""Plan the model that takes the last steps of another: SDXL's refiner, before it is loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from safelight.errors import SafelightError
from safelight.weights.budget import Beside, coded
from safelight.weights.check import printable
from safelight.weights.find import find
from safelight.weights.frames import frame
from safelight.weights.plan import Plan, read_plan
from safelight.weights.stored import has_codes


def read_refiner(
    name: str | Path, plan: Plan, *, download: bool = True, models_dir: str | Path | None = None
) -> Plan:
    """Return the plan of a refiner. plan: of the model whose last steps it takes.

    Raises SafelightError if it is not found, or cannot go on with the latents of the other.
    """
    refiner = read_plan(find(name, download=download, models_dir=models_dir))
    if plan.family.title != refiner.family.title or not plan.family.refinable:
        raise SafelightError(
            f"refiner {printable(refiner.name, 60)} is of {refiner.family.title}, and "
            f"{printable(plan.name, 60)} of {plan.family.title}: both must be of SDXL",
            field="refiner",
        )
    if refiner.family.reads_mask(refiner):
        raise SafelightError(
            f"refiner {printable(refiner.name, 60)} is an inpainting model, which cannot take the "
            "last steps of another: name SDXL's refiner",
            field="refiner",
        )
    return refiner


def beside_of(plan: Plan, dtype: torch.dtype) -> Beside:
    """Return what a refiner adds to the memory of a model. dtype: of the model."""
    dtypes = {part: plan.family.dtype_of(part, plan.configs[part], dtype) for part in plan.weights}
    few_bits = [part for part, those in plan.weights.items() if any(map(has_codes, those.values()))]
    codes = coded(plan, {part: frame(plan, part) for part in few_bits})
    return Beside(plan, dtypes, codes)
