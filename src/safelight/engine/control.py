"""The picture that guides a model through its ControlNet (arXiv:2302.05543)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from safelight.engine.inputs import covering

if TYPE_CHECKING:
    from safelight.model import Model
    from safelight.nets.controlnet import ControlNetModel
    from safelight.request import Request


@dataclass(frozen=True, eq=False)
class Control:
    """What guides the steps of one picture.

    hint: what the network reads of the picture, [1, channels, h, w]. request: says how much it
    guides, and when.
    """

    network: ControlNetModel
    hint: Tensor
    request: Request

    @property
    def scale(self) -> float:
        """Factor of what the network adds."""
        return self.request.control_scale


def guides(request: Request, row: int, rows: int) -> bool:
    """Return whether the control image guides a row: as in diffusers, if all of it is in bounds."""
    within = in_bounds(request.control_start, request.control_end, row, rows)
    return within and request.control_scale != 0


def in_bounds(start: float, end: float, row: int, rows: int) -> bool:
    """Return whether all of a row lies between two shares of the rows."""
    return start <= row / rows and (row + 1) / rows <= end


def read_control(model: Model, request: Request) -> Control | None:
    """Return what guides the pictures of a resolved request; None without a control_image."""
    if request.control_image is None:
        return None
    network = model.controlnet
    pixels = covering(model, request.control_image).add(1).div(2)
    return Control(network, network.read(pixels.to(model.dtype)), request.without_pictures())
