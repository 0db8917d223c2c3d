"""Defaults for settings that a request leaves out: a model's own, and the levels of `fast`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from safelight.errors import SafelightError
from safelight.families.base import SHORTCUTS
from safelight.request import Request

if TYPE_CHECKING:
    from safelight.families import Family

NEEDED = ("sampler", "steps", "guidance_scale")
"""The settings that every `draw_with` must have."""

OPTIONAL = ("guidance_start", "guidance_end")
"""The settings that a `draw_with` may have as well."""

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
"""The settings that each level of `fast` stands for; a request's own come first. Where 8-bit
integers are not available, linear layers are plain."""

BY_MODEL = frozenset({*NEEDED, *OPTIONAL}.union(*LEVELS.values()))
"""The settings whose defaults depend on the model."""


def model_defaults(notes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sampler, steps and guidance that a model says it draws best with.

    notes: the content of its safelight.json, where `draw_with` has all of NEEDED and any of
    OPTIONAL. The result is empty if `draw_with` is missing or not valid.
    """
    said = notes.get("draw_with")
    if not isinstance(said, dict):
        return {}
    names = (*NEEDED, *(name for name in OPTIONAL if name in said))
    try:
        asked = Request(**{name: said[name] for name in names})
    except (KeyError, SafelightError):
        return {}  # not a file that we wrote
    return {name: getattr(asked, name) for name in names}


def is_distilled(notes: Mapping[str, Any]) -> bool:
    """Return whether a model draws well only with its own `model_defaults`.

    notes: the content of its safelight.json. A distilled model has `"distilled": true`; one that
    our older distillation wrote has `made_from` and `draw_with` instead.
    """
    return notes.get("distilled", "made_from" in notes and "draw_with" in notes) is True


def defaults_of(family: Family, notes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a model draws best with: its own, or else those of its family.

    notes: the content of its safelight.json.
    """
    return {**family.defaults, **model_defaults(notes)}


def level_of(fast: int, family: Family, notes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a level of `fast` stands for with a model.

    A distilled model keeps the sampler and steps that it was taught. A family without the fast mode
    has no such settings. notes: the content of the model's safelight.json.
    """
    if not family.shortcuts:
        return {}
    fixed = defaults_of(family, notes) if family.distilled or is_distilled(notes) else {}
    left_out = {*fixed, *SHORTCUTS} - set(family.shortcuts)
    return {k: v for k, v in LEVELS.get(fast, {}).items() if k not in left_out}


def with_level(request: Request, family: Family, notes: Mapping[str, Any]) -> Request:
    """Return the request with its level of `fast` filled in for settings that it leaves out.

    notes: the content of the model's safelight.json.
    """
    return request.with_defaults(level_of(request.fast, family, notes))
