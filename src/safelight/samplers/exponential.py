"""Samplers that take the step in lambda = −log sigma exactly, and D or ε as a polynomial in it.

With r = next sigma/sigma = e^(−h), first order is x̃₊ = r·x̃ + (1 − r)·D, DDIM again. Higher orders
estimate how D changes from earlier rows. DEIS does the same with ε in place of D.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from safelight.levels import Floats, Grid, sigma_grid
from safelight.samplers.rows import D, Mix, Row, Table, make_row, noise, x
from safelight.schedule import SchedulerConfig


def _table(config: SchedulerConfig, grid: Grid, skip: int, rows: list[Row]) -> Table:
    scale = math.hypot(1.0, float(grid.sigmas[skip]))
    if config.thresholding:
        kept = (config.dynamic_thresholding_ratio, config.sample_max_value)
        return Table(tuple(rows), scale, threshold=kept)
    return Table(tuple(rows), scale)


def _gap(sigma: float, next_sigma: float) -> float:
    """h, the length of a step in lambda; infinite to a clean picture."""
    return math.log(sigma / next_sigma) if next_sigma > 0 else math.inf


def dpmpp_2m(config: SchedulerConfig, steps: int, skip: int, eta: float) -> Table:
    """DPM-Solver++(2M), arXiv 2211.01095, algorithm 2; 3M where the config's solver_order is 3."""
    return _multistep(config, steps, skip, stochastic=False)


def dpmpp_2m_sde(config: SchedulerConfig, steps: int, skip: int, eta: float) -> Table:
    """SDE-DPM-Solver++(2M), arXiv 2211.01095, section 5: the same on the reverse SDE."""
    return _multistep(config, steps, skip, stochastic=True)


def _multistep(config: SchedulerConfig, steps: int, skip: int, *, stochastic: bool) -> Table:
    # A rounded cosine schedule is too coarse near pure noise, so there karras keeps fractions;
    # they are then cut off, for the network is given whole timesteps.
    rounded = () if config.beta_schedule == "squaredcos_cap_v2" else ("karras",)
    grid = sigma_grid(config, steps, whole=True, rounded=rounded)
    sigmas = grid.sigmas
    few = config.lower_order_final and steps < 15
    rows = []
    for i in range(skip, steps):
        row, s, t = i - skip, float(sigmas[i]), float(sigmas[i + 1])
        order = min(config.solver_order, row + 1)
        if i == steps - 1 and (config.euler_at_final or few or config.final_sigmas_type == "zero"):
            order = 1
        elif i == steps - 2 and few:
            order = min(order, 2)
        r = t / s
        length = _gap(s, t) * (2 if stochastic else 1)
        kept = r * r if stochastic else r
        after = kept * x(row) + (1 - kept) * D(row)
        if order > 1:
            h, h0 = _gap(s, t), _gap(sigmas[i - 1], s)
            first = (D(row) - D(row - 1)) * (h / h0)
            slope = 1 - (1 - kept) / length if length else 0.0
            if order == 2:
                midpoint = config.solver_type != "heun"
                after = after + first * ((1 - kept) / 2 if midpoint else slope)
            else:
                h1 = _gap(sigmas[i - 2], sigmas[i - 1])
                second = (D(row - 1) - D(row - 2)) * (h / h1)
                bend = (first - second) * (h / (h0 + h1))
                curve = (kept - 1 + length) / length**2 if length else 0.5
                # Under noise the half has the other sign in the known scheduler.
                curve += 0.5 if stochastic else -0.5
                after = after + slope * (first + bend * (h0 / h)) - curve * bend
        c = t * math.sqrt(1 - r * r) if stochastic else None
        rows.append(make_row(row, s, grid.timesteps[i], t, after, c))
    return _table(config, grid, skip, rows)


def dpmpp_2s(config: SchedulerConfig, steps: int, skip: int, eta: float) -> Table:
    """DPM-Solver++(2S), arXiv 2211.01095, algorithm 1, on rows that alternate in order.

    Each second row goes back to the state before the first. solver_order 3 has rows in threes
    (DPM-Solver-3, arXiv 2206.00927).
    """
    grid = sigma_grid(config, steps, whole=True, rounded=("karras",))
    sigmas = grid.sigmas
    orders = _single_orders(config, steps)
    rows = []
    for i in range(skip, steps):
        row, s, t = i - skip, float(sigmas[i]), float(sigmas[i + 1])
        order = min(orders[i], row + 1)
        base, origin = row - order + 1, float(sigmas[i - order + 1])
        r, h = t / origin, _gap(origin, t)
        after = r * x(base) + (1 - r) * D(base)
        slope = 1 - (1 - r) / h if h else 0.0
        if order == 2:
            first = (D(row) - D(base)) * (h / _gap(origin, s))
            midpoint = config.solver_type != "heun"
            after = after + first * ((1 - r) / 2 if midpoint else slope)
        elif order == 3:
            r0, r1 = _gap(origin, s) / h, _gap(origin, sigmas[i - 1]) / h
            near, far = (D(base + 1) - D(base)) / r1, (D(row) - D(base)) / r0
            if config.solver_type != "heun":
                after = after + slope * far
            else:
                curve = (r - 1 + h) / h**2 - 0.5
                after = after + slope * (r0 * near - r1 * far) / (r0 - r1)
                after = after - curve * 2 * (far - near) / (r0 - r1)
        rows.append(make_row(row, s, grid.timesteps[i], t, after))
    return _table(config, grid, skip, rows)


def _single_orders(config: SchedulerConfig, steps: int) -> list[int]:
    """The order of each row: 1, 2, 1, 2 … or 1, 2, 3, 1, 2, 3 … with low ones at the end."""
    top = config.solver_order
    lower = config.lower_order_final or steps % top != 0 or config.final_sigmas_type == "zero"
    orders = [1 + i % top for i in range(steps)]
    if lower and top > 1 and steps % top == 0:
        orders[-2:] = [1, 1] if top == 2 else [2, 1]
    if config.final_sigmas_type == "zero":
        orders[-1] = 1
    return orders


def unipc(config: SchedulerConfig, steps: int, skip: int, eta: float) -> Table:
    """UniPC with B(h) of either kind, arXiv 2302.04867, algorithms 5 to 8, on D.

    Each row first corrects the state it was handed, now that D is known there, and then predicts
    the next. The correction is a change of the state by a combination of D alone, so one table
    row holds both; it changes the state as handed on, even where an inpainting mask has overwritten
    it.
    """
    grid = sigma_grid(config, steps, whole=True, rounded=("karras",), repeat_last=True)
    sigmas = grid.sigmas
    rows: list[Row] = []
    order, predicted = 1, Mix({})
    for i in range(skip, steps):
        row, s, t = i - skip, float(sigmas[i]), float(sigmas[i + 1])
        state = x(row)
        if row > 0 and i - 1 not in config.disable_corrector:
            corrected = _unified(config, sigmas, i - 1, order, row, corrector=True)
            state = state + corrected - predicted
        order = min(config.solver_order, row + 1)
        if config.lower_order_final:
            order = min(order, steps - i)
        predicted = _unified(config, sigmas, i, order, row, corrector=False)
        rows.append(make_row(row, s, grid.timesteps[i], t, (t / s) * state + predicted))
    return _table(config, grid, skip, rows)


def _unified(
    config: SchedulerConfig, sigmas: Floats, at: int, order: int, row: int, *, corrector: bool
) -> Mix:
    """What D adds in the step from sigmas[at], as predictor at `row` or as its corrector after."""
    base = row - corrector
    h = _gap(sigmas[at], sigmas[at + 1])
    lost = -math.expm1(-h)
    after = lost * D(base)
    if (order == 1 and not corrector) or h in (0, math.inf):
        return after
    ratios = [_gap(sigmas[at - k], sigmas[at]) / -h for k in range(1, order)]
    changes = [(D(base - k) - D(base)) / ratio for k, ratio in enumerate(ratios, start=1)]
    big = h if config.solver_type == "bh1" else lost
    # Moments of the exact step that the weights have to meet, one for each order.
    moments, phi, factorial = [], lost / h - 1, 1
    for k in range(1, order + 1):
        moments.append(phi * factorial / -big)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    if corrector:
        ratios.append(1.0)
        changes.append(D(row) - D(base))
    count = len(ratios)
    if order + corrector == 2:
        weights: Sequence[float] = [0.5]
    else:
        powers = np.vander(ratios, count, increasing=True).T
        weights = np.linalg.solve(powers, moments[:count]).tolist()
    for weight, change in zip(weights, changes, strict=True):
        after = after + (big * weight) * change
    return after


def deis(config: SchedulerConfig, steps: int, skip: int, eta: float) -> Table:
    """DEIS with polynomials in log sigma (ρAB-DEIS), arXiv 2204.13902, section 3."""
    settings = replace(config, final_sigmas_type="sigma_min")
    grid = sigma_grid(settings, steps, whole=True, rounded=("karras",), repeat_last=True)
    sigmas = grid.sigmas
    few = config.lower_order_final and steps < 15
    rows = []
    for i in range(skip, steps):
        row = i - skip
        order = min(config.solver_order, row + 1)
        if few:
            order = min(order, steps - i)
        nodes = sigmas[i - order + 1 : i + 1][::-1]
        after = x(row)
        for back, weight in enumerate(_log_integrals(nodes, sigmas[i], sigmas[i + 1])):
            after = after + weight * noise(row - back, nodes[back])
        rows.append(make_row(row, sigmas[i], grid.timesteps[i], sigmas[i + 1], after))
    return _table(config, grid, skip, rows)


def _log_integrals(nodes: Floats, start: float, end: float) -> list[float]:
    """∫ dρ from start to end of each Lagrange polynomial in log ρ over the nodes, at most three."""

    def primitives(rho: float) -> np.ndarray:
        log = math.log(rho)
        return rho * np.array([log**2 - 2 * log + 2, log - 1, 1.0])

    logs = np.log(nodes)
    change = primitives(end) - primitives(start)
    weights = []
    for k, log in enumerate(logs):
        others = np.delete(logs, k)
        polynomial = np.atleast_1d(np.poly(others)) / np.prod(log - others)
        weights.append(float(polynomial @ change[-len(nodes) :]))
    return weights
