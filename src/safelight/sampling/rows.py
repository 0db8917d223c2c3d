"""Levels, rows and tables, and the algebra that the samplers are written in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

State = TypeVar("State")
"""A tensor of torch or an array of NumPy: any type with + and * by numbers."""


@dataclass(frozen=True, slots=True)
class Level:
    """A level of noise: its states are alpha·clean + sigma·noise, with noise of variance 1.

    Variance exploding is (1, sigma), variance preserving (cos φ, sin φ), and flow matching
    (1 − t, t). The network is given state / norm.
    """

    alpha: float
    sigma: float
    norm: float = 1.0

    @classmethod
    def exploding(cls, sigma: float) -> Level:
        """Return the variance-exploding level of this sigma for a variance-preserving network.

        The network was trained on cos φ·clean + sin φ·noise with tan φ = sigma, so the state
        clean + sigma·noise is divided by √(1 + sigma²), which is 1/cos φ.
        """
        sigma = float(sigma)
        return cls(1.0, sigma, (1 + sigma**2) ** 0.5)

    @property
    def ratio(self) -> float:
        """sigma/alpha; infinite for pure noise, 0 for a clean picture."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def noise_share(self) -> float:
        """The noise's share of the state's variance, if the clean picture's is 1."""
        return self.sigma**2 / (self.alpha**2 + self.sigma**2)

    def mix(self, clean: State, noise: State) -> State:
        """Return the state of a clean picture and noise at this level."""
        mixed: Any = self.alpha * clean + self.sigma * noise  # type: ignore[operator]
        return mixed

    def view(self, state: State) -> State:
        """Return the network's input for a state of this level."""
        return state / self.norm  # type: ignore[operator]


@dataclass(frozen=True, slots=True)
class Row:
    """One evaluation of the network and the step that follows it.

    With x the state and D the network's estimate of the clean picture,

        x₊ = Σ a[k]·x₋ₖ + Σ b[k]·D₋ₖ + c·ε + clip_correction·(D − D before clipping)

    where x₋ₖ and D₋ₖ are the state and the estimate k rows before.
    """

    level: Level
    """Level of the state, as the sampler assumes it."""
    timestep: float
    """Timestep that the network is given; it may be fractional."""
    lands: Level
    """Level of x₊. Inpainting puts the known part back at this level."""
    a: tuple[float, ...]
    b: tuple[float, ...]
    c: float | None
    """Weight of fresh unit noise. None draws no noise; 0.0 draws it without using it."""
    clip_correction: float = 0.0


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of a sampler for one model and number of steps."""

    rows: tuple[Row, ...]
    noise_scale: float
    """From pure noise ε, the first state is x = noise_scale·ε."""
    clip: float | None = None
    """D is clamped to −clip … clip. None: no clipping."""
    threshold: tuple[float, float] | None = None
    """(ratio, maximum) of dynamic thresholding, arXiv:2205.11487: with s the quantile `ratio` of
    |D|, limited to 1 … maximum, D is clamped to −s … s and divided by s. None: no thresholding."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The levels of n steps, from noisy to clean.

    levels: n + 1 of them. timesteps: n, those that the network is given at each level but the
    last. noise_scale: standard deviation of the first state.
    """

    levels: tuple[Level, ...]
    timesteps: tuple[float, ...]
    noise_scale: float

    @property
    def steps(self) -> int:
        return len(self.timesteps)


class Mix:
    """A linear combination of states and clean estimates, each named by its row.

    Samplers are written with Mixes in place of tensors, so that they read like their papers and
    give the weights of the table.
    """

    __slots__ = ("terms",)

    def __init__(self, terms: Mapping[tuple[str, int], float]) -> None:
        self.terms = dict(terms)

    def __add__(self, other: Mix) -> Mix:
        terms = dict(self.terms)
        for key, weight in other.terms.items():
            terms[key] = terms.get(key, 0.0) + weight
        return Mix(terms)

    def __sub__(self, other: Mix) -> Mix:
        return self + (-1.0) * other

    def __mul__(self, factor: float) -> Mix:
        return Mix({key: weight * factor for key, weight in self.terms.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Mix:
        return self * (1.0 / divisor)

    def weights(self, kind: str, row: int) -> tuple[float, ...]:
        """Return the weights of x or D at this row, one row before, and so on."""
        by_age = {row - i: float(w) for (k, i), w in self.terms.items() if k == kind and w != 0.0}
        return tuple(by_age.get(age, 0.0) for age in range(max(by_age, default=0) + 1))


def x(row: int) -> Mix:
    """Return the state at this row."""
    return Mix({("x", row): 1.0})


def D(row: int) -> Mix:  # noqa: N802, the papers' name
    """Return the clean estimate made at this row."""
    return Mix({("D", row): 1.0})


def noise(row: int, level: Level) -> Mix:
    """Return the noise in the state at this row: ε = (x − alpha·D)/sigma."""
    return (x(row) - level.alpha * D(row)) / level.sigma


def make_row(
    row: int,
    level: Level,
    timestep: float,
    lands: Level,
    after: Mix,
    c: float | None = None,
    clip_correction: float = 0.0,
) -> Row:
    """Return the Row whose step takes the state to `after`."""
    return Row(
        level=level,
        timestep=float(timestep),
        lands=lands,
        a=after.weights("x", row),
        b=after.weights("D", row),
        c=None if c is None else float(c),
        clip_correction=float(clip_correction),
    )


def steps_of(grid: Grid, skip: int) -> Sequence[tuple[Level, Level, float]]:
    """Return (level, next level, timestep) of each step, without the first `skip`."""
    return list(zip(grid.levels[:-1], grid.levels[1:], grid.timesteps, strict=True))[skip:]
