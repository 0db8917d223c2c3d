"""The settings that a worker is started with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Settings:
    """The settings of a worker.

    allowed: names of the models that requests may name besides `model`; None allows those that
    ship and those of the models folder. model_memory: bytes that loaded models may take together;
    None for a share of the machine's. elsewhere: the server's machine may have other models: jobs
    of those that are not here are left to others. root: the data folder; of a worker elsewhere, its
    storage. storage: where pictures and inputs are, a folder or a URL; None for the data folder.
    """

    model: str
    url: str
    root: str
    models_dir: str | None = None
    vae: str | None = None
    refiner: str | None = None
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
        """Where pictures and inputs are."""
        return self.storage or self.root

    @property
    def loading(self) -> dict[str, Any]:
        """The keywords of `load_model` besides the model's name and the precision."""
        names = ("vae", "refiner", "preview_vae")
        return {**self.loading_others, **{name: getattr(self, name) for name in names}}

    @property
    def loading_others(self) -> dict[str, Any]:
        """The same for models that requests name, which are drawn with as they are."""
        names = ("device", "low_memory", "models_dir", "wildcards_dir", "styles_file")
        # A client may name files of the models folder, and no path.
        return {**{name: getattr(self, name) for name in names}, "takes_paths": False}
