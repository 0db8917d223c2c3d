"""The noise levels that a model was trained on, and schedules of sigmas.

A trained level has three names, for a picture z and unit noise ε:

- the timestep t, the index that the network was trained with, 0 … num_train_timesteps − 1;
- ᾱ, as in √ᾱ·z + √(1 − ᾱ)·ε, what the network sees (variance preserving);
- sigma = √((1 − ᾱ)/ᾱ), as in z + sigma·ε, the state of the samplers (variance exploding).

Levels are rounded to float32 where training code rounds them, so these are the numbers that the
network has seen. All that follows is float64. Nothing here needs torch.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from safelight.sampling.schedule import SchedulerConfig

Floats = NDArray[np.float64]


def alphas_cumprod(config: SchedulerConfig, floor: float = 2.0**-24) -> Floats:
    """Return ᾱ of each timestep, shape (num_train_timesteps,), falling.

    With zero-terminal-SNR rescaling (arXiv:2305.08891, algorithm 1) the last level is pure noise,
    ᾱ = 0 and sigma infinite; `floor` takes the place of that ᾱ.
    """
    alphas = np.float32(1) - _betas(config)
    if config.rescale_betas_zero_snr:
        roots = np.sqrt(_cumprod(alphas))
        first, last = roots[0], roots[-1]
        squares = ((roots - last) * (first / (first - last))) ** 2
        # Training code goes through betas, and each conversion rounds.
        ratios = np.concatenate([squares[:1], squares[1:] / squares[:-1]])
        alphas = np.float32(1) - (np.float32(1) - ratios)
    bars = _cumprod(alphas).astype(np.float64)
    if config.rescale_betas_zero_snr:
        bars[-1] = floor
    return bars


def _betas(config: SchedulerConfig) -> NDArray[np.float32]:
    count = config.num_train_timesteps
    if config.trained_betas is not None:
        return np.array(config.trained_betas, dtype=np.float32)
    if config.beta_schedule == "squaredcos_cap_v2":

        def bar(t: float) -> float:
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

        return np.array(
            [min(1 - bar((i + 1) / count) / bar(i / count), 0.999) for i in range(count)],
            dtype=np.float32,
        )
    if config.beta_schedule == "scaled_linear":
        return _linspace32(config.beta_start**0.5, config.beta_end**0.5, count) ** 2
    return _linspace32(config.beta_start, config.beta_end, count)


def _linspace32(start: float, end: float, count: int) -> NDArray[np.float32]:
    """Return evenly spaced float32 numbers, bit for bit those of torch.linspace.

    torch counts from both ends to the middle, with a step rounded to float32 and one rounding for
    each product and sum.
    """
    first, last = np.float32(start), np.float32(end)
    if count == 1:
        return np.array([first])
    step = np.float64((last - first) / np.float32(count - 1))
    i = np.arange(count)
    walked = np.where(i < count // 2, first + step * i, last - step * (count - 1 - i))
    return walked.astype(np.float32)


def _cumprod(alphas: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return running products as torch computes them: in float64, each rounded to float32."""
    return np.cumprod(alphas.astype(np.float64)).astype(np.float32)


def sigmas_of(bars: Floats) -> Floats:
    """Return sigma of each ᾱ, rounded to float32 as the training schedule is."""
    bars32 = bars.astype(np.float32)
    return np.sqrt((np.float32(1) - bars32) / bars32).astype(np.float64)


def spaced(
    config: SchedulerConfig, steps: int, *, fractional: bool = False, spare: bool = False
) -> Floats:
    """Return `steps` falling timesteps, spaced by config.timestep_spacing (2305.08891, table 2).

    fractional: linspace timesteps are not rounded. spare: leading and linspace make one timestep
    more and leave out the last, for solvers that step to the end of the schedule by themselves.
    """
    total = config.num_train_timesteps
    # Leaves out the noisiest levels: those whose lambda, −log sigma, is below lambda_min_clipped.
    loudest = math.exp(min(-config.lambda_min_clipped, 700.0))
    top = int(np.searchsorted(sigmas_of(alphas_cumprod(config)), loudest, side="right"))
    count = steps + spare
    if config.timestep_spacing == "trailing":
        # Rounding can let in the end of the range, which would be timestep −1.
        times = np.round(np.arange(top, 0, -total / steps))[:steps] - 1
    else:
        if config.timestep_spacing == "linspace":
            times = np.linspace(0, top - 1, count)
            times = times.astype(np.float32).astype(np.float64) if fractional else np.round(times)
        else:
            times = np.arange(count, dtype=np.float64) * (top // count)
        times = times[::-1][:steps]
        if config.timestep_spacing == "leading":
            times = times + config.steps_offset
    return times


def sigma_to_timestep(sigmas: Floats, trained: Floats) -> Floats:
    """Return the fractional timestep of each sigma: linear in log sigma between trained levels.

    trained: sigma of each timestep, rising. Sigmas outside that range get its first or last one.
    """
    logs = np.log(trained.astype(np.float32))
    wanted = np.log(np.maximum(sigmas, 1e-10))
    low = np.clip(np.searchsorted(logs, wanted, side="right") - 1, 0, len(logs) - 2)
    part = np.clip((logs[low] - wanted) / (logs[low] - logs[low + 1]), 0, 1)
    return (1 - part) * low + part * (low + 1)


def karras(high: float, low: float, count: int) -> Floats:
    """Return `count` sigmas from high to low, even in sigma^(1/7) (arXiv:2206.00364, eq. 5)."""
    inverse = 1 / 7
    ramp = np.linspace(0, 1, count)
    return (high**inverse + ramp * (low**inverse - high**inverse)) ** 7.0


def exponential(high: float, low: float, count: int) -> Floats:
    """Return `count` sigmas from high to low, even in log sigma (as in k-diffusion)."""
    return np.exp(np.linspace(math.log(high), math.log(low), count))


def beta(high: float, low: float, count: int) -> Floats:
    """Return `count` sigmas at even quantiles of Beta(0.6, 0.6), arXiv:2407.12173."""
    return low + beta_quantile(1 - np.linspace(0, 1, count), 0.6) * (high - low)


CURVES = {"karras": karras, "exponential": exponential, "beta": beta}


def beta_quantile(q: Floats, a: float) -> Floats:
    """Return the quantiles q, in 0 … 1, of the symmetric distribution Beta(a, a), 0 < a < 1.

    With u = x^a the distribution function is a power series with positive terms (DLMF 8.17.7), so
    Newton's method approaches the root from above. Symmetry keeps x ≤ ½, where each term of the
    series adds a bit of precision.
    """
    n = np.arange(60)
    # (1 − a)ₙ / n! / (a + n), the weights of xⁿ
    weights = np.cumprod(np.append(1.0, (n[1:] - a) / n[1:]))
    series = weights / (a + n)
    complete = math.gamma(a) ** 2 / math.gamma(2 * a)
    tail = np.minimum(q, 1 - q)
    u = tail * a * complete
    for _ in range(20):
        x = np.minimum(u ** (1 / a), 0.5)
        powers = np.vander(x, len(n), increasing=True)
        excess = x**a * (powers @ series) / complete - tail
        u = np.maximum(x**a - excess * a * complete / (powers @ weights), 0.0)
    x = u ** (1 / a)
    return np.where(q <= 0.5, x, 1 - x)
