"""What a sampler is, written down: rows of numbers, and the algebra that they are made with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One evaluation of the network and the step that follows it.

    With x̃ the state in sigma space (clean picture + sigma·ε) and D the network's clean estimate,

        x̃₊ = Σ a[k]·x̃₋ₖ + Σ b[k]·D₋ₖ + c·ε + raw·(D − D before clipping)

    where x̃₋ₖ and D₋ₖ were the state and the estimate k rows back.
    """

    sigma: float
    """Level as which the state is treated: the network is given x̃/√(1 + sigma²)."""
    timestep: float
    """What the network is told; it may be fractional."""
    next_sigma: float
    """Level of x̃₊; a known picture that is put in its place is noised to this level."""
    a: tuple[float, ...]
    b: tuple[float, ...]
    c: float | None
    """Weight of fresh unit noise. None: none is drawn. 0.0: noise is drawn and has no weight."""
    raw: float = 0.0


@dataclass(frozen=True, slots=True)
class Table:
    """A sampler laid out for one model and a number of steps."""

    rows: tuple[Row, ...]
    noise_scale: float
    """From pure noise ε, the first state is x̃ = noise_scale·ε."""
    clip: float | None = None
    """D is clamped to −clip … clip before use; None: it is left as it is."""
    threshold: tuple[float, float] | None = None
    """(ratio, most): D is thresholded per picture (arXiv 2205.11487): with s the quantile `ratio`
    of |D|, held to 1 … most, D becomes D clamped to −s … s, divided by s. None: it is not."""


class Mix:
    """A linear combination of states x̃ᵢ and clean estimates Dᵢ, i the row that had them.

    Samplers are written as their papers have them, on Mixes in place of tensors; what comes out
    are the weights.
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
        """Weights of the x or D of this row, of one row back, and so on."""
        by_age = {row - i: float(w) for (k, i), w in self.terms.items() if k == kind and w != 0.0}
        return tuple(by_age.get(age, 0.0) for age in range(max(by_age, default=0) + 1))


def x(row: int) -> Mix:
    """The state in sigma space at this row."""
    return Mix({("x", row): 1.0})


def D(row: int) -> Mix:  # noqa: N802, the papers' name
    """The clean estimate made at this row."""
    return Mix({("D", row): 1.0})


def noise(row: int, sigma: float) -> Mix:
    """The noise that the network sees at this row: ε = (x̃ − D)/sigma."""
    return (x(row) - D(row)) / sigma


def make_row(
    row: int,
    sigma: float,
    timestep: float,
    next_sigma: float,
    after: Mix,
    c: float | None = None,
    raw: float = 0.0,
) -> Row:
    """A Row whose step takes the state to `after`."""
    return Row(
        sigma=float(sigma),
        timestep=float(timestep),
        next_sigma=float(next_sigma),
        a=after.weights("x", row),
        b=after.weights("D", row),
        c=None if c is None else float(c),
        raw=float(raw),
    )


# (settings, steps, steps that are skipped at the start, eta) → table
Build = Callable[..., Table]
