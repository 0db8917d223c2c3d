"""The models that a server draws with: their names and their sources.

A name is looked up in a list; it is never made into a path. The server and its worker have the same
list, since both make it from the same settings.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from difflib import get_close_matches
from functools import cached_property

from safelight.errors import SafelightError
from safelight.server.settings import WorkerSettings
from safelight.server.wording import clipped
from safelight.weights.digest import known_digest
from safelight.weights.find import BUILT_IN, MODELS, Source, find, on_disk
from safelight.weights.library import ENDINGS, Entry, Library, open_library
from safelight.weights.matching import last_part

MAX_NAME = 300
"""The most characters of a model's name in a request: comparing names takes time for each one."""

MAX_TOLD = 6
"""The most names that an error lists."""

_TITLE = re.compile(r"(.+?) \[([0-9a-f]{8,64})\]")
"""A model as A1111 shows it: its name and the beginning of its SHA-256."""


class Served:
    """The models of a server. For use in threads: it reads the models folder on each call."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings

    @cached_property
    def default(self) -> str:
        """The name of the model that draws if a request names none."""
        name = self._settings.model
        if name in BUILT_IN:
            return name
        if (found := on_disk(name)) is not None:
            return found.name
        library = self._library
        if library is not None and library.matches(name, "model"):
            return library.find(name, "model").name
        return name

    def sources(self) -> dict[str, Source | None]:
        """Return the source of each model, by name; None for the default model.

        The default model comes first. Without an allowlist, the others are the models that ship and
        those of the models folder.
        """
        found: dict[str, Source | None] = {self.default: None}
        if self._settings.allowed is not None:
            return found | {n: s for n, s in self._allowed.items() if n not in found}
        for name in BUILT_IN:
            if (MODELS / name).is_dir():
                found.setdefault(name, Source(name, MODELS / name))
        if self._library is not None:
            own = on_disk(self._settings.model)
            for name, entry in _named(self._library.entries("model")).items():
                same = own is not None and own.path.resolve() == entry.path.resolve()
                if not same:
                    found.setdefault(name, Source(name, entry.path))
        return found

    def find(
        self,
        asked: str | None,
        elsewhere: Iterable[str] = (),
        digests: Mapping[str, str] | None = None,
        hidden: Container[str] = (),
    ) -> str:
        """Return the name of the model that a request means; None means the default one.

        asked: a name, or its last part, with or without its ending and in any case; or, as A1111
        shows it, "name [hash]"; or the first 8 or more digits of a known SHA-256. elsewhere: names
        of models that workers on other machines have. digests: the SHA-256 of models that have been
        loaded, by name. hidden: names that the error leaves out.

        Raises SafelightError, code "no_model", with the closest name, if no model or several fit.
        """
        if asked is None:
            return self.default
        if len(asked) > MAX_NAME:
            told = f"model must have at most {MAX_NAME} characters"
            raise _no_model(f"{told}; there is no {clipped(asked, 60)!r}")
        names, asked = dict.fromkeys(elsewhere) | self.sources(), asked.strip()
        if asked in names:
            return asked
        title = _TITLE.fullmatch(asked)
        plain = _plain(title[1] if title else asked)
        readings: tuple[Callable[[str], bool], ...] = (
            lambda name: _plain(name) == plain,
            lambda name: _plain(name).casefold() == plain.casefold(),
            lambda name: last_part(_plain(name)).casefold() == plain.casefold(),
        )
        for reading in readings:
            found = [name for name in names if reading(name)]
            if len(found) == 1:
                return found[0]
            if found:
                both = " and ".join(found[:2])
                raise _no_model(f"model {clipped(asked)!r} could be {both}: give all of its name")
        digest = (title[2] if title else asked).lower()
        if re.fullmatch("[0-9a-f]{8,64}", digest):
            for name, source in names.items():
                own = (digests or {}).get(name) or (None if source is None else _digest(source))
                if (own or "").startswith(digest):
                    return name
        shown = [name for name in names if name not in hidden]
        raise _no_model(f"no model {clipped(asked)!r} on this server; {_closest(plain, shown)}")

    def source(self, name: str) -> Source | None:
        """Return the source of a model of this name; None for the default one.

        Raises SafelightError if the model is not there any more.
        """
        names = self.sources()
        if name not in names:
            told = f"model {clipped(name)!r} is not on this server any more"
            raise _no_model(f"{told}; {_closest(name, names)}")
        return names[name]

    def check(self) -> None:
        """Raise SafelightError if a model of the allowlist is not there."""
        _ = self._allowed

    @cached_property
    def _library(self) -> Library | None:
        return open_library(self._settings.models_dir)

    @cached_property
    def _allowed(self) -> dict[str, Source]:
        folder = self._settings.models_dir
        found = [
            find(name, download=False, models_dir=folder) for name in self._settings.allowed or ()
        ]
        return {source.name: source for source in found}


def _named(entries: Iterable[Entry]) -> dict[str, Entry]:
    """Return entries by name; entries that share a name by their files' names."""
    entries = list(entries)
    counts = Counter(entry.name for entry in entries)
    return {entry.name if counts[entry.name] == 1 else entry.file_name: entry for entry in entries}


def _plain(name: str) -> str:
    """Return a name without the file ending of weights."""
    lower = name.lower()
    ending = next((one for one in ENDINGS if lower.endswith(one)), "")
    return name[: len(name) - len(ending)]


def _digest(source: Source) -> str | None:
    try:
        return known_digest(source.path) if source.path.is_file() else None
    except (OSError, SafelightError):
        return None


def _closest(asked: str, names: Iterable[str]) -> str:
    """Return the end of an error: the closest name, or the names that there are."""
    names = list(names)
    folded = {_plain(name).casefold(): name for name in names}
    near = get_close_matches(last_part(asked).casefold(), folded, 1, 0.6)
    if near:
        return f"did you mean {folded[near[0]]!r}?"
    shown = ", ".join(clipped(name, 60) for name in names[:MAX_TOLD])
    return f"there are {shown or 'none'}{' …' if len(names) > MAX_TOLD else ''}"


def _no_model(message: str) -> SafelightError:
    return SafelightError(message, code="no_model", field="model")
