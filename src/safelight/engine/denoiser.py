"""The network's estimate of the clean picture from a state, with guidance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safelight.families.base import Conditioning
from safelight.nets.reuse import Reuse
from safelight.sampling import Row

if TYPE_CHECKING:
    from safelight.model import Model


def estimate(
    model: Model,
    states: list[Tensor],
    rows: list[Row],
    conditionings: list[Conditioning],
    reuse: Reuse | None = None,
) -> list[Tensor]:
    """Return the clean estimate D of each picture, from one call of the network.

    states: float32 [1, channels, h, w], all of one shape. rows: the current row of each picture.
    conditionings: all with the same `call_key`. reuse: what the call reuses from earlier ones.
    Returns float32 tensors of the states' shape.
    """
    family = model.family
    inputs = [row.level.view(state) for state, row in zip(states, rows, strict=True)]
    outputs = family.call(model, inputs, [row.timestep for row in rows], conditionings, reuse)
    found, start = [], 0
    for state, row, conditioning in zip(states, rows, conditionings, strict=True):
        output = outputs[start : start + conditioning.evaluations]
        start += conditioning.evaluations
        if conditioning.evaluations > 1:
            # Classifier-free guidance (arXiv:2207.12598): away from the negative prompt, and
            # towards each of several prompts by its weight (arXiv:2206.01714).
            negative, *positives = output.split(1)
            output = negative
            weights = conditioning.weights or (1.0,) * len(positives)
            for weight, positive in zip(weights, positives, strict=True):
                output = output + conditioning.guidance * weight * (positive - negative)
            output = family.rescaled(model, output, positives[-1])
        found.append(family.clean(model, state, row.level, output))
    return found


def clip_or_threshold(
    clean: Tensor, clip: float | None, threshold: tuple[float, float] | None
) -> Tensor:
    """Return D, [batch, channels, h, w], limited to the range of pixels, for models of pixels.

    clip: the largest absolute value. threshold: (ratio, maximum) of dynamic thresholding
    (arXiv:2205.11487, section 2.3), which scales D down instead of cutting it off.
    """
    if threshold is not None:
        ratio, maximum = threshold
        flat = clean.flatten(1).abs()
        limit = torch.quantile(flat, ratio, dim=1).clamp(1, maximum)[:, None, None, None]
        return clean.clamp(-limit, limit) / limit
    return clean if clip is None else clean.clamp(-clip, clip)
