"""Checkpoints: found (find), looked at before they are trusted (check), and loaded (load)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from safelight.weights.load import inspect, load_model

__all__ = ["inspect", "load_model"]


def __getattr__(name: str) -> object:
    # Finding and checking files needs no torch, so loading is imported only when it is asked for.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("safelight.weights.load"), name)
