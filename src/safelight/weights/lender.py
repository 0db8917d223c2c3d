"""A model's folder, from which a single file takes what it lacks: networks and tokenizers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from safelight.families import Family, Part, family_of_folder
from safelight.weights.check import refusal
from safelight.weights.find import Source
from safelight.weights.folder import Folder
from safelight.weights.hub import lent
from safelight.weights.names import Weight, from_folder


@dataclass(frozen=True, slots=True)
class Networks:
    """Networks of a folder before any weight is read, by their names.

    parts: what each is built from. raw: the configs as they were written.
    """

    parts: dict[str, Part]
    raw: dict[str, Mapping[str, Any]]
    weights: dict[str, dict[str, Weight]]


@dataclass(frozen=True, slots=True)
class Lender:
    """A folder that lends a single file what it lacks.

    names: of the networks and tokenizers that it lends. networks: those networks. scheduler: the
    config of its scheduler, None if that tells nothing about the file.
    """

    source: Source
    folder: Folder
    names: frozenset[str]
    networks: Networks
    scheduler: Mapping[str, Any] | None


def read_lender(
    source: Source, family: Family, file: str, lacking: Collection[str]
) -> Lender | None:
    """Read the headers and configs of what a single file takes from a folder.

    family, file: of the file. lacking: the networks and tokenizers that it lacks.

    Returns None if the folder has nothing of it. Raises SafelightError if the folder is malformed,
    or of another family.
    """
    if not source.path.is_dir():
        raise refusal(source.name, "parts come from a model's folder in diffusers' layout")
    folder = Folder(source.path, source.name)
    theirs = family_of_folder(folder.index, source.name)
    if theirs.title != family.title:
        raise refusal(source.name, f"a folder of {theirs.title}; {file:.40} is of {family.title}")
    names = lent(family, folder.index, lacking)
    if not names:
        return None
    networks = networks_of(folder, family, [name for name in family.parts if name in names])
    scheduler = None
    if family.told_by_scheduler:
        scheduler = folder.part_json("scheduler", "scheduler_config.json")
    return Lender(source, folder, frozenset(names), networks, scheduler)


def networks_of(folder: Folder, family: Family, names: Iterable[str]) -> Networks:
    """Return networks of a folder by their names. Raises SafelightError if one is malformed."""
    parts = {
        name: family.parts[name].others.get(_class_of(folder.index.get(name)), family.parts[name])
        for name in names
    }
    raw: dict[str, Mapping[str, Any]] = {
        name: folder.part_json(name, "config.json") for name in parts
    }
    weights = {
        name: from_folder(part, folder.part_headers(name, part.stem))
        for name, part in parts.items()
    }
    return Networks(parts, raw, weights)


def _class_of(entry: Any) -> str:
    """Return the class that model_index.json names for a part, as [library, class]; or nothing."""
    return str(entry[-1]) if isinstance(entry, list) and entry else ""
