"""What must hold of every sampler table, whatever its model.

Three references, none of which needs a network: with a clean picture of zeros (D = 0) a state is
only noise, and must come down level by level; on a Gaussian the ideal estimate and the exact path
are known in closed form; and the same Gaussian, walked with noise, must come out with its own mean
and variance.
"""

import functools
import importlib
import itertools
import math
import sys
from typing import Any

import numpy as np
import pytest

from safelight.errors import SafelightError
from safelight.sampling import SAMPLERS, Grid, Row, Sampler, Table, find, table
from safelight.sampling import euler as euler_module
from safelight.sampling.levels import (
    alphas_cumprod,
    beta_quantile,
    exponential,
    karras,
    sigma_to_timestep,
    sigmas_of,
    spaced,
)
from safelight.sampling.rows import D, make_row, noise, steps_of
from safelight.sampling.schedule import SCHEDULES, SPACINGS, SchedulerConfig

LATENT = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
    "skip_prk_steps": True,
}
PIXELS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
CONFIGS = {
    "latent": SchedulerConfig.from_dict(LATENT),
    "latent-v": SchedulerConfig.from_dict(LATENT | {"prediction_type": "v_prediction"}),
    "pixels": SchedulerConfig.from_dict(PIXELS),
    "zero-snr": SchedulerConfig.from_dict(
        LATENT
        | {
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        }
    ),
}


@functools.cache
def tables(sampler: str) -> list[tuple[str, dict[str, Any], Table]]:
    """Yield (config, settings, table) over configs, schedules, spacings, eta and strength."""
    spec = SAMPLERS[sampler]
    settings: list[dict[str, Any]] = [{}]
    settings += [{"schedule": name} for name in spec.schedules]
    settings += [{"spacing": name} for name in spec.spacings]
    settings += [{"strength": strength} for strength in (0.75, 0.3)]
    settings += [{"eta": eta} for eta in (0.5, 1.0) if spec.eta]
    return [
        (config, setting, table(sampler, CONFIGS[config], steps, **setting))
        for config, setting, steps in itertools.product(CONFIGS, settings, (4, 10, 25))
    ]


def lands_elsewhere(sampler: str, config: str, setting: dict[str, Any]) -> bool:
    """Return whether states are handed on between levels: see safelight.sampling.discrete.

    ddim and pndm go down by a whole number of timesteps, as only leading spacing does; pndm started
    part of the way is one step behind.
    """
    spacing = setting.get("spacing") or ("trailing" if config == "zero-snr" else "leading")
    return (sampler in ("ddim", "pndm") and spacing != "leading") or (
        sampler == "pndm" and ("strength" in setting or config == "pixels")
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_finished_picture_stays(sampler: str) -> None:
    """Σa + Σb = 1: with no noise anywhere, the state does not change.

    Not so for lcm, whose boundary condition mixes in the state before it is scaled back; for
    states that are handed on between levels, where x and not x̃ is kept; and for pndm on v, which
    adds up outputs of different levels as they are.
    """
    for config, setting, made in tables(sampler):
        for i, row in enumerate(made.rows):
            total = sum(row.a) + sum(row.b)
            if sampler == "lcm":
                scaled = (row.timestep * 10) ** 2
                kept = 0.25 / (scaled + 0.25) / math.hypot(1.0, row.level.sigma)
                assert total == pytest.approx(math.sqrt(scaled / (scaled + 0.25)) + kept)
            elif not lands_elsewhere(sampler, config, setting) and not (
                sampler == "pndm" and CONFIGS[config].prediction_type == "v_prediction"
            ):
                assert total == pytest.approx(1.0, abs=1e-9), (config, setting, i)


def test_handed_on_between_levels_x_is_kept() -> None:
    """The second exception in full: Σa + Σb is √(ᾱ landed on/ᾱ treated as)."""
    config = CONFIGS["latent"]
    bars = alphas_cumprod(config)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("pndm", {"strength": 0.6}),
        ("pndm", {"spacing": "linspace"}),
        ("ddim", {"spacing": "linspace"}),
        ("ddim", {"spacing": "trailing"}),
    ]
    for sampler, settings in cases:
        rows = table(sampler, config, 12, **settings).rows
        for i, row in enumerate(rows[:-1]):
            if sampler == "pndm" and i == 1:
                continue  # repeats the step of the first, from a level that it reckons
            landed = int(row.timestep) - 1000 // 12
            bar = bars[landed] if landed >= 0 else bars[0]
            expected = math.sqrt(bar / bars[int(rows[i + 1].timestep)])
            assert sum(row.a) + sum(row.b) == pytest.approx(expected)


@pytest.mark.parametrize("steps", [20, 200])
def test_pndm_on_v_keeps_a_picture_the_better_the_finer(steps: int) -> None:
    rows = table("pndm", CONFIGS["latent-v"], steps).rows
    worst = max(abs(sum(row.a) + sum(row.b) - 1) for row in rows)
    assert 0 < worst < 2 / steps


def walk(rows: tuple[Row, ...], start: np.ndarray, clean: Any) -> list[np.ndarray]:
    """Return states as vectors of weights over independent unit noises, (rows + 2,) each.

    Entry 0 is a constant, entry 1 the starting noise, entry i + 2 the noise of row i. `clean` makes
    D from a state and a sigma. The first state is included.
    """
    xs, ds, states = [start], [], [start]
    for i, row in enumerate(rows):
        ds.insert(0, clean(xs[0], row.level.sigma))
        after = np.zeros_like(start)
        for weight, vector in [*zip(row.a, xs, strict=False), *zip(row.b, ds, strict=False)]:
            after += weight * vector
        if row.c is not None:
            after[i + 2] += row.c
        xs.insert(0, after)
        states.append(after)
    return states


def noise_only(rows: tuple[Row, ...], level: float) -> np.ndarray:
    start = np.zeros(len(rows) + 2)
    start[1] = level
    return start


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_noise_lands_on_the_next_level(sampler: str) -> None:
    """With D = 0 the state is noise, and its deviation is the level that comes next.

    That level is next_sigma, or for the row of dpm2 and dpm2_a that goes midway the sigma of the
    row after it. Not so where states land elsewhere; for lms part of the way, which takes weights
    for slopes that it does not have; and for pndm on v, as above.
    """
    for config, setting, made in tables(sampler):
        if (
            lands_elsewhere(sampler, config, setting)
            or (sampler == "lms" and "strength" in setting)
            or (sampler == "pndm" and CONFIGS[config].prediction_type == "v_prediction")
        ):
            continue
        rows = made.rows
        states = walk(rows, noise_only(rows, rows[0].level.sigma), lambda x, sigma: 0 * x)
        for i, (row, state) in enumerate(zip(rows, states[1:], strict=True)):
            level = row.lands.sigma
            if sampler in ("dpm2", "dpm2_a") and i + 1 < len(rows):
                level = rows[i + 1].level.sigma
            assert np.linalg.norm(state) == pytest.approx(level, rel=2e-5, abs=1e-4), (
                config,
                setting,
                i,
            )


def test_large_variance_adds_more_noise_than_it_took() -> None:
    """ddpm with fixed_large overshoots: a row adds β, not the posterior's variance."""
    config = SchedulerConfig.from_dict(PIXELS | {"variance_type": "fixed_large"})
    for row in table("ddpm", config, 20).rows[:-1]:
        assert row.c is not None
        bar, next_bar = 1 / (1 + row.level.sigma**2), 1 / (1 + row.lands.sigma**2)
        assert (row.c**2) * next_bar == pytest.approx(1 - bar / next_bar)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_levels_fall_and_follow_each_other(sampler: str) -> None:
    for _, _, made in tables(sampler):
        for row, after in itertools.pairwise(made.rows):
            # dpm2_a's midpoint is as far down as its end, but for a difference in float32.
            assert row.lands.sigma <= row.level.sigma * (1.05 if sampler == "dpm2_a" else 1.0)
            if sampler not in ("dpm2", "dpm2_a"):
                assert row.lands.sigma == after.level.sigma
            # karras rounds the timesteps of dpm2, and not those of its midpoints.
            assert after.timestep <= row.timestep + 0.5
        # deis repeats the last level of a schedule of its own choice; pndm, given two rows, uses
        # them to improve one step that ends where the second began.
        if not (sampler == "pndm" and len(made.rows) == 2):
            assert made.rows[-1].lands.sigma < 0.03
        assert made.noise_scale >= made.rows[0].level.sigma * (1 - 1e-9)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_noise_is_drawn_where_the_registry_says(sampler: str) -> None:
    spec = SAMPLERS[sampler]
    for _, setting, made in tables(sampler):
        if len(made.rows) == 1:
            continue  # a last row may need none
        draws = any(row.c is not None for row in made.rows)
        assert draws == (spec.noisy or setting.get("eta", 0.0) > 0)


# On a Gaussian, N(mean, deviation²): the estimate and the path of the ODE in closed form.
MEAN, DEVIATION = 0.4, 0.6


def ideal(x: np.ndarray, sigma: float) -> np.ndarray:
    """Return E[clean | x̃] for the Gaussian, linear in x̃ and a constant."""
    constant = np.zeros_like(x)
    constant[0] = MEAN
    return (DEVIATION**2 * x + sigma**2 * constant) / (DEVIATION**2 + sigma**2)


def path_error(sampler: str, steps: int, **settings: Any) -> float:
    """Return the error of a walk from one deviation of noise, against the exact path.

    The last row is left out: it goes to sigma 0 at once in all samplers, with an error that does
    not depend on the steps.
    """
    rows = table(sampler, CONFIGS["latent"], steps, **settings).rows
    start = np.zeros(len(rows) + 2)
    start[0], high = rows[0].level.sigma, rows[0].level.sigma
    state = walk(rows, start, ideal)[-2]
    low = rows[-1].level.sigma
    exact = MEAN + (high - MEAN) * math.sqrt((DEVIATION**2 + low**2) / (DEVIATION**2 + high**2))
    return abs(state[0] - exact)


@pytest.mark.parametrize(
    ("sampler", "settings", "low", "high"),
    [
        ("euler", {"schedule": "karras"}, 0.9, 1.1),
        ("ddim", {}, 0.9, 1.1),
        ("heun", {"schedule": "karras"}, 1.8, 2.4),
        ("dpm2", {"schedule": "karras"}, 1.8, 2.4),
        ("dpmpp_2m", {"schedule": "exponential"}, 1.8, 2.4),
        ("dpmpp_2s", {"schedule": "exponential"}, 1.8, 2.4),
        ("unipc", {"schedule": "exponential"}, 2.8, 3.2),
        ("deis", {"schedule": "exponential"}, 1.8, 2.4),
        ("lms", {"schedule": "karras"}, 3.4, 4.2),
        # On its way to 2: its weights are for even steps, and in sigma these are even only locally.
        ("pndm", {}, 1.4, 2.1),
    ],
)
def test_order_of_convergence(
    sampler: str, settings: dict[str, Any], low: float, high: float
) -> None:
    """With twice the steps, the error falls by 2 to the order."""
    errors = [path_error(sampler, steps, **settings) for steps in (50, 100, 200)]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(low <= order <= high for order in orders), (orders, errors)


@pytest.mark.parametrize(
    ("sampler", "settings", "steps", "coarse"),
    [
        ("ddpm", {}, 200, 0.03),
        ("ddim", {"eta": 1.0}, 200, 0.03),
        ("euler_a", {}, 200, 0.03),
        ("dpm2_a", {}, 50, 0.025),
        ("dpmpp_2m_sde", {}, 50, 0.015),
        ("dpmpp_2m_sde", {"schedule": "karras"}, 50, 0.006),
    ],
)
def test_a_gaussian_comes_out_as_it_is(
    sampler: str, settings: dict[str, Any], steps: int, coarse: float
) -> None:
    """Mean and deviation of sampling with noise are computed; there is no chance in it.

    They start as those of the noised Gaussian, whose mean is small beside the noise. Before the
    last row, which removes the noise at once, they must be those of the Gaussian noised to that
    level, the closer the more steps there are.
    """
    errors = []
    for count in (steps, 2 * steps):
        rows = table(sampler, CONFIGS["latent"], count, **settings).rows
        start = noise_only(rows, math.hypot(rows[0].level.sigma, DEVIATION))
        state = walk(rows, start, ideal)[-2]
        assert state[0] == pytest.approx(MEAN, abs=0.01)
        expected = math.hypot(DEVIATION, rows[-1].level.sigma)
        errors.append(abs(np.linalg.norm(state[1:]) / expected - 1))
    assert errors[0] < coarse
    assert errors[1] < 0.7 * errors[0]


def test_names() -> None:
    assert list(SAMPLERS) == [spec.name for spec in SAMPLERS.values()]
    for spec in SAMPLERS.values():
        made = table(spec.name, CONFIGS["latent"], spec.steps)
        extra = {"pndm": spec.steps + 1}
        rows = extra.get(spec.name, spec.evaluations * (spec.steps - 1) + 1)
        assert len(made.rows) == rows
        assert "\n" not in spec.summary
    known = {spec.a1111: spec.name for spec in SAMPLERS.values() if spec.a1111}
    assert known["PLMS"] == "pndm"
    assert known["DPM++ 2M SDE"] == "dpmpp_2m_sde"


def test_a_sampler_is_one_function_and_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs no twin in diffusers: on the model's own grid, with every schedule and spacing."""

    def restless(grid: Grid, skip: int = 0, *, share: float) -> list[Row]:
        rows = []
        for row, (s, t, time) in enumerate(steps_of(grid, skip)):
            after = D(row) + t.sigma * math.sqrt(1 - share) * noise(row, s)
            rows.append(make_row(row, s, time, t, after, t.sigma * math.sqrt(share)))
        return rows

    monkeypatch.setattr(euler_module, "restless", restless, raising=False)
    entry = Sampler(
        name="restless",
        summary="A share of the noise anew at each step",
        formula="euler.restless",
        options={"share": 0.5},
        steps=10,
        noisy=True,
    )
    monkeypatch.setitem(SAMPLERS, "restless", entry)
    assert (entry.diffusers, entry.schedules, entry.spacings) == (None, SCHEDULES, SPACINGS)
    test_levels_fall_and_follow_each_other("restless")
    test_noise_lands_on_the_next_level("restless")
    test_a_finished_picture_stays("restless")
    made = table("restless", CONFIGS["latent"], 8, schedule="karras", strength=0.5)
    assert len(made.rows) == 4


def test_the_old_name_warns() -> None:
    sys.modules.pop("safelight.samplers", None)
    with pytest.warns(DeprecationWarning, match=r"now safelight\.sampling"):
        old = importlib.import_module("safelight.samplers")
    assert old.SAMPLERS is SAMPLERS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eular", 10, {}), "did you mean euler"),
        (("", 10, {}), "known: pndm"),
        (("euler", 0, {}), "steps"),
        (("euler", True, {}), "steps"),
        (("euler", 1001, {}), "at most 1000"),
        (("lcm", 51, {}), "at most 50"),
        (("euler", 10, {"strength": 0.0}), "strength"),
        (("euler", 10, {"strength": math.nan}), "strength"),
        (("euler", 10, {"strength": 0.05}), "leaves none"),
        (("pndm", 1, {"strength": 0.8}), "leaves none of 1 steps; it should be at least 1, or"),
        (("ddim", 10, {"eta": 1.5}), "eta"),
        (("euler", 10, {"schedule": "karas"}), "karras, exponential, beta"),
        (("ddim", 10, {"schedule": "karras"}), "samplers that do: lms, euler, heun"),
        (("euler", 10, {"spacing": "uneven"}), "leading, linspace, trailing"),
        (("lcm", 4, {"spacing": "trailing"}), "samplers that do: pndm"),
        (("ddim", 1000, {}), "fewer steps"),
        (("dpmpp_2m", 1000, {}), "fewer"),
    ],
)
def test_what_cannot_be_done_is_said(
    arguments: tuple[str, Any, dict[str, Any]], message: str
) -> None:
    sampler, steps, settings = arguments
    with pytest.raises(SafelightError, match=message) as caught:
        table(sampler, CONFIGS["latent"], steps, **settings)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 200


def test_runge_kutta_needs_four_steps() -> None:
    with pytest.raises(SafelightError, match="at least 4"):
        table("pndm", CONFIGS["pixels"], 3)


@pytest.mark.parametrize(
    "values",
    [
        {"prediction_type": "flow"},
        {"beta_schedule": "sigmoid"},
        {"timestep_spacing": "wide"},
        {"variance_type": "learned_range"},
        {"num_train_timesteps": 0},
        {"num_train_timesteps": 10**9},
        {"num_train_timesteps": True},
        {"num_train_timesteps": 1000.0},
        {"beta_end": math.nan},
        {"beta_end": "0.012"},
        {"clip_sample": 1},
        {"prediction_type": ["epsilon"]},
        {"trained_betas": [0.1]},
        {"trained_betas": "abc"},
        {"use_karras_sigmas": True, "use_beta_sigmas": True},
        {"use_flow_sigmas": True},
        {"interpolation_type": "log_linear"},
    ],
)
def test_a_config_that_cannot_be_used_is_named(values: dict[str, Any]) -> None:
    with pytest.raises(SafelightError) as caught:
        SchedulerConfig.from_dict(values)
    assert next(iter(values)) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 200


def test_a_config_is_an_object() -> None:
    with pytest.raises(SafelightError, match="JSON object"):
        SchedulerConfig.from_dict([])  # type: ignore[arg-type]


def test_keys_that_mean_nothing_and_nulls_are_ignored() -> None:
    config = SchedulerConfig.from_dict({"_class_name": "X", "skip": 1, "trained_betas": None})
    assert config == SchedulerConfig()


def test_absent_keys_are_the_classes_defaults() -> None:
    """An Euler grid starts at the last timestep, a DDIM grid does not; a file decides for both."""
    bare, told = SchedulerConfig(), SchedulerConfig.from_dict({"timestep_spacing": "trailing"})
    assert table("euler", bare, 10).rows[0].timestep == 999
    assert table("ddim", bare, 10).rows[0].timestep == 900
    assert table("euler", told, 10).rows[0].timestep == 999
    assert table("ddim", told, 10).rows[0].timestep == 999
    assert table("ddim", bare, 10).clip == 1.0
    assert table("euler", bare, 10).clip is None


def test_override_counts_as_named() -> None:
    config = CONFIGS["latent"].override(clip_sample=True, clip_sample_range=2.0)
    assert config.beta_end == 0.012
    assert table("ddim", config, 4).clip == 2.0
    assert all(row.clip_correction > 0 for row in table("ddim", config, 4).rows[:-1])
    assert all(row.clip_correction == 0 for row in table("ddim", CONFIGS["latent"], 4).rows)


def test_spacings() -> None:
    """Table 2 of arXiv 2305.08891, for ten steps of a thousand."""
    for spacing, expected in (
        ("leading", [900, 800, 100, 0]),
        ("linspace", [999, 888, 111, 0]),
        ("trailing", [999, 899, 199, 99]),
    ):
        config = SchedulerConfig(timestep_spacing=spacing)
        times = spaced(config, 10)
        assert [times[0], times[1], times[-2], times[-1]] == expected


@pytest.mark.parametrize("steps", [61, 103, 499])
def test_trailing_has_as_many_timesteps_as_steps(steps: int) -> None:
    """This is where 1000/steps rounds so that a naive range has one more timestep, −1."""
    times = spaced(SchedulerConfig(timestep_spacing="trailing"), steps)
    assert len(times) == steps
    assert times[-1] >= 0


def test_zero_terminal_snr() -> None:
    rescaled = alphas_cumprod(CONFIGS["zero-snr"], floor=1e-9)
    plain = alphas_cumprod(CONFIGS["latent"])
    assert rescaled[-1] == 1e-9
    assert rescaled[0] == pytest.approx(plain[0], rel=1e-6)
    assert np.all(np.diff(rescaled) < 0)
    assert table("ddim", CONFIGS["zero-snr"], 10).rows[0].level.sigma > 1e6


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_walk_from_the_first_level_to_the_last(name: str) -> None:
    made = table("dpmpp_2m", CONFIGS["latent"], 12, schedule=name)
    sigmas = [row.level.sigma for row in made.rows]
    trained = sigmas_of(alphas_cumprod(CONFIGS["latent"]))
    assert sigmas[0] == pytest.approx(trained[-1], rel=1e-6)
    assert sigmas[-1] == pytest.approx(trained[0], rel=1e-6)
    assert sigmas == sorted(sigmas, reverse=True)


def test_grids_by_hand() -> None:
    assert karras(128.0, 1.0, 3)[1] == pytest.approx(1.5**7)
    assert exponential(100.0, 1.0, 3) == pytest.approx([100, 10, 1])


def test_beta_quantiles() -> None:
    """They are compared with the distribution function, integrated by t = sin² θ, without poles."""
    q = np.linspace(0, 1, 21)
    x = beta_quantile(q, 0.6)
    assert [x[0], x[10], x[-1]] == pytest.approx([0, 0.5, 1])
    complete = math.gamma(0.6) ** 2 / math.gamma(1.2)
    nodes, weights = np.polynomial.legendre.leggauss(200)
    for level, end in zip(q[1:-1], np.arcsin(np.sqrt(x[1:-1])), strict=True):
        theta = end * (nodes + 1) / 2
        density = 2 * (np.sin(theta) * np.cos(theta)) ** 0.2
        assert (weights @ density) * end / 2 / complete == pytest.approx(level, abs=1e-5)


def test_timesteps_of_trained_levels_are_themselves() -> None:
    trained = sigmas_of(alphas_cumprod(CONFIGS["latent"]))
    assert sigma_to_timestep(trained, trained) == pytest.approx(np.arange(1000), abs=1e-2)
    assert sigma_to_timestep(np.array([0.0, 1e9]), trained) == pytest.approx([0, 999])


def test_spacings_and_schedules_are_the_known_ones() -> None:
    assert find("dpmpp_2m").schedules == SCHEDULES
    assert find("dpmpp_2m").spacings == SPACINGS
    assert find("dpmpp_2s").spacings == ()
