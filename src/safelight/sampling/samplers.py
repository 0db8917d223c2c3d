"""The registry of samplers, and the table of a sampler for a model.

A new sampler needs a function that returns rows (see `euler` and `exponential`) and an entry here.
A twin in diffusers is optional: see `diffusers.TWINS`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from safelight.errors import SafelightError
from safelight.sampling.diffusers import PLAIN, TWINS, Formula, Twin, sigma_grid
from safelight.sampling.rows import Table
from safelight.sampling.schedule import SCHEDULES, SPACINGS, SchedulerConfig

if TYPE_CHECKING:
    from safelight.sampling.flow import Course


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """One entry of the registry.

    name: what users call it. summary: one line for a list of choices. formula: "module.function"
    in this package, called with `options`. steps: the default. a1111: AUTOMATIC1111's name, None
    if it has none. noisy: adds fresh noise at each step; samplers with `eta` do so when it is above
    0. evaluations: network calls per step (with 2, the last step takes one). more: rows beyond one
    per step, where there is more than one step. eta: whether the setting eta has an effect.
    flow: the formula for models of flow matching, None if it does not draw with them.
    """

    name: str
    summary: str
    formula: str
    steps: int
    a1111: str | None = None
    noisy: bool = False
    evaluations: int = 1
    more: int = 0
    eta: bool = False
    options: Mapping[str, Any] | None = None
    flow: str | None = None

    @property
    def twin(self) -> Twin | None:
        return TWINS.get(self.name)

    @property
    def diffusers(self) -> str | None:
        """The diffusers class whose pictures it makes, None if there is none."""
        return self.twin.scheduler if self.twin else None

    @property
    def defaults(self) -> Mapping[str, Any]:
        """The settings of a scheduler_config.json that it knows, with their defaults."""
        return self.twin.defaults if self.twin else PLAIN

    @property
    def schedules(self) -> tuple[str, ...]:
        """The schedules that it takes in place of the model's own."""
        return SCHEDULES if "use_karras_sigmas" in self.defaults else ()

    @property
    def spacings(self) -> tuple[str, ...]:
        """The spacings that it takes in place of the model's own."""
        return SPACINGS if "timestep_spacing" in self.defaults else ()

    def function(self, formula: str) -> Formula:
        """Return a formula with this sampler's options; it takes a Grid or a Walk, returns rows.

        It is imported here, not with this module: it needs NumPy, which takes 0.1 s to import and
        which a server or a help text does not need.
        """
        module, name = formula.split(".")
        found: Formula = getattr(import_module(f"safelight.sampling.{module}"), name)
        return partial(found, **(self.options or {}))

    def build(self, config: SchedulerConfig, steps: int, skip: int, eta: float) -> Table:
        """Return the table; config has this sampler's defaults filled in."""
        formula = self.function(self.formula)
        if self.twin is not None:
            return self.twin.build(formula, config, steps, skip, eta)
        grid = sigma_grid(config, steps)
        rows = formula(grid, skip, **({"eta": eta} if self.eta else {}))
        return Table(tuple(rows), grid.noise_scale)

    def build_flow(
        self, config: SchedulerConfig, steps: int, skip: int, course: Course | None
    ) -> Table:
        """Return the table for a model of flow matching.

        Raises SafelightError if this sampler does not draw with such models.
        """
        if self.flow is None:
            able = ", ".join(s.name for s in SAMPLERS.values() if s.flow)
            raise SafelightError(
                f"{self.name} is no sampler for flow matching, which this model was trained by; "
                f"those are {able}",
                field="sampler",
            )
        from safelight.sampling.flow import Course, flow_grid

        grid = flow_grid(config, steps, course or Course())
        return Table(tuple(self.function(self.flow)(grid, skip)), grid.noise_scale)


_ENTRIES = (
    Sampler(
        name="pndm",
        summary="PLMS, what Stable Diffusion 1 came with: four past outputs, one evaluation a step",
        formula="discrete.pndm",
        steps=50,
        more=1,
        a1111="PLMS",
    ),
    Sampler(
        name="ddim",
        summary="DDIM: plain steps of first order; eta 1 adds the noise of ddpm",
        formula="discrete.ddim",
        steps=50,
        a1111="DDIM",
        eta=True,
    ),
    Sampler(
        name="ddpm",
        summary="DDPM: the posterior the model was trained for; wants hundreds of steps",
        formula="discrete.ddpm",
        steps=250,  # where respaced ancestral sampling levels off, arXiv:2102.09672, section 4
        noisy=True,
    ),
    Sampler(
        name="lms",
        summary="Linear multistep of order 4 in sigma",
        formula="euler.lms",
        steps=25,
        a1111="LMS",
    ),
    Sampler(
        name="euler",
        summary="Euler's method: simple, smooth, good with few steps",
        formula="euler.euler",
        steps=25,
        a1111="Euler",
        flow="euler.euler",
    ),
    Sampler(
        name="euler_a",
        summary="Euler with fresh noise at each step: lively, changes with the number of steps",
        formula="euler.euler_a",
        steps=25,
        a1111="Euler a",
        noisy=True,
        flow="flow.euler_a",
    ),
    Sampler(
        name="heun",
        summary="Heun's method of second order: two evaluations a step",
        formula="euler.heun",
        steps=20,
        a1111="Heun",
        evaluations=2,
        flow="euler.heun",
    ),
    Sampler(
        name="dpm2",
        summary="DPM-Solver-2: second order by a midpoint, two evaluations a step",
        formula="euler.dpm2",
        steps=20,
        a1111="DPM2",
        evaluations=2,
    ),
    Sampler(
        name="dpm2_a",
        summary="DPM-Solver-2 with fresh noise at each step",
        formula="euler.dpm2_a",
        steps=20,
        a1111="DPM2 a",
        noisy=True,
        evaluations=2,
    ),
    Sampler(
        name="dpmpp_2m",
        summary="DPM-Solver++ 2M: second order from one evaluation a step; a good first choice",
        formula="exponential.dpmpp_2m",
        steps=20,
        a1111="DPM++ 2M",
        flow="exponential.dpmpp_2m",
    ),
    Sampler(
        name="dpmpp_2m_sde",
        summary="DPM-Solver++ 2M with fresh noise at each step",
        formula="exponential.dpmpp_2m",
        options={"stochastic": True},
        steps=25,
        a1111="DPM++ 2M SDE",
        noisy=True,
        flow="exponential.dpmpp_2m",
    ),
    Sampler(
        name="dpmpp_2s",
        summary="DPM-Solver++ 2S: second order on every second evaluation",
        formula="exponential.dpmpp_2s",
        steps=20,
        flow="exponential.dpmpp_2s",
    ),
    Sampler(
        name="unipc",
        summary="UniPC: predicts and corrects, one evaluation a step; good with 10",
        formula="exponential.unipc",
        steps=20,
        a1111="UniPC",
        flow="exponential.unipc",
    ),
    Sampler(
        name="deis",
        summary="DEIS: exponential integrator with past outputs, one evaluation a step",
        formula="exponential.deis",
        steps=20,
    ),
    Sampler(
        name="lcm",
        summary="For latent consistency models, which need 1 to 8 steps",
        formula="discrete.lcm",
        steps=4,
        a1111="LCM",
        noisy=True,
        flow="flow.lcm",
    ),
    Sampler(
        name="tcd",
        summary="For trajectory consistency models, 4 steps and up; eta adds noise on the way",
        formula="discrete.tcd",
        steps=4,
        eta=True,
    ),
)
SAMPLERS: dict[str, Sampler] = {sampler.name: sampler for sampler in _ENTRIES}


def find(name: str) -> Sampler:
    """Return the sampler of this name; SafelightError names the nearest if there is none."""
    if name in SAMPLERS:
        return SAMPLERS[name]
    near = difflib.get_close_matches(name, SAMPLERS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(SAMPLERS)}."
    raise SafelightError(f"there is no sampler {name!r:.40}; {hint}", field="sampler")


def table(
    sampler: str,
    config: SchedulerConfig,
    steps: int,
    *,
    schedule: str | None = None,
    spacing: str | None = None,
    eta: float = 0.0,
    strength: float = 1.0,
    skip: int | None = None,
    course: Course | None = None,
) -> Table:
    """Return the Table of a sampler for a model's noise schedule.

    steps: from 1 to the model's number of timesteps. schedule and spacing: one that the sampler
    takes, or None for the model's own. eta: fresh noise from 0 to 1, for samplers that have it.
    strength: above 0, at most 1; below 1, the first (1 − strength) of the steps are left out, and
    sampling starts from a picture noised to rows[0].level. skip: the number of first steps to
    leave out, instead of strength. course: how a model of flow matching walks through its times;
    such a model has no spacings.

    Raises SafelightError for settings that the sampler or the model cannot take.
    """
    chosen = find(sampler)
    check(chosen, steps, schedule, spacing, eta, strength)
    if schedule is not None:
        config = config.override(**{f"use_{name}_sigmas": name == schedule for name in SCHEDULES})
    if spacing is not None:
        config = config.override(timestep_spacing=spacing)
    settings = config if config.is_flow else config.resolved(chosen.defaults)
    trained = settings.num_train_timesteps
    if steps > trained:
        raise SafelightError(
            f"steps should be at most {trained} with this model, not {steps}", field="steps"
        )
    if skip is None:
        skip = steps - min(int(steps * strength), steps)
    import numpy as np

    fault = SafelightError(
        f"{sampler} has no finite {steps} steps with these settings; ask for fewer", field="steps"
    )
    try:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            if config.is_flow:
                made = chosen.build_flow(settings, steps, skip, course)
            else:
                made = chosen.build(settings, steps, skip, eta)
    except (ZeroDivisionError, np.linalg.LinAlgError) as error:
        # Two levels of the grid are the same: it has more steps than levels.
        raise fault from error
    numbers = [
        n
        for row in made.rows
        for n in (*row.a, *row.b, row.c or 0.0, row.level.sigma, row.lands.sigma)
    ]
    if not made.rows or not all(map(math.isfinite, numbers)):
        raise fault
    return made


def check(
    chosen: Sampler,
    steps: int,
    schedule: str | None = None,
    spacing: str | None = None,
    eta: float = 0.0,
    strength: float = 1.0,
) -> None:
    """Raise SafelightError for settings that a sampler cannot take, whatever the model."""
    if type(steps) is not int or steps < 1:
        raise SafelightError(
            f"steps should be a whole number from 1, not {steps!r:.40}", field="steps"
        )
    if not 0 < strength <= 1:
        raise SafelightError(
            f"strength should be above 0 and at most 1, not {strength!r:.40}", field="strength"
        )
    if int(steps * strength) + (chosen.more if steps > 1 else 0) < 1:
        raise SafelightError(
            f"strength {strength:g} leaves none of {steps} steps; "
            f"it should be at least {math.ceil(1000 / steps) / 1000:g}, or steps more",
            field="strength",
        )
    if not 0 <= eta <= 1:
        raise SafelightError(f"eta should be from 0 to 1, not {eta!r:.40}", field="eta")
    for field, value, choices, own in (
        ("schedule", schedule, SCHEDULES, "schedules"),
        ("spacing", spacing, SPACINGS, "spacings"),
    ):
        if value is None:
            continue
        if value not in choices:
            raise SafelightError(
                f"there is no {field} {value!r:.40}; known: {', '.join(choices)}, "
                "or none for the model's own",
                field=field,
            )
        if value not in getattr(chosen, own):
            able = ", ".join(s.name for s in SAMPLERS.values() if value in getattr(s, own))
            raise SafelightError(
                f"{chosen.name} has no {field} {value}; samplers that do: {able}", field=field
            )
