"""The settings of a worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BESIDE = (
    *("parts", "vae", "refiner", "controlnet", "ip_adapter", "image_encoder"),
    "preview_vae",
)
"""The settings that name what is loaded with the server's own model alone."""


@dataclass(frozen=True)
class WorkerSettings:
    """The settings that a worker is started with.

    allowed: names of the models that requests may name besides `model`; None allows those that ship
    and those of the models folder. model_memory: the most bytes of all loaded models; None for a
    share of the machine's memory. elsewhere: other machines may have other models, so jobs of
    models that are not here are left to their workers. root: the data folder; of a worker
    elsewhere, its storage. storage: where pictures and inputs are, a folder or a URL; None for the
    data folder.
    """

    model: str
    url: str
    root: str
    models_dir: str | None = None
    parts: str | list[str] | None = None
    vae: str | None = None
    refiner: str | None = None
    controlnet: str | list[str] | None = None
    ip_adapter: str | None = None
    image_encoder: str | None = None
    preview_vae: str | None = None
    wildcards_dir: str | None = None
    styles_file: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    low_memory: bool = False
    exact: bool = False
    rows: int | None = None
    allowed: tuple[str, ...] | None = None
    model_memory: int | None = None
    elsewhere: bool = False
    storage: str | None = None

    @property
    def place(self) -> str:
        """The folder or URL where pictures and inputs are."""
        return self.storage or self.root

    @property
    def loading(self) -> dict[str, Any]:
        """The keywords of `load_model` besides the model's name and precision."""
        return {**self.loading_others, **{name: getattr(self, name) for name in BESIDE}}

    @property
    def loading_others(self) -> dict[str, Any]:
        """The same keywords for models that requests name, without the server model's own parts."""
        names = ("device", "low_memory", "models_dir", "wildcards_dir", "styles_file")
        # A client may name models of the models folder, but no path.
        return {**{name: getattr(self, name) for name in names}, "takes_paths": False}
