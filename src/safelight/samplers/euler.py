"""Samplers that integrate dx̃/dsigma = (x̃ − D)/sigma on a grid of sigmas (arXiv 2206.00364)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from safelight.levels import (
    Floats,
    Grid,
    alphas_cumprod,
    sigma_grid,
    sigma_to_timestep,
    sigmas_of,
)
from safelight.samplers.rows import D, Row, Table, make_row, noise, x
from safelight.schedule import SchedulerConfig


def _table(rows: list[Row], grid: Grid, clip: float | None = None) -> Table:
    if rows and rows[-1].next_sigma > 0:
        # Here the final x̃ itself is the picture; whoever reads the table scales it once more.
        last, scale = rows[-1], math.hypot(1.0, rows[-1].next_sigma)
        a, b = tuple(w * scale for w in last.a), tuple(w * scale for w in last.b)
        rows[-1] = replace(last, a=a, b=b)
    return Table(tuple(rows), grid.initial_sigma, clip=clip)


def euler(config: SchedulerConfig, steps: int, skip: int, eta: float) -> Table:
    """Euler's method (algorithm 1 of the paper, without its correction)."""
    grid = sigma_grid(config, steps)
    rows = []
    for row, (s, t, time) in enumerate(_pairs(grid, skip)):
        rows.append(make_row(row, s, time, t, x(row) + (t - s) * noise(row, s)))
    return _table(rows, grid)


def euler_a(config: SchedulerConfig, steps: int, skip: int, eta: float) -> Table:
    """Euler's method to a lower level, and noise from there up (ancestral sampling)."""
    grid = sigma_grid(config, steps)
    down, up = _ancestral(grid.sigmas)
    rows = []
    for row, (s, t, time) in enumerate(_pairs(grid, skip)):
        after = x(row) + (down[skip + row] - s) * noise(row, s)
        rows.append(make_row(row, s, time, t, after, up[skip + row]))
    return _table(rows, grid)


def heun(config: SchedulerConfig, steps: int, skip: int, eta: float) -> Table:
    """Heun's method (algorithm 1): the mean of the slopes at both ends, two rows a step."""
    grid = sigma_grid(config, steps)
    pairs = _pairs(grid, skip)
    rows: list[Row] = []
    for i, (s, t, time) in enumerate(pairs):
        row = 2 * i
        slope = noise(row, s)
        rows.append(make_row(row, s, time, t, x(row) + (t - s) * slope))
        if i + 1 < len(pairs):
            mean = (slope + noise(row + 1, t)) / 2
            rows.append(make_row(row + 1, t, pairs[i + 1][2], t, x(row) + (t - s) * mean))
    return _table(rows, grid, config.clip_sample_range if config.clip_sample else None)


def dpm2(config: SchedulerConfig, steps: int, skip: int, eta: float) -> Table:
    """DPM-Solver-2 (arXiv 2206.00927) as Karras et al. ran it: the slope midway in log sigma.

    next_sigma of a row that goes midway is the end of its step: that is the level to which the
    known scheduler noises a picture there.
    """
    grid = sigma_grid(config, steps, rounded=("karras",))
    return _midpoint(config, grid, skip, grid.sigmas[1:], None)


def dpm2_a(config: SchedulerConfig, steps: int, skip: int, eta: float) -> Table:
    """dpm2 to a lower level, and noise from there up (ancestral sampling)."""
    grid = sigma_grid(config, steps, rounded=("karras",))
    down, up = _ancestral(grid.sigmas)
    return _midpoint(config, grid, skip, down, up)


def _midpoint(
    config: SchedulerConfig, grid: Grid, skip: int, targets: Floats, up: Floats | None
) -> Table:
    trained = sigmas_of(alphas_cumprod(config))
    pairs = _pairs(grid, skip)
    rows: list[Row] = []
    for i, (s, t, time) in enumerate(pairs):
        row = 2 * i
        if i + 1 == len(pairs):
            rows.append(make_row(row, s, time, 0.0, D(row)))
            break
        target = float(targets[skip + i])
        middle = math.sqrt(s * target)
        rows.append(make_row(row, s, time, t, x(row) + (middle - s) * noise(row, s)))
        middle_time = sigma_to_timestep(np.array([middle]), trained)[0]
        after = x(row) + (target - s) * noise(row + 1, middle)
        c = None if up is None else up[skip + i]
        rows.append(make_row(row + 1, middle, middle_time, t, after, c))
    return _table(rows, grid)


def lms(config: SchedulerConfig, steps: int, skip: int, eta: float) -> Table:
    """Linear multistep of order 4: the integral of the polynomial through the last slopes.

    A walk that starts part of the way takes the weights of full order from its first row, as the
    known scheduler does, though the slopes before it are not there.
    """
    grid = sigma_grid(config, steps)
    rows = []
    for row, (s, t, time) in enumerate(_pairs(grid, skip)):
        at = skip + row
        known = grid.sigmas[max(at - 3, 0) : at + 1][::-1]
        weights = _integrals(known, s, t)
        after = x(row)
        for back, weight in enumerate(weights[: row + 1]):
            after = after + weight * noise(row - back, known[back])
        rows.append(make_row(row, s, time, t, after))
    return _table(rows, grid)


def _integrals(nodes: Floats, start: float, end: float) -> list[float]:
    """∫ of each Lagrange polynomial over the nodes, at most four, from start to end."""
    # Two points integrate cubics exactly.
    half, centre = (end - start) / 2, (end + start) / 2
    points = centre + half * np.array([-1, 1]) / math.sqrt(3)
    weights = []
    for k, node in enumerate(nodes):
        others = np.delete(nodes, k)
        value = np.prod((points[:, None] - others) / (node - others), axis=1)
        weights.append(float(half * value.sum()))
    return weights


def _pairs(grid: Grid, skip: int) -> list[tuple[float, float, float]]:
    """(sigma, next sigma, timestep) of each step."""
    steps = zip(grid.sigmas[:-1], grid.sigmas[1:], grid.timesteps, strict=True)
    return [(float(s), float(t), float(time)) for s, t, time in steps][skip:]


def _ancestral(sigmas: Floats) -> tuple[Floats, Floats]:
    """For each step the level to go down to and the noise to add: down² + up² = next sigma².

    In float32: the difference of squares is coarse for long steps, and what is left of it decides
    which levels the network is asked about. Where nothing is left, it is t²/s, as it should be.
    """
    s, t = sigmas[:-1].astype(np.float32), sigmas[1:].astype(np.float32)
    up = np.sqrt(t**2 * (s**2 - t**2) / s**2)
    down = np.sqrt(t**2 - up**2)
    down = np.where(down > 0, down, t**2 / s)
    return down.astype(np.float64), up.astype(np.float64)
