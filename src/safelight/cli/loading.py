"""Loading a model for a command."""

import importlib
from typing import TYPE_CHECKING, Any

from safelight.interrupt import ctrl_c_waits

if TYPE_CHECKING:
    from safelight.model import Model


def load(name: str, **how: Any) -> "Model":
    """As `safelight.load`, with a Ctrl-C that waits until PyTorch has been imported."""
    import safelight

    import_torch()
    return safelight.load(name, **how)


def import_torch() -> None:
    """In the middle of it Ctrl-C can meet C++ that does not expect an exception, and aborts."""
    with ctrl_c_waits():
        importlib.import_module("torch")
