"""Train the autoencoder: pictures to latents and back."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from safelight.nets.tiny import AutoencoderTiny
from safelight.nets.vae import AutoencoderKL, VAEConfig
from safelight.train.devices import accelerator, autocast
from safelight.train.loop import Draw, Show, fit, progress
from safelight.train.plan import Plan

KL_WEIGHT = 1e-6
EDGE_WEIGHT = 1.0

AT_ONCE = 1 << 21
"""Pixels that are encoded in one call."""

TOLD_EVERY = 15.0
"""Seconds between two lines about the encoding."""


class Pictures(Protocol):
    def batch(
        self, n: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.uint8] | Tensor, list[str]]:
        """Return `n` pictures, uint8 [n, size, size, 3], and their captions."""
        ...


def train_autoencoder(
    config: VAEConfig,
    scenes: Pictures,
    plan: Plan,
    folder: Path,
    *,
    native: bool = False,
    on_checkpoint: Show | None = None,
) -> AutoencoderKL:
    """Return an autoencoder trained on pictures, on the CPU; `latent_spread` tells its scale.

    The loss is the absolute error of pixels, the absolute error of the differences between
    neighbouring pixels (which keeps outlines crisp), and the KL term of arXiv:2112.10752 at its
    tiny weight. With `native` the network is compiled first.
    """
    torch.manual_seed(plan.seed)
    vae = AutoencoderKL(config)
    if vae.quant_conv is not None:
        # Begin with little noise in the latents: at unit variance it hides their content, and
        # training settles on one gray picture for all.
        with torch.no_grad():
            vae.quant_conv.bias[config.latent_channels :] -= 6  # type: ignore[index]

    def loss_of(run: Any, draw: Draw) -> Tensor:
        pictures = to_pixels(scenes.batch(plan.batch, draw.data)[0]).to(draw.device)
        side = pictures.shape[-1] // config.factor
        noise = draw.normal((plan.batch, config.latent_channels, side, side))
        with autocast(draw.device):
            drawn, mean, std = run(pictures, noise)
        drawn, mean, std = drawn.float(), mean.float(), std.float()
        kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
        return (
            F.l1_loss(drawn, pictures) + EDGE_WEIGHT * edge_error(drawn, pictures) + KL_WEIGHT * kl
        )

    net = _Pass(vae)
    fit(net, loss_of, plan, folder, native=native, on_checkpoint=on_checkpoint)
    vae = vae.cpu()
    return vae.eval().requires_grad_(False)


class _Pass(nn.Module):
    """Encode, draw from the posterior, decode."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pictures: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, std = self.vae.encode(pictures)
        return self.vae.decode(mean + std * noise), mean, std


def edge_error(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean absolute error of the differences between neighbouring pixels."""
    down = (a.diff(dim=-2) - b.diff(dim=-2)).abs().mean()
    right = (a.diff(dim=-1) - b.diff(dim=-1)).abs().mean()
    return down + right


def to_pixels(pictures: NDArray[np.uint8] | Tensor) -> Tensor:
    """Return uint8 pictures [n, h, w, 3] as float32 [n, 3, h, w] in −1..1, on their device."""
    return torch.as_tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode(vae: AutoencoderKL | AutoencoderTiny, pictures: NDArray[np.uint8] | Tensor) -> Tensor:
    """Return the latents as the denoiser sees them, float16 [n, 4, h, w] on the CPU.

    pictures: uint8 [n, size, size, 3]. They are encoded part by part, on the GPU if there is one.
    """
    pictures = torch.as_tensor(pictures)
    vae.to(accelerator().device)
    parts, done, told = [], 0, time.monotonic()
    for part in pictures.split(_at_once(pictures)):
        parts.append(vae.config.scale(_means(vae, part)).half().cpu())
        done += len(part)
        if time.monotonic() - told > TOLD_EVERY:
            told = time.monotonic()
            progress(f"encoded {done}/{len(pictures)} pictures")
    vae.cpu()
    return torch.cat(parts)


@torch.inference_mode()
def latent_spread(vae: AutoencoderKL, scenes: Pictures, draw: Draw, count: int = 1024) -> float:
    """Return the standard deviation of the latents of `count` scenes: 1 / scaling_factor.

    Scenes are drawn and encoded part by part, as `encode` does.
    """
    vae.to(accelerator().device)
    parts, n = list[Tensor](), 1  # the first one shows how large they are
    while count:
        part = torch.as_tensor(scenes.batch(min(n, count), draw.data)[0])
        parts.append(_means(vae, part))
        n, count = _at_once(part), count - len(part)
    return float(torch.cat(parts).std())


def _at_once(pictures: Tensor) -> int:
    """Return how many pictures of this size are encoded in one call."""
    return max(1, AT_ONCE // pictures[0, ..., 0].numel())


def _means(vae: AutoencoderKL | AutoencoderTiny, pictures: Tensor) -> Tensor:
    """Return the means of the posteriors, float32, on the device."""
    device = accelerator().device
    with autocast(device):
        return vae.encode(to_pixels(pictures.to(device)))[0].float()
