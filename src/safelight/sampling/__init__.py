"""Samplers as tables of numbers: noise schedules, levels, rows, and the registry of samplers.

    from safelight.sampling import SAMPLERS, table

    rows = table("euler_a", config, steps=20, schedule="karras").rows

A table depends on the model's noise schedule and on the settings, never on tensors.
"""

from safelight.sampling.prediction import clean_estimate
from safelight.sampling.rows import Grid, Level, Mix, Row, Table
from safelight.sampling.samplers import SAMPLERS, Sampler, check, find, table
from safelight.sampling.schedule import SCHEDULES, SPACINGS, SchedulerConfig

__all__ = [
    "SAMPLERS",
    "SCHEDULES",
    "SPACINGS",
    "Grid",
    "Level",
    "Mix",
    "Row",
    "Sampler",
    "SchedulerConfig",
    "Table",
    "check",
    "clean_estimate",
    "find",
    "table",
]
