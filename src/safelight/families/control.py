"""The settings of models that have a ControlNet or an IP-Adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelight.errors import SafelightError

if TYPE_CHECKING:
    from safelight.request import Request

CONTROL = ("control_image", "control_scale", "control_start", "control_end")
IP_ADAPTER = ("ip_adapter_image", "ip_adapter_scale", "ip_adapter_start", "ip_adapter_end")

OF_PICTURES = {name: group[0] for group in (CONTROL, IP_ADAPTER) for name in group[1:]}
"""The settings that say how much a picture counts and when, and that picture's."""


def check_control(model: str, request: Request, there: bool) -> None:
    """Raise SafelightError if a request has a control_image and no ControlNet is there for it.

    model: its name.
    """
    if request.control_image is not None and not there:
        raise SafelightError(
            f"control_image needs a ControlNet, and {model} was loaded without one: give one with "
            "controlnet, or leave it out",
            field="control_image",
        )


def check_ip_adapter(model: str, request: Request, there: bool) -> None:
    """Raise SafelightError if a request has an ip_adapter_image and no IP-Adapter is there for it.

    model: its name.
    """
    if request.ip_adapter_image is not None and not there:
        raise SafelightError(
            f"ip_adapter_image needs an IP-Adapter, and {model} was loaded without one: give one "
            "with ip_adapter, or leave it out",
            field="ip_adapter_image",
        )
