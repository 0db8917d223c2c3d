"""What a picture's file says about its enlargement, without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safelight.errors import SafelightError
from safelight.recipe import parsed, png_texts, postprocessed
from safelight.upscaling.names import LANCZOS, TILE

MOST_TIMES_NOTED = 8
"""The most enlargements of a picture that its recipe notes."""


def entry(
    used: Mapping[str, str] | None,
    before: tuple[int, int],
    after: tuple[int, int],
    tile: int = TILE,
) -> dict[str, Any]:
    """Return what a recipe notes of an enlargement, in its list `upscaled`.

    used: name and SHA-256 of the upscaler; None for Lanczos. before, after: sizes.
    """
    scale = round(after[0] / before[0], 4)
    told = {"scale": scale, "size": list(after)}
    return {"name": LANCZOS, **told} if used is None else {**used, **told, "tile": tile}


def noted(texts: Mapping[str, str], done: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of a PNG that was enlarged. Its recipe stays, and what was done is added.

    done: see `entry`. A picture of another program, or without a recipe, gets AUTOMATIC1111's words
    for it, in the text `parameters` or `postprocessing`. Raises SafelightError for a recipe that
    Safelight did not write.
    """
    if "safelight" in texts:
        recipe = parsed(texts["safelight"])
        before = checked(recipe)
        if len(before) >= MOST_TIMES_NOTED:
            raise SafelightError(f"the picture was enlarged {len(before)} times already")
        try:
            return png_texts({**recipe, "upscaled": [*before, dict(done)]})
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            raise SafelightError("its recipe is not one that Safelight writes") from None
    told = ", ".join(f"{key}: {value}" for key, value in postprocessed([done]).items())
    if "parameters" in texts:
        return {"parameters": f"{texts['parameters'].rstrip()}, {told}"}
    return {"postprocessing": told}


def checked(recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the enlargements that a recipe notes, which may be a stranger's.

    Raises SafelightError if they are not as `entry` writes them.
    """
    found = recipe.get("upscaled", [])
    good = isinstance(found, list) and len(found) <= MOST_TIMES_NOTED
    for one in found if good else ():
        size = one.get("size") if isinstance(one, dict) else None
        good = good and isinstance(size, list) and [type(side) for side in size] == [int, int]
        good = good and isinstance(one.get("name"), str)
        good = good and isinstance(one.get("scale", 1), int | float)
        good = good and isinstance(one.get("sha256", ""), str)
        good = good and type(one.get("tile", 0)) is int
    if not good:
        raise SafelightError("the recipe's list `upscaled` is not one that Safelight writes")
    return list(found)
