"""What a picture's file says about its enlargement, without PyTorch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from safelight.errors import SafelightError
from safelight.recipe import parse_recipe_text, parsed, png_texts, postprocessed
from safelight.upscaling.names import LANCZOS, TILE

MAX_NOTED = 8
"""The most enlargements of a picture that its recipe notes."""

_MOST_SCALE = 1e5
_POSTPROCESSED = re.compile(r', Postprocess upscale(?:r| by): (?:"(?:[^"\\]|\\.)*"|[^,]*)')


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
    for it, in the line of pairs of its text `parameters`, else in `postprocessing`.

    Raises SafelightError for a recipe that Safelight did not write.
    """
    if "safelight" in texts:
        recipe = parsed(texts["safelight"])
        before = checked(recipe)
        if len(before) >= MAX_NOTED:
            raise SafelightError(f"the picture was enlarged {len(before)} times already")
        try:
            return png_texts({**recipe, "upscaled": [*before, dict(done)]})
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            raise SafelightError("its recipe is not one that Safelight writes") from None
    told = ", ".join(f"{key}: {value}" for key, value in postprocessed([done]).items())
    if "parameters" not in texts:
        return {"postprocessing": told}
    before = texts["parameters"]
    try:
        parse_recipe_text(before)
    except SafelightError:  # it has no pairs that others could be added to
        return {"parameters": before, "postprocessing": told}
    prompts, line, pairs = before.rstrip().rpartition("\n")
    return {"parameters": f"{prompts}{line}{_POSTPROCESSED.sub('', pairs)}, {told}"}


def checked(recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the enlargements that a recipe notes, which may be a stranger's.

    Raises SafelightError if they are not as `entry` writes them, or if its size `enlarged` is none.
    """
    if recipe.get("enlarged") is not None and not _is_size(recipe["enlarged"]):
        raise SafelightError("the recipe's size `enlarged` is not one that Safelight writes")
    found = recipe.get("upscaled", [])
    good = isinstance(found, list) and len(found) <= MAX_NOTED
    for one in found if good else ():
        good = good and isinstance(one, dict) and _is_size(one.get("size"))
        good = good and isinstance(one.get("name"), str)
        good = good and isinstance(one.get("scale", 1), int | float)
        good = good and 0 <= one.get("scale", 1) < _MOST_SCALE
        good = good and isinstance(one.get("sha256", ""), str)
        good = good and type(one.get("tile", 0)) is int
    if not good:
        raise SafelightError("the recipe's list `upscaled` is not one that Safelight writes")
    return list(found)


def _is_size(found: Any) -> bool:
    return isinstance(found, list) and [type(side) for side in found] == [int, int]
