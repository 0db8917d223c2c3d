"""Tell what a model is and how much memory it takes, from its headers and configs alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safelight.families import Family
from safelight.fast import helps
from safelight.machine import pick_device
from safelight.weights.autoencoders import with_autoencoders
from safelight.weights.budget import budget, coded
from safelight.weights.controlnets import with_controlnets
from safelight.weights.find import Given, Source, find, find_vae, parts_finder
from safelight.weights.frames import frame
from safelight.weights.ip_adapters import with_image_prompts
from safelight.weights.load import pick_dtype
from safelight.weights.plan import read_plan


@dataclass(frozen=True)
class Estimate:
    """What a model is and what it takes.

    weights, work: bytes for its weights, and for drawing a picture of its native size. native_size:
    width and height in pixels. dtype: what it computes in.
    """

    family: Family
    native_size: tuple[int, int]
    dtype: str
    weights: int
    work: int


def estimate(
    name: str | Path | Source,
    *,
    device: str = "auto",
    dtype: str = "auto",
    low_memory: bool = False,
    models_dir: str | Path | None = None,
    parts: Given | Sequence[Given] | None = None,
    vae: str | Path | None = None,
    refiner: str | Path | None = None,
    controlnet: str | Path | Sequence[str | Path] | None = None,
    ip_adapter: str | Path | None = None,
    image_encoder: str | Path | None = None,
) -> Estimate:
    """Return what loading a model with these settings (see `load_model`) would take.

    Raises SafelightError as `load_model` does for one that is missing or malformed.
    """
    where = pick_device(device)
    vaes = {} if vae is None else {"vae": find_vae(vae, download=False, models_dir=models_dir)}
    source = find(name, download=False, models_dir=models_dir)
    rest = parts_finder(parts, download=False, models_dir=models_dir)
    plan = with_autoencoders(read_plan(source, without=vaes, parts=rest), vaes)
    plan = with_controlnets(plan, controlnet, models_dir, download=False)
    plan = with_image_prompts(plan, ip_adapter, image_encoder, models_dir, download=False)
    precision = pick_dtype(dtype, where, plan.family.half)
    dtypes = {
        part: plan.family.dtype_of(part, plan.configs[part], precision) for part in plan.weights
    }
    fast = helps(where, precision)
    codes = coded(plan, {part: frame(plan, part) for part in plan.weights})
    found = budget(plan, dtypes, fast=fast, low_memory=low_memory, codes=codes)
    weights = found.weights
    if refiner is not None:
        weights += estimate(
            refiner, device=device, dtype=dtype, low_memory=low_memory, models_dir=models_dir
        ).weights
    return Estimate(
        family=plan.family,
        native_size=plan.native_size,
        dtype=str(precision).removeprefix("torch."),
        weights=weights,
        work=found.work,
    )
