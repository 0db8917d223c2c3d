"""Every sampler table against the diffusers scheduler that it follows, state by state.

A made-up network, smooth and not linear, is walked down in two ways: by the scheduler as its
pipelines use it, and by a·x̃ + b·D + c·ε. Both get the same noise from equal generators.
"""

import copy
import functools
import inspect
import itertools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from safelight.errors import SafelightError
from safelight.sampling import SAMPLERS, Table, table
from safelight.sampling.levels import alphas_cumprod
from safelight.sampling.schedule import SCHEDULES, SchedulerConfig

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
diffusers.utils.logging.set_verbosity_error()
# Diffusers warns about its own use of numpy and its own NaN; our samplers are tested for that
# apart.
pytestmark = pytest.mark.filterwarnings("ignore")

SD1 = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
    "skip_prk_steps": True,
}
PIXELS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": True,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd1": SD1,
    "sd2-v": SD1 | {"prediction_type": "v_prediction"},
    "zero-snr-v": SD1
    | {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
    "pixels-small": PIXELS | {"variance_type": "fixed_small"},
    "pixels-large": PIXELS | {"variance_type": "fixed_large", "prediction_type": "sample"},
    "steep-v": SD1
    | {"beta_end": 0.02, "prediction_type": "v_prediction", "set_alpha_to_one": True},
}
# Settings that a config file may have and that the cases above do not cover: one run each.
ODD: dict[str, tuple[str, dict[str, Any], int]] = {
    "no-settings-pndm": ("pndm", {}, 6),
    "no-settings-ddim": ("ddim", {}, 6),
    "no-settings-heun": ("heun", {}, 6),
    "no-settings-lcm": ("lcm", {}, 4),
    "no-settings-unipc": ("unipc", {}, 6),
    "nulls": ("ddpm", PIXELS | {"variance_type": None, "trained_betas": None}, 6),
    "log-variance": ("ddpm", PIXELS | {"variance_type": "fixed_small_log"}, 6),
    "cosine": ("dpmpp_2m", {"beta_schedule": "squaredcos_cap_v2"}, 6),
    "cosine-karras": (
        "dpmpp_2m",
        {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True},
        6,
    ),
    "clipped-lambda": ("dpmpp_2m", PIXELS | {"lambda_min_clipped": -2.1}, 6),
    "clipped-lambda-2s": ("dpmpp_2s", PIXELS | {"lambda_min_clipped": -2.1}, 6),
    "trained-betas": (
        "euler",
        {
            "num_train_timesteps": 100,
            "trained_betas": [0.001 + 0.0001 * i for i in range(100)],
        },
        6,
    ),
    "own-karras": ("dpm2", SD1 | {"use_karras_sigmas": True}, 6),
    "sigma-range": (
        "euler",
        SD1 | {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0},
        6,
    ),
    "euler-min": ("euler", SD1 | {"final_sigmas_type": "sigma_min"}, 6),
    "2m-heun": ("dpmpp_2m", SD1 | {"solver_type": "heun"}, 6),
    "2m-min": ("dpmpp_2m", SD1 | {"final_sigmas_type": "sigma_min"}, 16),
    "2m-min-karras": (
        "dpmpp_2m",
        SD1 | {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True},
        16,
    ),
    "2m-euler-last": (
        "dpmpp_2m",
        SD1 | {"final_sigmas_type": "sigma_min", "euler_at_final": True},
        16,
    ),
    "3m": ("dpmpp_2m", SD1 | {"solver_order": 3}, 16),
    "1m": ("dpmpp_2m", SD1 | {"solver_order": 1}, 6),
    "sde-heun": ("dpmpp_2m_sde", SD1 | {"solver_type": "heun"}, 6),
    "sde-3m": ("dpmpp_2m_sde", SD1 | {"solver_order": 3}, 16),
    "2s-heun": ("dpmpp_2s", SD1 | {"solver_type": "heun"}, 6),
    "2s-min": ("dpmpp_2s", SD1 | {"final_sigmas_type": "sigma_min"}, 6),
    "3s": ("dpmpp_2s", SD1 | {"solver_order": 3}, 9),
    "3s-heun": ("dpmpp_2s", SD1 | {"solver_order": 3, "solver_type": "heun"}, 11),
    "unipc-3": ("unipc", SD1 | {"solver_order": 3}, 9),
    "unipc-bh1": (
        "unipc",
        SD1 | {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        9,
    ),
    "unipc-min": (
        "unipc",
        SD1 | {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True},
        9,
    ),
    "unipc-disabled": ("unipc", SD1 | {"disable_corrector": [0, 1], "lower_order_final": True}, 9),
    "deis-3": ("deis", SD1 | {"solver_order": 3}, 16),
    "deis-3-few": ("deis", SD1 | {"solver_order": 3}, 6),
    "threshold-ddim": ("ddim", PIXELS | {"thresholding": True, "sample_max_value": 1.5}, 6),
    "threshold-unipc": ("unipc", PIXELS | {"thresholding": True}, 6),
    "lcm-clip": ("lcm", PIXELS | {"timestep_scaling": 0.01}, 6),
    "heun-clip": ("heun", PIXELS, 6),
}
ALL = CONFIGS | {name: values for name, (_, values, _) in ODD.items()}
# These schedulers know no prediction of the clean picture.
NO_SAMPLE = {"pndm", "euler_a", "dpm2", "dpm2_a"}
# The tables that schedulers keep in float32.
FLOAT32 = (
    "alphas_cumprod",
    "final_alpha_cumprod",
    "one",
    "sigmas",
    "sigmas_interpol",
    "sigmas_up",
    "sigmas_down",
)
SHAPE = (1, 2, 3, 4)


@dataclass
class Walk:
    states: list[Any]
    """The states after each row, in the form that diffusers keeps them."""
    timesteps: list[float]
    generator: Any


def network(x: Any, t: float) -> Any:
    """A deterministic stand-in for a network: x (1, 2, 3, 4) and a timestep to an output."""
    turned = torch.roll(x, 1, dims=-1)
    return 0.8 * x + 0.3 * torch.tanh(1.3 * turned + math.cos(t / 150)) - 0.2 * math.sin(t / 90)


@functools.cache
def _scheduler(sampler: str, config: str) -> Any:
    extra = {"algorithm_type": "sde-dpmsolver++"} if sampler == "dpmpp_2m_sde" else {}
    return getattr(diffusers, SAMPLERS[sampler].diffusers).from_config(ALL[config], **extra)


def scheduler_of(sampler: str, config: str, schedule: str | None, spacing: str | None) -> Any:
    """Return a scheduler as from_config makes it; set_timesteps, called next, resets it."""
    scheduler = copy.copy(_scheduler(sampler, config))
    changes: dict[str, Any] = {"timestep_spacing": spacing} if spacing else {}
    if schedule:
        changes |= {f"use_{name}_sigmas": name == schedule for name in SCHEDULES}
    scheduler.register_to_config(**changes)
    return scheduler


def start_of(sampler: str) -> tuple[Any, Any, Any]:
    """Return a generator, noise and a picture. One scheduler always draws float32 noise."""
    dtype = torch.float32 if sampler == "dpmpp_2m_sde" else torch.float64
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(SHAPE, generator=generator, dtype=dtype).double()
    return generator, noise, torch.tanh(noise.flip(-1)) * 0.7


def walk_scheduler(
    sampler: str,
    scheduler: Any,
    steps: int,
    eta: float,
    strength: float,
    exact: bool,
    shaken: int | None = None,
) -> tuple[Walk, list[float]]:
    """Drives a scheduler as StableDiffusion(Img2Img)Pipeline does.

    exact: its tables are held in float64. shaken: then each of their numbers is moved by what
    float32 may have moved it before, at random from this seed.

    Also returns, for each row but the last, the weight of noise over that of the picture in what
    add_noise makes there, as the inpainting pipeline calls it.
    """
    generator, noise, picture = start_of(sampler)
    shaking = None if shaken is None else torch.Generator().manual_seed(shaken)
    if shaking is not None:
        shake_training(scheduler, shaking)
    scheduler.set_timesteps(steps)
    if exact:
        for name in FLOAT32:
            if hasattr(scheduler, name):
                setattr(scheduler, name, getattr(scheduler, name).double())
        if shaking is not None:
            shake(scheduler, shaking)
    begin = max(steps - min(int(steps * strength), steps), 0) * scheduler.order
    timesteps = scheduler.timesteps[begin:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    if strength < 1:
        x = scheduler.add_noise(picture, noise, timesteps[:1])
    else:
        x = noise * scheduler.init_noise_sigma
    accepted = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {"generator": generator} if "generator" in accepted else {}
    if "eta" in accepted:
        extra["eta"] = eta
    states, levels = [], []
    for i, t in enumerate(timesteps):
        out = network(scheduler.scale_model_input(x, t), float(t))
        x = scheduler.step(out, t, x, **extra).prev_sample
        states.append(x.double())
        if strength < 1 and i + 1 < len(timesteps):
            one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
            at = timesteps[i + 1 : i + 2]
            levels.append(
                float(scheduler.add_noise(zero, one, at) / scheduler.add_noise(one, zero, at))
            )
    return Walk(states, [float(t) for t in timesteps], generator), levels


def moved(exact: Any, generator: Any, units: float = 1.0) -> Any:
    """Return numbers each moved by at most so many half units of float32's last place."""
    by = 2 * torch.rand(exact.shape, generator=generator, dtype=torch.float64) - 1
    return exact * (1 + units * 2**-24 * by)


def shake_training(scheduler: Any, generator: Any) -> None:
    """Moves the levels of training where they are rescaled to end without a signal.

    Root, difference, product and square are rounded there, in the size of a root of almost 1.
    """
    if scheduler.config.get("rescale_betas_zero_snr"):
        roots = scheduler.alphas_cumprod.double().sqrt()
        unit = moved(torch.ones_like(roots), generator, 4) - 1
        last = scheduler.alphas_cumprod[-1:]  # 0, or what stands for it
        bars = ((roots + unit).clamp(min=0) ** 2).to(torch.float32)
        scheduler.alphas_cumprod = torch.cat([bars[:-1], last])


def shake(scheduler: Any, generator: Any) -> None:
    """Moves each number of a scheduler's tables by up to half a unit of float32's last place."""
    for name in FLOAT32:
        if name != "one" and hasattr(scheduler, name):
            setattr(scheduler, name, moved(getattr(scheduler, name), generator))
    if scheduler.timesteps.is_floating_point():
        exact = scheduler.timesteps.double()
        # Both evaluations of a step find it by its timestep: equal ones stay equal.
        different, which = torch.unique(exact, return_inverse=True)
        scheduler.timesteps = moved(different, generator)[which]


def walk_table(
    sampler: str, made: Table, prediction: str, strength: float, *, in_sigma: bool
) -> Walk:
    """Walks a table; in_sigma: the scheduler keeps x̃, else x = x̃/√(1 + sigma²)."""
    generator, noise, picture = start_of(sampler)
    first = made.rows[0].level.sigma
    x = made.noise_scale * noise if strength == 1 else picture + first * noise
    xs, ds, states = [], [], []
    for i, row in enumerate(made.rows):
        alpha = 1 / math.hypot(1.0, row.level.sigma)
        out = network(alpha * x, row.timestep)
        if prediction == "epsilon":
            unclipped = x - row.level.sigma * out
        elif prediction == "v_prediction":
            unclipped = alpha * (alpha * x) - row.level.sigma * alpha * out
        else:
            unclipped = out
        d = unclipped if made.clip is None else unclipped.clamp(-made.clip, made.clip)
        if made.threshold is not None:
            ratio, most = made.threshold
            s = torch.quantile(d.abs().flatten(), ratio).clamp(1, most)
            d = d.clamp(-s, s) / s
        xs.insert(0, x)
        ds.insert(0, d)
        x = sum(w * s for w, s in zip(row.a, xs, strict=False))
        x = (
            x
            + sum(w * s for w, s in zip(row.b, ds, strict=False))
            + row.clip_correction * (d - unclipped)
        )
        if row.c is not None:
            dtype = torch.float32 if sampler == "dpmpp_2m_sde" else torch.float64
            x = x + row.c * torch.randn(SHAPE, generator=generator, dtype=dtype).double()
        last = i + 1 == len(made.rows)
        level = row.lands.sigma if last else made.rows[i + 1].level.sigma
        states.append(x if in_sigma and not last else x / math.hypot(1.0, level))
    return Walk(states, [row.timestep for row in made.rows], generator)


@dataclass
class Compared:
    error: float
    """The largest relative error of a state; NaN where diffusers itself has NaN."""
    own: Callable[[], float]
    """The same error between diffusers' walks in float32 and in float64."""
    slack: float
    """The result of `state_slack`."""
    shaken: Callable[[], float]
    """The same error between diffusers' walks in float64 with and without shaken tables."""


def distance(some: Walk, others: Walk) -> float:
    pairs = zip(some.states, others.states, strict=True)
    return max(float((o - t).norm() / t.norm()) for o, t in pairs)


def compare(
    sampler: str,
    config_name: str,
    steps: int,
    schedule: str | None = None,
    spacing: str | None = None,
    eta: float = 0.0,
    strength: float = 1.0,
    exact: bool = False,
) -> Compared:
    """Walks down both ways.

    Asserts all that should be equal: rows, timesteps, noise that was drawn, the first level, and
    the levels that inpainting noises to.
    """

    def walk(exact: bool, shaken: int | None = None) -> tuple[Walk, list[float]]:
        scheduler = scheduler_of(sampler, config_name, schedule, spacing)
        return walk_scheduler(sampler, scheduler, steps, eta, strength, exact, shaken)

    def shaken() -> float:
        true = walk(True)[0]
        return max(distance(walk(True, seed)[0], true) for seed in range(3))

    config = SchedulerConfig.from_dict(ALL[config_name])
    scheduler = scheduler_of(sampler, config_name, schedule, spacing)
    made = table(
        sampler, config, steps, schedule=schedule, spacing=spacing, eta=eta, strength=strength
    )
    theirs, levels = walk_scheduler(sampler, scheduler, steps, eta, strength, exact)
    in_sigma = sampler in {"lms", "euler", "euler_a", "heun", "dpm2", "dpm2_a"}
    ours = walk_table(sampler, made, config.prediction_type, strength, in_sigma=in_sigma)
    assert all(bool(state.isfinite().all()) for state in ours.states)

    def own() -> float:
        return distance(theirs, walk(True)[0])

    if not all(bool(state.isfinite().all()) for state in theirs.states):
        return Compared(math.nan, own, 0.0, shaken)
    assert len(ours.timesteps) == len(theirs.timesteps)
    for mine, their, slack in zip(
        ours.timesteps, theirs.timesteps, timestep_slack(sampler, scheduler), strict=False
    ):
        assert mine == pytest.approx(their, abs=2e-3 + slack)
    assert torch.equal(ours.generator.get_state(), theirs.generator.get_state())
    if strength == 1:
        in_theirs = made.noise_scale / (
            1 if in_sigma else math.hypot(1.0, made.rows[0].level.sigma)
        )
        assert in_theirs == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-6)
    for row, level in zip(made.rows, levels, strict=False):
        assert row.lands.sigma == pytest.approx(level, rel=1e-5)
    return Compared(distance(ours, theirs), own, state_slack(sampler, scheduler), shaken)


def steepest(scheduler: Any) -> float:
    """Return the most timesteps per unit of a level's logarithm."""
    bars = scheduler.alphas_cumprod.double()
    return float(2 / ((1 - bars) / bars).log().diff().min())


def levels_of(scheduler: Any) -> list[float]:
    """Return sigma before each step and after the last, without the second evaluations of steps."""
    sigmas = [float(s) for s in scheduler.sigmas]
    return sigmas if scheduler.order == 1 else [sigmas[0], *sigmas[1::2]]


def timestep_slack(sampler: str, scheduler: Any) -> list[float]:
    """How far float32 may move each timestep.

    dpm2_a's second evaluation is at √(σ·σ_down), where σ_down² = σ₊² − σ_up² is a difference of
    nearly equal numbers. It is (σ₊/σ)² of what is subtracted, so that the few roundings of half a
    unit (2⁻²⁴ each, say four) count (σ/σ₊)² times as much; each of the two roots halves that. A
    timestep is where the logarithm lies between those of the training levels.
    """
    if sampler != "dpm2_a":
        return [0.0] * len(scheduler.timesteps)
    slack = [0.0]
    for level, below in itertools.pairwise(levels_of(scheduler)):
        slack += [2**-24 * (level / below) ** 2 * steepest(scheduler) if below else 0.0, 0.0]
    return slack


def state_slack(sampler: str, scheduler: Any) -> float:
    """How far float32 may move a state, relatively, by what a walk in float64 does not show.

    The classes of Euler round the state itself: half a unit of σ·|ε|, with |ε| up to 3, stays when
    the state has the size of the next level, or of the picture (0.5). dpm2_a moves the timestep of
    its second evaluation, and `network` changes by up to 0.3/150 + 0.2/90 for each timestep.
    """
    if sampler not in ("euler", *IN_FLOAT32):
        return 0.0
    moves = timestep_slack(sampler, scheduler)
    return max(
        (3 * 2**-24 + max(moves) * (0.3 / 150 + 0.2 / 90)) * level / max(below, 0.5)
        for level, below in itertools.pairwise(levels_of(scheduler))
    )


def cases(sampler: str) -> Iterator[dict[str, Any]]:
    """Return cases that cover all pairs of steps, schedules, spacings, eta and strengths."""
    spec = SAMPLERS[sampler]
    for steps in (1, 2, 3, 5, 10, 20, 50):
        yield {"steps": steps}
    for steps, schedule in itertools.product((2, 7, 20), spec.schedules):
        yield {"steps": steps, "schedule": schedule}
    for steps, spacing in itertools.product((3, 10, 50), spec.spacings):
        yield {"steps": steps, "spacing": spacing}
    for schedule, spacing in itertools.product(spec.schedules, spec.spacings):
        yield {"steps": 10, "schedule": schedule, "spacing": spacing, "strength": 0.6}
    for steps, strength in itertools.product((5, 16, 20), (0.8, 0.5, 0.1)):
        yield {"steps": steps, "strength": strength}
    if spec.eta:
        for eta, strength in itertools.product((0.3, 1.0), (1.0, 0.5)):
            yield {"steps": 10, "eta": eta, "strength": strength}


# Here diffusers ends in NaN: the root of a negative number, or 0/0 where float32 has no digits
# left.
BROKEN = {("ddim", "zero-snr-v", 10), ("dpm2_a", "pixels-small", 2)}
# These choose levels by a difference in float32, as we do: they cannot be walked in float64.
IN_FLOAT32 = {"euler_a", "dpm2_a"}
PAIRS = [
    (sampler, config)
    for sampler, config in itertools.product(SAMPLERS, CONFIGS)
    if not (sampler in NO_SAMPLE and CONFIGS[config].get("prediction_type") == "sample")
]


def refuses(sampler: str, config: str, case: dict[str, Any]) -> bool:
    """Return whether there is nothing to compare: diffusers fails there, with a poorer message."""
    if sampler == "pndm":
        return case["steps"] < 4 and not CONFIGS[config].get("skip_prk_steps")
    return int(case["steps"] * case.get("strength", 1.0)) == 0


def check(found: Compared, *, exact: bool, what: Any) -> None:
    """The bounds, each with its reason.

    Our tables are made in float64. Against a scheduler whose tables are held in float64, the only
    difference is that these were rounded to float32 before. The bound is 1e-6, or, if the case
    enlarges that, four times the effect of shaking its numbers by as much (the largest of three
    draws; the sum of a row's few roundings may be that much larger). Against the scheduler as it
    is, the bound is 1e-5, or twice the distance of its float32 from its own float64, which is more
    for levels of 4,096 or steps from 157 to 0.01: by the triangle inequality we are no further.
    `state_slack` says what neither walk shows.
    """
    limit = 1e-6 if exact else 1e-5
    if found.error > limit:
        limit = max(limit, 4 * found.shaken() if exact else max(found.slack, 2 * found.own()))
    assert found.error <= limit, what


def check_all(sampler: str, config: str, stride: int, *, exact: bool) -> None:
    """Check each stride-th case; configs start at different ones, so all cases come up."""
    for case in itertools.islice(
        cases(sampler), list(CONFIGS).index(config) % stride, None, stride
    ):
        if sampler == "lms" and case["steps"] > 10 and config != "sd1":
            continue  # their integrals take seconds
        if refuses(sampler, config, case):
            with pytest.raises(SafelightError):
                compare(sampler, config, **case)
            continue
        found = compare(sampler, config, **case, exact=exact)
        if math.isnan(found.error):
            assert (sampler, config, case["steps"]) in BROKEN, case
        else:
            check(found, exact=exact, what=(case, found.error))


@pytest.mark.parametrize(("sampler", "config"), PAIRS)
def test_the_states_are_those_of_diffusers(sampler: str, config: str) -> None:
    check_all(sampler, config, 1 if os.environ.get("SAFELIGHT_SOAK") else 6, exact=False)


@pytest.mark.parametrize(("sampler", "config"), [p for p in PAIRS if p[0] not in IN_FLOAT32])
def test_what_differs_is_rounding_alone(sampler: str, config: str) -> None:
    """Compare with the scheduler's own numbers held in float64."""
    check_all(sampler, config, 6, exact=True)


@pytest.mark.parametrize("name", ODD)
def test_settings_of_the_config_file(name: str) -> None:
    sampler, _, steps = ODD[name]
    for strength, exact in ((1.0, False), (0.7, False), (1.0, True)):
        found = compare(sampler, name, steps, strength=strength, exact=exact)
        check(found, exact=exact, what=(strength, exact, found.error))


@pytest.mark.parametrize("config", [*CONFIGS, "cosine", "trained-betas"])
def test_levels_are_those_of_training(config: str) -> None:
    """They are equal to the bit; after zero-SNR rescaling, a square root may be a bit off."""
    bars = alphas_cumprod(SchedulerConfig.from_dict(ALL[config]), floor=0.0)
    theirs = diffusers.DDIMScheduler.from_config(ALL[config]).alphas_cumprod.double().numpy()
    tolerance = 1e-4 if ALL[config].get("rescale_betas_zero_snr") else 0.0
    assert bars == pytest.approx(theirs, rel=tolerance, abs=0.0)
    assert bars[-1] == theirs[-1]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_registry_names_what_diffusers_takes(sampler: str) -> None:
    """It has every setting, with the class's own default, and the same schedules and steps."""
    spec = SAMPLERS[sampler]
    theirs = inspect.signature(getattr(diffusers, spec.diffusers)).parameters
    for key, value in spec.defaults.items():
        if key in ("sigma_min", "sigma_max"):
            continue  # read by all of them wherever the config has them
        default = theirs[key].default
        assert (tuple(default) if isinstance(default, list) else default) == value, key
    assert bool(spec.schedules) == ("use_karras_sigmas" in theirs)
    scheduler = _scheduler(sampler, "sd1")
    assert spec.evaluations == scheduler.order
    assert spec.eta == ("eta" in inspect.signature(scheduler.step).parameters)
