"""The settings that may have several values: one for each picture that guides.

A request has one value as it is, and several as a tuple. Stored pictures have a name each, an
input's: that of the setting for the first, and "control_image_2" and so on for further ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safelight.errors import SafelightError
from safelight.families.control import CONTROL, each
from safelight.request_fields import PICTURES
from safelight.request_ranges import MAX_CONTROLS

if TYPE_CHECKING:
    from PIL.Image import Image

    from safelight.request import Request

_NUMBERS = CONTROL[1:]

CONTROLNETS = ("controlnet", *(f"controlnet_{place}" for place in range(2, MAX_CONTROLS + 1)))
"""The names of a model's ControlNets among its parts, in the order of the pictures."""

INPUTS = (*PICTURES, *(f"{CONTROL[0]}_{place}" for place in range(2, MAX_CONTROLS + 1)))
"""The names of all pictures that a request may have. A digest is stored as the name and _sha256."""


@dataclass(frozen=True)
class Guide:
    """How much one picture guides. start, end: the shares of the steps between which it does."""

    scale: float
    start: float
    end: float

    def at(self, row: int, rows: int) -> bool:
        """Return whether it guides a row: as in diffusers, if all of the row is in bounds."""
        return self.scale != 0 and in_bounds(self.start, self.end, row, rows)


def in_bounds(start: float, end: float, row: int, rows: int) -> bool:
    """Return whether all of a row lies between two shares of the rows."""
    return start <= row / rows and (row + 1) / rows <= end


def setting_of(name: str) -> str:
    """Return the setting that an input belongs to."""
    return name if name in PICTURES else CONTROL[0]


def by_input(pictures: Mapping[str, Any]) -> dict[str, Any]:
    """Return what stands for pictures by their inputs. pictures: by their settings."""
    found: dict[str, Any] = {}
    for name, given in pictures.items():
        for place, picture in enumerate(each(given)):
            found[f"{name}_{place + 1}" if place else name] = picture
    return found


def by_setting(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return pictures by their settings: several of one as a tuple. The reverse of `by_input`."""
    found: dict[str, tuple[Any, ...]] = {}
    for name in sorted(inputs, key=INPUTS.index):
        found[setting_of(name)] = (*found.get(setting_of(name), ()), inputs[name])
    return {name: given[0] if len(given) == 1 else given for name, given in found.items()}


def control_images(request: Request) -> tuple[Image, ...]:
    """Return the pictures that guide, one for each ControlNet."""
    return each(request.control_image)


def check_room(inputs: Mapping[str, Image]) -> None:
    """Raise SafelightError if the pictures that guide have more pixels together than one may."""
    from safelight.picture import MAX_PIXELS

    guiding = [one for name, one in inputs.items() if setting_of(name) == CONTROL[0]]
    if len(guiding) > 1 and sum(one.width * one.height for one in guiding) > MAX_PIXELS:
        raise SafelightError(
            f"control_image must have at most {MAX_PIXELS // 10**6} million pixels in all: make "
            "the pictures smaller",
            field=CONTROL[0],
        )


def guides_of(settings: Mapping[str, Any], count: int) -> list[Guide]:
    """Return how much each picture guides; one value of a setting holds for all pictures.

    settings: of a request, by name. count: how many pictures there are.
    """
    columns = [each(settings[name]) for name in _NUMBERS]
    columns = [column * count if len(column) == 1 else column for column in columns]
    return [Guide(*numbers) for numbers in zip(*columns, strict=True)]


def guides(request: Request) -> Iterator[tuple[Image, Guide]]:
    """Yield each picture that guides, and how much it does."""
    if pictures := control_images(request):
        settings = {name: getattr(request, name) for name in _NUMBERS}
        yield from zip(pictures, guides_of(settings, len(pictures)), strict=True)


def check_control(request: Request) -> None:
    """Raise SafelightError if the settings of the pictures that guide do not fit one another."""
    numbers = {name: each(getattr(request, name)) for name in _NUMBERS}
    pictures = len(control_images(request))
    count = pictures or max(map(len, numbers.values()))
    for name, given in numbers.items():
        if len(given) not in (1, count):
            other = f"control_image is {pictures} picture{'s' * (pictures > 1)}"
            other = other if pictures else f"another setting has {count}"
            raise SafelightError(
                f"{name} has {len(given)} values, and {other}: give one for each picture, or one "
                "for all",
                field=name,
            )
    for guide in guides_of(numbers, count):
        if guide.start > guide.end:
            raise SafelightError(
                f"control_end must be at least control_start, {guide.start}, not {guide.end}",
                field="control_end",
            )
