"""Read the settings stored in a picture by Safelight, AUTOMATIC1111 or ComfyUI."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from safelight.errors import SafelightError
from safelight.recipe import read_recipe
from safelight.sampler_names import sampler_and_schedule
from safelight.server.decoder import Sent

_PLAIN = ("", "normal", "automatic", "uniform")
"""Names that others give a model's own schedule."""


def settings_in(sent: Sent, name: str) -> dict[str, Any]:
    """Return `recipe_settings` of a file's bytes, for a decoder's process. name: is not used."""
    return recipe_settings(sent.take())


def recipe_settings(source: str | Path | bytes) -> dict[str, Any]:
    """Return the settings of a Request that the picture stores.

    Reads Safelight's recipes, AUTOMATIC1111's text and ComfyUI's graph. Raises SafelightError for a
    picture without any of them.
    """
    try:
        # Bytes, for the uploaded file's name means nothing to the user.
        recipe = read_recipe(source if isinstance(source, bytes) else Path(source).read_bytes())
    except SafelightError as error:
        found = _graph(source)
        if found is None:
            raise error
        return found
    if "safelight" in recipe:
        return recipe["settings"]
    pairs = recipe["parameters"]
    return _settings(
        recipe["prompt"],
        recipe["negative_prompt"],
        {
            "sampler": pairs.get("Sampler", ""),
            "schedule": pairs.get("Schedule type", ""),
            "steps": pairs.get("Steps"),
            "guidance_scale": pairs.get("CFG scale"),
            "seed": pairs.get("Seed"),
            "size": pairs.get("Size", ""),
            "clip_skip": pairs.get("Clip skip"),
        },
    ) | {"prompt_syntax": "a1111"}


def _graph(source: str | Path | bytes) -> dict[str, Any] | None:
    """Return the settings that sd-parsers finds in ComfyUI's graph, or None."""
    from sd_parsers import ParserManager

    try:
        info = ParserManager().parse(BytesIO(source) if isinstance(source, bytes) else source)
    except Exception:  # parsers of broken files raise anything
        return None
    if info is None or not info.samplers:
        return None
    sampler = info.samplers[0]
    given = sampler.parameters
    return _settings(
        info.full_prompt,
        info.full_negative_prompt,
        {
            "sampler": sampler.name,
            "schedule": given.get("scheduler", ""),
            "steps": given.get("steps"),
            "guidance_scale": given.get("cfg_scale"),
            "seed": given.get("seed"),
        },
    ) | {"prompt_syntax": "comfy"}


def _settings(prompt: str, negative_prompt: str, given: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative_prompt}
    known = sampler_and_schedule(str(given["sampler"]))
    # An unknown one stays, so that the form can report it.
    found["sampler"], joined = known or (given["sampler"] or None, "")
    schedule = str(given["schedule"]).lower() or joined
    found["schedule"] = None if schedule in _PLAIN else schedule
    numbers = {"steps": int, "guidance_scale": float, "seed": int, "clip_skip": int}
    for name, kind in numbers.items():
        try:
            found[name] = kind(given[name])
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
    width, _, height = str(given.get("size", "")).partition("x")
    if width.isdecimal() and height.isdecimal():
        found |= {"width": int(width), "height": int(height)}
    return found
