"""The settings that a worker is started with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The settings of a worker."""

    model: str
    url: str
    root: str
    device: str = "auto"
    dtype: str = "auto"
    low_memory: bool = False
    exact: bool = False
    rows: int | None = None
