"""Train a denoiser: noise is added to clean data, and the network learns to remove it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from safelight.nets.clip import CLIPTextModel
from safelight.nets.unet import UNet2DConditionModel, UNetConfig
from safelight.nets.unet2d import UNet2DConfig, UNet2DModel
from safelight.sampling.levels import alphas_cumprod
from safelight.sampling.schedule import SchedulerConfig
from safelight.train.autoencoder import to_pixels
from safelight.train.devices import accelerator, autocast, initialise
from safelight.train.loop import Draw, Show, fit
from safelight.train.plan import Plan

DROP_CAPTION = 0.1
"""Share of captions left empty, so that guidance has something to guide away from."""


class Noising:
    """Adds noise as the schedule says, and scores the network's prediction.

    min_snr: γ of min-SNR weighting, None for equal weights. A network that predicts velocity and
    learns from captions does better with equal weights: its target has unit variance at every
    level, and min-SNR almost leaves out the noisy levels, where the caption decides most.

    middle: whether timesteps between the ends are drawn more often. At high noise a network can
    predict only the mean of all pictures that fit the caption, and at low noise the picture itself
    shows what it is.
    """

    def __init__(
        self, schedule: SchedulerConfig, min_snr: float | None = None, middle: bool = False
    ) -> None:
        self.kind, self.min_snr, self.middle = schedule.prediction_type, min_snr, middle
        self.bars = torch.from_numpy(alphas_cumprod(schedule)).float()

    def loss(self, clean: Tensor, draw: Draw, net: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return the weighted mean squared error of the predictions, at drawn timesteps.

        clean: [n, channels, h, w]; net maps (noisy, timestep [n]) to its prediction.
        """
        n = len(clean)
        # One timestep from each n-th of the range: the same expectation, less variance.
        where = (torch.arange(n, device=draw.device) + draw.uniform([n])) / n
        if self.middle:
            # With t = timestep / count, a density in proportion to t(1 − t²): seven of ten lie
            # between 0.3 and 0.8. The sum above may round up to n.
            where = (1 - (1 - where).clamp(min=0).sqrt()).sqrt()
        steps = (where * len(self.bars)).long().clamp(max=len(self.bars) - 1)
        self.bars = self.bars.to(draw.device)
        bar = self.bars[steps][:, None, None, None]
        noise = draw.normal(clean.shape)
        noisy = bar.sqrt() * clean + (1 - bar).sqrt() * noise
        target = wanted(self.kind, clean, noise, bar)
        with autocast(draw.device):
            predicted = net(noisy, steps)
        error = (predicted.float() - target).square()
        return (error * self._weight(bar)).mean()

    def _weight(self, bar: Tensor) -> Tensor | float:
        """Return the weight of each noise level: min-SNR-γ (arXiv:2303.09556), or 1."""
        if self.min_snr is None:
            return 1.0
        snr = bar / (1 - bar)
        kept = snr.clamp(max=self.min_snr)
        return {"epsilon": kept / snr, "v_prediction": kept / (snr + 1), "sample": kept}[self.kind]


def wanted(kind: str, clean: Tensor, noise: Tensor, bar: Tensor) -> Tensor:
    """Return what such a network should predict for √ᾱ·clean + √(1 − ᾱ)·noise.

    kind: its prediction type. bar: ᾱ.
    """
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return clean
    return bar.sqrt() * noise - (1 - bar).sqrt() * clean


class Sketch(nn.Module):
    """A text encoder, and a linear layer that predicts a coarse picture from each of its states."""

    def __init__(self, text: CLIPTextModel, values: int) -> None:
        super().__init__()
        self.text_encoder = text
        self.picture = nn.Linear(text.config.hidden_size, values)

    def forward(self, ids: Tensor) -> Tensor:
        return self.picture(self.text_encoder(ids))


def teach_words(
    text: CLIPTextModel, latents: Tensor, ids: Tensor, end: int, plan: Plan, folder: Path
) -> None:
    """Train the text encoder, alone, to predict what its captions look like.

    From every state at and after the end mark a linear layer predicts the latents, halved in size.
    It takes a few minutes. Without it, the word that matters is one state among `length`, which the
    UNet's attention has to find first: after a thousand steps the UNet still drew the same thing
    for every prompt.

    latents: [n, 4, h, w]; ids: [n, length]; end: the id of the end mark, which also pads.
    """
    sketch = Sketch(text, latents[0].numel() // 4)

    def loss_of(run: Any, draw: Draw) -> Tensor:
        pick = torch.from_numpy(draw.data.integers(len(ids), size=plan.batch)).to(ids.device)
        words = ids[pick].long().to(draw.device)
        with autocast(draw.device):
            told = run(words)
        shown = F.avg_pool2d(latents[pick].float(), 2).flatten(1)
        error = (told.float() - shown[:, None].to(draw.device)).square().mean(dim=-1)
        return error[words == end].mean()

    fit(sketch, loss_of, plan, folder)
    sketch.cpu()


class TextToImage(nn.Module):
    """Text encoder and UNet, trained together."""

    def __init__(self, text: CLIPTextModel, unet: UNetConfig) -> None:
        super().__init__()
        self.text_encoder = text
        self.unet = initialise(UNet2DConditionModel(unet))

    def forward(self, noisy: Tensor, steps: Tensor, ids: Tensor) -> Tensor:
        return self.unet(noisy, steps, self.text_encoder(ids))


def train_text_to_image(
    net: TextToImage,
    schedule: SchedulerConfig,
    latents: Tensor,
    ids: Tensor,
    empty: Tensor,
    plan: Plan,
    folder: Path,
    *,
    every: int = 500,
    native: bool = False,
    min_snr: float | None = None,
    middle: bool = False,
    on_checkpoint: Show | None = None,
) -> None:
    """Train both networks of `net`, in place.

    latents: [n, 4, h, w], scaled to unit variance; ids: [n, length] tokens of each one's
    caption; empty: [length] tokens of the empty caption. min_snr, middle: see Noising.
    """
    noising = Noising(schedule, min_snr, middle)
    device = accelerator().device
    latents, ids, empty = latents.to(device), ids.to(device), empty.to(device)

    def loss_of(run: Any, draw: Draw) -> Tensor:
        pick = draw.pick(len(latents), plan.batch)
        drop = draw.uniform([plan.batch]) < DROP_CAPTION
        words = torch.where(drop[:, None], empty, ids[pick]).long()
        return noising.loss(latents[pick].float(), draw, lambda x, t: run(x, t, words))

    fit(
        net,
        loss_of,
        plan,
        folder,
        every=every,
        native=native,
        on_device=True,
        on_checkpoint=on_checkpoint,
    )
    net.cpu()


def train_unconditional(
    config: UNet2DConfig,
    schedule: SchedulerConfig,
    pictures_of: Callable[[Draw, int], NDArray[np.uint8] | Tensor],
    plan: Plan,
    folder: Path,
    *,
    every: int = 500,
    native: bool = False,
    on_device: bool = False,
    on_checkpoint: Show | None = None,
) -> UNet2DModel:
    """Train a model that draws from noise alone, and return it.

    pictures_of(draw, n) returns uint8 pictures [n, side, side, 3]. on_device: whether it takes them
    from the device alone, see `loop.fit`.
    """
    torch.manual_seed(plan.seed)
    net = initialise(UNet2DModel(config))
    noising = Noising(schedule)

    def loss_of(run: Any, draw: Draw) -> Tensor:
        clean = to_pixels(pictures_of(draw, plan.batch)).to(draw.device)
        return noising.loss(clean, draw, run)

    fit(
        net,
        loss_of,
        plan,
        folder,
        every=every,
        native=native,
        on_device=on_device,
        on_checkpoint=on_checkpoint,
    )
    net.cpu()
    return net.eval().requires_grad_(False)
