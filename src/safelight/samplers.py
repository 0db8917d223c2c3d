"""Deprecated: this module is now `safelight.sampling`."""

import warnings

from safelight.sampling.samplers import SAMPLERS, Sampler, check, find, table

__all__ = ["SAMPLERS", "Sampler", "check", "find", "table"]

warnings.warn(
    "safelight.samplers is now safelight.sampling; the old name goes with the next version",
    DeprecationWarning,
    stacklevel=2,
)
