"""The settings that a worker is started with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Settings:
    """The settings of a worker."""

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

    @property
    def loading(self) -> dict[str, Any]:
        """The keywords of `load_model` besides the model's name and the precision."""
        names = ("device", "low_memory", "models_dir", "vae", "refiner", "preview_vae")
        names += ("wildcards_dir", "styles_file")
        # A client may name files of the models folder, and no path.
        return {**{name: getattr(self, name) for name in names}, "takes_paths": False}
