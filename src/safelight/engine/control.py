"""The pictures that guide a model, each through its ControlNet (arXiv:2302.05543)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from safelight.controls import Guide, guides
from safelight.engine.inputs import covering

if TYPE_CHECKING:
    from safelight.model import Model
    from safelight.nets.controlnet import ControlNetModel
    from safelight.request import Request


@dataclass(frozen=True, eq=False)
class Control:
    """One picture that guides the steps of a job.

    hint: what the network reads of the picture, [1, channels, h, w]. guide: how much it guides, and
    when.
    """

    network: ControlNetModel
    hint: Tensor
    guide: Guide

    @property
    def scale(self) -> float:
        """Factor of what the network adds."""
        return self.guide.scale


def guides_any(request: Request, row: int, rows: int) -> bool:
    """Return whether any picture of a request guides a row."""
    return any(guide.at(row, rows) for _, guide in guides(request))


def read_control(model: Model, request: Request) -> tuple[Control, ...]:
    """Return what guides the pictures of a resolved request; empty without a control_image."""
    found: list[Control] = []
    for network, (picture, guide) in zip(model.controlnets, guides(request), strict=False):
        if guide.scale:
            pixels = covering(model, picture).add(1).div(2)
            found.append(Control(network, network.read(pixels.to(model.dtype)), guide))
    return tuple(found)
