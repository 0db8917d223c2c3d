"""What guides a request by pictures: how much each of them does, and through which network.

A request has one value of a setting as it is, and several as a tuple: one for each picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safelight.errors import SafelightError
from safelight.families.control import CONTROL
from safelight.request_pictures import MAX_CONTROLS, each, inputs_of
from safelight.weights.matching import last_part

if TYPE_CHECKING:
    from PIL.Image import Image

    from safelight.request import Request

_NUMBERS = CONTROL[1:]
OFF: dict[str, float] = dict(zip(_NUMBERS, (0.0, 0.0, 1.0), strict=True))
"""The settings of a network that is off."""

_BLANK = (8, 8)
"""The smallest size that a picture is read at."""

CONTROLNETS = ("controlnet", *(f"controlnet_{place}" for place in range(2, MAX_CONTROLS + 1)))
"""The names of a model's ControlNets among its parts, in the order of the pictures."""


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


def control_images(request: Request) -> tuple[Image, ...]:
    """Return the pictures that guide, one for each ControlNet."""
    return each(request.control_image)


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


def with_scale(scales: Any, scale: Any) -> Any:
    """Return control_scale with another value; networks that are off beside others stay off.

    scales: the value so far.
    """
    if isinstance(scale, tuple) or not (any(each(scales)) and 0 in each(scales)):
        return scale
    return tuple(scale if one else 0.0 for one in each(scales))


def matched(asked: Sequence[str], there: Sequence[str]) -> tuple[dict[int, int], list[int]]:
    """Return which ControlNet of ours each asked name means, by indices, and those that are left.

    Names are compared without case, and without folders if the whole names differ. A name that is
    empty, or none of those that are left, is not in the answer.
    """
    found: dict[int, int] = {}
    left = list(range(len(there)))
    for plain in (str.casefold, lambda name: last_part(name).casefold()):
        for i, name in enumerate(asked):
            if name and i not in found:
                place = next((p for p in left if plain(there[p]) == plain(name)), None)
                if place is not None:
                    left.remove(place)
                    found[i] = place
    return found, left


def first_guide(request: Request) -> Image | None:
    """Return the first picture that guides; the first of all if every network is off."""
    found = [*guides(request)]
    return next((one for one, guide in found if guide.scale), found[0][0] if found else None)


def left_small(request: Request, size: tuple[int, int]) -> list[str]:
    """Return the inputs that need not become as large as a size: those of networks that are off."""
    return [
        name
        for name, (picture, guide) in zip(inputs_of(CONTROL[0]), guides(request), strict=False)
        if not guide.scale and picture.width * picture.height <= size[0] * size[1]
    ]


def blank() -> Image:
    """Return the picture that stands in for one that a network which is off would have."""
    from PIL import Image

    return Image.new("RGB", _BLANK)


def is_blank(digest: Any) -> bool:
    """Return whether a picture's digest is that of `blank`."""
    from safelight.pixels import picture_sha256

    return digest is not None and digest == picture_sha256(blank())


def with_blanks(pictures: Mapping[str, Any], digests: Mapping[str, Any]) -> dict[str, Any]:
    """Return pictures by their settings, with the blank ones that were not given again.

    digests: of stored settings, by inputs.
    """
    given = each(pictures.get(CONTROL[0]))
    asked = [one for name in inputs_of(CONTROL[0]) if (one := digests.get(name)) is not None]
    if not given or len(given) >= len(asked):
        return {**pictures}
    off = [*map(is_blank, asked)]
    if len(given) + sum(off) != len(asked):
        return {**pictures}
    rest = iter(given)
    filled = tuple(blank() if one else next(rest) for one in off)
    return {**pictures, CONTROL[0]: filled}


def check_control(request: Request) -> None:
    """Raise SafelightError if the settings of the pictures that guide do not fit one another."""
    settings = {name: getattr(request, name) for name in _NUMBERS}
    check_numbers(settings, len(control_images(request)))


def check_numbers(settings: Mapping[str, Any], pictures: int) -> None:
    """Raise SafelightError as `check_control` does.

    settings: of a request, by name. pictures: how many there are.
    """
    numbers = {name: each(settings[name]) for name in _NUMBERS}
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
