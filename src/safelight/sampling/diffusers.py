"""Details of diffusers' schedulers that no paper has: defaults, rounding, repeated steps.

A Twin calls a sampler's formula such that its table equals that of a diffusers class, number for
number. A sampler without a twin calls its formula on `sigma_grid(config, steps)`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from safelight.errors import SafelightError
from safelight.sampling.rows import Grid, Level, Row, Table
from safelight.sampling.schedule import SchedulerConfig

if TYPE_CHECKING:
    from safelight.sampling.discrete import Walk

Formula = Callable[..., list[Row]]
Build = Callable[[Formula, SchedulerConfig, int, int, float], Table]
"""(formula, config, steps, number of first steps to skip, eta) → table."""


@dataclass(frozen=True, slots=True)
class Twin:
    """A diffusers scheduler.

    scheduler: its class. defaults: the settings of a scheduler_config.json that the class knows,
    with its default values. build: makes the table.
    """

    scheduler: str
    defaults: Mapping[str, Any]
    build: Build


# --- grids of sigmas -------------------------------------------------------------------------


def sigma_grid(
    config: SchedulerConfig,
    steps: int,
    *,
    whole: bool = False,
    rounded: tuple[str, ...] = (),
    repeat_last: bool = False,
) -> Grid:
    """Return the grid of a sampler that works on sigmas.

    whole: the network is given whole timesteps, and the schedules karras, exponential and beta
    span all trained levels. Else timesteps are fractional, and these schedules span the levels of
    the chosen timesteps.
    rounded: schedules whose timesteps are rounded to the nearest whole number. With `whole`,
    those of the others are truncated.
    repeat_last: final_sigmas_type "sigma_min" repeats the last sigma of such a schedule. Else it
    is the model's smallest.
    """
    import numpy as np

    from safelight.sampling.levels import (
        CURVES,
        alphas_cumprod,
        sigma_to_timestep,
        sigmas_of,
        spaced,
    )

    trained = sigmas_of(alphas_cumprod(config))
    times = spaced(config, steps, fractional=not whole, spare=whole)
    sigmas = np.interp(times, np.arange(len(trained)), trained)
    if config.schedule is not None:
        span = trained[::-1] if whole else sigmas
        high = float(span[0]) if config.sigma_max is None else config.sigma_max
        low = float(span[-1]) if config.sigma_min is None else config.sigma_min
        sigmas = CURVES[config.schedule](high, low, steps)
        times = sigma_to_timestep(sigmas, trained)
        if config.schedule in rounded:
            times = np.round(times)
    if whole:
        times = np.trunc(times)
    last = 0.0
    if config.final_sigmas_type == "sigma_min":
        last = sigmas[-1] if repeat_last and config.schedule else trained[0]
    levels = tuple(map(Level.exploding, np.append(sigmas, last).astype(np.float32).tolist()))
    largest = max(levels, key=lambda level: level.sigma)
    # With fractional timesteps, only "leading" starts at √(1 + sigma²). Tables with whole ones
    # take that norm from their first row, see `_exponential_table`.
    hypotenuse = not whole and config.timestep_spacing == "leading"
    return Grid(levels, tuple(times.tolist()), largest.norm if hypotenuse else largest.sigma)


def _timestep_of(config: SchedulerConfig) -> Callable[[float], float]:
    """Return the function from a sigma to its fractional timestep."""
    import numpy as np

    from safelight.sampling.levels import alphas_cumprod, sigma_to_timestep, sigmas_of

    trained = sigmas_of(alphas_cumprod(config))
    return lambda sigma: float(sigma_to_timestep(np.array([sigma]), trained)[0])


# --- tables of rows on sigmas ----------------------------------------------------------------


def _bounds(config: SchedulerConfig) -> dict[str, Any]:
    """Return the bounds of D, as keywords of Table; thresholding takes precedence over clipping."""
    if config.thresholding:
        return {"threshold": (config.dynamic_thresholding_ratio, config.sample_max_value)}
    return {"clip": config.clip_sample_range if config.clip_sample else None}


def _ode_table(rows: list[Row], grid: Grid, config: SchedulerConfig) -> Table:
    """Return the table of a sampler in `euler`.

    These schedulers return the last state undivided even above sigma 0. The engine divides it by
    its level's norm, so the last row multiplies by that norm.
    """
    if rows and rows[-1].lands.sigma > 0:
        last, scale = rows[-1], rows[-1].lands.norm
        a, b = tuple(w * scale for w in last.a), tuple(w * scale for w in last.b)
        rows = [*rows[:-1], replace(last, a=a, b=b)]
    return Table(tuple(rows), grid.noise_scale, **_bounds(config))


def _ode(formula: Formula, config: SchedulerConfig, steps: int, skip: int, eta: float) -> Table:
    grid = sigma_grid(config, steps)
    return _ode_table(formula(grid, skip), grid, config)


def _dpm2(formula: Formula, config: SchedulerConfig, steps: int, skip: int, eta: float) -> Table:
    grid = sigma_grid(config, steps, rounded=("karras",))
    rows = formula(grid, skip, timestep_of=_timestep_of(config))
    return _ode_table(rows, grid, config)


def _exponential_table(rows: list[Row], config: SchedulerConfig) -> Table:
    scale = rows[0].level.norm if rows else 1.0
    return Table(tuple(rows), scale, **_bounds(config))


def _few(config: SchedulerConfig, steps: int) -> bool:
    """Return whether the last steps have a lower order: below 15 steps, if the config says so."""
    return config.lower_order_final and steps < 15


def _slope(config: SchedulerConfig) -> str:
    return "heun" if config.solver_type == "heun" else "midpoint"


def _dpmpp_2m(
    formula: Formula, config: SchedulerConfig, steps: int, skip: int, eta: float
) -> Table:
    # With a cosine schedule diffusers does not round karras timesteps, as that is too coarse near
    # pure noise. `sigma_grid` truncates them, as the network is given whole timesteps.
    rounded = () if config.beta_schedule == "squaredcos_cap_v2" else ("karras",)
    grid = sigma_grid(config, steps, whole=True, rounded=rounded)
    last: tuple[int, ...] = ()
    if _few(config, steps):
        last = (2, 1)
    elif config.euler_at_final or config.final_sigmas_type == "zero":
        last = (1,)
    rows = formula(grid, skip, order=config.solver_order, last_orders=last, slope=_slope(config))
    return _exponential_table(rows, config)


def _dpmpp_2s(
    formula: Formula, config: SchedulerConfig, steps: int, skip: int, eta: float
) -> Table:
    grid = sigma_grid(config, steps, whole=True, rounded=("karras",))
    top, to_zero = config.solver_order, config.final_sigmas_type == "zero"
    orders = [1 + i % top for i in range(steps)]
    lower = config.lower_order_final or steps % top != 0 or to_zero
    if lower and top > 1 and steps % top == 0:
        orders[-2:] = [1, 1] if top == 2 else [2, 1]
    if to_zero:
        orders[-1] = 1
    return _exponential_table(formula(grid, skip, orders=orders, slope=_slope(config)), config)


def _unipc(formula: Formula, config: SchedulerConfig, steps: int, skip: int, eta: float) -> Table:
    grid = sigma_grid(config, steps, whole=True, rounded=("karras",), repeat_last=True)
    order = config.solver_order
    rows = formula(
        grid,
        skip,
        order=order,
        last_orders=range(order, 0, -1) if config.lower_order_final else (),
        b=config.solver_type,
        uncorrected=config.disable_corrector,
    )
    return _exponential_table(rows, config)


def _deis(formula: Formula, config: SchedulerConfig, steps: int, skip: int, eta: float) -> Table:
    settings = replace(config, final_sigmas_type="sigma_min")
    grid = sigma_grid(settings, steps, whole=True, rounded=("karras",), repeat_last=True)
    order = config.solver_order
    last = range(order, 0, -1) if _few(config, steps) else ()
    return _exponential_table(formula(grid, skip, order=order, last_orders=last), config)


# --- tables of rows on trained timesteps -----------------------------------------------------


def _walk(config: SchedulerConfig, times: list[int], skip: int, *, ends_clean: bool) -> Walk:
    from safelight.sampling.discrete import Walk

    walk = Walk(config, times[skip:], ends_clean=ends_clean)
    if walk.times and max(walk.times) >= len(walk.bars):
        raise SafelightError(
            f"with this spacing and steps_offset {config.steps_offset} the first timestep is "
            f"{max(walk.times)} of {len(walk.bars)}; ask for fewer steps",
            field="steps",
        )
    return walk


def _spaced(config: SchedulerConfig, steps: int) -> list[int]:
    from safelight.sampling.levels import spaced

    return [int(t) for t in spaced(config, steps)]


def _ddim(formula: Formula, config: SchedulerConfig, steps: int, skip: int, eta: float) -> Table:
    walk = _walk(config, _spaced(config, steps), skip, ends_clean=config.set_alpha_to_one)
    bounds = _bounds(config)
    rows = formula(
        walk,
        stride=config.num_train_timesteps // steps,
        eta=eta,
        # Where D is clipped, the direction still has the noise that the network predicted.
        keep_noise=any(bounds.values()),
    )
    return _exponential_table(rows, config)


def _ddpm(formula: Formula, config: SchedulerConfig, steps: int, skip: int, eta: float) -> Table:
    walk = _walk(config, _spaced(config, steps), skip, ends_clean=True)
    rows = formula(walk, large_variance=config.variance_type == "fixed_large")
    return _exponential_table(rows, config)


def _pndm(formula: Formula, config: SchedulerConfig, steps: int, skip: int, eta: float) -> Table:
    """Return the table of PNDMScheduler.

    PLMS takes the first step twice, so the plan of timesteps repeats one at its start. A walk that
    starts part of the way (strength below 1) takes its first step twice without that timestep:
    from its third row on, the state is one step noisier than the network is told.
    """
    descending = _spaced(config, steps)
    stride = config.num_train_timesteps // steps
    if config.skip_prk_steps:
        times = descending[:1] + descending[1:2] + descending[1:]
    else:
        if steps < 4:
            raise SafelightError(
                f"pndm needs at least 4 steps with this model, not {steps}", field="steps"
            )
        times = []
        for high, low in itertools.pairwise(descending[:4]):
            times += [high, low + stride // 2, low + stride // 2, low]
        times += descending[3:]
    walk = _walk(config, times, skip, ends_clean=config.set_alpha_to_one)
    rows = formula(
        walk,
        stride=stride,
        plan=times,
        runge_kutta=not config.skip_prk_steps,
        velocity=config.prediction_type == "v_prediction",
    )
    return _exponential_table(rows, config)


def _distilled_times(name: str, config: SchedulerConfig, steps: int) -> list[int]:
    """Return falling timesteps, picked from those that a consistency model was distilled on."""
    import numpy as np

    trained = config.original_inference_steps
    if steps > trained:
        raise SafelightError(
            f"{name} takes at most {trained} steps with this model, not {steps}", field="steps"
        )
    stride = config.num_train_timesteps // trained
    if stride < 1:
        raise SafelightError(
            f"original_inference_steps is {trained}, more than the model's "
            f"{config.num_train_timesteps} timesteps"
        )
    picked = np.floor(np.linspace(0, trained, steps, endpoint=False)).astype(int)
    return [(trained - int(i)) * stride - 1 for i in picked]


def _lcm(formula: Formula, config: SchedulerConfig, steps: int, skip: int, eta: float) -> Table:
    walk = _walk(config, _distilled_times("lcm", config, steps), skip, ends_clean=True)
    return _exponential_table(formula(walk, scaling=config.timestep_scaling), config)


def _tcd(formula: Formula, config: SchedulerConfig, steps: int, skip: int, eta: float) -> Table:
    walk = _walk(config, _distilled_times("tcd", config, steps), skip, ends_clean=False)
    return _exponential_table(formula(walk, eta=eta), config)


# --- defaults of the classes -----------------------------------------------------------------

_TRAINED: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
_LATENT = _TRAINED | {"beta_start": 0.00085, "beta_end": 0.012}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
_LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
_CURVES = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "sigma_min": None,
    "sigma_max": None,
}
_CLIP = {"clip_sample": False, "clip_sample_range": 1.0}
_THRESHOLD = {
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
_FINAL = {"final_sigmas_type": "zero"}
_PIXELS = _TRAINED | _LEADING | _CLIP | _THRESHOLD | _ZERO_SNR | {"clip_sample": True}
_ODE = _LINSPACE | _CURVES
_SOLVER = _CURVES | _THRESHOLD | {"solver_order": 2, "lower_order_final": True}
_DPM = _TRAINED | _SOLVER | _FINAL | {"solver_type": "midpoint", "lambda_min_clipped": -math.inf}
_MULTISTEP = _DPM | _LINSPACE | _ZERO_SNR | {"euler_at_final": False}
_UNIPC = _TRAINED | _SOLVER | _FINAL | _LINSPACE | _ZERO_SNR
_UNIPC |= {"solver_type": "bh2", "disable_corrector": ()}
_DISTILLED = _LATENT | _ZERO_SNR
_DISTILLED |= {"beta_schedule": "scaled_linear", "original_inference_steps": 50}

PLAIN = _TRAINED | _LINSPACE | _CURVES | _ZERO_SNR | _FINAL
"""The settings that a sampler without a twin knows, and their defaults."""

TWINS: dict[str, Twin] = {
    "pndm": Twin(
        "PNDMScheduler",
        _TRAINED | _LEADING | {"skip_prk_steps": False, "set_alpha_to_one": False},
        _pndm,
    ),
    "ddim": Twin("DDIMScheduler", _PIXELS | {"set_alpha_to_one": True}, _ddim),
    "ddpm": Twin("DDPMScheduler", _PIXELS | {"variance_type": "fixed_small"}, _ddpm),
    "lms": Twin("LMSDiscreteScheduler", _TRAINED | _ODE, _ode),
    "euler": Twin("EulerDiscreteScheduler", _TRAINED | _ODE | _ZERO_SNR | _FINAL, _ode),
    "euler_a": Twin("EulerAncestralDiscreteScheduler", _TRAINED | _LINSPACE | _ZERO_SNR, _ode),
    "heun": Twin("HeunDiscreteScheduler", _LATENT | _ODE | _CLIP, _ode),
    "dpm2": Twin("KDPM2DiscreteScheduler", _LATENT | _ODE, _dpm2),
    "dpm2_a": Twin("KDPM2AncestralDiscreteScheduler", _LATENT | _ODE, _dpm2),
    "dpmpp_2m": Twin("DPMSolverMultistepScheduler", _MULTISTEP, _dpmpp_2m),
    "dpmpp_2m_sde": Twin("DPMSolverMultistepScheduler", _MULTISTEP, _dpmpp_2m),
    "dpmpp_2s": Twin(
        "DPMSolverSinglestepScheduler", _DPM | {"lower_order_final": False}, _dpmpp_2s
    ),
    "unipc": Twin("UniPCMultistepScheduler", _UNIPC, _unipc),
    "deis": Twin("DEISMultistepScheduler", _TRAINED | _LINSPACE | _SOLVER, _deis),
    "lcm": Twin("LCMScheduler", _DISTILLED | _CLIP | _THRESHOLD | {"timestep_scaling": 10.0}, _lcm),
    "tcd": Twin("TCDScheduler", _DISTILLED, _tcd),
}
