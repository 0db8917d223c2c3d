"""Styles: named words that are put around a prompt, in AUTOMATIC1111's styles.csv."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safelight.errors import SafelightError
from safelight.paths import expanded

_LARGEST_FILE = 4 * 2**20
MAX_PROMPT = 16 * 1024


@dataclass(frozen=True)
class Style:
    """`{prompt}` in a text stands for the prompt; without it the text follows the prompt."""

    prompt: str
    negative_prompt: str


def read_styles(file: str | Path) -> dict[str, Style]:
    """Return the styles of a file by name. Its columns are name, prompt and negative_prompt.

    Raises SafelightError if it cannot be read.
    """
    path = expanded(file)
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise SafelightError(f"{path.name} is over 4 MiB: styles are a few lines")
        with path.open(encoding="utf-8-sig", newline="") as opened:
            rows = list(csv.DictReader(opened, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SafelightError(f"styles cannot be read from {path.name!r}: {error}") from None
    if rows and not {"name", "prompt"} <= rows[0].keys():
        raise SafelightError(
            f"{path.name!r} must begin with the line name,prompt,negative_prompt, as styles do"
        )
    return {
        row["name"]: Style(row["prompt"] or "", row.get("negative_prompt") or "")
        for row in rows
        if row["name"]
    }


def apply_styles(
    styles: Mapping[str, Style], names: Sequence[str], prompt: str, negative_prompt: str
) -> tuple[str, str]:
    """Return prompt and negative prompt with the named styles, one after the other.

    Raises SafelightError for a name that is not among them.
    """
    for name in names:
        if name not in styles:
            close = difflib.get_close_matches(name[:60], styles, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(styles)}"
            if not styles:
                hint = "no file of styles was given (--styles-file)"
            raise SafelightError(f"there is no style {name[:60]!r}: {hint[:120]}", field="styles")
        prompt = _around(styles[name].prompt, prompt)
        negative_prompt = _around(styles[name].negative_prompt, negative_prompt)
        # A style with the prompt in it twice, given forty times, would fill any memory.
        if max(len(prompt), len(negative_prompt)) > MAX_PROMPT:
            raise SafelightError(
                f"prompt is over {MAX_PROMPT >> 10} KiB with style {name[:60]!r} around it",
                field="styles",
            )
    return prompt, negative_prompt


def _around(style: str, prompt: str) -> str:
    if "{prompt}" in style:
        return style.replace("{prompt}", prompt)
    return ", ".join(filter(None, (prompt.strip(), style.strip())))
