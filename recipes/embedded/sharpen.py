"""Train a decoder to draw crisp pictures from latents that are not quite right.

A denoiser's latents have errors, and a decoder that has seen only perfect ones draws soft pictures.
Here noise is added to the latents, half of them are drawn again by the denoiser, and a small
discriminator judges patches of the pictures (arXiv:1611.07004, with the hinge loss of
arXiv:1705.02894). Its loss is weighted against the others by their gradients (arXiv:2012.09841).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.embedded.pool import Pool
from recipes.embedded.principal import Principal
from safelight.train.autoencoder import edge_error, to_pixels
from safelight.train.devices import autocast
from safelight.train.loop import Draw, fit
from safelight.train.plan import Plan

NOISE = 0.25
"""Largest standard deviation of the noise that is added to latents of unit variance."""

WEIGHT = 0.4
"""The discriminator's gradient over that of the other losses, both by the pixels."""

RATE = 2e-4
"""Learning rate of the discriminator."""

LISTEN, AHEAD = 1000, 300
"""Steps after which a decoder in closed form learns from the discriminator, and for how many steps
before that the discriminator learns alone. Recorded steps are all the same: with them it learns
from the first step."""


class Patches(nn.Module):
    """The discriminator: a number for each patch, larger the more the patch looks composed.

    It maps [n, 3, h, w] to [n, 1, h/8, w/8].
    """

    def __init__(self, width: int = 48) -> None:
        super().__init__()

        def block(a: int, b: int, stride: int) -> nn.Sequential:
            norm = nn.utils.spectral_norm
            return nn.Sequential(norm(nn.Conv2d(a, b, 4, stride, 1)), nn.LeakyReLU(0.2))

        self.layers = nn.Sequential(
            block(3, width, 2),
            block(width, 2 * width, 2),
            block(2 * width, 4 * width, 2),
            nn.Conv2d(4 * width, 1, 3, 1, 1),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)


def sharpen(
    decoder: nn.Module,
    principal: Principal,
    pool: Pool,
    plan: Plan,
    folder: Path,
    *,
    redrawn: Tensor | None = None,
    listen: float = LISTEN,
    every: int = 500,
    native: bool = False,
) -> None:
    """Train a decoder in place on the pictures of `pool`, from the latents of `principal`.

    decoder: maps latents [n, channels, h, w] to pixels [n, 3, height, width] in −1..1. redrawn:
    latents of the pool's first pictures as a denoiser draws them; in half of the cases they replace
    a picture's own. listen: steps after which the decoder learns from the discriminator, infinite
    for never. Every `every` steps the state of the run goes to `folder`, with the discriminator and
    its optimizer.
    """
    device = pool.pictures.device
    decoder.to(device).requires_grad_(True)
    torch.manual_seed(plan.seed)
    critic, principal = Patches().to(device), principal.to(device)
    capturable = device.type == "cuda"
    optimizer = torch.optim.Adam(
        critic.parameters(), lr=RATE, betas=(0.5, 0.99), capturable=capturable
    )

    def loss_of(run: Any, draw: Draw) -> Tensor:
        pick = draw.pick(len(pool), plan.batch)
        pictures = to_pixels(pool.pictures[pick])
        latents = principal.encode(F.avg_pool2d(pictures, 2))
        if redrawn is not None:
            others = redrawn[pick.clamp(max=len(redrawn) - 1)].float()
            some = (pick < len(redrawn)) & (draw.uniform([plan.batch]) < 0.5)
            latents = torch.where(some[:, None, None, None], others, latents)
        size = NOISE * draw.uniform([plan.batch, 1, 1, 1])
        latents = latents + size * draw.normal(latents.shape)
        with autocast(draw.device):
            drawn = run(latents).float()
            plain = F.l1_loss(drawn, pictures) + edge_error(drawn, pictures)
            if draw.number is None and draw.step < listen - AHEAD:
                return plain
            real, fake = critic(pictures).float(), critic(drawn.detach()).float()
            wrong = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        optimizer.zero_grad(set_to_none=True)
        wrong.backward()
        optimizer.step()
        if draw.number is None and draw.step < listen:
            return plain
        with autocast(draw.device):
            fooled = -critic(drawn).float().mean()
        # Gradients by the pixels: going back through the decoder for each loss would cost as much
        # as the step.
        of_plain, of_fooled = (
            torch.autograd.grad(loss, drawn, retain_graph=True)[0].norm()
            for loss in (plain, fooled)
        )
        weight = (WEIGHT * of_plain / (of_fooled + 1e-12)).detach()
        if draw.number is not None:
            weight = weight * (draw.number >= listen)
        return plain + weight * fooled

    also = {"discriminator": critic, "its optimizer": optimizer}
    fit(
        decoder,
        loss_of,
        plan,
        folder,
        every=every,
        native=native,
        on_device=True,
        also=also,
    )
    decoder.cpu().eval().requires_grad_(False)
