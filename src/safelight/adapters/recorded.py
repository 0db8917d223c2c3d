"""The files of the LoRAs that a recipe names, found by name and hash."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelight.adapters.file import file_in
from safelight.errors import SafelightError
from safelight.weights.check import printable
from safelight.weights.digest import digest_file

if TYPE_CHECKING:
    from safelight.weights.library import Library


def recorded_files(
    recipe: dict[str, Any], library: Library | None, given: Sequence[str]
) -> dict[str, Path]:
    """Return the path of each LoRA of a recipe, by its name there.

    library: the models folder, if there is one. given: paths that are looked at first. The recipe
    may be a stranger's: nothing in it is taken for a path.

    Raises SafelightError for a LoRA that none of the files is.
    """
    there = {digest_file(file_in(Path(path))).sha256: Path(path) for path in given}
    found: dict[str, Path] = {}
    records = recipe.get("loras", [])
    for record in records if isinstance(records, list) else ():
        told = record if isinstance(record, dict) else {}
        name, sha256 = told.get("name"), told.get("sha256")
        if not isinstance(name, str) or not isinstance(sha256, str):
            raise SafelightError("the recipe's loras are not as Safelight writes them")
        path = there.get(sha256) or (library and _in_library(library, name, sha256))
        if path is None:
            raise SafelightError(
                f"lora {printable(name, 60)} of SHA-256 {printable(sha256, 10)} is needed: "
                "give its file with --lora, or a folder that has it with --models-dir",
                code="no_model",
                field="loras",
            )
        if found.setdefault(name, path) != path:
            raise SafelightError(f"the recipe has two loras with the name {printable(name, 60)}")
    return found


def _in_library(library: Library, name: str, sha256: str) -> Path | None:
    for entry in library.matches(name, "lora"):
        if digest_file(entry.path).sha256 == sha256:
            return entry.path
    entry = library.by_hash(sha256, "lora")
    return None if entry is None else entry.path
