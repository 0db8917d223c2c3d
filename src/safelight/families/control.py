"""The settings of a model that has a ControlNet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelight.errors import SafelightError

if TYPE_CHECKING:
    from safelight.request import Request

CONTROL = ("control_image", "control_scale", "control_start", "control_end")


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
