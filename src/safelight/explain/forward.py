"""The forward process: noise is added to a picture as the schedule did in training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from safelight.engine.job import cut, decode
from safelight.model import Model
from safelight.sampling import Level, SchedulerConfig
from safelight.sampling.levels import alphas_cumprod, sigmas_of

SHARES = (0.05, 0.15, 0.3, 0.45, 0.65, 1.0)
"""The timesteps that are shown, as shares of the model's last one."""


@dataclass(frozen=True)
class Noised:
    """The picture at one level of noise.

    sigma: the noise level, if the picture keeps its scale. timestep: the model's number for it;
    None at sigma 0, which is the picture itself.
    """

    sigma: float
    timestep: int | None
    picture: Image.Image


def forward(
    model: Model, latents: Tensor, seed: int, size: tuple[int, int] | None = None
) -> list[Noised]:
    """Return a picture at growing levels of the same noise, the clean one first.

    latents: the finished picture's, float32 [1, channels, h, w] (pixels for a model without
    autoencoder). seed: of the noise. size: of the finished picture; None: all that the latents
    cover. Each picture is the network's input at that level, decoded.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)

    def shown(state: Tensor) -> Image.Image:
        return cut(model, decode(model, state), state, size)

    with torch.inference_mode():
        made = [Noised(0.0, None, shown(latents))]
        for share in SHARES:
            level, timestep = _trained(model.scheduler, share)
            noisy = level.view(level.mix(latents, noise))
            made.append(Noised(level.sigma, timestep, shown(noisy)))
    return made


def _trained(config: SchedulerConfig, share: float) -> tuple[Level, int]:
    """Return the level at a share of the trained timesteps, and its timestep."""
    t = round(share * (config.num_train_timesteps - 1))
    if config.is_flow:
        time = (t + 1) / config.num_train_timesteps
        return Level(1 - time, time), t + 1
    return Level.exploding(float(sigmas_of(alphas_cumprod(config))[t])), t
