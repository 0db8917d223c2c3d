"""What a family reads from a single file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safelight.weights.names import Weight


@dataclass(frozen=True, slots=True)
class SingleFile:
    """The contents of a single file, and the facts that it does not hold.

    configs: of each network, in diffusers' keys. weights: of each network, by our names.
    scheduler: its config. native: side in pixels of the training pictures. v_native: the same for
    v-prediction; None if files of this kind always say what they predict. prediction: what the
    network predicts, if a key of the file says so.
    """

    configs: Mapping[str, Mapping[str, Any]]
    weights: dict[str, dict[str, Weight]]
    scheduler: Mapping[str, Any]
    native: int
    v_native: int | None = None
    prediction: str | None = None
