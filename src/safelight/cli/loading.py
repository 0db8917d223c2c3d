"""Load a model for a command."""

import importlib
from typing import TYPE_CHECKING, Any

from safelight.interrupt import ctrl_c_waits

if TYPE_CHECKING:
    from safelight.model import Model


def load(name: str, **how: Any) -> "Model":
    """Load a model as `safelight.load`; Ctrl-C waits until PyTorch has been imported.

    A line says before it how much memory a large model takes, and a warning that there are no
    compiled kernels, where they could be used.
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
    """Import PyTorch while Ctrl-C waits: in the midst of it an exception can abort the process."""
    with ctrl_c_waits():
        importlib.import_module("torch")
