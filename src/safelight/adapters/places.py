"""Where the files of a LoRA are: in a folder that PEFT or diffusers wrote, or on the hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safelight.errors import SafelightError
from safelight.weights.check import printable
from safelight.weights.find import file_on_hub
from safelight.weights.hub_names import HubName
from safelight.weights.library import IN_FOLDER

_CONFIG = "adapter_config.json"
"""PEFT's config, beside the first of IN_FOLDER."""


def file_in(path: Path) -> Path:
    """Return the weight file in a folder that PEFT or diffusers wrote; a file's path as it is.

    Raises SafelightError if a folder has none.
    """
    if not path.is_dir():
        return path
    for name in IN_FOLDER:
        if (path / name).is_file():
            return path / name
    raise SafelightError(f"{printable(path.name, 60)}: a folder without {' or '.join(IN_FOLDER)}")


def config_of(path: Path) -> Path | None:
    """Return the path of PEFT's config beside a weight file, which has alpha; None without one."""
    told = path.with_name(_CONFIG)
    return told if path.name in IN_FOLDER and told.is_file() else None


def on_hub(name: HubName) -> Path:
    """Return the path of a LoRA's file on the hub; PEFT's config comes with a file of PEFT's.

    Raises SafelightError for a file that cannot be had.
    """
    folder, slash, file = (name.file or "").rpartition("/")
    if file == IN_FOLDER[0]:
        file_on_hub(replace(name, file=f"{folder}{slash}{_CONFIG}"), "lora")
    return file_on_hub(name, "lora")
