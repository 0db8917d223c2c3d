"""Sheets of samples: what a model draws, in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image


def draw_sheet(
    model: str | Path, path: Path, prompts: Sequence[str] = (), **other: Any
) -> Image.Image:
    """Return a sheet of pictures that a model draws, and save it.

    model: a name or a folder. The sheet has one picture for each prompt, or twelve if the model
    reads no prompt. other: settings of `Model.generate` in place of those that the model draws best
    with, or of ours if it does not say.
    """
    from safelight.weights import load_model

    loaded = load_model(str(model))
    settings: dict[str, Any] = {"steps": 20, "seed": 1}
    if loaded.uses_prompt:
        settings |= {"sampler": "dpmpp_2m", "guidance_scale": 4.0} | loaded.defaults | other
        pictures = [loaded.generate(text, **settings).images[0] for text in prompts]
    else:
        settings |= {"sampler": "ddim", "count": 12, "unconditional": True}
        settings |= loaded.defaults | other
        pictures = loaded.generate(**settings).images
    sheet = grid(pictures, 6)
    sheet.save(path)
    return sheet


def is_sheet(path: Path) -> bool:
    """Return whether a file is a whole picture."""
    try:
        with Image.open(path) as saved:
            saved.load()
    except Exception:  # decoders of broken files raise anything
        return False
    return True


def under(first: Path, second: Image.Image) -> Image.Image:
    """Return a saved sheet with another below it."""
    with Image.open(first) as saved:
        return grid([saved.convert("RGB"), second], 1)


def grid(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Return pictures of one size as one picture, row by row."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (min(columns, len(pictures)) * width, rows * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet
