"""Sizes that a picture may have."""

MIN_SIDE, MAX_SIDE, SIDE_STEP = 64, 2048, 8


def allowed_side(pixels: float) -> int:
    """Return the nearest side that a picture may have."""
    return min(max(round(pixels / SIDE_STEP) * SIDE_STEP, MIN_SIDE), MAX_SIDE)


def allowed_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return a size itself, or the nearest of its proportions that a picture may have."""
    scale = max(min(1.0, MAX_SIDE / max(size)), MIN_SIDE / min(size))
    return allowed_side(size[0] * scale), allowed_side(size[1] * scale)


def drawable_size(size: tuple[int, int], native: tuple[int, int]) -> tuple[int, int]:
    """Return the size to draw at so that a picture can be enlarged to `size`.

    A model draws poorly, and slowly, far above the size that it was trained on. Up to four times
    the native number of pixels (twice each side) the size is kept; above, it is the native number
    of pixels in the proportions of `size`.
    """
    scale = (native[0] * native[1] / (size[0] * size[1])) ** 0.5
    if scale >= 0.5:
        return size
    return allowed_size((max(1, round(size[0] * scale)), max(1, round(size[1] * scale))))
