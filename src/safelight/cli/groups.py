"""Options that several commands share, as dataclasses: one field for each option.

A command has one parameter of such a class; `spread` turns the fields into options.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from safelight.cli import options
from safelight.server.settings import WorkerSettings

if TYPE_CHECKING:
    from safelight.model import Model


@dataclass(frozen=True)
class Loading:
    """How a command loads its model."""

    device: options.Device = "auto"
    dtype: options.Dtype = "auto"
    low_memory: options.LowMemory = False
    models_dir: options.ModelsDir = None
    parts: options.Parts = None
    vae: options.Vae = None
    refiner: options.Refiner = None
    controlnet: options.Controlnet = None
    ip_adapter: options.IpAdapter = None
    image_encoder: options.ImageEncoder = None
    wildcards: options.Wildcards = None
    styles_file: options.StylesFile = None

    @property
    def keywords(self) -> dict[str, Any]:
        """The keywords of `safelight.load` besides the model's name."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "low_memory": self.low_memory,
            "models_dir": self.models_dir,
            "parts": options.one_or_all(self.parts),
            "vae": self.vae,
            "refiner": self.refiner,
            "controlnet": options.one_or_all(self.controlnet),
            "ip_adapter": self.ip_adapter,
            "image_encoder": self.image_encoder,
            "wildcards_dir": self.wildcards,
            "styles_file": self.styles_file,
        }

    def load(self, name: str) -> "Model":
        """Load a model; see `cli.loading.load`."""
        from safelight.cli.loading import load

        return load(name, **self.keywords)

    def with_words(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the settings of a request; see `options.with_words`."""
        return options.with_words(given, styles_file=self.styles_file, wildcards=self.wildcards)


@dataclass(frozen=True)
class Serving(Loading):
    """How a server's worker loads its models."""

    preview_vae: options.PreviewVae = None
    allow_models: options.AllowModels = None
    model_memory: options.ModelMemory = None

    def settings(self, model: str, url: str, root: str, **how: Any) -> WorkerSettings:
        """Return the worker's settings. how: further fields of `WorkerSettings`.

        Raises SafelightError for an invalid value.
        """
        from safelight.weights.library import open_library

        self.with_words({})
        open_library(self.models_dir)  # before the server looks as if it had started
        return WorkerSettings(
            model=model,
            url=url,
            root=root,
            preview_vae=self.preview_vae,
            allowed=options.names(self.allow_models),
            model_memory=options.memory_size(self.model_memory),
            **self.keywords,
            **how,
        )


def spread(function: Callable[..., None]) -> Callable[..., None]:
    """Return a function that takes the fields of its dataclass parameters as parameters."""
    signature = inspect.signature(function)
    found: list[inspect.Parameter] = []
    groups: dict[str, type] = {}
    for parameter in signature.parameters.values():
        kind = parameter.annotation
        if isinstance(kind, type) and is_dataclass(kind):
            groups[parameter.name] = kind
            found += [
                inspect.Parameter(
                    one.name, parameter.KEYWORD_ONLY, default=one.default, annotation=one.type
                )
                for one in fields(kind)
            ]
        else:
            found.append(parameter)

    def call(*first: Any, **given: Any) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{one.name: given.pop(one.name) for one in fields(kind)})
        function(*first, **given)

    call.__name__, call.__doc__ = function.__name__, function.__doc__
    call.__annotations__ = {one.name: one.annotation for one in found}
    call.__signature__ = signature.replace(parameters=found)
    return call
