"""Samplers as tables of numbers, and the registry of their names.

    rows = table("euler_a", config, steps=20, schedule="karras").rows

A table depends on the model's noise schedule and on the request, never on tensors; `Row` says
what to do with its numbers. Each sampler follows one diffusers class, named in SAMPLERS, at that
class's defaults and with the settings of the model's scheduler_config.json, number for number.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from safelight.errors import SafelightError
from safelight.samplers.rows import Build, Row, Table
from safelight.schedule import SCHEDULES, SPACINGS, SchedulerConfig

__all__ = ["SAMPLERS", "Row", "Sampler", "Table", "check", "find", "table"]


@dataclass(frozen=True, slots=True)
class Sampler:
    """One entry of the registry."""

    name: str
    summary: str
    """One line for a list of choices."""
    diffusers: str
    """The diffusers class whose pictures it makes."""
    a1111: str | None
    """What AUTOMATIC1111 calls it, if it has it."""
    steps: int
    """How many steps are taken if the request does not say."""
    module: str
    """Which one here has the function of this name that lays out the table."""
    defaults: Mapping[str, Any]
    """The settings of a scheduler_config.json that the class knows, and what it takes for each
    that the file leaves out."""
    noisy: bool = False
    """Draws fresh noise on the way; samplers with `eta` do so when it is above 0."""
    evaluations: int = 1
    """Evaluations of the network a step (with 2, the last step takes one)."""
    eta: bool = False
    """Whether the setting eta means anything."""

    @property
    def build(self) -> Build:
        """Lays out the table. It is imported now: with it comes NumPy, which takes a tenth of a
        second that a server or a help text does not have.
        """
        return getattr(import_module(f"{__name__}.{self.module}"), self.name)

    @property
    def schedules(self) -> tuple[str, ...]:
        """The schedules that it takes in place of the model's own."""
        return SCHEDULES if "use_karras_sigmas" in self.defaults else ()

    @property
    def spacings(self) -> tuple[str, ...]:
        """The spacings that it takes in place of the model's own."""
        return SPACINGS if "timestep_spacing" in self.defaults else ()


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
_WARPED = {
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
_SOLVER = _WARPED | _THRESHOLD | {"solver_order": 2, "lower_order_final": True}
_DPM = _TRAINED | _SOLVER | _FINAL | {"solver_type": "midpoint", "lambda_min_clipped": -math.inf}
_MULTISTEP = _DPM | _LINSPACE | _ZERO_SNR | {"euler_at_final": False}
_DISTILLED = _LATENT | _ZERO_SNR
_DISTILLED |= {"beta_schedule": "scaled_linear", "original_inference_steps": 50}

SAMPLERS: dict[str, Sampler] = {
    s.name: s
    for s in (
        Sampler(
            "pndm",
            "PLMS, what Stable Diffusion 1 came with: four past outputs, one evaluation a step",
            "PNDMScheduler",
            "PLMS",
            50,
            "discrete",
            _TRAINED | _LEADING | {"skip_prk_steps": False, "set_alpha_to_one": False},
        ),
        Sampler(
            "ddim",
            "DDIM: plain steps of first order; eta 1 adds the noise of ddpm",
            "DDIMScheduler",
            "DDIM",
            50,
            "discrete",
            _TRAINED
            | _LEADING
            | _CLIP
            | _THRESHOLD
            | _ZERO_SNR
            | {"clip_sample": True, "set_alpha_to_one": True},
            eta=True,
        ),
        Sampler(
            "ddpm",
            "DDPM: the posterior the model was trained for; wants hundreds of steps",
            "DDPMScheduler",
            None,
            # Where respaced ancestral sampling levels off, arXiv 2102.09672, section 4.
            250,
            "discrete",
            _TRAINED
            | _LEADING
            | _CLIP
            | _THRESHOLD
            | _ZERO_SNR
            | {"clip_sample": True, "variance_type": "fixed_small"},
            noisy=True,
        ),
        Sampler(
            "lms",
            "Linear multistep of order 4 in sigma",
            "LMSDiscreteScheduler",
            "LMS",
            25,
            "euler",
            _TRAINED | _LINSPACE | _WARPED,
        ),
        Sampler(
            "euler",
            "Euler's method: simple, smooth, good with few steps",
            "EulerDiscreteScheduler",
            "Euler",
            25,
            "euler",
            _TRAINED | _LINSPACE | _WARPED | _ZERO_SNR | _FINAL,
        ),
        Sampler(
            "euler_a",
            "Euler with fresh noise at each step: lively, changes with the number of steps",
            "EulerAncestralDiscreteScheduler",
            "Euler a",
            25,
            "euler",
            _TRAINED | _LINSPACE | _ZERO_SNR,
            noisy=True,
        ),
        Sampler(
            "heun",
            "Heun's method of second order: two evaluations a step",
            "HeunDiscreteScheduler",
            "Heun",
            20,
            "euler",
            _LATENT | _LINSPACE | _WARPED | _CLIP,
            evaluations=2,
        ),
        Sampler(
            "dpm2",
            "DPM-Solver-2: second order by a midpoint, two evaluations a step",
            "KDPM2DiscreteScheduler",
            "DPM2",
            20,
            "euler",
            _LATENT | _LINSPACE | _WARPED,
            evaluations=2,
        ),
        Sampler(
            "dpm2_a",
            "DPM-Solver-2 with fresh noise at each step",
            "KDPM2AncestralDiscreteScheduler",
            "DPM2 a",
            20,
            "euler",
            _LATENT | _LINSPACE | _WARPED,
            noisy=True,
            evaluations=2,
        ),
        Sampler(
            "dpmpp_2m",
            "DPM-Solver++ 2M: second order from one evaluation a step; a good first choice",
            "DPMSolverMultistepScheduler",
            "DPM++ 2M",
            20,
            "exponential",
            _MULTISTEP,
        ),
        Sampler(
            "dpmpp_2m_sde",
            "DPM-Solver++ 2M with fresh noise at each step",
            "DPMSolverMultistepScheduler",
            "DPM++ 2M SDE",
            25,
            "exponential",
            _MULTISTEP,
            noisy=True,
        ),
        Sampler(
            "dpmpp_2s",
            "DPM-Solver++ 2S: second order on every second evaluation",
            "DPMSolverSinglestepScheduler",
            None,
            20,
            "exponential",
            _DPM | {"lower_order_final": False},
        ),
        Sampler(
            "unipc",
            "UniPC: predicts and corrects, one evaluation a step; good with 10",
            "UniPCMultistepScheduler",
            "UniPC",
            20,
            "exponential",
            _TRAINED
            | _LINSPACE
            | _SOLVER
            | _FINAL
            | _ZERO_SNR
            | {"solver_type": "bh2", "disable_corrector": ()},
        ),
        Sampler(
            "deis",
            "DEIS: exponential integrator with past outputs, one evaluation a step",
            "DEISMultistepScheduler",
            None,
            20,
            "exponential",
            _TRAINED | _LINSPACE | _SOLVER,
        ),
        Sampler(
            "lcm",
            "For latent consistency models, which need 1 to 8 steps",
            "LCMScheduler",
            "LCM",
            4,
            "discrete",
            _DISTILLED | _CLIP | _THRESHOLD | {"timestep_scaling": 10.0},
            noisy=True,
        ),
        Sampler(
            "tcd",
            "For trajectory consistency models, 4 steps and up; eta adds noise on the way",
            "TCDScheduler",
            None,
            4,
            "discrete",
            _DISTILLED,
            eta=True,
        ),
    )
}


def find(name: str) -> Sampler:
    """The sampler of this name; SafelightError names the nearest if there is none."""
    if name in SAMPLERS:
        return SAMPLERS[name]
    near = difflib.get_close_matches(name, SAMPLERS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(SAMPLERS)}."
    raise SafelightError(f"there is no sampler {name!r:.40}; {hint}")


def table(
    sampler: str,
    config: SchedulerConfig,
    steps: int,
    *,
    schedule: str | None = None,
    spacing: str | None = None,
    eta: float = 0.0,
    strength: float = 1.0,
) -> Table:
    """The rows of a sampler for a model's schedule.

    steps: from 1 to the model's timesteps. schedule and spacing: one of the sampler's own, or
    None for the model's. eta: noise from 0 to 1 for samplers that have it, no effect on others.
    strength: above 0, at most 1; below 1 the walk starts part of the way down, with a picture
    noised to rows[0].sigma, and the first (1 − strength) of the steps are left out.

    Raises SafelightError for settings that the sampler or the model cannot take.
    """
    chosen = find(sampler)
    check(chosen, steps, schedule, spacing, eta, strength)
    if schedule is not None:
        config = config.override(**{f"use_{name}_sigmas": name == schedule for name in SCHEDULES})
    if spacing is not None:
        config = config.override(timestep_spacing=spacing)
    settings = config.resolved(chosen.defaults)
    trained = settings.num_train_timesteps
    if steps > trained:
        raise SafelightError(f"steps should be at most {trained} with this model, not {steps}")
    skip = steps - min(int(steps * strength), steps)
    import numpy as np

    fault = f"{sampler} has no finite {steps} steps with these settings; ask for fewer"
    try:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            made = chosen.build(settings, steps, skip, eta)
    except (ZeroDivisionError, np.linalg.LinAlgError) as error:
        # Two levels of the grid are the same: it has more steps than levels.
        raise SafelightError(fault) from error
    if not made.rows:
        raise SafelightError(
            f"strength {strength:g} leaves none of {steps} steps; "
            f"it should be at least {math.ceil(1000 / steps) / 1000:g}, or steps more"
        )
    numbers = [n for r in made.rows for n in (r.sigma, r.next_sigma, *r.a, *r.b, r.c or 0.0, r.raw)]
    if not all(map(math.isfinite, numbers)):
        raise SafelightError(fault)
    return made


def check(
    chosen: Sampler,
    steps: int,
    schedule: str | None = None,
    spacing: str | None = None,
    eta: float = 0.0,
    strength: float = 1.0,
) -> None:
    """Raises SafelightError for settings that a sampler cannot take, whatever the model."""
    if type(steps) is not int or steps < 1:
        raise SafelightError(f"steps should be a whole number from 1, not {steps!r:.40}")
    if not 0 < strength <= 1:
        raise SafelightError(f"strength should be above 0 and at most 1, not {strength!r:.40}")
    if not 0 <= eta <= 1:
        raise SafelightError(f"eta should be from 0 to 1, not {eta!r:.40}")
    for kind, value, choices, own in (
        ("schedule", schedule, SCHEDULES, "schedules"),
        ("spacing", spacing, SPACINGS, "spacings"),
    ):
        if value is None:
            continue
        if value not in choices:
            raise SafelightError(
                f"there is no {kind} {value!r:.40}; known: {', '.join(choices)}, "
                "or none for the model's own"
            )
        if value not in getattr(chosen, own):
            able = ", ".join(s.name for s in SAMPLERS.values() if value in getattr(s, own))
            raise SafelightError(f"{chosen.name} has no {kind} {value}; samplers that do: {able}")
