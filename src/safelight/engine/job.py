"""The job of one picture: prepare, advance, finish.

A job is plain data: a table of rows, a cursor, a few tensors, a generator. Only `prepare` knows
whether there is an input picture or a mask.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from safelight.engine.control import Control
from safelight.engine.denoiser import clip_or_threshold, estimate
from safelight.engine.inputs import covering
from safelight.engine.ip_adapter import PicturePrompt, counts
from safelight.engine.refining import Second
from safelight.engine.shortcuts import Kept, Plan, Words, gather, scatter
from safelight.errors import SafelightError
from safelight.families.base import Conditioning
from safelight.fast import int8, memory
from safelight.picture import from_tensor
from safelight.region import Canvas
from safelight.sampling import Level, Row, Table

if TYPE_CHECKING:
    from safelight.keywords import MaskContent
    from safelight.model import Model


class NotFiniteError(SafelightError):
    """The network returned NaN or infinity for these jobs."""

    def __init__(self, message: str, jobs: list[Job]) -> None:
        super().__init__(message, code="not_finite")
        self.jobs = jobs


@dataclass
class Known:
    """The known part of a picture in inpainting.

    latents, noise: [1, channels, h, w]; mask: [1, 1, h, w], 1 where to paint.
    """

    latents: Tensor
    noise: Tensor
    mask: Tensor

    def put_back(self, state: Tensor, level: Level) -> Tensor:
        """Return the state with its known part at this level."""
        return torch.where(self.mask > 0.5, state, level.mix(self.latents, self.noise))


@dataclass
class Job:
    """The state of one picture between two steps.

    state: float32 [1, channels, h, w], at `level`. cursor: index of the next row. second: the
    refiner that takes over, if any. clean: the clean estimate of the last row taken, None before
    the first. steps: the number of steps, as some samplers have several rows per step; None: one
    row per step. canvas: what is painted in, if there is a mask. size: width and height of what is
    drawn, in pixels; None: all that the latents cover.
    control, prompted: the pictures that guide it, and the picture that is a prompt, if there are
    such; a refiner reads none of them. references: latents of the reference pictures.
    """

    table: Table
    conditioning: Conditioning
    generator: torch.Generator
    state: Tensor
    known: Known | None = None
    canvas: Canvas | None = None
    cursor: int = 0
    clean: Tensor | None = None
    past_states: deque[Tensor] = field(default_factory=deque)
    past_cleans: deque[Tensor] = field(default_factory=deque)
    steps: int | None = None
    second: Second | None = None
    kept: Kept = field(default_factory=Kept)
    size: tuple[int, int] | None = None
    control: tuple[Control, ...] = ()
    prompted: PicturePrompt | None = None
    references: tuple[Tensor, ...] = ()

    @property
    def asked(self) -> Conditioning:
        """The conditioning of the next row."""
        return self.asked_at(self.cursor)

    @property
    def evaluations(self) -> int:
        """Evaluations of the network at the next row."""
        return self._texts_at(self.cursor).evaluations

    def _texts_at(self, cursor: int) -> Conditioning:
        """Return the conditioning of a row without pictures."""
        return self.kept.asked(self._stage_at(cursor), cursor, len(self.table.rows))

    def asked_at(self, cursor: int) -> Conditioning:
        """Return the conditioning of a row."""
        rows = len(self.table.rows)
        found = self._texts_at(cursor)
        if self.references:
            found = replace(found, references=self.references)
        if (prompted := self._prompted_at(cursor)) is not None:
            found = replace(found, image=prompted.rows(found.evaluations))
        control = self.control if self._second_at(cursor) is None else ()
        control = tuple(one for one in control if one.guide.at(cursor, rows))
        return replace(found, control=control) if control else found

    def _prompted_at(self, cursor: int) -> PicturePrompt | None:
        """Return the picture that is a prompt of a row."""
        found = self.prompted if self._second_at(cursor) is None else None
        if found is None or not counts(found.request, cursor, len(self.table.rows)):
            return None
        return found

    @property
    def words(self) -> Words:
        """The prompts of the next row, as if it were guided."""
        return self._stage_at(self.cursor).tokens, self._prompted_at(self.cursor)

    def _stage_at(self, cursor: int) -> Conditioning:
        """Return the conditioning of a row, as if it were guided."""
        rows = len(self.table.rows)
        second = self._second_at(cursor)
        conditioning = self.conditioning if second is None else second.conditioning
        return conditioning.at(cursor * (self.steps or rows) // rows)

    def plan(self, model: Model) -> Plan:
        """Return what the next row reuses from earlier ones. model: the one that takes the row."""
        rows = len(self.table.rows)
        return self.kept.plan(self.cursor, rows, id(model), self.evaluations, self.words)

    def model_at(self, cursor: int, first: Model) -> Model:
        """Return the model that takes a row. first: the model of the first row."""
        second = self._second_at(cursor)
        return first if second is None else second.model

    def _second_at(self, cursor: int) -> Second | None:
        return self.second if self.second is not None and cursor >= self.second.row else None

    @property
    def row(self) -> Row:
        return self.table.rows[self.cursor]

    @property
    def done(self) -> bool:
        return self.cursor == len(self.table.rows)

    @property
    def level(self) -> Level:
        """The level of the state."""
        return self.table.rows[-1].lands if self.done else self.row.level

    @property
    def view(self) -> Tensor:
        """The state as the network sees it."""
        return self.level.view(self.state)


def prepare(
    model: Model,
    table: Table,
    conditioning: Conditioning,
    seed: int,
    size: tuple[int, int],
    *,
    image: Image.Image | None = None,
    mask: Image.Image | None = None,
    strength: float = 1.0,
    content: MaskContent = "original",
) -> Job:
    """Return a job at its first row.

    size: width and height in pixels; image (RGB) and mask (L, 0 or 255) have that size. content:
    what the masked part begins with below full strength; "fill" is in the image already. Each
    picture draws its noise from its own CPU generator, in diffusers' order for the task. So a seed
    gives the same picture as in diffusers, and other pictures of the batch never change it. Where
    the latents cover more than the picture, its edge pixels are repeated.

    A network that reads a mask draws without one as with one that is white everywhere: the same
    draws in the same order, and the same picture.
    """
    family = model.family
    generator = torch.Generator().manual_seed(seed)
    shape = family.latent_shape(model, size)

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator).to(model.device)

    def draw_to_encode() -> Tensor:
        # A tiny autoencoder's latents are not sampled, and diffusers draws no noise for them.
        samples = model.vae is None or model.vae.samples
        return draw() if samples else torch.zeros(shape, device=model.device)

    def around(kept: Tensor, painted: Tensor) -> Conditioning:
        # kept: the pixels that are not repainted, gray elsewhere. painted: 1 where they are.
        latents = family.encode_picture(model, kept, draw_to_encode())
        return conditioning.with_extra(torch.cat([painted, latents], dim=1))

    def around_nothing() -> Conditioning:
        cell = family.factor(model)
        gray = torch.zeros(1, 3, shape[2] * cell, shape[3] * cell, device=model.device)
        return around(gray, torch.ones(1, 1, *shape[2:], device=model.device))

    reads_mask = family.reads_mask(model)
    if image is None:
        state = draw() * table.noise_scale
        if reads_mask:
            conditioning = around_nothing()
        return Job(table, conditioning, generator, state, size=size)

    # Full strength with a mask starts from noise alone; without one, from the noised picture.
    from_noise = mask is not None and strength == 1.0
    pixels = covering(model, image)
    latents = None
    if not (reads_mask and from_noise):
        latents = family.encode_picture(model, pixels, draw_to_encode())
    noise = draw()
    if mask is None:
        assert latents is not None
        state = table.rows[0].level.mix(latents, noise)
        if reads_mask:
            conditioning = around_nothing()
        return Job(table, conditioning, generator, state, size=size)

    painted = covering(model, mask).add(1).div(2).round()
    small = F.interpolate(painted, size=shape[2:])  # nearest, as the networks were trained
    if from_noise or latents is None:
        state = noise * table.noise_scale
    else:
        begun = latents
        if content in ("noise", "nothing"):
            inside = noise if content == "noise" else torch.zeros_like(latents)
            begun = torch.where(small > 0.5, inside, latents)
        state = table.rows[0].level.mix(begun, noise)
    known = None
    if reads_mask:
        conditioning = around(pixels * (painted < 0.5), small)
    else:
        draw_to_encode()  # diffusers draws it for both kinds of network
        known = None if latents is None else Known(latents, noise, small)
    canvas = Canvas(image, mask)
    return Job(table, conditioning, generator, state, known, canvas, size=size)


def decode(model: Model, latents: Tensor) -> Image.Image:
    """Return the picture of clean latents, float32 [1, channels, h, w].

    Raises SafelightError if its pixels are not finite.
    """
    return from_tensor(model.family.decode_latents(model, latents))


def cut(
    model: Model, picture: Image.Image, latents: Tensor, size: tuple[int, int] | None
) -> Image.Image:
    """Return a picture of latents, of any scale, without what lies beyond the finished picture.

    size: width and height of the finished picture; None: the latents cover no more.
    """
    if size is None:
        return picture
    reach = model.family.factor(model)
    width = round(picture.width * size[0] / (latents.shape[3] * reach))
    height = round(picture.height * size[1] / (latents.shape[2] * reach))
    shown = max(width, 1), max(height, 1)
    return picture if shown == picture.size else picture.crop((0, 0, *shown))


def advance(model: Model, jobs: list[Job]) -> None:
    """Take each job one row further, with one call of the network for all.

    The jobs' states have one shape, their conditionings one `call_key`, and their plans are equal;
    samplers, steps, tasks and guidance may differ. Raises NotFiniteError for jobs whose new state
    is not finite, after the others have taken the step; those jobs stay at their row.
    """
    asked, kept = [job.asked for job in jobs], [job.kept for job in jobs]
    evaluations = [conditioning.evaluations for conditioning in asked]
    plan, states = jobs[0].plan(model), [job.state for job in jobs]
    reuse = gather(plan, kept, evaluations)
    with int8.asked(plan.int8):
        cleans = estimate(model, states, [job.row for job in jobs], asked, reuse)
    scatter(reuse, kept, id(model), evaluations, [job.words for job in jobs])
    lost = [job for job, clean in zip(jobs, cleans, strict=True) if not _step(job, clean)]
    if lost:
        advice = "" if model.dtype == torch.float32 else "dtype float32, or "
        raise NotFiniteError(
            f"NaN at step {lost[0].cursor + 1} of {len(lost[0].table.rows)}: "
            f"try {advice}a lower guidance_scale",
            lost,
        )


def _step(job: Job, unclipped: Tensor) -> bool:
    """Take the step of a row; return False, and leave the job at it, if the state is not finite."""
    row, table = job.row, job.table
    clean = clip_or_threshold(unclipped, table.clip, table.threshold)
    job.clean = clean
    job.past_states.appendleft(job.state)
    job.past_cleans.appendleft(clean)
    state = torch.zeros_like(job.state)
    for weight, past in zip(row.a, job.past_states, strict=False):
        state = state + weight * past
    for weight, past in zip(row.b, job.past_cleans, strict=False):
        state = state + weight * past
    if row.clip_correction:
        state = state + row.clip_correction * (clean - unclipped)
    if row.c is not None:
        fresh = torch.randn(job.state.shape, generator=job.generator)
        state = state + row.c * fresh.to(state.device)
    # Before the known part is put back, which would hide what the network returned there.
    if not torch.isfinite(state).all():
        return False
    if job.known is not None:
        last = job.cursor == len(table.rows) - 1
        state = job.known.put_back(state, Level(1.0, 0.0) if last else row.lands)
    job.state = state
    job.cursor += 1
    _forget(job)
    return True


def _forget(job: Job) -> None:
    """Drop the past states and estimates that no later row uses."""
    rest = job.table.rows[job.cursor :]
    states = max((len(row.a) for row in rest), default=1) - 1
    cleans = max((len(row.b) for row in rest), default=1) - 1
    while len(job.past_states) > states:
        job.past_states.pop()
    while len(job.past_cleans) > cleans:
        job.past_cleans.pop()


def finish(model: Model, job: Job) -> Image.Image:
    """Return the picture of a job that is done; see `Canvas` for one with a mask.

    Raises SafelightError if the picture is not finite.
    """
    if model.device.type == "cpu":
        memory.give_back()  # the steps' activations, as those of the decoder are the largest
    latents = final_latents(job)
    painted = cut(model, decode(model, latents), latents, job.size)
    return painted if job.canvas is None else job.canvas.with_painted(painted)


def final_latents(job: Job) -> Tensor:
    """Return the last state as the network would see it, as some samplers end above sigma 0."""
    if job.known is None:
        return job.view
    # put_back made the known part clean; only the painted part is at the last level.
    return torch.where(job.known.mask > 0.5, job.view, job.state)
