"""One picture in the making: prepare, advance, finish.

A job is plain data: a table of rows, a cursor, a few tensors, a generator. Which task it is
(text, picture, mask, or nothing to start from) is known to `prepare` alone.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from safelight.denoiser import Condition, bounded, estimate
from safelight.errors import SafelightError
from safelight.fast import memory
from safelight.model import Model
from safelight.picture import from_tensor, lay_back, to_tensor
from safelight.sampling import Row, Table


class NotFiniteError(SafelightError):
    """The network said NaN or infinity for these jobs."""

    def __init__(self, message: str, jobs: list[Job]) -> None:
        super().__init__(message)
        self.jobs = jobs


@dataclass
class Known:
    """The part of a picture that stays, while the rest is painted anew.

    latents, noise: [1, channels, h, w]; mask: [1, 1, h, w], 1 where to paint.
    """

    latents: Tensor
    noise: Tensor
    mask: Tensor

    def put_back(self, state: Tensor, sigma: float) -> Tensor:
        """The state with its known part at noise level sigma."""
        return torch.where(self.mask > 0.5, state, self.latents + sigma * self.noise)


@dataclass
class Job:
    """state: x̃ in sigma space, float32 [1, channels, h, w]; cursor: the next row."""

    table: Table
    condition: Condition
    generator: torch.Generator
    state: Tensor
    known: Known | None = None
    original: Image.Image | None = None
    mask: Image.Image | None = None
    cursor: int = 0
    clean: Tensor | None = None
    past_states: deque[Tensor] = field(default_factory=deque)
    past_cleans: deque[Tensor] = field(default_factory=deque)

    @property
    def row(self) -> Row:
        return self.table.rows[self.cursor]

    @property
    def done(self) -> bool:
        return self.cursor == len(self.table.rows)


def prepare(
    model: Model,
    table: Table,
    condition: Condition,
    seed: int,
    size: tuple[int, int],
    *,
    image: Image.Image | None = None,
    mask: Image.Image | None = None,
    strength: float = 1.0,
) -> Job:
    """A job at its first row.

    size: width and height in pixels; image (RGB) and mask (L, 0 or 255) have that size. Noise
    is drawn by a CPU generator of this picture's own, in diffusers' order for the task, so the
    seed means the same picture there; batch and neighbours never change it.
    """
    generator = torch.Generator().manual_seed(seed)
    factor = 1 if model.vae is None else model.vae.config.factor
    channels = model.unet.config.out_channels
    shape = (1, channels, size[1] // factor, size[0] // factor)

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator).to(model.device)

    if image is None:
        return Job(table, condition, generator, draw() * table.noise_scale)

    reads_mask = model.unet.config.in_channels > channels
    # Full strength with a mask starts from noise alone; without one, from the noised picture.
    from_noise = mask is not None and strength == 1.0
    pixels = to_tensor(image).to(model.device)
    latents = None
    if not (reads_mask and from_noise):
        latents = encode(model, pixels, draw())
    noise = draw()
    if from_noise or latents is None:
        state = noise * table.noise_scale
    else:
        state = latents + table.rows[0].level.sigma * noise
    if mask is None:
        return Job(table, condition, generator, state)

    painted = to_tensor(mask).add(1).div(2).round().to(model.device)
    small = F.interpolate(painted, size=shape[2:])  # nearest, as the networks were trained
    masked_noise = draw()  # diffusers draws it for both kinds of network
    known = None
    if reads_mask:
        around = encode(model, pixels * (painted < 0.5), masked_noise)
        condition = Condition(
            condition.context, condition.guidance, torch.cat([small, around], dim=1)
        )
    elif latents is not None:
        known = Known(latents, noise, small)
    return Job(table, condition, generator, state, known, image, mask)


def encode(model: Model, pixels: Tensor, noise: Tensor) -> Tensor:
    """Latents of a picture: [1, 3, H, W] in −1..1 to float32 [1, channels, h, w], scaled."""
    assert model.vae is not None
    mean, std = model.vae.encode(pixels.to(model.dtype))
    return (mean.float() + std.float() * noise) * model.vae.config.scaling_factor


def decode(model: Model, latents: Tensor) -> Image.Image:
    """The picture of clean latents, or of pixels for a model without autoencoder."""
    if model.vae is not None:
        scaled = latents / model.vae.config.scaling_factor
        latents = model.vae.decode(scaled.to(model.dtype)).float()
    return from_tensor(latents)


def advance(model: Model, jobs: list[Job]) -> None:
    """Take each job one row further, with one call of the network for all.

    The jobs' latents have one shape; their samplers, steps, tasks and guidance may differ.
    Raises NotFiniteError, after all have taken the step, for those whose state is no longer finite.
    """
    cleans = estimate(
        model,
        [job.state for job in jobs],
        [job.row.level.sigma for job in jobs],
        [job.row.timestep for job in jobs],
        [job.condition for job in jobs],
    )
    lost = [job for job, clean in zip(jobs, cleans, strict=True) if not _step(job, clean)]
    if lost:
        advice = "" if model.dtype == torch.float32 else "dtype float32, or "
        raise NotFiniteError(
            f"NaN at step {lost[0].cursor + 1} of {len(lost[0].table.rows)}: "
            f"try {advice}a lower guidance_scale",
            lost,
        )


def _step(job: Job, raw: Tensor) -> bool:
    """Whether the new state is finite; if not, the job stays where it was."""
    row, table = job.row, job.table
    clean = bounded(raw, table.clip, table.threshold)
    job.clean = clean
    job.past_states.appendleft(job.state)
    job.past_cleans.appendleft(clean)
    state = torch.zeros_like(job.state)
    for weight, past in zip(row.a, job.past_states, strict=False):
        state = state + weight * past
    for weight, past in zip(row.b, job.past_cleans, strict=False):
        state = state + weight * past
    if row.clip_correction:
        state = state + row.clip_correction * (clean - raw)
    if row.c is not None:
        fresh = torch.randn(job.state.shape, generator=job.generator)
        state = state + row.c * fresh.to(state.device)
    # Before the known part is put back, which would hide what the network said there.
    if not torch.isfinite(state).all():
        return False
    if job.known is not None:
        state = job.known.put_back(state, row.lands.sigma if not _last(job) else 0.0)
    job.state = state
    job.cursor += 1
    _forget(job)
    return True


def _last(job: Job) -> bool:
    return job.cursor == len(job.table.rows) - 1


def _forget(job: Job) -> None:
    """Let go of past states that no row to come looks at."""
    rest = job.table.rows[job.cursor :]
    states = max((len(row.a) for row in rest), default=1) - 1
    cleans = max((len(row.b) for row in rest), default=1) - 1
    while len(job.past_states) > states:
        job.past_states.pop()
    while len(job.past_cleans) > cleans:
        job.past_cleans.pop()


def finish(model: Model, job: Job) -> Image.Image:
    """The picture of a job that is done; outside a mask it is the original, to the byte."""
    if model.device.type == "cpu":
        memory.give_back()  # the steps' activations: those of the decoder are the largest
    painted = decode(model, final_latents(job))
    if job.mask is None or job.original is None:
        return painted
    return lay_back(job.original, painted, job.mask)


def final_latents(job: Job) -> Tensor:
    """The last state, out of sigma space: some samplers end a little above sigma 0."""
    if job.known is not None:
        # put_back laid the known part down clean; only what was painted is at the last level.
        scale = 1 / (1 + job.table.rows[-1].lands.sigma ** 2) ** 0.5
        return torch.where(job.known.mask > 0.5, job.state * scale, job.state)
    return job.state / (1 + job.table.rows[-1].lands.sigma ** 2) ** 0.5
