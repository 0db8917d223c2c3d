"""Samplers on the straight line of flow matching: alpha = 1 − t, sigma = t.

At t = 1 there is no picture in the state: alpha is 0 and sigma/alpha infinite. On a Gaussian the
ideal estimate and the exact path are known in closed form, so there is no chance in these tests.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest

from safelight.sampling import Grid, Level, Row
from safelight.sampling.euler import euler, heun
from safelight.sampling.exponential import deis, dpmpp_2m, dpmpp_2s, unipc

MEAN, DEVIATION = 0.4, 0.6
Formula = Callable[[Grid], list[Row]]


def flow(steps: int, start: float = 1.0, end: float = 0.0) -> Grid:
    """Return the levels of flow matching, evenly spaced in t."""
    times = [start + (end - start) * i / steps for i in range(steps + 1)]
    levels = tuple(Level(1 - t, t) for t in times)
    return Grid(levels, tuple(1000 * t for t in times[:-1]), start)


def ideal(level: Level, x: tuple[float, float]) -> tuple[float, float]:
    """Return E[clean | x], as a constant and the weight of the first noise."""
    a, s = level.alpha, level.sigma
    gain = a * DEVIATION**2 / (a**2 * DEVIATION**2 + s**2)
    return MEAN + gain * (x[0] - a * MEAN), gain * x[1]


def walk(rows: Sequence[Row], start: tuple[float, float]) -> tuple[float, float]:
    """Return the state after the rows: its mean, and the weight of its starting noise."""
    xs, ds = [start], []
    for row in rows:
        ds.insert(0, ideal(row.level, xs[0]))
        parts = [*zip(row.a, xs, strict=False), *zip(row.b, ds, strict=False)]
        xs.insert(0, (sum(w * v[0] for w, v in parts), sum(w * v[1] for w, v in parts)))
    return xs[0]


def exact(level: Level, end: Level, start: tuple[float, float]) -> tuple[float, float]:
    """Return the exact path: it keeps the distance to the mean, in standard deviations."""

    def spread(at: Level) -> float:
        return math.hypot(at.alpha * DEVIATION, at.sigma)

    scale = spread(end) / spread(level)
    return end.alpha * MEAN + scale * (start[0] - level.alpha * MEAN), scale * start[1]


def error(formula: Formula, grid: Grid) -> float:
    start = (grid.levels[0].alpha * MEAN, 1.0)
    found = walk(formula(grid), start)
    return math.dist(found, exact(grid.levels[0], grid.levels[-1], start))


def full(formula: Callable[..., list[Row]]) -> Formula:
    """Return the formula at full order to the last row, for walks that end above t = 0."""
    return lambda grid: formula(grid, last_orders=())


SAMPLERS: dict[str, Formula] = {
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2s": dpmpp_2s,
    "unipc": unipc,
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_from_pure_noise_to_the_gaussian(sampler: str) -> None:
    """Mean and standard deviation come out, the closer the more steps there are."""
    apart = []
    for steps in (50, 400):
        mean, deviation = walk(SAMPLERS[sampler](flow(steps)), (0.0, 1.0))
        assert mean == pytest.approx(MEAN, abs=1e-9)
        apart.append(abs(deviation / DEVIATION - 1))
    # Order 1 of euler at least: an eighth.
    assert apart[1] < 0.005
    assert apart[1] < apart[0] / 7


@pytest.mark.parametrize("start", [1.0, 0.9])
@pytest.mark.parametrize(
    ("sampler", "formula", "low", "high"),
    [
        ("euler", euler, 0.9, 1.1),
        ("heun", heun, 1.9, 2.1),
        ("dpmpp_2m", full(dpmpp_2m), 1.9, 2.2),
        ("dpmpp_2s", dpmpp_2s, 1.8, 2.1),
        # UniPC-2 with its corrector is of order 3. From t = 1 its first step, which is of first
        # order, errs the other way, so the sum falls faster for a while.
        ("unipc", full(unipc), 2.8, 4.0),
    ],
)
def test_order_of_convergence(
    sampler: str, formula: Formula, low: float, high: float, start: float
) -> None:
    """With twice the steps, the error falls by 2 to the order, also from pure noise."""
    errors = [error(formula, flow(steps, start, 0.1)) for steps in (50, 100, 200)]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(low <= order <= high for order in orders), (orders, errors)


def test_deis_takes_any_level_but_pure_noise() -> None:
    errors = [error(full(deis), flow(steps, 0.9, 0.1)) for steps in (50, 100, 200)]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(1.9 <= order <= 2.1 for order in orders), (orders, errors)


@pytest.mark.parametrize("formula", SAMPLERS.values(), ids=SAMPLERS)
def test_a_finished_picture_stays(formula: Formula) -> None:
    """If state and estimates are of one picture, each row lands on it: Σa·α + Σb = α₊."""
    rows = formula(flow(10))
    for i, row in enumerate(rows):
        past = [rows[i - k].level.alpha for k in range(len(row.a))]
        total = sum(w * alpha for w, alpha in zip(row.a, past, strict=True)) + sum(row.b)
        assert total == pytest.approx(row.lands.alpha, abs=1e-12)


def test_eulers_row_is_that_of_flow_matching() -> None:
    """x₊ = (σ₊/σ)·x + (1 − σ₊/σ)·D, which is x + (t₊ − t)·v with v = (x − D)/t."""
    for row in euler(flow(7)):
        kept = row.lands.sigma / row.level.sigma
        assert row.a == pytest.approx((kept,), abs=1e-12)
        assert row.b == pytest.approx((1 - kept,))


@pytest.mark.parametrize("sigma", [0.0, 0.03, 1.0, 14.6, 1e4])
def test_variance_exploding_levels_are_seen_at_unit_variance(sigma: float) -> None:
    """The network sees cos φ·clean + sin φ·noise."""
    level = Level.exploding(sigma)
    assert math.hypot(level.alpha / level.norm, level.sigma / level.norm) == pytest.approx(1.0)
    assert level.view(level.mix(2.0, 3.0)) == pytest.approx((2.0 + 3.0 * sigma) / level.norm)
