"""What holds where a request asks for nothing: a model's own settings, and levels of `fast`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from safelight.errors import SafelightError
from safelight.request import Request

if TYPE_CHECKING:
    from safelight.families import Family

NEEDED = ("sampler", "steps", "guidance_scale")
"""The settings that stand in every `draw_with`."""

OPTIONAL = ("guidance_start", "guidance_end")
"""The settings that may stand there, too."""

LEVELS: Mapping[int, Mapping[str, Any]] = {
    1: {"cache_every": 3},
    2: {"cache_every": 2, "linears": "int8", "sampler": "dpmpp_2m", "steps": 12},
    3: {
        "cache_every": 3,
        "guidance_start": 0.3,
        "linears": "int8",
        "sampler": "dpmpp_2m",
        "steps": 10,
    },
}
"""The settings that a level of `fast` stands for, where a request does not have its own. Where
8-bit integers cannot be had, linear layers are plain."""

BY_MODEL = frozenset({*NEEDED, *OPTIONAL}.union(*LEVELS.values()))
"""The settings whose defaults depend on the model."""


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


def defaults_of(family: Family, notes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a model draws best with: its own, or else those of its family.

    notes: the content of its safelight.json.
    """
    return {**family.defaults, **model_defaults(notes)}


def with_level(request: Request, family: Family, notes: Mapping[str, Any]) -> Request:
    """Return the request with the settings that its level of `fast` stands for, where it asks for
    nothing.

    A distilled model keeps the sampler and steps that it was taught. notes: the content of its
    safelight.json.
    """
    if not family.shortcuts:
        return request
    fixed = defaults_of(family, notes) if is_distilled(notes) else {}
    level = LEVELS.get(request.fast, {})
    return request.with_defaults({k: v for k, v in level.items() if k not in fixed})
