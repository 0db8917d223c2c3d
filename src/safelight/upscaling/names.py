"""Names, sizes and limits of upscalers, without PyTorch."""

from __future__ import annotations

from importlib.util import find_spec

from safelight.errors import SafelightError
from safelight.picture import MAX_PIXELS, MAX_SIDE, MIN_SIDE

LANCZOS = "Lanczos"
"""The filter that needs no network, by AUTOMATIC1111's name."""

ALIASES = {
    "R-ESRGAN 4x+": "RealESRGAN_x4plus",
    "R-ESRGAN 4x+ Anime6B": "RealESRGAN_x4plus_anime_6B",
    "R-ESRGAN 2x+": "RealESRGAN_x2plus",
    "R-ESRGAN General 4xV3": "realesr-general-x4v3",
    "R-ESRGAN AnimeVideo": "realesr-animevideov3",
}
"""AUTOMATIC1111's names of upscalers whose files are called otherwise."""

MAX_SCALE = 16
"""The most that a picture is enlarged."""

MAX_MADE = 200_000_000
"""The most pixels that a network may make, before its picture is reduced to the size asked for.

A phone's photo of 12 million pixels has 192 million once it is enlarged 4 times. Each takes 4
bytes, beside the floats of one row of tiles.
"""

TILE = 320
"""Pixels of a tile's side, with its overlaps. Of a picture of 512x512 it makes four tiles of 288.

Real-ESRGAN x4plus takes about 1.3 GB for one.
"""

MISSING = "upscalers need more: pip install 'safelight[upscale]'"


def is_lanczos(name: str) -> bool:
    """Return whether a name means the filter that needs no network."""
    return name.casefold() == LANCZOS.casefold()


def installed() -> bool:
    """Return whether the library with the networks is there."""
    return find_spec("spandrel") is not None


def check_installed() -> None:
    """Raise SafelightError, code "not_installed", if the library with the networks is not there."""
    if not installed():
        raise SafelightError(MISSING, code="not_installed")


def scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Return a size enlarged; see `check_size`, which it satisfies.

    Raises SafelightError for a scale that is not above 0 and at most MAX_SCALE.
    """
    if not 0 < scale <= MAX_SCALE:
        raise SafelightError(f"scale must be above 0 and at most {MAX_SCALE}, not {scale:g}")
    width, height = (round(side * scale) for side in size)
    check_size((width, height))
    return width, height


def check_size(size: tuple[int, int]) -> None:
    """Raise SafelightError if a picture must not be made so large, or so small."""
    width, height = size
    if width * height > MAX_PIXELS or max(size) > MAX_SIDE or min(size) < MIN_SIDE:
        raise SafelightError(
            f"the enlarged picture would be {width}x{height}: sides may have {MIN_SIDE} to "
            f"{MAX_SIDE} pixels, and a picture up to {MAX_PIXELS // 10**6} million; "
            "give another scale"
        )


def passes(
    size: tuple[int, int], times: int, wanted: tuple[int, int]
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return the sizes before and after each time that a network enlarges a picture.

    times: how much it enlarges. wanted: the size to reach. The network is used again until its
    picture is as large, and once at least.

    Raises SafelightError if a picture in between would have more than MAX_MADE pixels.
    """
    found = []
    while True:
        made = size[0] * times, size[1] * times
        if made[0] * made[1] > MAX_MADE:
            raise SafelightError(
                f"the upscaler enlarges {times} times, and {size[0]}x{size[1]} would become "
                f"{made[0]}x{made[1]}: at most {MAX_MADE // 10**6} million pixels are made; "
                "give a smaller picture, or a network that enlarges less"
            )
        found.append((size, made))
        if times == 1 or (made[0] >= wanted[0] and made[1] >= wanted[1]):
            return found
        size = made
