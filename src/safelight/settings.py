"""The settings of a Request as every interface needs them: limits in words, names, parsing.

`Request` describes each setting once. The command line, the three APIs, the page's form, grids,
recipes and docs/settings.md are made from what the functions here read out of that description.
"""

from __future__ import annotations

import difflib
import numbers
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Union,
    get_args,
    get_origin,
)

from pydantic import BeforeValidator, Field

from safelight.errors import SafelightError

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic.fields import FieldInfo

    from safelight.request import Request

_PICTURE = "a PNG, JPEG or WebP picture in base64"
TEXT = "text of at most 16 KiB"
CHARACTERS = " without NUL characters or lone surrogates"
MAX_TEXTS = 32
"""The most texts in one list."""


def _plain_number(value: object) -> object:
    """Return numpy's scalars as plain numbers; booleans stay, and the strict check refuses them."""
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    return value


Whole = Annotated[int, BeforeValidator(_plain_number)]
Number = Annotated[float, BeforeValidator(_plain_number), Field(allow_inf_nan=False)]


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


Texts = Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(max_length=MAX_TEXTS)]
"""A list of texts. JSON has it as an array; an option of the command line is given repeatedly."""


@dataclass(frozen=True)
class About:
    """What interfaces need to know of a setting besides its type, limits and description.

    default: what holds where the setting is left out, in words; empty if the field's default
      says it.
    accepts: the accepted values in words, where type and limits do not say them; of a list, those
      of each text.
    short: the one-letter option of the command line.
    aliases: options of other programs that the command line takes for this one.
    a1111: the field in AUTOMATIC1111's API; empty for the setting's own name.
    infotext: the key in the PNG text `parameters`; empty if it has none.
    option: the command line's option, where it is not the setting's name.
    slider: lowest value, highest value and step of the page's slider.
    choices: returns the accepted values, where another module keeps them.
    some_models: whether there are models that do not read it (`Family.conditioned_on`).
    group: the heading that it has in the command line's help; empty for that of most settings.
    """

    default: str = ""
    accepts: str = ""
    short: str = ""
    aliases: tuple[str, ...] = ()
    a1111: str = ""
    infotext: str = ""
    option: str = ""
    slider: tuple[float, float, float] | None = None
    choices: Callable[[], tuple[str, ...]] | None = None
    some_models: bool = False
    group: str = ""


@dataclass(frozen=True)
class Setting:
    """One setting, read from a field of a Request class.

    kind: str, int, float, bool, tuple for texts, or None for pictures. description: what it does.
    lowest, highest: limits, None without; above: whether `lowest` itself is excluded. choices: all
    values, empty if they are not listed. optional: whether it may be None. most: how many values it
    may have; listed: whether it is a list even of one.
    """

    name: str
    kind: type | None
    description: str
    default: Any
    optional: bool
    lowest: float | None
    highest: float | None
    above: bool
    multiple: int | None
    choices: tuple[str, ...]
    about: About
    most: int = 1
    listed: bool = False

    @property
    def several(self) -> bool:
        """Whether it may have several values, so that its option may be given more than once."""
        return self.most > 1

    @property
    def accepts(self) -> str:
        """The accepted values in words, as in "a whole number from 1 to 1000"."""
        return self.accepts_one if self.listed else f"{self.accepts_one}{self._or_several}"

    @property
    def _or_several(self) -> str:
        each = "" if self.listed else ", one for each ControlNet"
        return f", or a list of at most {self.most}{each}" if self.several else ""

    @property
    def accepts_one(self) -> str:
        """The same of one value, where there may be several."""
        if self.kind is tuple:
            each = f", each {self.about.accepts}" if self.about.accepts else ""
            return f"a list of at most {MAX_TEXTS} texts{each}"
        if self.about.accepts:
            return self.about.accepts
        if self.choices:
            return f"{', '.join(self.choices[:-1])} or {self.choices[-1]}"
        if self.kind is str:
            return TEXT
        if self.kind is bool:
            return "true or false"
        noun = "whole number" if self.kind is int else "number"
        if self.multiple is not None:
            noun = f"multiple of {self.multiple}"
        if self.lowest is None or self.highest is None:
            return f"a {noun}"
        if self.above:
            return f"a {noun} above {self.lowest:g}, up to {self.highest:g}"
        return f"a {noun} from {self.lowest} to {self.highest}"

    @property
    def left_out(self) -> str:
        """What holds where the setting is left out, in words."""
        if self.about.default:
            return self.about.default
        if self.default in (None, ()):
            return "none"
        if self.kind is bool:
            return "on" if self.default else "off"
        if self.kind is float:
            return f"{self.default:g}"
        return f"{self.default}" or "empty"

    @property
    def must_be(self) -> str:
        """`accepts`, and what leaving it out means where that is not a plain value."""
        if self.optional and self.about.default:
            return f"{self.accepts} (left out: {self.about.default})"
        return f"{self.accepts}{CHARACTERS}" if self.accepts == TEXT else self.accepts

    @property
    def option(self) -> str:
        """The command line's option."""
        return self.about.option or f"--{self.name.replace('_', '-')}"

    @property
    def label(self) -> str:
        """The name as a person reads it."""
        return self.name.replace("_", " ")

    def parse(self, text: str) -> Any:
        """Return the value that a text stands for, or the text unchanged if it is no such value.

        The values of a list are separated by commas or line ends; one value is itself where the
        setting takes that. `Request` checks the value, and says what would be right.
        """
        if not (self.several or self.listed):
            return self._parse_one(text)
        parts = [part for part in map(str.strip, re.split(r"[,\n]", text)) if part]
        if not self.listed and len(parts) < 2:
            return self._parse_one(parts[0] if parts else text)
        return tuple(parts if self.kind is tuple else map(self._parse_one, parts))

    def _parse_one(self, text: str) -> Any:
        try:
            if self.kind is int:
                return int(text)
            if self.kind is float:
                return float(text)
        except ValueError:
            return text
        if self.kind is bool:
            return {"true": True, "false": False}.get(text.lower(), text)
        return text

    def text(self, value: Any) -> Any:
        """Return a list as one text, other values unchanged.

        A line for each text; commas between numbers.
        """
        between = "\n" if self.kind is tuple else ", "
        return between.join(map(str, value)) if isinstance(value, tuple | list) else value

    def schema(self) -> dict[str, Any]:
        """Return the setting's JSON Schema.

        A picture is a string of base64; null leaves the setting out. A default that depends on the
        model is in the description alone, so that no client sends another model's.
        """
        kinds = {str: "string", int: "integer", float: "number", bool: "boolean", None: "string"}
        plain: dict[str, Any] = {"type": "string" if self.kind is tuple else kinds[self.kind]}
        if self.choices:
            plain["enum"] = list(self.choices)
        if self.lowest is not None:
            plain["exclusiveMinimum" if self.above else "minimum"] = self.lowest
        if self.highest is not None:
            plain["maximum"] = self.highest
        if self.multiple is not None:
            plain["multipleOf"] = self.multiple
        array = {"type": "array", "items": plain, "maxItems": self.most}
        array |= {} if self.listed else {"minItems": 1}
        one, several = self.kind is not tuple, [array] if self.several else []
        plain = {"anyOf": [*([plain] if one else []), *several, {"type": "null"}]}
        accepts = self.accepts if self.kind else f"{_PICTURE}{self._or_several}"
        plain["description"] = f"{self.description}: {accepts} (left out: {self.left_out})"
        own = self.kind is not None and not self.about.default
        if own and self.default is not None and not callable(self.default):
            plain["default"] = list(self.default) if self.kind is tuple else self.default
        return plain


_KINDS = (str, int, float, bool)
_READ: dict[Any, dict[str, Setting]] = {}


def settings_of(request_type: type[Request]) -> dict[str, Setting]:
    """Return all settings of a Request class by name, in their order."""
    if request_type not in _READ:
        fields = request_type.model_fields
        _READ[request_type] = {name: _setting(name, field) for name, field in fields.items()}
    return _READ[request_type]


def unlike_defaults(request_type: type[Request], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without those at their default.

    A setting whose default depends on the model or on the picture stays.
    """
    known = settings_of(request_type)
    fixed = {name: one.default for name, one in known.items() if not one.about.default}
    return {name: value for name, value in given.items() if fixed.get(name, ...) != value}


def json_schema(request_type: type[Request]) -> dict[str, Any]:
    """Return the schema of a JSON object that holds a request's settings."""
    return {
        "type": "object",
        "title": request_type.__name__,
        "description": "Settings of one generation of `count` images.",
        "properties": {name: s.schema() for name, s in settings_of(request_type).items()},
        "additionalProperties": False,
    }


def explained(request_type: type[Request], error: ValidationError) -> SafelightError:
    """Return one line for the first of pydantic's findings about a request."""
    found = error.errors(include_url=False)
    first = found[0]
    if isinstance(own := first.get("ctx", {}).get("error"), SafelightError):
        return own
    if not first["loc"]:
        return SafelightError(first["msg"])
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return unknown_setting(name, request_type.model_fields)
    # Of a list, the member that is wrong is named: pydantic tries one value before the list.
    inside = (one for one in found if one["loc"][0] == name and _is_of_list(one["loc"]))
    given = next(inside, first)["input"]
    told = f"{len(given)} values" if isinstance(given, tuple | list) else shown(given)
    must_be = settings_of(request_type)[name].must_be
    return SafelightError(f"{name} must be {must_be}, not {told}", field=name)


def _is_of_list(place: tuple[int | str, ...]) -> bool:
    return any(isinstance(part, int) for part in place)


def unknown_setting(name: str, known: Mapping[str, Any]) -> SafelightError:
    """Return the error for a name that is no setting; it suggests the nearest known one.

    known: fields or Settings by their names. A name that another program has for one means that.
    """
    option = f"--{name[:40].replace('_', '-')}"
    close = [ours for ours, one in known.items() if option in _about_of(one).aliases]
    close = close or difflib.get_close_matches(name[:40], known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
    return SafelightError(
        f"there is no setting {shown(name)}: {hint}", code="unknown_setting", field=name[:40]
    )


def _about_of(one: Any) -> About:
    """Return what is known of a field or a Setting."""
    metadata = (getattr(one, "about", None), *getattr(one, "metadata", ()))
    return next((found for found in metadata if isinstance(found, About)), About())


def shown(value: object) -> str:
    """Return a value as an error message shows it: short, on one line, printable."""
    if isinstance(value, str):
        return repr(value) if len(value) <= 40 else f"{value[:40]!r}… of {len(value)} characters"
    if isinstance(value, float) or value is None:
        return repr(value)
    if isinstance(value, bool):
        return repr(value).lower()
    if isinstance(value, int):
        return repr(value) if value.bit_length() <= 128 else "a number that long"
    return f"something of type {type(value).__name__}"


def _setting(name: str, field: FieldInfo) -> Setting:
    types_, metadata = _flat(field.annotation)
    metadata += field.metadata
    kinds = [kind for kind in types_ if kind is not type(None)]
    about = next((one for one in metadata if isinstance(one, About)), About())
    literal = kinds and get_origin(kinds[0]) is Literal
    arrays = [kind for kind in kinds if get_origin(kind) is tuple]
    texts = any(get_args(kind)[0] is str for kind in arrays)
    alone = [kind for kind in kinds if kind not in arrays]
    if about.choices is not None:
        choices = about.choices()
    else:
        choices = get_args(kinds[0]) if literal else ()
    limits = {
        key: getattr(one, key)
        for one in metadata
        for key in ("ge", "gt", "le", "multiple_of")
        if getattr(one, key, None) is not None
    }
    return Setting(
        name=name,
        kind=tuple if texts else str if literal else next((k for k in alone if k in _KINDS), None),
        description=field.description or "",
        default=None if field.default_factory is not None else field.default,
        optional=type(None) in types_,
        lowest=limits.get("ge", limits.get("gt")),
        highest=limits.get("le"),
        above="gt" in limits,
        multiple=limits.get("multiple_of"),
        choices=choices,
        about=about,
        most=next((m.max_length for m in metadata if hasattr(m, "max_length")), 1) if arrays else 1,
        listed=bool(arrays) and not alone,
    )


def _flat(annotation: Any) -> tuple[list[Any], list[Any]]:
    """Return the types and the metadata of an annotation, with unions and FieldInfo taken apart."""
    if get_origin(annotation) is Annotated:
        inner, *extra = get_args(annotation)
        types_, metadata = _flat(inner)
        unpacked = [one for each in extra for one in (each, *getattr(each, "metadata", ()))]
        return types_, metadata + unpacked
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [_flat(part) for part in get_args(annotation)]
        return [k for kinds, _ in parts for k in kinds], [m for _, more in parts for m in more]
    return [annotation], []
