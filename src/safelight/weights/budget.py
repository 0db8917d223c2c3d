"""Estimate how much memory a model takes on a CPU, before it is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from safelight.errors import SafelightError
from safelight.fast import memory
from safelight.fast.layers import LARGE
from safelight.weights.check import refusal
from safelight.weights.plan import Plan

PROGRAM = 450 << 20
"""Bytes of Python, PyTorch and a tokenizer."""

MAPS = 4
"""Feature maps of the autoencoder's second width, at full size, that a decoder holds at once.

Measured with Stable Diffusion 1.5 and XL; other work takes less.
"""

TOLD_FROM = 1 << 30
"""Bytes above which the user is told."""


@dataclass(frozen=True)
class Budget:
    """Memory in bytes. weights: those that stay in memory. work: the program and drawing a picture.

    free, total: this machine's memory that is free now, and all of it; 0 if the system does not
    tell.
    """

    weights: int
    work: int
    free: int
    total: int

    @property
    def needed(self) -> int:
        return self.weights + self.work

    def __str__(self) -> str:
        of = f", of {_gb(self.free)} that are free" if self.free else ""
        return (
            f"memory: {_gb(self.weights)} of weights and {_gb(self.work)} at work, "
            f"{_gb(self.needed)} in all{of}"
        )


def budget(
    plan: Plan, dtypes: Mapping[str, torch.dtype], *, fast: bool, low_memory: bool
) -> Budget:
    """Return what a model takes while it draws a picture of its own size.

    dtypes: of its networks. fast: whether they get the fast layers, which leave text encoders in
    files, and with low_memory all large weights.
    """
    weights = 0
    for part, those in plan.weights.items():
        _, network = plan.parts[part].load_classes()
        if fast and getattr(network, "runs_once", False):
            continue
        held = [math.prod(weight.shape) for weight in those.values()]
        if fast and low_memory:
            held = [numbers for numbers in held if numbers < LARGE] + [max(held)]
        weights += sum(held) * dtypes[part].itemsize
    width, height = plan.native_size
    channels = getattr(plan.configs.get("vae"), "block_out_channels", (0, 0))[:2][-1]
    itemsize = dtypes["vae"].itemsize if "vae" in dtypes else 4
    work = PROGRAM + MAPS * width * height * channels * itemsize
    return Budget(weights, work, memory.free(), memory.total())


def check_memory(plan: Plan, dtypes: Mapping[str, torch.dtype], *, fast: bool, low: bool) -> Budget:
    """Return the budget. Raises SafelightError if the memory is too small, with what would help."""
    found = budget(plan, dtypes, fast=fast, low_memory=low)
    if not found.total or found.needed <= found.total:
        return found
    half = dict.fromkeys(dtypes, torch.bfloat16)
    ways = {
        "low_memory": budget(plan, dtypes, fast=fast, low_memory=True),
        "dtype bfloat16": budget(plan, half, fast=True, low_memory=low),
        "low_memory and dtype bfloat16": budget(plan, half, fast=True, low_memory=True),
    }
    fits = [way for way, one in ways.items() if one.needed <= found.total]
    raise _too_large(plan, found, fits)


def _too_large(plan: Plan, found: Budget, fits: list[str]) -> SafelightError:
    way = f"try {fits[0]}" if fits else "no setting makes it fit"
    return refusal(
        plan.source.name,
        f"takes {_gb(found.needed)} ({_gb(found.weights)} of weights), and this machine has "
        f"{_gb(found.total)}: {way}",
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
