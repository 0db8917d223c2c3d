"""The settings of models that have a ControlNet or an IP-Adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from safelight.errors import SafelightError
from safelight.request_pictures import each

if TYPE_CHECKING:
    from safelight.request import Request

CONTROL = ("control_image", "control_scale", "control_start", "control_end")
IP_ADAPTER = ("ip_adapter_image", "ip_adapter_scale", "ip_adapter_start", "ip_adapter_end")

OF_PICTURES = {name: group[0] for group in (CONTROL, IP_ADAPTER) for name in group[1:]}
"""The settings that say how much a picture counts and when, and that picture's."""


NETWORKS = (
    ("control_image", "controlnet", "a ControlNet"),
    ("ip_adapter_image", "ip_adapter", "an IP-Adapter"),
)
"""The pictures that a network beside the model's own reads: the setting, the network's, and words
for the network."""


def check_networks(model: str, request: Request, there: Mapping[str, int]) -> None:
    """Raise SafelightError if a request has pictures that are not one for each network.

    model: its name. there: how many networks there are, of those named in NETWORKS.
    """
    for picture, network, kind in NETWORKS:
        given = getattr(request, picture)
        if given is None:
            continue
        if not there[network]:
            raise SafelightError(
                f"{picture} needs {kind}, and {model} was loaded without one: give one with "
                f"{network}, or leave it out",
                field=picture,
            )
        count = len(each(given))
        if count != there[network]:
            raise SafelightError(
                f"{picture} must be {_pictures(there[network])} for {model}, one for each of its "
                f"{kind.split()[-1]}s, not {count}; scale 0 turns one off",
                field=picture,
            )


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count} pictures"
