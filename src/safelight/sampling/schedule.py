"""The settings of a model's scheduler_config.json: how it was trained, and how to sample it.

`levels` computes the noise levels from them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from safelight.errors import SafelightError

SCHEDULES = ("karras", "exponential", "beta")
SPACINGS = ("leading", "linspace", "trailing")
FLOW = "flow_prediction"
"""The prediction_type of flow matching: the network predicts noise − clean (arXiv:2210.02747)."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "prediction_type": ("epsilon", "v_prediction", "sample", FLOW),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "timestep_spacing": SPACINGS,
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
    "time_shift_type": ("exponential", "linear"),
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
    "shift": (1e-3, 1e3),
    "base_shift": (-20.0, 20.0),
    "max_shift": (-20.0, 20.0),
    "base_image_seq_len": (1, 10_000_000),
    "max_image_seq_len": (1, 10_000_000),
    "shift_terminal": (0.0, 0.99),
}
# Settings that change what a sampler does, each with the one value that is supported.
_ONLY: dict[str, Any] = {
    "use_flow_sigmas": False,
    "use_lu_lambdas": False,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "predict_x0": True,
}


@dataclass(frozen=True)
class SchedulerConfig:
    """A model's `scheduler_config.json`: how it was trained, and how to sample it.

    `given` holds the keys in the file. The defaults of the others differ between scheduler
    classes; `resolved` fills them in.
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
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    time_shift_type: str = "exponential"
    shift_terminal: float | None = None
    given: frozenset[str] = frozenset()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SchedulerConfig:
        """Return the settings in a `scheduler_config.json`'s content; null is the same as absent.

        Raises SafelightError, with the values that can be used, for a known setting that cannot.
        Unknown keys are ignored.
        """
        if not isinstance(values, Mapping):
            raise SafelightError("the scheduler's config should be a JSON object of settings")
        for key, only in _ONLY.items():
            if values.get(key) not in (None, only):
                raise SafelightError(
                    f"scheduler setting {key} is {values[key]!r:.40}; only {only!r} is supported"
                )
        if str(values.get("_class_name")).startswith("FlowMatch"):
            values = {**values, "prediction_type": FLOW}  # these classes predict nothing else
        known = {f.name for f in fields(cls)} - {"given"}
        given = {k: _checked(k, v) for k, v in values.items() if k in known and v is not None}
        config = cls(**given, given=frozenset(given))
        _check_together(config)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a `scheduler_config.json` with these settings."""
        given = {key: getattr(self, key) for key in sorted(self.given)}
        if self.is_flow:
            del given["prediction_type"]
            return {"_class_name": "FlowMatchEulerDiscreteScheduler", **given}
        return {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **given}

    def override(self, **values: Any) -> SchedulerConfig:
        """Return a copy in which these settings count as given by the file.

        Raises SafelightError as `from_dict` does.
        """
        return SchedulerConfig.from_dict({**{k: getattr(self, k) for k in self.given}, **values})

    def resolved(self, defaults: Mapping[str, Any]) -> SchedulerConfig:
        """Return the settings as a scheduler class with these defaults reads them.

        The class does not know settings that are not in `defaults`. Those get the defaults of
        SchedulerConfig, which have no effect.
        """
        values = {k: getattr(self, k) if k in self.given else v for k, v in defaults.items()}
        return SchedulerConfig(**values, given=frozenset(values))

    @property
    def is_flow(self) -> bool:
        """Whether the model was trained by flow matching, on (1 − t)·clean + t·noise."""
        return self.prediction_type == FLOW

    @property
    def schedule(self) -> str | None:
        """The grid that the config asks for, one of SCHEDULES, or None for the model's own."""
        return next((name for name in SCHEDULES if getattr(self, f"use_{name}_sigmas")), None)


def _checked(key: str, value: Any) -> Any:
    """Return a setting's value, converted to its type; SafelightError if it is not usable."""
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
    """Raise SafelightError for settings that contradict each other."""
    betas = config.trained_betas
    if betas is not None and (
        len(betas) != config.num_train_timesteps or not all(0 < b < 1 for b in betas)
    ):
        raise SafelightError(
            f"trained_betas should be {config.num_train_timesteps} numbers between 0 and 1"
        )
    if config.use_dynamic_shifting and not config.is_flow:
        raise SafelightError("use_dynamic_shifting is for models of flow matching alone")
    if config.base_image_seq_len >= config.max_image_seq_len:
        raise SafelightError("base_image_seq_len should be below max_image_seq_len")
    if sum(getattr(config, f"use_{name}_sigmas") for name in SCHEDULES) > 1:
        raise SafelightError(
            "of use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas one can be true"
        )
