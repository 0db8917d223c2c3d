"""The pictures that guide a model, each through its ControlNet or its T2I-Adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from safelight.controls import Guide, guides
from safelight.engine.inputs import covering
from safelight.nets.t2i_adapter import T2IAdapter

if TYPE_CHECKING:
    from safelight.model import Model
    from safelight.nets.controlnet import ControlNetModel
    from safelight.request import Request


@dataclass(frozen=True, eq=False)
class Control:
    """One picture that guides the steps of a job.

    hint: what a ControlNet reads of the picture, [1, channels, h, w]; None of a T2I-Adapter. maps:
    what a T2I-Adapter adds to the states of the UNet at each step, [1, channels, h, w] each; none
    of a ControlNet. guide: how much it guides, and when.
    """

    network: ControlNetModel | T2IAdapter
    guide: Guide
    hint: Tensor | None = None
    maps: tuple[Tensor, ...] = ()

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
        if not guide.scale:
            continue
        if isinstance(network, T2IAdapter) and network.config.in_channels == 1:
            picture = picture.convert("L")
        pixels = covering(model, picture).add(1).div(2).to(model.dtype)
        if isinstance(network, T2IAdapter):
            maps = tuple(guide.scale * one for one in network(pixels))
            found.append(Control(network, guide, maps=maps))
        else:
            found.append(Control(network, guide, network.read(pixels)))
    return tuple(found)
