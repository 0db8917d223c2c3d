"""Sizes that a picture may have."""

from safelight.errors import SafelightError

MIN_SIDE, MAX_SIDE, SIDE_STEP = 64, 2048, 8

USUAL_SIZE = 512, 512
"""What to draw at if it is not known which model draws: the size of Stable Diffusion 1."""

_ROBUST = 512 * 512
"""Models of fewer native pixels are small networks that saw one size only. `embedded`, of 256x256,
ruins its pictures at 288x288. Stable Diffusion, of 512x512, draws up to _MOST_TIMES as many."""
_MOST_TIMES = 4


def allowed_side(pixels: float) -> int:
    """Return the nearest side that a picture may have."""
    return min(max(round(pixels / SIDE_STEP) * SIDE_STEP, MIN_SIDE), MAX_SIDE)


def allowed_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return the nearest size of the same proportions that a picture may have."""
    scale = max(min(1.0, MAX_SIDE / max(size)), MIN_SIDE / min(size))
    return allowed_side(size[0] * scale), allowed_side(size[1] * scale)


def own_size(size: tuple[int, int], native: tuple[int, int]) -> tuple[int, int]:
    """Return the size of a model's own number of pixels in the proportions of `size`, about."""
    scale = (native[0] * native[1] / (size[0] * size[1])) ** 0.5
    return allowed_size((max(1, round(size[0] * scale)), max(1, round(size[1] * scale))))


def is_small(native: tuple[int, int]) -> bool:
    """Return whether a model is a small network, which draws its own size alone well."""
    return native[0] * native[1] < _ROBUST


def drawable_size(size: tuple[int, int], native: tuple[int, int]) -> tuple[int, int]:
    """Return the size to draw at so that a picture can be enlarged to `size`.

    A model draws poorly, and slowly, above the size that it was trained on. A model of 512x512
    pixels or more keeps a size of up to four times its native number of pixels (twice each side),
    a smaller model one of up to its native number. Above, the size to draw at is the native number
    of pixels in the proportions of `size`. No side is below MIN_SIDE, so that 512x256 becomes
    128x64 for a model of 64x64.
    """
    pixels = native[0] * native[1]
    times = size[0] * size[1] / pixels
    if times <= (1 if is_small(native) else _MOST_TIMES):
        return size
    return own_size(size, native)


def unlike_native(model: str, native: tuple[int, int], size: tuple[int, int]) -> str:
    """Return the warning about a size that a model was not trained on."""
    return (
        f"{model} was trained on {native[0]}x{native[1]}; "
        f"at {size[0]}x{size[1]} it may repeat itself or fall apart"
    )


def size_of(
    picture: tuple[int, int],
    width: int | None,
    height: int | None,
    *,
    name: str = "image",
    native: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """Return the width and height to draw at, for a picture that is given. name: its setting.

    native: the width and height that the model draws best, for the advice of an error.

    Where one side is asked for, the other keeps the picture's proportions; where none is, both are
    the nearest multiples of SIDE_STEP. Raises SafelightError for a picture that is too small or
    too large for that.
    """
    if width is None and height is None:
        near = (
            round(picture[0] / SIDE_STEP) * SIDE_STEP,
            round(picture[1] / SIDE_STEP) * SIDE_STEP,
        )
        if MIN_SIDE <= min(near) <= max(near) <= MAX_SIDE:
            return near
        # A photo at MAX_SIDE takes hours on a CPU, and most models draw it badly.
        wide, high = own_size(picture, native or USUAL_SIZE)
        raise SafelightError(
            f"{name} is {picture[0]}x{picture[1]}; sides must be from {MIN_SIDE} to {MAX_SIDE}: "
            f"ask for width {wide} and height {high}, about the model's own size, to have it "
            "resized",
            field=name,
        )
    if width is not None and height is not None:
        return width, height
    scale = width / picture[0] if width is not None else (height or picture[1]) / picture[1]
    return width or allowed_side(picture[0] * scale), height or allowed_side(picture[1] * scale)
