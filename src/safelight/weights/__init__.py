"""Checkpoints: found (find), looked at before they are trusted (check), and loaded (load)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from safelight.weights.load import load_model
    from safelight.weights.summary import inspect

__all__ = ["inspect", "load_model"]

_MODULES = {"inspect": "summary", "load_model": "load"}


def __getattr__(name: str) -> object:
    # Finding and checking files needs no torch, so loading is imported only when it is asked for.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"safelight.weights.{_MODULES[name]}"), name)
