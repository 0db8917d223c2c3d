"""The files of the LoRAs, embeddings and upscalers that a recipe names, found by name and hash."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelight.adapters.places import file_in
from safelight.errors import SafelightError
from safelight.weights.check import printable
from safelight.weights.digest import digest_file

if TYPE_CHECKING:
    from safelight.weights.library import Library


def recorded_files(
    recipe: dict[str, Any], kind: str, library: Library | None, given: Sequence[str]
) -> dict[str, Path]:
    """Return the path of each LoRA, embedding or upscaler of a recipe, by its name there.

    kind: "lora", "embedding" or "upscaler". library: the models folder, if there is one. given:
    paths that are looked at first. The recipe may be a stranger's: nothing in it is taken for a
    path.

    Raises SafelightError for one whose file is not found.
    """
    there = {_sha256(path, kind): Path(path) for path in given}
    found: dict[str, Path] = {}
    records = recipe.get(f"{kind}s", [])
    for record in records if isinstance(records, list) else ():
        told = record if isinstance(record, dict) else {}
        name, sha256 = told.get("name"), told.get("sha256")
        if kind == "upscaler" and sha256 is None:  # a filter, which has no file
            continue
        if not isinstance(name, str) or not isinstance(sha256, str):
            raise SafelightError(f"the recipe's {kind}s are not as Safelight writes them")
        path = there.get(sha256) or (library and _in_library(library, kind, name, sha256))
        if path is None:
            raise SafelightError(
                f"{kind} {printable(name, 60)} of SHA-256 {printable(sha256, 10)} is needed: "
                f"give its file with --{kind}, or a folder that has it with --models-dir",
                code="no_model",
                field=f"{kind}s",
            )
        if found.setdefault(name, path) != path:
            raise SafelightError(f"the recipe has two {kind}s with the name {printable(name, 60)}")
    return found


def _sha256(path: str, kind: str) -> str:
    try:
        return digest_file(file_in(Path(path))).sha256
    except (OSError, ValueError):
        raise SafelightError(
            f"there is no file {printable(path[-80:], 80)!r}: --{kind} takes the path of a file",
            field=f"{kind}s",
        ) from None


def _in_library(library: Library, kind: str, name: str, sha256: str) -> Path | None:
    for entry in library.matches(name, kind):
        if digest_file(entry.path).sha256 == sha256:
            return entry.path
    entry = library.by_hash(sha256, kind)
    return None if entry is None else entry.path
