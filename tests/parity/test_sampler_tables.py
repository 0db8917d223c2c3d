"""Every sampler table against the diffusers scheduler that it follows, state by state.

A made-up network, smooth and not linear, is walked down twice: by the scheduler as its pipelines
drive it, and by a·x̃ + b·D + c·ε. Both see the same noise from equal generators.
"""

import copy
import functools
import inspect
import itertools
import math
from collections.abc import Iterator
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
# Diffusers warns about how it calls numpy and about its own NaN; ours have tests of their own.
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
# One run each: settings that a config file may hold and that the ones above leave alone.
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
    """After each row, as diffusers keeps them."""
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
    """A scheduler as from_config makes it; set_timesteps, called next, makes it new."""
    scheduler = copy.copy(_scheduler(sampler, config))
    changes: dict[str, Any] = {"timestep_spacing": spacing} if spacing else {}
    if schedule:
        changes |= {f"use_{name}_sigmas": name == schedule for name in SCHEDULES}
    scheduler.register_to_config(**changes)
    return scheduler


def start_of(sampler: str) -> tuple[Any, Any, Any]:
    """A generator, noise and a picture; this one scheduler draws float32 whatever the state is."""
    dtype = torch.float32 if sampler == "dpmpp_2m_sde" else torch.float64
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(SHAPE, generator=generator, dtype=dtype).double()
    return generator, noise, torch.tanh(noise.flip(-1)) * 0.7


def walk_scheduler(
    sampler: str, scheduler: Any, steps: int, eta: float, strength: float, exact: bool
) -> tuple[Walk, list[float]]:
    """Drives a scheduler as StableDiffusion(Img2Img)Pipeline does.

    Also returns, for each row but the last, the weight of noise over that of the picture in what
    add_noise makes there, as the inpainting pipeline calls it.
    """
    generator, noise, picture = start_of(sampler)
    scheduler.set_timesteps(steps)
    if exact:
        for name in FLOAT32:
            if hasattr(scheduler, name):
                setattr(scheduler, name, getattr(scheduler, name).double())
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


def compare(
    sampler: str,
    config_name: str,
    steps: int,
    schedule: str | None = None,
    spacing: str | None = None,
    eta: float = 0.0,
    strength: float = 1.0,
    exact: bool = False,
) -> float:
    """The largest relative error of a state, NaN where diffusers has NaN itself.

    Asserts all that should be equal: rows, timesteps, noise that was drawn, the first level, and
    the levels that inpainting noises to.
    """
    config = SchedulerConfig.from_dict(ALL[config_name])
    scheduler = scheduler_of(sampler, config_name, schedule, spacing)
    made = table(
        sampler, config, steps, schedule=schedule, spacing=spacing, eta=eta, strength=strength
    )
    theirs, levels = walk_scheduler(sampler, scheduler, steps, eta, strength, exact)
    in_sigma = sampler in {"lms", "euler", "euler_a", "heun", "dpm2", "dpm2_a"}
    ours = walk_table(sampler, made, config.prediction_type, strength, in_sigma=in_sigma)
    assert all(bool(state.isfinite().all()) for state in ours.states)
    if not all(bool(state.isfinite().all()) for state in theirs.states):
        return math.nan
    assert len(ours.timesteps) == len(theirs.timesteps)
    assert ours.timesteps == pytest.approx(theirs.timesteps, abs=2e-3)
    assert torch.equal(ours.generator.get_state(), theirs.generator.get_state())
    if strength == 1:
        in_theirs = made.noise_scale / (
            1 if in_sigma else math.hypot(1.0, made.rows[0].level.sigma)
        )
        assert in_theirs == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-6)
    for row, level in zip(made.rows, levels, strict=False):
        assert row.lands.sigma == pytest.approx(level, rel=1e-5)
    pairs = zip(ours.states, theirs.states, strict=True)
    return max(float((o - t).norm() / t.norm()) for o, t in pairs)


def cases(sampler: str) -> Iterator[dict[str, Any]]:
    """Steps, schedules, spacings, eta and strengths that cover the pairs of them."""
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


# Where diffusers' own float32 is coarser than 1e-5. Euler rounds its state to float32, at sigma
# 4096 here; Heun in two steps from sigma 157 divides a difference by 0.01; DEIS takes differences
# of nearly equal logarithms. EXACT below shows that it is rounding and nothing else.
COARSE = {
    ("euler", "zero-snr-v"): 2e-4,
    ("euler_a", "zero-snr-v"): 2e-4,
    ("heun", "pixels-small"): 1e-3,
    ("heun", "pixels-large"): 1e-2,
} | {("deis", config): 3e-5 for config in CONFIGS}
# Diffusers ends in NaN: a root of a negative number, 0/0 where float32 has nothing left.
BROKEN = {("ddim", "zero-snr-v", 10), ("dpm2_a", "pixels-small", 2)}
# These decide on levels by a difference in float32, which we follow.
IN_FLOAT32 = {"euler_a", "dpm2_a"}
PAIRS = [
    (sampler, config)
    for sampler, config in itertools.product(SAMPLERS, CONFIGS)
    if not (sampler in NO_SAMPLE and CONFIGS[config].get("prediction_type") == "sample")
]


def refuses(sampler: str, config: str, case: dict[str, Any]) -> bool:
    """Whether there is nothing to compare: diffusers fails there, with less of an explanation."""
    if sampler == "pndm":
        return case["steps"] < 4 and not CONFIGS[config].get("skip_prk_steps")
    return int(case["steps"] * case.get("strength", 1.0)) == 0


def check_all(sampler: str, config: str, stride: int, tolerance: float, *, exact: bool) -> None:
    """Each stride-th case, beginning elsewhere for each config, so that some config has it."""
    for case in itertools.islice(
        cases(sampler), list(CONFIGS).index(config) % stride, None, stride
    ):
        if sampler == "lms" and case["steps"] > 10 and config != "sd1":
            continue  # their integrals take seconds
        if refuses(sampler, config, case):
            with pytest.raises(SafelightError):
                compare(sampler, config, **case)
            continue
        error = compare(sampler, config, **case, exact=exact)
        if math.isnan(error):
            assert (sampler, config, case["steps"]) in BROKEN, case
        else:
            assert error <= tolerance, (case, error)


@pytest.mark.parametrize(("sampler", "config"), PAIRS)
def test_the_states_are_those_of_diffusers(sampler: str, config: str) -> None:
    check_all(sampler, config, 3, COARSE.get((sampler, config), 1e-5), exact=False)


@pytest.mark.parametrize(("sampler", "config"), [p for p in PAIRS if p[0] not in IN_FLOAT32])
def test_what_differs_is_rounding_alone(sampler: str, config: str) -> None:
    """With the scheduler's own numbers held in float64, the states are equal to 1e-6."""
    check_all(sampler, config, 6, 1e-6, exact=True)


@pytest.mark.parametrize("name", ODD)
def test_settings_of_the_config_file(name: str) -> None:
    sampler, _, steps = ODD[name]
    assert compare(sampler, name, steps) <= 1e-5
    assert compare(sampler, name, steps, strength=0.7) <= 1e-5
    assert compare(sampler, name, steps, exact=True) <= 1e-6


@pytest.mark.parametrize("config", [*CONFIGS, "cosine", "trained-betas"])
def test_levels_are_those_of_training(config: str) -> None:
    """Bit for bit; zero-SNR rescaling goes through torch's square root, which may be a bit off."""
    bars = alphas_cumprod(SchedulerConfig.from_dict(ALL[config]), floor=0.0)
    theirs = diffusers.DDIMScheduler.from_config(ALL[config]).alphas_cumprod.double().numpy()
    tolerance = 1e-4 if ALL[config].get("rescale_betas_zero_snr") else 0.0
    assert bars == pytest.approx(theirs, rel=tolerance, abs=0.0)
    assert bars[-1] == theirs[-1]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_registry_names_what_diffusers_takes(sampler: str) -> None:
    """Every setting with the class's own default, and the same schedules and steps."""
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
