"""Make the settings of a request from the columns of a row."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from safelight.batch.rows import Columns
from safelight.controls import check_numbers
from safelight.errors import SafelightError
from safelight.families.control import CONTROL
from safelight.picture import open_pictures, reason
from safelight.request import Request
from safelight.request_pictures import MAX_PICTURES, PICTURES, REFERENCES, changed, each
from safelight.settings import Setting, settings_of, shown, unknown_setting
from safelight.weights.digest import digest_file

MAX_NAME = 200
"""The most bytes of a picture's name: every file system takes as many, with the ending."""

_SETTINGS = settings_of(Request)
_PLACE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
_WHOLE = re.compile(r"\s*([+-]?[0-9]{1,19})\.0*\s*")
"""A whole number as pandas and spreadsheets write it."""


@dataclass(frozen=True)
class Row:
    """A row that is ready to be drawn.

    number: from 1, in the file's order. line: its line in the file. name: its id in the form used
    in file names. settings: of its request, with paths for pictures. digest: hash of all that its
    pictures depend on.
    """

    number: int
    line: int
    id: str
    name: str
    model: str
    settings: dict[str, Any]
    digest: str

    def request(self) -> Request:
        """Return its request, with its pictures opened. Raises SafelightError if that fails."""
        return Request(**{**self.settings, **open_pictures(self.settings)})


@dataclass(frozen=True)
class Rules:
    """How columns become settings.

    defaults: settings for rows that do not name them. templates: texts with `{column}` in them, by
    the setting that they make. id_column: None takes the column "id", or else the row's number.
    ignored: columns that are left out. model: for rows that name none; None is the shipped one.
    folder: what paths of pictures are relative to.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    templates: Mapping[str, str] = field(default_factory=dict)
    id_column: str | None = None
    ignored: frozenset[str] = frozenset()
    model: str | None = None
    folder: Path = Path()

    def __post_init__(self) -> None:
        for name in self.templates:
            if name not in (*_SETTINGS, "model"):
                raise unknown_setting(name, _SETTINGS)

    def row(self, number: int, columns: Columns) -> Row:
        """Return the checked row of these columns. Raises SafelightError with one line."""
        if columns.problem is not None:
            raise SafelightError(columns.problem, code="unreadable")
        used = {name for text in self.templates.values() for name in places(text)}
        filled = {name: fill(text, columns.values) for name, text in self.templates.items()}
        hidden = self.ignored - {self.id_column}
        values = {name: value for name, value in columns.values.items() if name not in hidden}
        row_id = self._id(number, values)
        named = (filled.pop("model", None), values.pop("model", None), self.model)
        model = next((one for one in named if one not in (None, "")), None)
        left_out = {*filled, *self.ignored, *(used - _SETTINGS.keys())}
        given = {name: value for name, value in values.items() if name not in left_out}
        for name in given:
            if name not in _SETTINGS:
                raise _unknown_column(name)
        settings = {
            **self.defaults,
            **{n: _value(_SETTINGS[n], v, columns.typed) for n, v in given.items()},
            **{n: _value(_SETTINGS[n], v, typed=False) for n, v in filled.items()},
        }
        # A seed of -1 means a random seed in web UIs: treat it as missing.
        settings = {n: v for n, v in settings.items() if v is not None and (n, v) != ("seed", -1)}
        settings.setdefault("seed", seed_of(row_id))
        settings |= {n: self._listed(n, settings[n]) for n in PICTURES if n in settings}
        settings |= changed(settings, self._path)
        if "mask" in settings and "image" not in settings:
            raise SafelightError(
                "mask needs a picture to repaint: give image as well", field="mask"
            )
        request = Request(**{n: v for n, v in settings.items() if n not in PICTURES})
        check_numbers(dict(request), len(each(settings.get(CONTROL[0]))))
        if "prompt" not in settings and not request.unconditional:
            raise SafelightError(
                'prompt is missing: give it in a column or by --set prompt="…", or give '
                "unconditional",
                field="prompt",
            )
        for name in ("image", REFERENCES):
            if request.unconditional and settings.get(name):
                raise SafelightError(f"{name} cannot be used with unconditional", field=name)
        if model is None:
            model = "embedded-unconditional" if request.unconditional else "embedded"
        elif not isinstance(model, str) or not model.isprintable():
            raise SafelightError(f"model must be a name, not {shown(model)}")
        told = json.dumps([model, _told(settings)], sort_keys=True, ensure_ascii=False)
        digest = hashlib.sha256(told.encode()).hexdigest()[:16]
        return Row(number, columns.line, row_id, name_of(row_id), model, settings, digest)

    def _id(self, number: int, values: dict[str, Any]) -> str:
        column = self.id_column or "id"
        if values.get(column, "") == "":
            values.pop(column, None)
            if self.id_column is not None:
                raise SafelightError(f"column {shown(column)}, the row's id, is missing or empty")
            return str(number)
        # The id column may also be a setting.
        found = _plain(values[column] if column in _SETTINGS else values.pop(column))
        if isinstance(found, float) and found.is_integer():  # pandas has no missing integers
            found = int(found)
        if isinstance(found, bool) or not isinstance(found, str | int):
            raise SafelightError(f"id must be a text or a whole number, not {shown(found)}")
        if not str(found).isprintable() or len(name_of(str(found))) > MAX_NAME:
            raise SafelightError(f"id must be printable and short, not {shown(found)}")
        return str(found)

    def _listed(self, name: str, given: Any) -> Any:
        """Return what is given for a setting's pictures, as a list if one text names several."""
        if MAX_PICTURES[name] == 1 or not isinstance(given, str) or not re.search(r"[,\n]", given):
            return given
        try:
            self._path(name, given)  # a file's name may have a comma
            return given
        except SafelightError:
            return _SETTINGS[name].parse(given)

    def _path(self, name: str, given: Any) -> str:
        if not isinstance(given, str):
            raise SafelightError(f"{name} must be the path of a picture, not {shown(given)}")
        try:
            path = self.folder / Path(given).expanduser()
            if path.is_file():
                return str(path)
        except (OSError, RuntimeError, ValueError):  # such as a name that is too long
            pass
        raise SafelightError(f"{name}: there is no file {shown(given)}", field=name)


def _told(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings in the form that is hashed, independent of how a file writes them.

    7 becomes 7.0, a picture becomes the SHA-256 of its file, wherever that is, and a list of one
    value becomes that value, where it means the same.
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if _SETTINGS[name].kind is float:
            numbers = [float(one) for one in each(value)]
            value = numbers if len(numbers) > 1 else numbers[0]
        found[name] = value
    return found | changed(settings, lambda _, path: _sha256_of(path))


def _sha256_of(path: str) -> str:
    try:
        return _sha256(path, Path(path).stat().st_mtime_ns)
    except OSError as error:
        raise SafelightError(f"{shown(path)} cannot be read: {reason(error)}") from None


@lru_cache
def _sha256(path: str, changed: int) -> str:
    """Return a file's SHA-256. changed: its time, so that unchanged files are read only once."""
    return digest_file(Path(path)).sha256


def name_of(row_id: str) -> str:
    """Return an id in the form used in file names: letters, digits, - and _; the rest as %XX.

    It has no dot, since a WebDataset ends the key at the first one, and no @, which precedes the
    number of a picture of the row.
    """
    return quote(row_id, safe="").replace(".", "%2E").replace("~", "%7E")


def seed_of(row_id: str) -> int:
    """Return the seed of a row that names none: 32 bits of a hash of its id."""
    return int.from_bytes(hashlib.sha256(row_id.encode(errors="replace")).digest()[:4], "big")


def places(template: str) -> list[str]:
    """Return the columns that a template names."""
    return [found[1] for found in _PLACE.finditer(template) if found[1] is not None]


def fill(template: str, values: Mapping[str, Any]) -> str:
    """Return a template with each `{column}` replaced; `{{` and `}}` stand for braces.

    Raises SafelightError for a column that the row has not.
    """

    def replaced(found: re.Match[str]) -> str:
        if found[1] is None:
            return found[0][0]
        if found[1] not in values:
            raise SafelightError(
                f"column {shown(found[1])} of the template is missing or empty; {{{{ is a brace"
            )
        return str(values[found[1]])

    return _PLACE.sub(replaced, template)


def _plain(value: Any) -> Any:
    """Return a decimal number of Parquet as an int if it is whole, else a float; others as is."""
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return value


def _value(setting: Setting, value: Any, typed: bool) -> Any:
    value = _plain(value)
    if not typed and isinstance(value, str):
        if setting.kind is int and (whole := _WHOLE.fullmatch(value)):
            return int(whole[1])
        return value if setting.kind is None else setting.parse(value)
    if setting.kind is int and isinstance(value, float) and value.is_integer():
        return int(value)  # pandas makes floats of a column with missing numbers
    return value


def _unknown_column(name: str) -> SafelightError:
    problem = str(unknown_setting(name, _SETTINGS)).removeprefix("there is no setting ")
    told, _, hint = problem.partition(": ")
    hint = f"{hint} " if hint.startswith("did you mean") else ""
    return SafelightError(
        f"column {told} is no setting: {hint}use it in --set, or leave it out with --ignore",
        code="unknown_setting",
        field=name[:40],
    )
