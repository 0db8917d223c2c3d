"""Network + schedule + prediction type → clean estimate; guidance.

Everything here lives in sigma space: x̃ = x/α = clean + σ·ε, with α = 1/√(1 + σ²). The state is
float32 whatever precision the network has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safelight.model import Model
from safelight.nets.unet import UNet2DConditionModel, guidance_embedding


@dataclass(frozen=True)
class Condition:
    """What one picture is drawn to.

    context: text states [1, tokens, width], or [2, tokens, width] with those of the negative
      prompt first where guidance is on; None for a model without words.
    guidance: the scale; used where context holds two, or by a network distilled with it.
    extra: [1, channels, h, w], what an inpainting network reads beside the latents; else None.
    """

    context: Tensor | None
    guidance: float = 1.0
    extra: Tensor | None = None

    @property
    def evaluations(self) -> int:
        return 1 if self.context is None else len(self.context)


def estimate(
    model: Model,
    states: list[Tensor],
    sigmas: list[float],
    timesteps: list[float],
    conditions: list[Condition],
) -> list[Tensor]:
    """The clean estimate D of each picture, from one call of the network.

    states: x̃ of each picture, float32 [1, channels, h, w] of one shape; sigmas and timesteps:
    the level and the network's timestep of each. Returns float32 tensors of the states' shape.
    """
    inputs, times, scales = [], [], []
    # Both evaluations of a guided picture read one row, unless pictures without guidance are
    # among them: the network wants as many texts for each row as for any other.
    shared = len({condition.evaluations for condition in conditions}) == 1
    for state, sigma, timestep, condition in zip(
        states, sigmas, timesteps, conditions, strict=True
    ):
        noisy = state / (1 + sigma**2) ** 0.5
        if condition.extra is not None:
            noisy = torch.cat([noisy, condition.extra], dim=1)
        rows = 1 if shared else condition.evaluations
        inputs += [noisy] * rows
        times += [timestep] * rows
        scales += [condition.guidance] * rows
    contexts = [c.context for c in conditions if c.context is not None]
    outputs = _call(model, torch.cat(inputs), torch.tensor(times), contexts, scales)

    found, start = [], 0
    for state, sigma, condition in zip(states, sigmas, conditions, strict=True):
        output = outputs[start : start + condition.evaluations]
        start += condition.evaluations
        if condition.evaluations == 2:
            # Classifier-free guidance (arXiv:2207.12598): away from the negative prompt's.
            negative, positive = output.chunk(2)
            output = negative + condition.guidance * (positive - negative)
        found.append(_clean(state, sigma, output, model.scheduler.prediction_type))
    return found


def _call(
    model: Model, x: Tensor, times: Tensor, contexts: list[Tensor], scales: list[float]
) -> Tensor:
    x, times = x.to(model.dtype), times.to(x.device, torch.float32)
    if not isinstance(model.unet, UNet2DConditionModel):
        return model.unet(x, times).float()
    # One picture's text stays the same tensor from step to step, so that what is computed from
    # it alone can be kept.
    context = contexts[0] if len(contexts) == 1 else torch.cat(contexts)
    embedded = None
    if model.unet.config.time_cond_proj_dim is not None:
        embedded = guidance_embedding(scales, model.unet.config.time_cond_proj_dim)
        embedded = embedded.to(x.device, x.dtype)
    return model.unet(x, times, context.to(x.dtype), embedded).float()


def _clean(state: Tensor, sigma: float, output: Tensor, prediction_type: str) -> Tensor:
    """D from what the network said, by what it was trained to say (arXiv:2202.00512)."""
    if prediction_type == "sample":
        return output
    if prediction_type == "epsilon":
        return state - sigma * output
    # Velocity v = α·ε − σ'·clean with σ' = α·σ, and x = α·x̃: clean = α·x − σ'·v.
    variance = 1 + sigma**2
    return state / variance - output * (sigma / variance**0.5)


def bounded(clean: Tensor, clip: float | None, threshold: tuple[float, float] | None) -> Tensor:
    """D held to the range of pictures, as pixel models were sampled in training.

    clip: the largest absolute value. threshold: (ratio, most) of dynamic thresholding
    (arXiv:2205.11487, section 2.3), which scales down what would otherwise be cut off.
    """
    if threshold is not None:
        ratio, most = threshold
        flat = clean.flatten(1).abs()
        limit = torch.quantile(flat, ratio, dim=1).clamp(1, most)[:, None, None, None]
        return clean.clamp(-limit, limit) / limit
    return clean if clip is None else clean.clamp(-clip, clip)
