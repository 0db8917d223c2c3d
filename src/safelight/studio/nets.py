"""Which of the server's ControlNets each control image of a recipe is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safelight.controls import OFF, is_blank, matched
from safelight.families.control import CONTROL
from safelight.recipe import is_ip_adapter, listed_files
from safelight.request_pictures import digest_key, each, inputs_in, inputs_of, setting_of
from safelight.studio.suits import Suits

_PICTURE = CONTROL[0]


def recorded(recipe: Mapping[str, Any]) -> list[str]:
    """Return the names of the ControlNets of a recipe of Safelight, in order."""
    return [
        str(one.get("name")) if isinstance(one, Mapping) else ""
        for one in listed_files(recipe.get("controlnet"))
    ]


def named(units: Sequence[str]) -> list[str]:
    """Return the names of the ControlNets of what the web UI's extension writes of its units.

    A unit that names none has "" there. Units of IP-Adapters are left out.
    """
    found: list[str] = []
    for unit in units:
        pairs = pairs_of(unit)
        model = pairs.get("model", "").partition(" [")[0]
        if not is_ip_adapter(pairs.get("module", ""), model):
            found.append("" if model.casefold() in ("none", "auto") else model)
    return found


def pairs_of(unit: str) -> dict[str, str]:
    """Return the names, in small letters, and the values of what is written of a unit."""
    parts = (part.partition(": ") for part in unit.split(", "))
    return {name.lower(): value for name, _, value in parts}


def arranged(
    settings: Mapping[str, Any], stored: Mapping[str, Any], names: Sequence[str], suits: Suits
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Return a recipe's settings and pictures in the order of the server's ControlNets.

    settings: may hold anything. stored: the recipe's pictures, by their inputs. names: of the
    recipe's ControlNets, "" for one that is not known. A picture whose ControlNet is not here takes
    one that is left. Also returns a sentence for each of them.
    """
    inputs, there = inputs_of(_PICTURE), suits.controlnets
    given = [name for name in inputs_in(settings) if name in inputs]
    numbers = {name: each(settings[name]) for name in OFF if name in settings}
    if not there or not given or len(given) > len(there) or len(names) != len(given):
        return {**settings}, {**stored}, []
    if any(len(values) not in (1, len(given)) for values in numbers.values()):
        return {**settings}, {**stored}, []
    places, told = _places(names, there)
    moved = {one: inputs[place] for one, place in zip(given, places, strict=True)}
    found = {n: v for n, v in settings.items() if n not in map(digest_key, inputs)}
    pictures = {name: one for name, one in stored.items() if name not in inputs}
    for name, to in moved.items():
        if not is_blank(digest := settings[digest_key(name)]):  # the ControlNet was off
            found[digest_key(to)] = digest
            pictures[to] = stored.get(name)
    for name, values in numbers.items():
        if len(values) > 1:
            by_place = dict(zip(places, values, strict=True))
            found[name] = [by_place.get(place, OFF[name]) for place in range(len(there))]
    return found, pictures, told


def lost(settings: Mapping[str, Any], stored: Mapping[str, Any], suits: Suits) -> list[str]:
    """Return a sentence for each control image of a recipe that is not stored."""
    nets = suits.controlnets
    places = {name: place for place, name in enumerate(inputs_of(_PICTURE))}
    told: list[str] = []
    for name in inputs_in(settings):
        if setting_of(name) == _PICTURE and stored.get(name) is None:
            which = f" of {nets[places[name]]}" if 1 < len(nets) > places[name] else ""
            told.append(f"the control image{which} is not stored: add it below")
    return list(dict.fromkeys(told))


def _places(names: Sequence[str], there: Sequence[str]) -> tuple[list[int], list[str]]:
    """Return the place of each name among ours, and a sentence for each that is none of ours."""
    taken, left = matched(names, there)
    told: list[str] = []
    for i, name in enumerate(names):
        if i not in taken:
            taken[i] = left.pop(0)
            if name:
                told.append(f"the ControlNet {name:.60}, for which {there[taken[i]]} is used")
    return [taken[i] for i in range(len(names))], told
