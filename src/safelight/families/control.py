"""The settings of models that have a ControlNet or an IP-Adapter."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from safelight.errors import SafelightError

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


def check_networks(model: str, request: Request, there: Collection[str]) -> None:
    """Raise SafelightError if a request has a picture and its network is not there.

    model: its name. there: the networks, of those named in NETWORKS.
    """
    for picture, network, kind in NETWORKS:
        if getattr(request, picture) is not None and network not in there:
            raise SafelightError(
                f"{picture} needs {kind}, and {model} was loaded without one: give one with "
                f"{network}, or leave it out",
                field=picture,
            )
