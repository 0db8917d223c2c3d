"""Tables for models of flow matching (arXiv:2210.02747, arXiv:2403.03206).

A state is (1 − t)·clean + t·noise, with t from 1, pure noise, to 0. The network is given 1000·t for
1000 trained timesteps. Times are shifted towards noise, as large pictures need it (2403.03206,
section 5.3.2): by a fixed number, or by one that grows with the number of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safelight.sampling.levels import CURVES
from safelight.sampling.rows import D, Grid, Level, Row, make_row, noise, steps_of
from safelight.sampling.schedule import SchedulerConfig

Times = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Course:
    """How a family walks through the times of flow matching.

    tokens: of the picture that is drawn, for shifts that grow with it. trained: steps are even
    between the first and the last trained time, which are shifted ones, as StableDiffusion3Pipeline
    of diffusers takes them; else from 1 to 1/steps, as FluxPipeline and ZImagePipeline do.
    empirical: the shift depends on the number of steps too, see `empirical_mu`.
    """

    tokens: int = 4096
    trained: bool = False
    empirical: bool = False


def flow_grid(config: SchedulerConfig, steps: int, course: Course) -> Grid:
    """Return the levels of FlowMatchEulerDiscreteScheduler, rounded to float32 as there."""
    total = config.num_train_timesteps
    if course.trained:
        ends = np.array([1.0, 1 / total], np.float32)
        if not config.use_dynamic_shifting:
            ends = _by_ratio(config.shift, ends)
        # As the class does it: in float64, by way of timesteps.
        times = np.linspace(float(ends[0]) * total, float(ends[1]) * total, steps) / total
    else:
        times = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    mu = empirical_mu(course.tokens, steps) if course.empirical else None
    times = stretched(shifted(config, times, course.tokens, mu), config.shift_terminal)
    if config.schedule is not None:
        times = CURVES[config.schedule](float(times[0]), float(times[-1]), steps)
    times = times.astype(np.float32)
    given = times * np.float32(total)
    levels = tuple(Level(float(1 - t), float(t)) for t in (*times, np.float32(0)))
    return Grid(levels, tuple(given.tolist()), levels[0].sigma)


def shifted(config: SchedulerConfig, times: Times, tokens: int, mu: float | None = None) -> Times:
    """Return times moved towards noise.

    tokens: of the picture, for dynamic shifting. mu: the shift, if it does not follow from the
    config's numbers.
    """
    if not config.use_dynamic_shifting:
        return _by_ratio(config.shift, times)
    if mu is None:
        slope = (config.max_shift - config.base_shift) / (
            config.max_image_seq_len - config.base_image_seq_len
        )
        mu = tokens * slope + (config.base_shift - slope * config.base_image_seq_len)
    ratio = math.exp(mu) if config.time_shift_type == "exponential" else mu
    return ratio / (ratio + (1 / times - 1))


def stretched(times: Times, last: float | None) -> Times:
    """Return times moved towards the picture, so that the last of them is `last`; None: as it is.

    What remains to 1 is multiplied by one number, as `stretch_shift_to_terminal` of
    FlowMatchEulerDiscreteScheduler in diffusers does it. A single time is 1, and stays.
    """
    remains = 1 - times
    return times if not last or not remains[-1] else 1 - remains * ((1 - last) / remains[-1])


def shifted_by(config: SchedulerConfig, shift: float) -> SchedulerConfig:
    """Return a config whose times are shifted by a fixed number, for every size and step count."""
    return replace(config, shift=shift, use_dynamic_shifting=False, shift_terminal=None)


def empirical_mu(tokens: int, steps: int) -> float:
    """Return the shift of FLUX.2 for a picture of so many tokens in so many steps.

    It is a line over the tokens for 10 steps and one for 200, and a line between both over the
    steps; beyond 4300 tokens that for 200 steps. The numbers are those of `compute_empirical_mu`
    in diffusers' pipelines of FLUX.2.
    """
    many = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return many
    few = 8.73809524e-05 * tokens + 1.89833333
    return many + (many - few) / 190 * (steps - 200)


def _by_ratio(ratio: float, times: Times) -> Times:
    return ratio * times / (1 + (ratio - 1) * times)


def euler_a(grid: Grid, skip: int = 0) -> list[Row]:
    """Euler's method to a lower level, then noise up to the next.

    The lower time is t₊²/t, so that a long step adds more noise. As
    `sample_euler_ancestral_RF` of ComfyUI with eta 1: the state is scaled to the share of the clean
    picture at the next level, and noise fills what its own noise lacks.
    """
    rows = []
    for row, (s, t, time) in enumerate(steps_of(grid, skip)):
        low = t.sigma**2 / s.sigma
        lower = Level(1 - low, low)
        after = lower.alpha * D(row) + lower.sigma * noise(row, s)
        scale = t.alpha / lower.alpha
        c = math.sqrt(max(t.sigma**2 - (lower.sigma * scale) ** 2, 0.0))
        rows.append(make_row(row, s, time, t, scale * after, c))
    return rows


def lcm(grid: Grid, skip: int = 0) -> list[Row]:
    """The clean estimate, noised anew at each level, for models that were distilled to few steps.

    As FlowMatchEulerDiscreteScheduler of diffusers with stochastic_sampling. The last step adds
    none.
    """
    return [
        make_row(row, s, time, t, t.alpha * D(row), t.sigma)
        for row, (s, t, time) in enumerate(steps_of(grid, skip))
    ]
