"""A grid of pictures over one or two settings, all from the same noise.

x, y = Axis.parse("sampler=ddim,euler_a"), Axis.parse("steps=5,10,20")
grid(model, Request(prompt="a cat", seed=1), x, y).save("grid.png")
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from PIL import Image, ImageDraw, ImageFont

from safelight.controls import with_scale
from safelight.errors import SafelightError
from safelight.families.control import CONTROL
from safelight.picture import save_png
from safelight.recipe import png_texts
from safelight.request import Request
from safelight.result import Result
from safelight.settings import Setting, settings_of, unlike_defaults

if TYPE_CHECKING:
    from safelight.model import Model

MAX_CELLS = 100

SETTINGS = {
    name: setting
    for name, setting in settings_of(Request).items()
    if setting.kind not in (None, bool) and name != "count"
}
"""The settings that an axis can be: all but pictures, switches and the count."""

TEXTS = ("prompt", "negative_prompt", *(n for n, s in SETTINGS.items() if s.kind is tuple))
"""Settings whose values may contain commas."""

PAPER, INK, MUTED, FRAME = "#fbfaf8", "#211e1b", "#7d756c", "#d9d3ca"
SMALLEST_CELL = 192
"""Pixels of the shorter side. Smaller pictures are enlarged by a whole factor, for the labels."""

MAX_PIXELS = 32_000_000
"""Pixels of all cells together on the sheet; larger cells are shrunk."""


@dataclass(frozen=True)
class Axis:
    """A setting, by its name in Request, and its values in order; None leaves the setting out."""

    name: str
    values: tuple[Any, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the axis that is written `setting=value,value`.

        Values of TEXTS are separated by |, as in `prompt=a cat|a dog, sitting` and
        `loras=none|ink:0.5|ink:0.5,film`. `none` leaves out a setting that can be left out, as in
        `schedule=none,karras`. Raises SafelightError for any other form. `requests` checks the
        values.
        """
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise SafelightError(
                f"an axis must be a setting and its values, as in steps=5,10,20, not {text!r:.60}"
            )
        if name not in SETTINGS:
            near = difflib.get_close_matches(name[:40], SETTINGS, n=1)
            known = (n for n, setting in SETTINGS.items() if not setting.about.some_models)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise SafelightError(f"{name!r:.40} cannot be an axis; {hint}")
        parts = values.split("|" if name in TEXTS else ",")
        return cls(name, tuple(_value(SETTINGS[name], part.strip()) for part in parts))

    @property
    def title(self) -> str:
        return self.name.replace("_", " ")

    @property
    def labels(self) -> list[str]:
        """The values in words, for people."""
        return [_shown(value) for value in self.values]


def _value(setting: Setting, text: str) -> Any:
    can_be_left_out = setting.optional or setting.default in ((), "")
    # A prompt cannot be left out: there "none" is the prompt itself.
    if text == "none" and can_be_left_out and setting.name != "prompt":
        return setting.default
    return setting.parse(text)


def _shown(value: object) -> str:
    if value is None:
        return "default"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value) or "(empty)"


def requests(base: Request, x: Axis, y: Axis | None = None) -> list[list[Request]]:
    """Return the request of every cell, row by row: base with x's and y's values.

    All have base's seed, and so its noise, unless seed is an axis. Raises SafelightError for the
    first value that is not valid, and for a grid of more than 100 cells.
    """
    if y is not None and x.name == y.name:
        raise SafelightError(f"x and y must be two settings, not {x.name} twice")
    if base.count != 1:
        raise SafelightError(f"count must be 1 in a grid, not {base.count}: a cell is one picture")
    cells = len(x.values) * (1 if y is None else len(y.values))
    if cells > MAX_CELLS:
        raise SafelightError(f"a grid must have at most {MAX_CELLS} cells, not {cells}")
    rows = [{}] if y is None else [{y.name: value} for value in y.values]
    return [[_cell(base, {**row, x.name: value}) for value in x.values] for row in rows]


def _cell(base: Request, values: dict[str, Any]) -> Request:
    """Return the request of a cell; a value of None leaves that setting out."""
    given = {name: value for name, value in values.items() if value is not None}
    if (scale := CONTROL[1]) in given:
        given[scale] = with_scale(getattr(base, scale), given[scale])
    return base.without(*(values.keys() - given.keys())).replace(**given)


@dataclass(frozen=True)
class Grid:
    """The results of a comparison, row by row, each of one picture.

    size: of the first cell as it was drawn; None if its picture in the results has that size.
    """

    x: Axis
    y: Axis | None
    results: list[list[Result]]
    size: tuple[int, int] | None = None

    @property
    def warnings(self) -> list[str]:
        """The warnings of all cells, each once."""
        told = (warning for row in self.results for one in row for warning in one.warnings)
        return list(dict.fromkeys(told))

    def sheet(self) -> Image.Image:
        """Return all cells on one labelled page."""
        first, shared = self.results[0][0], self._shared()
        parts = [first.model, *(f"{k.replace('_', ' ')} {_shown(v)}" for k, v in shared.items())]
        return sheet(
            [[result.images[0] for result in row] for row in self.results],
            self.x,
            self.y,
            title=first.settings["prompt"] if self._same("prompt") else "",
            note="  ·  ".join(parts),
        )

    def recipe(self) -> dict[str, Any]:
        """Return the first cell's recipe (`Result.recipe`), with the axes under `grid`."""
        axes = [axis for axis in (self.x, self.y) if axis is not None]
        recipe = self.results[0][0].recipe()
        return {
            **recipe,
            "size": recipe["size"] if self.size is None else list(self.size),
            "grid": {axis.name: list(axis.values) for axis in axes},
            "warnings": self.warnings,
        }

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the sheet as a PNG with the recipe in it; raises as `picture.save_png`."""
        save_png(self.sheet(), path, png_texts(self.recipe()), overwrite=overwrite)

    def _same(self, name: str) -> bool:
        first = self.results[0][0].settings[name]
        return all(result.settings[name] == first for row in self.results for result in row)

    def _shared(self) -> dict[str, Any]:
        """Return the settings that all cells share, without empty ones and those at a default."""
        names = [name for name in SETTINGS if name not in ("prompt", "width", "height")]
        first = unlike_defaults(Request, self.results[0][0].settings)
        return {name: first[name] for name in names if first.get(name) and self._same(name)}


def grid(
    model: Model,
    base: Request,
    x: Axis,
    y: Axis | None = None,
    *,
    on_cell: Callable[[int, int, Image.Image], object] | None = None,
    on_step: Callable[[int, int], object] | None = None,
) -> Grid:
    """Draw every cell. Many share a call of the network (decision 0005 says how that rounds).

    on_cell is called with column, row and picture when a cell is finished; on_step after each step
    of a cell, with the number of steps taken and of all steps. Raises SafelightError before the
    first step if a cell is not valid, and later if a cell's values become NaN.

    Where only the part around a mask is drawn, every cell is a whole photo: the results have them
    shrunk to what the sheet shows; on_cell gets them whole.
    """
    from safelight.engine import Engine

    asked = requests(base, x, y)
    engine = Engine(model, exact=False)
    results = [
        [engine.add(request, (column, row)) for column, request in enumerate(cells)]
        for row, cells in enumerate(asked)
    ]
    # All by one factor, so that sizes that differ stay in proportion.
    cells = [request for row in asked for request in row]
    photos = [one.image.size for one in cells if one.image is not None and one.is_cropped]
    scale = shown_scale([photos[0]] * len(cells)) if photos else 1.0
    first: tuple[int, int] | None = None
    taken, steps = 0, sum(ticket.steps for ticket in engine.tickets)
    while engine.busy:
        stepped, finished = engine.step()
        for _ in stepped:
            taken += 1
            if on_step is not None:
                on_step(taken, steps)
        for ticket in finished:
            column, row = ticket.tag
            if ticket.image is None:
                at = [axis.labels[i] for axis, i in ((x, column), (y, row)) if axis is not None]
                raise SafelightError(f"cell {' × '.join(at):.80}: {ticket.error}")
            if column == row == 0:
                first = ticket.image.size
            results[row][column].images.append(shrunk(ticket.image, scale))
            if on_cell is not None:
                on_cell(column, row, ticket.image)
    return Grid(x, y, results, first)


# --- the page ------------------------------------------------------------------------------------


def shown_scale(sizes: Sequence[tuple[int, int]]) -> float:
    """Return the factor, at most 1, that brings cells of these sizes to MAX_PIXELS together."""
    width, height = (max(size[i] for size in sizes) for i in (0, 1))
    return min(1.0, (MAX_PIXELS / (len(sizes) * width * height)) ** 0.5)


def shrunk(picture: Image.Image, scale: float) -> Image.Image:
    """Return a picture made smaller; itself at scale 1."""
    return picture if scale == 1 else _scaled(picture, scale)


def sheet(
    pictures: Sequence[Sequence[Image.Image]],
    x: Axis,
    y: Axis | None = None,
    *,
    title: str = "",
    note: str = "",
) -> Image.Image:
    """Return pictures, row by row, on one page, with a label over each column and beside each row.

    title stands at the top and note, smaller, at the bottom. The font is Pillow's own, which has
    only English letters: accents are left out, and other scripts become boxes.
    """
    width, height = (max(picture.size[i] for row in pictures for picture in row) for i in (0, 1))
    count = len(pictures) * len(pictures[0])
    scale: float = max(1, -(-SMALLEST_CELL // min(width, height)))
    scale = min(scale, (MAX_PIXELS / (count * width * height)) ** 0.5)
    width, height = round(width * scale), round(height * scale)
    size = max(15, width // 16)
    heading, text, small = (_Text(size * n // 20) for n in (25, 20, 16))
    gap = size // 2
    margin = 2 * size

    columns = [text.wrapped(label, width) for label in x.labels]
    rows = [text.wrapped(label, width) for label in y.labels] if y is not None else []
    gutter = 0
    if y is not None:
        gutter = max(small.width(y.title), *map(text.block_width, rows)) + size
    across = len(columns) * (width + gap) - gap
    headline = heading.wrapped(title, gutter + across, 2) if title else []
    foot = small.wrapped(note, gutter + across, 3) if note else []

    top = margin + (len(headline) * heading.line + size if headline else 0)
    first = top + small.line + max(map(len, columns)) * text.line + gap
    down = len(pictures) * (height + gap) - gap
    left = margin + gutter
    bottom = first + down + (size + len(foot) * small.line if foot else 0) + margin
    page = Image.new("RGB", (left + across + margin, bottom), PAPER)
    pen = ImageDraw.Draw(page)

    heading.write(pen, (margin, margin), headline, INK)
    small.write(pen, (left, top), [x.title], MUTED)
    if y is not None:
        small.write(pen, (margin, first - gap - text.line), [y.title], MUTED)
    for i, lines in enumerate(columns):
        at = left + i * (width + gap) + width / 2
        text.write(pen, (at, first - gap - len(lines) * text.line), lines, INK, "ma")
    for i, lines in enumerate(rows):
        middle = first + i * (height + gap) + (height - len(lines) * text.line) / 2
        text.write(pen, (left - size, middle), lines, INK, "ra")
    for i, row in enumerate(pictures):
        for j, picture in enumerate(row):
            shown = _scaled(picture, scale)
            corner = left + j * (width + gap), first + i * (height + gap)
            page.paste(shown, corner)
            # Without a frame, a white picture has no visible edge.
            edge = (corner[0] + shown.width - 1, corner[1] + shown.height - 1)
            pen.rectangle((*corner, *edge), outline=FRAME)
    small.write(pen, (margin, first + down + size), foot, MUTED)
    return page


def _scaled(picture: Image.Image, scale: float) -> Image.Image:
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    way = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return picture.convert("RGB").resize(size, way)


class _Text:
    """Text in one size of Pillow's font."""

    def __init__(self, size: int) -> None:
        self.font = ImageFont.load_default(size)
        self.line = round(size * 1.3)

    def width(self, text: str) -> int:
        return round(self.font.getlength(text))

    def block_width(self, lines: list[str]) -> int:
        return max(map(self.width, lines))

    def wrapped(self, text: str, width: int, most: int = 3) -> list[str]:
        """Return at most `most` lines of `width` pixels; the last ends in … if text is left."""
        letters = unicodedata.normalize("NFKD", text)
        words = "".join(c for c in letters if not unicodedata.combining(c)).split()
        lines = [""]
        for word in words:
            longer = f"{lines[-1]} {word}".lstrip()
            if self.width(longer) <= width or not lines[-1]:
                lines[-1] = longer
            elif len(lines) < most:
                lines.append(word)
            else:
                lines[-1] = f"{lines[-1]}…"
                break
        return [self._cut(line, width) for line in lines]

    def _cut(self, line: str, width: int) -> str:
        if self.width(line) <= width:
            return line
        line = line[:200].rstrip("…")
        while len(line) > 1 and self.width(f"{line}…") > width:
            line = line[:-1]
        return f"{line}…"

    def write(
        self,
        pen: ImageDraw.ImageDraw,
        at: tuple[float, float],
        lines: list[str],
        colour: str,
        anchor: str = "la",
    ) -> None:
        for i, line in enumerate(lines):
            pen.text((at[0], at[1] + i * self.line), line, colour, self.font, anchor=anchor)
