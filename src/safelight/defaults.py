"""What a model says about itself, in its safelight.json, that decides how it draws."""

from collections.abc import Mapping
from typing import Any

from safelight.errors import SafelightError
from safelight.request import Request

NEEDED = ("sampler", "steps", "guidance_scale")
"""The settings that stand in every `draw_with`."""

OPTIONAL = ("guidance_start", "guidance_end")
"""The settings that may stand there, too."""


def model_defaults(notes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sampler, steps and guidance that a model says it draws best with.

    notes: the content of its safelight.json. They stand under `draw_with`, all of NEEDED and any
    of OPTIONAL; the result is empty if there is none, or none that is valid.
    """
    said = notes.get("draw_with")
    if not isinstance(said, dict):
        return {}
    names = (*NEEDED, *(name for name in OPTIONAL if name in said))
    try:
        asked = Request(**{name: said[name] for name in names})
    except (KeyError, SafelightError):
        return {}  # a file of someone else's
    return {name: getattr(asked, name) for name in names}


def is_distilled(notes: Mapping[str, Any]) -> bool:
    """Return whether a model draws well with its own `model_defaults` alone.

    notes: the content of its safelight.json: `"distilled": true`, or what our distillation wrote
    before it wrote that: the model it was made from, and what to draw with.
    """
    return notes.get("distilled", "made_from" in notes and "draw_with" in notes) is True
