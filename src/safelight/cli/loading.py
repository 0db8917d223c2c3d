"""Load a model for a command."""

import importlib
from typing import TYPE_CHECKING, Any

from safelight.interrupt import ctrl_c_waits

if TYPE_CHECKING:
    from safelight.model import Model


def load(name: str, **how: Any) -> "Model":
    """Load a model with `safelight.load`; Ctrl-C waits until PyTorch has been imported.

    A line says beforehand how much memory a large model takes. A warning says if compiled kernels
    could be used and are missing.
    """
    import safelight
    from safelight.cli.output import note, warn

    import_torch()
    loaded = safelight.load(name, on_plan=note, **how)
    from safelight.fast import missing_kernels

    if slow := missing_kernels(loaded.device):
        warn(slow)
    return loaded


def import_torch() -> None:
    """Import PyTorch while Ctrl-C waits: an exception during the import can abort the process."""
    with ctrl_c_waits():
        importlib.import_module("torch")
