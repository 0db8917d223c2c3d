"""What networks predict, and the clean picture that follows from it."""

from __future__ import annotations

from typing import Any

from safelight.sampling.rows import Level, State
from safelight.sampling.schedule import FLOW


def clean_estimate(state: State, level: Level, output: State, prediction_type: str) -> State:
    """Return the clean picture D that follows from the network's output, in the state's shape.

    prediction_type: what it was trained to predict (arXiv:2202.00512): "sample" is the picture
    itself, "epsilon" the noise, "v_prediction" the velocity alpha'·noise − sigma'·clean, where
    alpha' and sigma' are those of the network's view, state / norm. "flow_prediction" is
    noise − clean, at levels (1 − t, t).
    """
    x: Any = state
    out: Any = output
    if prediction_type == "sample":
        return out
    if prediction_type == "epsilon":
        return (x - level.sigma * out) / level.alpha
    if prediction_type == FLOW:
        return x - level.sigma * out
    return x * level.alpha / level.norm**2 - out * (level.sigma / level.norm)
