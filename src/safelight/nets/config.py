"""How a network's frozen config is read from the JSON beside its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from safelight.errors import SafelightError


class NetConfig:
    """Base of the frozen config dataclasses.

    A config is data from a stranger. A key we build from is a field; a key that would change
    the arithmetic and that we do not build stands in `_inert` with the values under which it
    changes nothing; any other key is bookkeeping of the library that wrote it and is ignored.
    """

    _inert: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @classmethod
    def from_dict(cls, json: Mapping[str, Any]) -> Self:
        """Build the config from a parsed config.json.

        Raises SafelightError when a key asks for a part that Safelight does not build, or when
        a value has the wrong type.
        """
        for key, harmless in cls._inert.items():
            value = json.get(key, harmless[0])
            if not any(type(value) is type(h) and value == h for h in harmless):
                raise SafelightError(
                    f"{cls._label()}: {key}={value!r} is not supported; "
                    f"expected {' or '.join(repr(h) for h in harmless)}"
                )
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            if field.name not in json:
                continue
            value = json[field.name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
        try:
            config = cls(**values)
        except TypeError as e:
            raise SafelightError(f"{cls._label()}: the config is not usable ({e})") from None
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            _check(cls._label(), field.name, getattr(config, field.name), str(field.type))
        config._validate()
        return config

    @classmethod
    def _label(cls) -> str:
        return cls.__name__.removesuffix("Config")

    def _validate(self) -> None:
        """Further checks of one kind of config; raises SafelightError."""

    def _refuse(self, why: str) -> None:
        raise SafelightError(f"{self._label()}: {why}")


def _check(label: str, name: str, value: Any, kind: str) -> None:
    """Check a value against its annotation: int, float, bool, str, tuples of them, or None."""
    if kind.endswith(" | None"):
        if value is None:
            return
        kind = kind.removesuffix(" | None")
    options = [k.strip() for k in kind.split("|")]
    for option in options:
        if option.startswith("tuple["):
            inner = option.removeprefix("tuple[").removesuffix(", ...]")
            if isinstance(value, tuple) and value and all(_is(v, inner) for v in value):
                return
        elif _is(value, option):
            return
    raise SafelightError(f"{label}: {name}={value!r:.60} should be {kind}")


def _is(value: Any, kind: str) -> bool:
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "int":
        # The bound keeps a hostile config from asking for petabytes on the meta device.
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 2**24
    if kind == "float":
        return isinstance(value, int | float) and not isinstance(value, bool) and value == value
    return isinstance(value, str)
