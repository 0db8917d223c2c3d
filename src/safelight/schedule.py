"""The noise levels a model was trained on, and grids of levels to walk down.

A level is told in one of three ways, all for the same picture z and unit noise ε:

- the timestep t, the index that the network was trained with, 0 … num_train_timesteps − 1;
- ᾱ, as in x = √ᾱ·z + √(1 − ᾱ)·ε, the state that the network sees;
- sigma = √((1 − ᾱ)/ᾱ), as in x̃ = x/√ᾱ = z + sigma·ε, the state that the sampler tables speak of.

The levels are rounded to float32 where training code rounds them: these are the very numbers the
network has seen. All that follows is float64. Nothing here needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safelight.errors import SafelightError

Floats = NDArray[np.float64]

SCHEDULES = ("karras", "exponential", "beta")
SPACINGS = ("leading", "linspace", "trailing")

_CHOICES: dict[str, tuple[str, ...]] = {
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "timestep_spacing": SPACINGS,
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
}
_RANGES: dict[str, tuple[float, float]] = {
    "num_train_timesteps": (1, 100_000),
    "beta_start": (1e-12, 0.999),
    "beta_end": (1e-12, 0.999),
    "steps_offset": (0, 100_000),
    "clip_sample_range": (1e-6, 1e6),
    "dynamic_thresholding_ratio": (1e-6, 1.0),
    "sample_max_value": (1.0, 1e6),
    "sigma_min": (1e-6, 1e6),
    "sigma_max": (1e-6, 1e6),
    "solver_order": (1, 3),
    "lambda_min_clipped": (-math.inf, 0.0),
    "original_inference_steps": (1, 100_000),
    "timestep_scaling": (1e-6, 1e6),
}
# Settings that change what a sampler does and that we have in one form alone.
_ONLY: dict[str, Any] = {
    "use_flow_sigmas": False,
    "use_lu_lambdas": False,
    "use_dynamic_shifting": False,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "predict_x0": True,
}


@dataclass(frozen=True)
class SchedulerConfig:
    """A model's `scheduler_config.json`: how it was trained, and how it likes to be sampled.

    `given` holds the keys that the file names. The value of any other key is the default of the
    class of scheduler that reads the file, and classes differ: `resolved` fills them in.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: str = "epsilon"
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    set_alpha_to_one: bool = False
    skip_prk_steps: bool = False
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    variance_type: str = "fixed_small"
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: str = "zero"
    solver_order: int = 2
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    disable_corrector: tuple[int, ...] = ()
    lambda_min_clipped: float = -math.inf
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    given: frozenset[str] = frozenset()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SchedulerConfig:
        """Reads the content of a `scheduler_config.json`; null is the same as absent.

        Raises SafelightError for a setting that is known and cannot be used, naming what can.
        Keys that mean nothing here are ignored.
        """
        if not isinstance(values, Mapping):
            raise SafelightError("the scheduler's config should be a JSON object of settings")
        for key, only in _ONLY.items():
            if values.get(key) not in (None, only):
                raise SafelightError(
                    f"scheduler setting {key} is {values[key]!r:.40}; only {only!r} is supported"
                )
        known = {f.name for f in fields(cls)} - {"given"}
        given = {k: _checked(k, v) for k, v in values.items() if k in known and v is not None}
        config = cls(**given, given=frozenset(given))
        _check_together(config)
        return config

    def to_dict(self) -> dict[str, Any]:
        """What a `scheduler_config.json` of it holds."""
        given = {key: getattr(self, key) for key in sorted(self.given)}
        return {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **given}

    def override(self, **values: Any) -> SchedulerConfig:
        """A copy in which these settings count as named by the file."""
        return SchedulerConfig.from_dict({**{k: getattr(self, k) for k in self.given}, **values})

    def resolved(self, defaults: Mapping[str, Any]) -> SchedulerConfig:
        """The settings as a class of scheduler with these defaults sees them.

        Settings that are not in `defaults` are ones that the class does not know; they are left
        at the values of this class, where they have no effect.
        """
        values = {k: getattr(self, k) if k in self.given else v for k, v in defaults.items()}
        return SchedulerConfig(**values, given=frozenset(values))

    @property
    def schedule(self) -> str | None:
        """The grid that the config asks for, one of SCHEDULES, or None for the model's own."""
        return next((name for name in SCHEDULES if getattr(self, f"use_{name}_sigmas")), None)


def _checked(key: str, value: Any) -> Any:
    """One setting of a config file, converted to its type; SafelightError if it is not usable."""
    default = getattr(SchedulerConfig, key)
    wrong = SafelightError(f"scheduler setting {key} is {value!r:.40}, which is not usable")
    if key in _CHOICES:
        if value not in _CHOICES[key]:
            choices = ", ".join(_CHOICES[key])
            raise SafelightError(f"scheduler setting {key} is {value!r:.40}; known: {choices}")
        return value
    if key in ("trained_betas", "disable_corrector"):
        kind = float if key == "trained_betas" else int
        if not isinstance(value, (list, tuple)) or not all(type(v) in (int, kind) for v in value):
            raise wrong
        return tuple(kind(v) for v in value)
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise wrong
        return value
    low, high = _RANGES[key]
    whole = isinstance(default, int)
    if type(value) not in ((int,) if whole else (int, float)) or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise SafelightError(
            f"scheduler setting {key} is {value!r:.40}; it should be {kind} from {low} to {high}"
        )
    return value if whole else float(value)


def _check_together(config: SchedulerConfig) -> None:
    """Refuses settings that are fine alone and contradict each other."""
    betas = config.trained_betas
    if betas is not None and (
        len(betas) != config.num_train_timesteps or not all(0 < b < 1 for b in betas)
    ):
        raise SafelightError(
            f"trained_betas should be {config.num_train_timesteps} numbers between 0 and 1"
        )
    if sum(getattr(config, f"use_{name}_sigmas") for name in SCHEDULES) > 1:
        raise SafelightError(
            "of use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas one can be true"
        )


def alphas_cumprod(config: SchedulerConfig, floor: float = 2.0**-24) -> Floats:
    """ᾱ for each timestep, shape (num_train_timesteps,), falling.

    With zero-terminal-SNR rescaling (arXiv 2305.08891, algorithm 1) the last level is pure noise,
    ᾱ = 0 and sigma infinite; `floor` stands in for that ᾱ.
    """
    alphas = np.float32(1) - _betas(config)
    if config.rescale_betas_zero_snr:
        roots = np.sqrt(_cumprod(alphas))
        first, last = roots[0], roots[-1]
        squares = ((roots - last) * (first / (first - last))) ** 2
        # Training goes through betas, and each turn rounds.
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
    """Evenly spaced float32 numbers, bit for bit as torch has them.

    It walks from both ends to the middle, with a step that is rounded to float32 and one rounding
    for each product and sum.
    """
    first, last = np.float32(start), np.float32(end)
    if count == 1:
        return np.array([first])
    step = np.float64((last - first) / np.float32(count - 1))
    i = np.arange(count)
    walked = np.where(i < count // 2, first + step * i, last - step * (count - 1 - i))
    return walked.astype(np.float32)


def _cumprod(alphas: NDArray[np.float32]) -> NDArray[np.float32]:
    """Running products; torch keeps them in float64 and rounds each."""
    return np.cumprod(alphas.astype(np.float64)).astype(np.float32)


def sigmas_of(bars: Floats) -> Floats:
    """sigma for each ᾱ, rounded to float32 at each turn as the training schedule is."""
    bars32 = bars.astype(np.float32)
    return np.sqrt((np.float32(1) - bars32) / bars32).astype(np.float64)


def spaced(
    config: SchedulerConfig, steps: int, *, fractional: bool = False, spare: bool = False
) -> Floats:
    """`steps` timesteps, falling, spaced as config.timestep_spacing says (2305.08891, table 2).

    fractional: linspace keeps its fractions. spare: leading and linspace lay out one timestep
    more and leave out the last, as solvers do that land on the end of the schedule by themselves.
    """
    total = config.num_train_timesteps
    # Solvers can be told to leave out the levels noisier than lambda = −log sigma.
    loudest = math.exp(min(-config.lambda_min_clipped, 700.0))
    top = int(np.searchsorted(sigmas_of(alphas_cumprod(config)), loudest, side="right"))
    count = steps + spare
    if config.timestep_spacing == "trailing":
        # An end of the range that rounding lets in would be timestep −1.
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


@dataclass(frozen=True)
class Grid:
    """Levels to walk down: sigmas, shape (n + 1,), ends on the level to land on; timesteps, (n,).

    initial_sigma is the standard deviation of x̃ that sampling from pure noise starts with.
    """

    sigmas: Floats
    timesteps: Floats
    initial_sigma: float


def sigma_grid(
    config: SchedulerConfig,
    steps: int,
    *,
    whole: bool = False,
    rounded: tuple[str, ...] = (),
    repeat_last: bool = False,
) -> Grid:
    """The grid of a sampler that works on sigmas.

    whole: the timesteps given to the network are whole numbers, and karras, exponential and beta
    span all the levels of the schedule; else they are fractional and span the chosen timesteps.
    rounded: schedules whose timesteps are rounded to the nearest, the others' are cut off.
    repeat_last: final_sigmas_type sigma_min means the grid's last sigma, not the model's.
    """
    trained = sigmas_of(alphas_cumprod(config))
    times = spaced(config, steps, fractional=not whole, spare=whole)
    sigmas = np.interp(times, np.arange(len(trained)), trained)
    if config.schedule is not None:
        span = trained[::-1] if whole else sigmas
        high = float(span[0]) if config.sigma_max is None else config.sigma_max
        low = float(span[-1]) if config.sigma_min is None else config.sigma_min
        sigmas = _WARPS[config.schedule](high, low, steps)
        times = sigma_to_timestep(sigmas, trained)
        if config.schedule in rounded:
            times = np.round(times)
    if whole:
        times = np.trunc(times)
    last = 0.0
    if config.final_sigmas_type == "sigma_min":
        last = sigmas[-1] if repeat_last and config.schedule else trained[0]
    sigmas = np.append(sigmas, last).astype(np.float32).astype(np.float64)
    largest = float(sigmas.max())
    if not whole and config.timestep_spacing == "leading":
        largest = math.hypot(largest, 1.0)
    return Grid(sigmas, times, largest)


def sigma_to_timestep(sigmas: Floats, trained: Floats) -> Floats:
    """The fractional timestep of each sigma: linear in log sigma between the trained levels."""
    logs = np.log(trained.astype(np.float32))
    wanted = np.log(np.maximum(sigmas, 1e-10))
    low = np.clip(np.searchsorted(logs, wanted, side="right") - 1, 0, len(logs) - 2)
    part = np.clip((logs[low] - wanted) / (logs[low] - logs[low + 1]), 0, 1)
    return (1 - part) * low + part * (low + 1)


def karras(high: float, low: float, count: int) -> Floats:
    """`count` sigmas from high to low, even in sigma^(1/7) (arXiv 2206.00364, equation 5)."""
    inverse = 1 / 7
    ramp = np.linspace(0, 1, count)
    return (high**inverse + ramp * (low**inverse - high**inverse)) ** 7.0


def exponential(high: float, low: float, count: int) -> Floats:
    """`count` sigmas from high to low, even in log sigma."""
    return np.exp(np.linspace(math.log(high), math.log(low), count))


def beta(high: float, low: float, count: int) -> Floats:
    """`count` sigmas at even quantiles of Beta(0.6, 0.6) from high to low (arXiv 2407.12173)."""
    return low + beta_quantile(1 - np.linspace(0, 1, count), 0.6) * (high - low)


_WARPS = {"karras": karras, "exponential": exponential, "beta": beta}


def beta_quantile(q: Floats, a: float) -> Floats:
    """The quantiles q, in 0 … 1, of the symmetric distribution Beta(a, a), 0 < a < 1.

    With u = x^a the distribution function is a power series with rising terms (DLMF 8.17.7), so
    Newton's method falls on the root from above. Past the middle, symmetry keeps x ≤ ½, where the
    series gains a bit per term.
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
