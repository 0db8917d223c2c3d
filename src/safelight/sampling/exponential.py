"""Exponential integrators: they solve the linear part of each step exactly.

With λ = log(alpha/sigma), h = λ₊ − λ and r = e^(−h), the step of first order is

    x₊ = (sigma₊/sigma)·x + alpha₊·(1 − r)·D

which is DDIM. Higher orders estimate from earlier rows how D changes with λ; DEIS uses ε instead of
D. All work at any levels, also those of flow matching. At pure noise (alpha 0) h is infinite: the
first step has order 1, and later steps that would look back to it have a lower order.

Each function returns rows. grid: the levels; skip: the number of first steps to leave out.
last_orders: the highest order of each of the last rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from safelight.sampling.rows import D, Grid, Level, Mix, Row, make_row, noise, steps_of, x


def _gap(level: Level, after: Level) -> float:
    """Return h, the length of a step in λ; infinite from pure noise and to a clean picture."""
    if after.ratio == 0 or level.ratio == math.inf:
        return math.inf
    return math.log(level.ratio / after.ratio)


def _order(order: int, row: int, rows: int, last_orders: Sequence[int]) -> int:
    """Return the order of a row: at most `order`, the rows so far, and its entry in last_orders."""
    at = row - (rows - len(last_orders))
    return min(order, row + 1, last_orders[at] if at >= 0 else order)


def dpmpp_2m(
    grid: Grid,
    skip: int = 0,
    *,
    order: int = 2,
    last_orders: Sequence[int] = (1,),
    slope: Literal["midpoint", "heun"] = "midpoint",
    stochastic: bool = False,
) -> list[Row]:
    """DPM-Solver++(2M), arXiv:2211.01095, algorithm 2; (3M) with order 3.

    slope: the weight of the change of D, as `solver_type` in diffusers.
    stochastic: SDE-DPM-Solver++ (section 5), the same for the reverse SDE, with fresh noise.
    """
    levels, rows = grid.levels, []
    steps = steps_of(grid, skip)
    for row, (s, t, time) in enumerate(steps):
        i = skip + row
        here = _order(order, row, len(steps), last_orders)
        r = t.ratio / s.ratio
        kept = r * r if stochastic else r
        clean = (1 - kept) * D(row)
        if here > 1:
            h, h0 = _gap(s, t), _gap(levels[i - 1], s)
            length = h * (2 if stochastic else 1)
            first = (D(row) - D(row - 1)) * (h / h0)
            weight = 1 - (1 - kept) / length if length else 0.0
            if here == 2:
                clean = clean + first * ((1 - kept) / 2 if slope == "midpoint" else weight)
            else:
                h1 = _gap(levels[i - 2], levels[i - 1])
                second = (D(row - 1) - D(row - 2)) * (h / h1)
                bend = (first - second) * (h / (h0 + h1))
                curve = (kept - 1 + length) / length**2 if length else 0.5
                # With fresh noise, diffusers adds ½ instead of subtracting it.
                curve += 0.5 if stochastic else -0.5
                clean = clean + weight * (first + bend * (h0 / h)) - curve * bend
        after = (t.sigma / s.sigma) * (r if stochastic else 1.0) * x(row) + t.alpha * clean
        c = t.sigma * math.sqrt(1 - r * r) if stochastic else None
        rows.append(make_row(row, s, time, t, after, c))
    return rows


def dpmpp_2s(
    grid: Grid,
    skip: int = 0,
    *,
    orders: Sequence[int] | None = None,
    slope: Literal["midpoint", "heun"] = "midpoint",
) -> list[Row]:
    """DPM-Solver++(2S), arXiv:2211.01095, algorithm 1; with orders 1, 2, 3, 1 …
    DPM-Solver-3, arXiv:2206.00927.

    orders: one for each step of the grid. A row of order 2 starts from the state of the row
    before it, a row of order 3 from the state two rows before. None: 1, 2, 1, 2 …, and 1 at last.
    slope: as in `dpmpp_2m`.
    """
    levels, rows = grid.levels, []
    if orders is None:
        orders = [1 + i % 2 for i in range(grid.steps - 1)] + [1]
    for row, (s, t, time) in enumerate(steps_of(grid, skip)):
        i = skip + row
        order = min(orders[i], row + 1)
        if levels[i - order + 1].ratio == math.inf:
            order = 1
        base, origin = row - order + 1, levels[i - order + 1]
        r, h = t.ratio / origin.ratio, _gap(origin, t)
        clean = (1 - r) * D(base)
        weight = 1 - (1 - r) / h if h else 0.0
        if order == 2:
            first = (D(row) - D(base)) * (h / _gap(origin, s))
            clean = clean + first * ((1 - r) / 2 if slope == "midpoint" else weight)
        elif order == 3:
            r0, r1 = _gap(origin, s) / h, _gap(origin, levels[i - 1]) / h
            near, far = (D(base + 1) - D(base)) / r1, (D(row) - D(base)) / r0
            if slope == "midpoint":
                clean = clean + weight * far
            else:
                curve = (r - 1 + h) / h**2 - 0.5
                clean = clean + weight * (r0 * near - r1 * far) / (r0 - r1)
                clean = clean - curve * 2 * (far - near) / (r0 - r1)
        after = (t.sigma / origin.sigma) * x(base) + t.alpha * clean
        rows.append(make_row(row, s, time, t, after))
    return rows


def unipc(
    grid: Grid,
    skip: int = 0,
    *,
    order: int = 2,
    last_orders: Sequence[int] = (2, 1),
    b: Literal["bh1", "bh2"] = "bh2",
    uncorrected: Sequence[int] = (),
) -> list[Row]:
    """UniPC for D, arXiv:2302.04867, algorithms 5 to 8, with either B(h).

    Each row first corrects its state, now that D is known there, and then predicts the next one.
    The correction adds a combination of D to the state, so one row of the table holds both. It is
    added even where inpainting has put the known part back.

    b: which B(h). uncorrected: steps of the grid whose result is not corrected.
    """
    levels, rows = grid.levels, []
    steps = steps_of(grid, skip)
    here, predicted = 1, Mix({})
    for row, (s, t, time) in enumerate(steps):
        i = skip + row
        state = x(row)
        if row > 0 and i - 1 not in uncorrected:
            corrected = _unified(levels, i - 1, here, row, b, corrector=True)
            state = state + s.alpha * (corrected - predicted)
        here = _order(order, row, len(steps), last_orders)
        predicted = _unified(levels, i, here, row, b, corrector=False)
        after = (t.sigma / s.sigma) * state + t.alpha * predicted
        rows.append(make_row(row, s, time, t, after))
    return rows


def _unified(
    levels: Sequence[Level], at: int, order: int, row: int, b: str, *, corrector: bool
) -> Mix:
    """Return what D adds to the state in the step from levels[at], divided by the next alpha.

    row: the row of that step, or with `corrector` the next one, where D at the end is known.
    """
    base = row - corrector
    h = _gap(levels[at], levels[at + 1])
    lost = -math.expm1(-h)
    after = lost * D(base)
    if (order == 1 and not corrector) or h in (0, math.inf):
        return after
    gaps = [_gap(levels[at - k], levels[at]) for k in range(1, order)]
    ratios = [gap / -h for gap in gaps if gap < math.inf]
    order = len(ratios) + 1
    changes = [(D(base - k) - D(base)) / ratio for k, ratio in enumerate(ratios, start=1)]
    big = h if b == "bh1" else lost
    # Moments of the exact step, one for each order; the weights have to match them.
    moments, phi, factorial = [], lost / h - 1, 1
    for k in range(1, order + 1):
        moments.append(phi * factorial / -big)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    if corrector:
        ratios.append(1.0)
        changes.append(D(row) - D(base))
    if not ratios:
        return after
    count = len(ratios)
    if order + corrector == 2:
        weights: Sequence[float] = [0.5]
    else:
        powers = np.vander(ratios, count, increasing=True).T
        weights = np.linalg.solve(powers, moments[:count]).tolist()
    for weight, change in zip(weights, changes, strict=True):
        after = after + (big * weight) * change
    return after


def deis(
    grid: Grid, skip: int = 0, *, order: int = 2, last_orders: Sequence[int] = ()
) -> list[Row]:
    """DEIS with polynomials in log(sigma/alpha) (ρAB-DEIS), arXiv:2204.13902, section 3.

    The grid must not end at sigma 0.
    """
    rows = []
    steps = steps_of(grid, skip)
    for row, (s, t, time) in enumerate(steps):
        i = skip + row
        here = _order(order, row, len(steps), last_orders)
        nodes = grid.levels[i - here + 1 : i + 1][::-1]
        after = x(row) / s.alpha
        weights = _log_integrals([node.ratio for node in nodes], s.ratio, t.ratio)
        for back, weight in enumerate(weights):
            after = after + weight * noise(row - back, nodes[back])
        rows.append(make_row(row, s, time, t, t.alpha * after))
    return rows


def _log_integrals(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """Return the integral over ρ from start to end of each Lagrange polynomial in log ρ.

    nodes: at most 3.
    """

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
