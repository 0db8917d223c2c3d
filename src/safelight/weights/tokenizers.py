"""Where a single file's tokenizers come from: a folder, a tokenizer.json, a GGUF file, or ComfyUI.

The tokenizers of T5 and Qwen stand in no safetensors file, and none ships with us. Programs that
draw with such files bring them along: an installation of ComfyUI or Forge around the models folder
is looked into.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from safelight.errors import SafelightError
from safelight.families import Family
from safelight.weights.check import Header, read_json, refusal
from safelight.weights.find import Source
from safelight.weights.folder import Folder
from safelight.weights.gguf import read_gguf_lists
from safelight.weights.library import Library

_GENERIC = ("PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend")
"""Classes that say nothing about the kind of a tokenizer."""


class Home(Protocol):
    """A tokenizer's files."""

    @property
    def files(self) -> dict[str, Path]:
        """Those that were read, by name."""
        ...

    def file(self, name: str) -> Path | None:
        """Return the path of a file such as "merges.txt", None if it is not there."""
        ...

    def json(self, name: str, limit: int = 2**20) -> dict[str, Any] | None:
        """Return the content of a file, None if it is not there."""
        ...

    def drop(self) -> None:
        """Forget what was read and kept, which may be large."""
        ...


class FolderHome:
    """A tokenizer in a folder. inside: where in the folder, such as "tokenizer_2/"."""

    def __init__(self, folder: Folder, inside: str = "") -> None:
        self._folder, self._inside = folder, inside

    @property
    def files(self) -> dict[str, Path]:
        return self._folder.files

    def file(self, name: str) -> Path | None:
        return self._folder.file(f"{self._inside}{name}")

    def json(self, name: str, limit: int = 2**20) -> dict[str, Any] | None:
        return self._folder.json(f"{self._inside}{name}", limit)

    def drop(self) -> None:
        pass


class FileHome:
    """A tokenizer.json alone, whatever its name. T5's padding token is in another file."""

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()
        self._name = path.name
        self._files: dict[str, Path] = {}
        self._kept: dict[str, Any] | None = None

    @property
    def files(self) -> dict[str, Path]:
        return self._files

    def file(self, name: str) -> Path | None:
        if name != "tokenizer.json":
            return None
        self._files[self._name] = self._path
        return self._path

    def json(self, name: str, limit: int = 2**20) -> dict[str, Any] | None:
        if name == "tokenizer.json":
            return self._content(limit)
        if name == "tokenizer_config.json" and _model_of(_content_of(self)) == "Unigram":
            return {"pad_token": "<pad>"}
        return None

    def drop(self) -> None:
        self._kept = None

    def _content(self, limit: int) -> dict[str, Any]:
        """Return the content. It is kept, because class and padding are read from it, too."""
        path = self.file("tokenizer.json")
        assert path is not None
        if self._kept is None:
            self._kept = read_json(path, limit, self._name)
        return self._kept


class GGUFHome:
    """A tokenizer in the metadata of a GGUF file, as the files of a folder."""

    def __init__(self, header: Header) -> None:
        self._header = header
        self._made: dict[str, dict[str, Any]] | None = None

    @property
    def files(self) -> dict[str, Path]:
        return {self._header.name: self._header.path}

    def file(self, name: str) -> Path | None:
        return None

    def json(self, name: str, limit: int = 2**20) -> dict[str, Any] | None:
        if self._made is None:
            from safelight.prompt.gguf_tokenizer import LISTS, gguf_files

            header = self._header
            lists = read_gguf_lists(header.path, LISTS, header.name)
            self._made = gguf_files(header.metadata, lists, header.name)
        return self._made.get(name)

    def drop(self) -> None:
        self._made = None


class Gathered(Folder):
    """The tokenizers of a model from several places, as one folder that holds nothing else.

    homes: by the names of the tokenizers, which `tokenizers` has.
    """

    def __init__(self, homes: Mapping[str, Home], label: str) -> None:
        self.path = self.root = Path()
        self.label, self.index, self.flat = label, {}, False
        self._homes, self.tokenizers = homes, frozenset(homes)
        self.files = {}

    def file(self, name: str) -> Path | None:
        part, _, rest = name.partition("/")
        home = self._homes.get(part)
        found = None if home is None else home.file(rest)
        if found is not None:
            self.files[name] = found
        return found

    def json(self, name: str, limit: int = 2**20) -> dict[str, Any] | None:
        part, _, rest = name.partition("/")
        home = self._homes.get(part)
        return None if home is None else home.json(rest, limit)

    def drop(self) -> None:
        """Forget what the homes have read and kept."""
        for home in self._homes.values():
            home.drop()


def class_of(home: Home) -> str | None:
    """Return the class of a tokenizer in transformers, None if its files do not tell.

    Raises SafelightError if they are malformed.
    """
    stated = (home.json("tokenizer_config.json") or {}).get("tokenizer_class")
    if isinstance(stated, str) and stated not in _GENERIC:
        return stated
    content = _content_of(home)
    kind = _model_of(content)
    if kind == "Unigram" and [token[:1] for token in _begin(content)] == [["<pad>"], ["</s>"]]:
        return "T5Tokenizer"
    added = content.get("added_tokens")
    listed = added if isinstance(added, list) else []
    marks = [told.get("content") for told in listed if isinstance(told, dict)]
    return "Qwen2Tokenizer" if kind == "BPE" and "<|im_start|>" in marks else None


def _begin(content: Mapping[str, Any]) -> list[list[Any]]:
    """Return the first two tokens of a Unigram model, with their scores."""
    vocab = content["model"].get("vocab")
    first = vocab[:2] if isinstance(vocab, list) else []
    return [token for token in first if isinstance(token, list)]


def _content_of(home: Home) -> dict[str, Any]:
    from safelight.prompt.pipeline import LARGEST

    return home.json("tokenizer.json", LARGEST) or {}


def _model_of(content: Mapping[str, Any]) -> str | None:
    """Return the kind of a tokenizer.json's model, None if it says none."""
    model = content.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    return kind if isinstance(kind, str) else None


def of_class(family: Family, found: str | None) -> list[str]:
    """Return the tokenizers of a family that a tokenizer of this class can be."""
    return [name for name, classes in family.tokenizers.items() if found in classes]


def tokenizer_home(source: Source) -> Home:
    """Return the tokenizer that lies in a folder, or in a tokenizer.json."""
    if source.path.is_dir():
        return FolderHome(Folder(source.path, source.name, index=None))
    return FileHome(source.path)


def gguf_home(header: Header) -> tuple[Home, str] | None:
    """Return the tokenizer in a GGUF file and its class; None if it holds none that we read."""
    from safelight.prompt.gguf_tokenizer import gguf_class

    found = gguf_class(header.metadata) if header.format == "gguf" else None
    return None if found is None else (GGUFHome(header), found)


def installed_for(
    library: Library, family: Family, name: str, configs: Mapping[str, Any]
) -> tuple[Source, Home] | None:
    """Return an installed tokenizer that can be the one of this name of a family.

    configs: of the text encoders. One that the family refuses with them is passed over.
    """
    for entry in library.tokenizers():
        source = Source(entry.name, entry.path)
        home = tokenizer_home(source)
        try:
            if name in of_class(family, class_of(home)):
                family.load_tokenizers(Gathered({name: home}, source.name), configs, {name})
                return source, home
        except SafelightError:
            continue  # another may do
    return None


def check_tokenizer(source: Source, family: Family) -> tuple[Home, list[str]]:
    """Return a tokenizer that is given alone, and which of a family's tokenizers it can be.

    Raises SafelightError if it can be none.
    """
    home = tokenizer_home(source)
    found = class_of(home)
    names = of_class(family, found)
    if not names:
        known = " or ".join(dict.fromkeys(c[0] for c in family.tokenizers.values()))
        raise refusal(source.name, f"a tokenizer of {found or 'no kind we know'}; {known} is read")
    return home, names
