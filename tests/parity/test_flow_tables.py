"""Sampler tables of flow matching against diffusers' schedulers, state by state."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.sampling import SAMPLERS, Grid, Level, Row, Table, clean_estimate, table
from safelight.sampling.exponential import dpmpp_2m, unipc
from safelight.sampling.flow import Course, euler_a, flow_grid, shifted_by
from safelight.sampling.schedule import SCHEDULES, SchedulerConfig

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")

EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
SD3 = EULER | {"shift": 3.0}
PLAIN = EULER | {"shift": 1.0}
DYNAMIC = EULER | {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.4, "max_shift": 1.2}
LINEAR = DYNAMIC | {"time_shift_type": "linear", "max_image_seq_len": 1024}
ENDING = DYNAMIC | {"shift_terminal": 0.02, "max_shift": 0.9, "max_image_seq_len": 8192}
CONFIGS = {"sd3": SD3, "plain": PLAIN, "dynamic": DYNAMIC, "linear": LINEAR}
TOKENS = 640


def network(x: Tensor, timestep: float) -> Tensor:
    """Return something smooth that depends on the state and the time."""
    return torch.tanh(x * 0.7 + timestep / 900) - 0.3 * x


def start() -> Tensor:
    return torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(3))


def mu(config: dict[str, Any]) -> float:
    most, least = config.get("max_image_seq_len", 4096), 256
    slope = (config["max_shift"] - config["base_shift"]) / (most - least)
    return TOKENS * slope + config["base_shift"] - slope * least


def theirs(scheduler: Any, steps: int, config: dict[str, Any], trained: bool) -> list[Tensor]:
    given: dict[str, Any] = {"mu": mu(config)} if config.get("use_dynamic_shifting") else {}
    if trained:
        scheduler.set_timesteps(steps, **given)
    else:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), **given)
    x, found = start(), []
    noise = torch.Generator().manual_seed(9)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, float(t)), t, x, generator=noise).prev_sample
        found.append(x)
    return found


def ours(made: Table, skip_noise: bool = False) -> list[Tensor]:
    noise = torch.Generator().manual_seed(9)
    xs, ds, found = [start() * made.noise_scale], [], []
    for row in made.rows:
        v = network(xs[0], row.timestep)
        ds.insert(0, clean_estimate(xs[0], row.level, v, "flow_prediction"))
        x = sum(
            (w * v for w, v in [*zip(row.a, xs, strict=False), *zip(row.b, ds, strict=False)]),
            start=torch.zeros_like(xs[0]),
        )
        if row.c is not None and not skip_noise:
            x = x + row.c * torch.randn(x.shape, generator=noise)
        xs.insert(0, x)
        found.append(x)
    return found


def same(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)


def of(sampler: str, config: dict[str, Any], steps: int, trained: bool, **more: Any) -> Table:
    course = Course(TOKENS, trained)
    return table(sampler, SchedulerConfig.from_dict(config), steps, course=course, **more)


@pytest.mark.parametrize("steps", [1, 7, 28])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_euler(name: str, trained: bool, steps: int) -> None:
    config = CONFIGS[name]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    same(ours(of("euler", config, steps, trained)), theirs(scheduler, steps, config, trained))


@pytest.mark.parametrize("steps", [2, 7, 28])
def test_a_last_time_that_the_scheduler_tells(steps: int) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(ENDING)
    same(ours(of("euler", ENDING, steps, False)), theirs(scheduler, steps, ENDING, False))
    assert of("euler", ENDING, steps, False).rows[-1].level.sigma == pytest.approx(0.02, rel=1e-4)
    # Of a single step, diffusers makes NaN.
    assert of("euler", ENDING, 1, False).rows == of("euler", DYNAMIC, 1, False).rows


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", [*CONFIGS, "ending"])
def test_a_shift_that_is_asked_for_takes_the_place_of_the_model_s(name: str, trained: bool) -> None:
    config = shifted_by(SchedulerConfig.from_dict({"ending": ENDING, **CONFIGS}[name]), 2.5)
    made = table("euler", config, 7, course=Course(TOKENS, trained))
    assert made.rows == of("euler", EULER | {"shift": 2.5}, 7, trained).rows


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["sd3", "dynamic"])
def test_schedules(name: str, schedule: str) -> None:
    config = CONFIGS[name] | {f"use_{schedule}_sigmas": True}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    expected = theirs(scheduler, 9, config, trained=True)
    same(ours(of("euler", config, 9, trained=True)), expected)
    same(ours(of("euler", CONFIGS[name], 9, trained=True, schedule=schedule)), expected)


@pytest.mark.parametrize("trained", [True, False])
def test_lcm_is_stochastic_sampling(trained: bool) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(
        SD3 | {"stochastic_sampling": True}
    )
    same(ours(of("lcm", SD3, 5, trained)), theirs(scheduler, 5, SD3, trained))


@pytest.mark.parametrize("steps", [2, 9])
def test_heun(steps: int) -> None:
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    x, expected = start(), []
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, float(t)), t, x).prev_sample
        expected.append(x)
    found = ours(of("heun", SD3, steps, trained=True))
    # Between the two evaluations of a step, ours holds the state that theirs holds there too.
    same(found, expected)


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        (diffusers.DPMSolverMultistepScheduler, lambda g: dpmpp_2m(g, last_orders=(2, 1))),
        (diffusers.UniPCMultistepScheduler, lambda g: unipc(g, last_orders=(2, 1))),
    ],
    ids=["dpmpp_2m", "unipc"],
)
def test_solvers_at_their_levels(kind: Any, formula: Callable[[Grid], list[Row]]) -> None:
    """On the levels that diffusers' solvers take with use_flow_sigmas, the states are equal."""
    scheduler = kind(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    scheduler.set_timesteps(8)
    sigmas = scheduler.sigmas.tolist()
    times = [float(t) for t in scheduler.timesteps]
    x, expected = start(), []
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, float(t)), t, x).prev_sample
        expected.append(x)
    grid = Grid(tuple(Level(1 - s, s) for s in sigmas), tuple(times), 1.0)
    same(ours(Table(tuple(formula(grid)), 1.0)), expected)


def test_euler_a_lands_on_its_levels() -> None:
    """From a clean picture and noise it lands on alpha₊ of the picture, and sigma₊ of noise."""
    rows = euler_a(flow_grid(SchedulerConfig.from_dict(SD3), 12, Course(trained=True)))
    for row in rows:
        assert row.c is not None
        clean = row.a[0] * row.level.alpha + row.b[0]
        left = row.a[0] * row.level.sigma
        assert clean == pytest.approx(row.lands.alpha, abs=1e-9)
        assert math.hypot(left, row.c) == pytest.approx(row.lands.sigma, abs=1e-9)
    assert any(row.c > 0.05 for row in rows if row.c is not None)


@pytest.mark.parametrize("sampler", [s.name for s in SAMPLERS.values() if s.flow])
def test_all_reach_the_picture(sampler: str) -> None:
    """If the estimates are of one picture, the last state is it, from any step on."""
    for strength in (1.0, 0.5):
        made = of(sampler, SD3, 8, trained=True, strength=strength)
        clean = torch.full((1, 4, 6, 5), 0.6)
        xs, ds = [made.rows[0].level.mix(clean, start())], []
        for row in made.rows:
            ds.insert(0, clean)
            terms = [*zip(row.a, xs, strict=False), *zip(row.b, ds, strict=False)]
            x = sum((w * v for w, v in terms), start=torch.zeros_like(clean))
            xs.insert(0, x if row.c is None else x + row.c * torch.randn_like(x))
        torch.testing.assert_close(xs[0], clean, rtol=1e-4, atol=1e-4)


def test_others_are_refused() -> None:
    with pytest.raises(SafelightError, match=r"pndm is no sampler for flow matching.* euler"):
        of("pndm", SD3, 8, trained=True)
    with pytest.raises(SafelightError, match="use_dynamic_shifting is for models of flow"):
        SchedulerConfig.from_dict({"use_dynamic_shifting": True})
    with pytest.raises(SafelightError, match="invert_sigmas"):
        SchedulerConfig.from_dict(EULER | {"invert_sigmas": True})


def test_what_is_written_is_read_again() -> None:
    config = SchedulerConfig.from_dict(DYNAMIC)
    assert SchedulerConfig.from_dict(config.to_dict()) == config
