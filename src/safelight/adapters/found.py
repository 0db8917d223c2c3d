"""LoRAs of the models folder, by name. Without PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safelight.adapters.asked import asked_of
from safelight.errors import SafelightError
from safelight.weights.check import printable
from safelight.weights.library import Library, facts_of, open_library

if TYPE_CHECKING:
    from safelight.request import Request


def find_lora(library: Library | None, name: str, *, no_file: str = "") -> Path:
    """Return the path of a LoRA by its name. no_file: what was seen before, for the error.

    Raises SafelightError if there is none, or no models folder.
    """
    if library is None:
        raise SafelightError(
            f"no lora {printable(repr(name), 80)}: {no_file}no models folder is given "
            "(--models-dir, SAFELIGHT_MODELS)",
            code="no_model",
            field="loras",
        )
    return library.find(name, "lora").path


def check_names(request: Request, models_dir: str | None) -> None:
    """Raise SafelightError for a LoRA of a request that is not in the models folder."""
    asked, _ = asked_of(request)
    if asked:
        library = open_library(models_dir)
        for one in asked:
            find_lora(library, one.name)


def listed(models_dir: str | None, kind: str) -> list[dict[str, str]]:
    """Return the files of one kind in the models folder: "name", and "alias" if they have one."""
    library = open_library(models_dir)
    return [
        {"name": entry.name, "alias": facts_of(entry.path).get("alias", "")}
        for entry in (library.entries(kind) if library is not None else ())
    ]
