"""Safelight: words into pictures with Stable Diffusion class models.

    import safelight

    model = safelight.load()
    result = model.generate("a red apple", steps=20, sampler="dpmpp_2m", seed=7)
    result.save("apple.png")

Names are imported when they are first used, so that importing the package costs nothing: PyTorch
is loaded with the first model.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from safelight.errors import SafelightError
    from safelight.model import Model
    from safelight.request import Request
    from safelight.result import Result
    from safelight.upscaling.upscaler import load_upscaler
    from safelight.weights import load_model as load

__all__ = [
    "Model",
    "Request",
    "Result",
    "SafelightError",
    "__version__",
    "load",
    "load_upscaler",
]

_HOMES = {
    "Model": ("safelight.model", "Model"),
    "Request": ("safelight.request", "Request"),
    "Result": ("safelight.result", "Result"),
    "SafelightError": ("safelight.errors", "SafelightError"),
    "load": ("safelight.weights", "load_model"),
    "load_upscaler": ("safelight.upscaling.upscaler", "load_upscaler"),
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = globals()[name] = getattr(import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
