"""Samplers that integrate the probability flow ODE (arXiv:2206.00364).

With the state x = alpha·clean + sigma·noise, the equation is dx = D·dalpha + ε·dsigma. `euler` and
`heun` work at any levels, also those of flow matching. The others are written for
variance-exploding levels, where alpha is 1 and dx/dsigma = ε.

Each function returns rows. grid: the levels; skip: the number of first steps to leave out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from safelight.sampling.rows import D, Grid, Level, Mix, Row, make_row, noise, steps_of, x


def _change(level: Level, after: Level, clean: Mix, eps: Mix) -> Mix:
    """Return D·Δalpha + ε·Δsigma."""
    return (after.alpha - level.alpha) * clean + (after.sigma - level.sigma) * eps


def euler(grid: Grid, skip: int = 0) -> list[Row]:
    """Euler's method: arXiv:2206.00364, algorithm 1, without its correction. Order 1."""
    return [
        make_row(row, s, time, t, x(row) + _change(s, t, D(row), noise(row, s)))
        for row, (s, t, time) in enumerate(steps_of(grid, skip))
    ]


def heun(grid: Grid, skip: int = 0) -> list[Row]:
    """Heun's method: arXiv:2206.00364, algorithm 1. Order 2, two rows a step.

    The second row uses the mean of the changes at both ends. The last step is one of Euler's.
    """
    steps = steps_of(grid, skip)
    rows: list[Row] = []
    for i, (s, t, time) in enumerate(steps):
        row = 2 * i
        rows.append(make_row(row, s, time, t, x(row) + _change(s, t, D(row), noise(row, s))))
        if i + 1 < len(steps):
            clean = (D(row) + D(row + 1)) / 2
            eps = (noise(row, s) + noise(row + 1, t)) / 2
            after = x(row) + _change(s, t, clean, eps)
            rows.append(make_row(row + 1, t, steps[i + 1][2], t, after))
    return rows


def euler_a(grid: Grid, skip: int = 0) -> list[Row]:
    """Ancestral sampling: Euler's method to a lower level, then noise up to the next.

    As `sample_euler_ancestral` of k-diffusion.
    """
    rows = []
    for row, (s, t, time) in enumerate(steps_of(grid, skip)):
        down, up = _ancestral(s, t)
        rows.append(make_row(row, s, time, t, x(row) + (down - s.sigma) * noise(row, s), up))
    return rows


def dpm2(grid: Grid, skip: int = 0, *, timestep_of: Callable[[float], float]) -> list[Row]:
    """DPM-Solver-2, arXiv:2206.00927, in sigma: the slope at the middle in log sigma. Order 2.

    timestep_of: the network's timestep at a sigma. The row to the middle has the end of the step as
    its `lands`, so inpainting uses that level.
    """
    return _midpoint(grid, skip, timestep_of, lambda s, t: (t.sigma, None))


def dpm2_a(grid: Grid, skip: int = 0, *, timestep_of: Callable[[float], float]) -> list[Row]:
    """dpm2 to a lower level, then noise up to the next (ancestral sampling)."""
    return _midpoint(grid, skip, timestep_of, _ancestral)


def _midpoint(
    grid: Grid,
    skip: int,
    timestep_of: Callable[[float], float],
    target_of: Callable[[Level, Level], tuple[float, float | None]],
) -> list[Row]:
    steps = steps_of(grid, skip)
    rows: list[Row] = []
    for i, (s, t, time) in enumerate(steps):
        row = 2 * i
        if i + 1 == len(steps):
            rows.append(make_row(row, s, time, Level.exploding(0.0), D(row)))
            break
        target, c = target_of(s, t)
        middle = Level.exploding(math.sqrt(s.sigma * target))
        half = x(row) + (middle.sigma - s.sigma) * noise(row, s)
        rows.append(make_row(row, s, time, t, half))
        after = x(row) + (target - s.sigma) * noise(row + 1, middle)
        rows.append(make_row(row + 1, middle, timestep_of(middle.sigma), t, after, c))
    return rows


def lms(grid: Grid, skip: int = 0, *, order: int = 4) -> list[Row]:
    """Linear multistep: integrates the polynomial through the last `order` slopes, at most 4.

    As `sample_lms` of k-diffusion. The weights are those of a walk from the start of the grid; a
    walk that skips steps leaves out the slopes that it lacks, as in diffusers.
    """
    rows = []
    for row, (s, t, time) in enumerate(steps_of(grid, skip)):
        at = skip + row
        known = grid.levels[max(at - order + 1, 0) : at + 1][::-1]
        weights = _integrals([level.sigma for level in known], s.sigma, t.sigma)
        after = x(row)
        for back, weight in enumerate(weights[: row + 1]):
            after = after + weight * noise(row - back, known[back])
        rows.append(make_row(row, s, time, t, after))
    return rows


def _integrals(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """Return each Lagrange polynomial's integral from start to end. nodes: at most four."""
    # Two Gauss points integrate cubics exactly.
    half, centre = (end - start) / 2, (end + start) / 2
    points = centre + half * np.array([-1, 1]) / math.sqrt(3)
    weights = []
    for k, node in enumerate(nodes):
        others = np.delete(np.array(nodes), k)
        value = np.prod((points[:, None] - others) / (node - others), axis=1)
        weights.append(float(half * value.sum()))
    return weights


def _ancestral(level: Level, after: Level) -> tuple[float, float]:
    """Return the sigma to go down to and the noise to add: down² + up² = next sigma².

    Computed in float32, as other implementations do: in long steps the difference of squares is
    coarse, and the levels that the network sees depend on it. Where it is 0, down is t²/s.
    """
    s, t = np.float32(level.sigma), np.float32(after.sigma)
    up = np.sqrt(t * t * (s * s - t * t) / (s * s))
    down = np.sqrt(t * t - up * up)
    return float(down if down > 0 else t * t / s), float(up)
