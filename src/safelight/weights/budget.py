"""Estimate how much memory a model takes on a CPU, before it is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

import torch
from torch import nn

from safelight.errors import SafelightError
from safelight.fast import memory, runs_once, takes_codes
from safelight.fast.layers import LARGE
from safelight.weights.check import refusal
from safelight.weights.plan import Plan
from safelight.weights.stored import has_codes, stored_bytes

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
    tell. codes: whether weights that are stored in few bits stay so. beside: the weights of a
    refiner that stay in memory as well.
    """

    weights: int
    work: int
    free: int
    total: int
    codes: bool = False
    beside: int = 0

    @property
    def needed(self) -> int:
        return self.weights + self.beside + self.work

    def __str__(self) -> str:
        of = f", of {_gb(self.free)} that are free" if self.free else ""
        how = ", decoded at each step" if self.codes else ""
        return (
            f"memory: {_gb(self.weights + self.beside)} of weights{how} and {_gb(self.work)} at "
            "work, "
            f"{_gb(self.needed)} in all{of}"
        )


@dataclass(frozen=True)
class Beside:
    """A refiner, which is in memory at the same time. dtypes, codes: see `budget`."""

    plan: Plan
    dtypes: Mapping[str, torch.dtype]
    codes: Mapping[str, Set[str]]


def budget(
    plan: Plan,
    dtypes: Mapping[str, torch.dtype],
    *,
    fast: bool,
    low_memory: bool,
    codes: Mapping[str, Set[str]] | None = None,
    beside: Beside | None = None,
) -> Budget:
    """Return what a model takes while it draws a picture of its own size.

    dtypes: of its networks. fast: whether they get the fast layers, which leave text encoders in
    files, and with low_memory all large weights. codes: names of weights that can stay as codes, by
    network. They do with low_memory, and where the model would not fit into free memory otherwise;
    fast layers only can. beside: its refiner, if it has one.
    """

    def both(kept: bool) -> Budget:
        codes_of = codes if codes and fast else {}
        found = _budget(plan, dtypes, fast, low_memory, codes_of, kept=kept)
        if beside is None:
            return found
        theirs = beside.codes if fast else {}
        other = _budget(beside.plan, beside.dtypes, fast, low_memory, theirs, kept=kept)
        # They draw one after the other.
        return replace(found, beside=other.weights, work=max(found.work, other.work))

    found = both(kept=False)
    free = found.free or found.total or math.inf
    return both(kept=True) if low_memory or found.needed > free else found


def _budget(
    plan: Plan,
    dtypes: Mapping[str, torch.dtype],
    fast: bool,
    low_memory: bool,
    codes: Mapping[str, Set[str]],
    *,
    kept: bool,
) -> Budget:
    """Return the budget. kept: whether codes stay; those of text encoders always do."""
    weights, any_kept = 0, False
    for part, those in plan.weights.items():
        _, network = plan.parts[part].load_classes()
        sizes = {name: math.prod(weight.shape) for name, weight in those.items()}
        if fast and runs_once(network):
            # Mapped, but for what is decoded now, such as norms.
            away = {name for name, one in those.items() if not has_codes(one)}
            away |= codes.get(part, set())
            weights += (
                sum(sizes[name] for name in sizes if name not in away) * dtypes[part].itemsize
            )
            continue
        away = set(codes.get(part, ())) if kept else set()
        any_kept |= bool(away)
        if not low_memory:
            weights += sum(stored_bytes(those[name]) for name in away)
        elif fast:
            away |= {name for name, numbers in sizes.items() if numbers >= LARGE}
        held = [numbers for name, numbers in sizes.items() if name not in away]
        # One of those that are fetched or decoded for their use.
        held.append(max((sizes[name] for name in away), default=0))
        weights += sum(held) * dtypes[part].itemsize
    width, height = plan.native_size
    channels = getattr(plan.configs.get("vae"), "block_out_channels", (0, 0))[:2][-1]
    itemsize = dtypes["vae"].itemsize if "vae" in dtypes else 4
    work = PROGRAM + MAPS * width * height * channels * itemsize
    return Budget(weights, work, memory.free(), memory.total(), codes=any_kept)


def coded(plan: Plan, nets: Mapping[str, nn.Module]) -> dict[str, set[str]]:
    """Return the names of the weights that can stay as codes, by network."""
    return {
        part: {name for name in takes_codes(net) if has_codes(plan.weights[part][name])}
        for part, net in nets.items()
    }


def check_memory(
    plan: Plan,
    dtypes: Mapping[str, torch.dtype],
    *,
    fast: bool,
    low: bool,
    codes: Mapping[str, Set[str]] | None = None,
    beside: Beside | None = None,
) -> Budget:
    """Return what `budget` does.

    Raises SafelightError if the memory is too small, with what would help.
    """
    found = budget(plan, dtypes, fast=fast, low_memory=low, codes=codes, beside=beside)
    if not found.total or found.needed <= found.total:
        return found

    def other(half: bool, fast: bool, low_memory: bool) -> Budget:
        mine = dict.fromkeys(dtypes, torch.bfloat16) if half else dtypes
        theirs = beside
        if beside is not None and half:
            theirs = replace(beside, dtypes=dict.fromkeys(beside.dtypes, torch.bfloat16))
        return budget(plan, mine, fast=fast, low_memory=low_memory, codes=codes, beside=theirs)

    ways = {
        "low_memory": other(False, fast, True),
        "dtype bfloat16": other(True, True, low),
        "low_memory and dtype bfloat16": other(True, True, True),
    }
    fits = [way for way, one in ways.items() if one.needed <= found.total]
    raise _too_large(plan, found, fits)


def _too_large(plan: Plan, found: Budget, fits: list[str]) -> SafelightError:
    way = f"try {fits[0]}" if fits else "no setting makes it fit"
    refiner = "with its refiner " if found.beside else ""
    weights = found.weights + found.beside
    return refusal(
        plan.source.name,
        f"{refiner}takes {_gb(found.needed)} ({_gb(weights)} of weights), and this machine has "
        f"{_gb(found.total)}: {way}",
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
