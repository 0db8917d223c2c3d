"""Finds the textual inversions of a request: those it asks for, and those its prompts name."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import ref

from safelight.adapters.asked import asked_of
from safelight.adapters.embedding import EmbeddingFile, bundled, look_at
from safelight.adapters.learned import with_embeddings
from safelight.errors import SafelightError
from safelight.prompt.dialects import read
from safelight.prompt.learned import marked
from safelight.weights.cache import stamp_of
from safelight.weights.check import printable
from safelight.weights.digest import digest_file
from safelight.weights.find import file_on_hub, hub_file

if TYPE_CHECKING:
    from safelight.model import Model
    from safelight.prompt.tokenizer import Tokenizer
    from safelight.request import Request
    from safelight.weights.library import Library

MAX_SETS = 8
"""Sets of embeddings that a model keeps."""


@dataclass(frozen=True)
class EmbeddingFinder:
    """Where textual inversions are found.

    library: the models folder. takes_paths: whether one may be named by its path. files: files by
    the names that stand for them.
    """

    library: Library | None = None
    takes_paths: bool = False
    files: Mapping[str, Path] = field(default_factory=dict)

    def choose(
        self,
        request: Request,
        tokenizer: Tokenizer,
        widths: Mapping[str, int],
        *,
        known: Collection[str] = (),
        warnings: list[str] | None = None,
    ) -> tuple[EmbeddingFile, ...]:
        """Return the embeddings of a request, once its dynamic prompts are drawn.

        With `prompt_syntax` a1111 and comfy, the prompts also name embeddings of the models folder.
        In a1111, one that does not fit the model is read as text, and of several files with one
        name one is used, with a line in `warnings`.

        widths: of the vectors that each text encoder reads. known: names that a LoRA brings, which
        need not be found. Raises SafelightError for one that is not found, or is no embedding.
        """
        found: dict[Path, EmbeddingFile] = {}
        for name in request.embeddings:
            one = self.located(name)
            found.setdefault(one.path, one)
        there = {one.name for one in found.values()}
        if request.prompt_syntax == "comfy":
            for path, name in self._marked(request, there, known):
                found.setdefault(path, look_at(path, name))
        elif request.prompt_syntax == "a1111":
            said: list[str] = []
            for name, paths in self._in_words(request, tokenizer).items():
                if name in there or name in known:
                    continue
                if (one := self._first_fitting(name, paths, widths, said)) is not None:
                    found.setdefault(one.path, one)
            if warnings is not None:
                warnings += said
        return tuple(found.values())

    def located(self, name: str) -> EmbeddingFile:
        """Return the embedding of a name. Raises SafelightError if there is none."""
        if name in self.files:
            return look_at(self.files[name], name)
        if self.takes_paths:
            try:
                path = Path(name).expanduser()
                if path.is_file():
                    return look_at(path)
            except SafelightError:
                raise
            except (OSError, RuntimeError, ValueError):
                pass  # too long, or no home: not a path
            if (hub := hub_file(name, "embedding", self.library)) is not None:
                return look_at(file_on_hub(hub, "embedding"))
        if self.library is None:
            where = "no file here, and " if self.takes_paths else ""
            raise SafelightError(
                f"no embedding {printable(repr(name), 80)}: {where}no models folder is given "
                "(--models-dir, SAFELIGHT_MODELS)",
                code="no_model",
                field="embeddings",
            )
        entry = self.library.find(name, "embedding")
        return look_at(entry.path, _last(entry.name))

    def _marked(
        self, request: Request, there: set[str], known: Collection[str]
    ) -> Iterator[tuple[Path, str]]:
        """Yield path and name of each `embedding:name`, without those in `there` or `known`."""

        def is_there(name: str) -> bool:
            return name in there or name in known or bool(self._matches(name))

        for text in _pieces(request):
            for name, _ in marked(text, is_there):
                if not name or name in there or name in known:
                    continue
                found = self._matches(name)
                if self.library is not None and len(found) != 1:
                    self.library.find(name, "embedding")  # raises an error that lists them
                yield from found[:1]

    def _matches(self, name: str) -> list[tuple[Path, str]]:
        found = [(path, known) for known, path in self.files.items() if known == name]
        if not found and self.library is not None:
            entries = self.library.matches(name, "embedding")
            found = [(entry.path, _last(entry.name)) for entry in entries]
        return found

    def _in_words(self, request: Request, tokenizer: Tokenizer) -> dict[str, list[Path]]:
        """Return the files that the prompts name, by their names."""
        found: dict[str, list[Path]] = {}
        known = [(path, name) for name, path in self.files.items()]
        if self.library is not None:
            entries = self.library.entries("embedding")
            known += [(entry.path, _last(entry.name)) for entry in entries]
        is_named = naming(request, tokenizer)
        for path, name in known:
            if is_named(name):
                found.setdefault(name, []).append(path)
        return found

    def _first_fitting(
        self, name: str, paths: Sequence[Path], widths: Mapping[str, int], warnings: list[str]
    ) -> EmbeddingFile | None:
        """Return the first of some files of one name that fits, safetensors first; or None.

        widths, warnings: see `choose`.
        """
        fitting: list[EmbeddingFile] = []
        errors: list[SafelightError] = []
        for path in sorted(paths, key=lambda path: path.suffix.lower() != ".safetensors"):
            try:
                one = look_at(path, name)
                one.fitting(widths)
                fitting.append(one)
            except SafelightError as error:
                errors.append(error)
        if not fitting:
            warnings += [f"{error}; its name in the prompt is read as text" for error in errors]
            return None
        if len(fitting) > 1:
            used, other = (printable(self._shown(one.path), 60) for one in fitting[:2])
            warnings.append(
                f"two embeddings are called {printable(repr(name), 60)}: {used} is used; the "
                f"setting embeddings may name {other}"
            )
        return fitting[0]

    def _shown(self, path: Path) -> str:
        """Return a name by which `located` finds a file: its path below the models folder."""
        if self.library is None or not path.is_relative_to(self.library.root):
            return path.name
        return path.relative_to(self.library.root).as_posix()


class Embeddings:
    """The textual inversions of one model. The last few sets are kept, as models that know them."""

    def __init__(self, model: Model) -> None:
        # A weak reference: the model has this object, and its memory is freed with the last
        # reference to it.
        self._of = ref(model)
        self._kept: OrderedDict[Any, Model] = OrderedDict()

    def __reduce__(self) -> tuple[type[Embeddings], tuple[Model]]:
        return Embeddings, (self._model,)

    @property
    def _model(self) -> Model:
        model = self._of()
        assert model is not None, "the model is gone"
        return model

    def choose(
        self, request: Request, warnings: list[str] | None = None
    ) -> tuple[EmbeddingFile, ...]:
        """Return the embeddings of a request, and those inside its LoRAs.

        Its dynamic prompts must be drawn. warnings: gets a line for each that was left out. Raises
        SafelightError for one that is not found or does not fit the model.
        """
        model = self._model
        if not model.family.text_parts:
            if request.embeddings:
                raise SafelightError(
                    f"{model.name} reads no embeddings: leave them out",
                    field="embeddings",
                )
            return ()
        finder = EmbeddingFinder(model.library, model.takes_paths, model.embedding_files)
        name, _ = model.family.text_parts[0]
        tokenizer = model.parts[name]
        inside = self._inside_loras(request, tokenizer, warnings)
        chosen = finder.choose(
            request,
            tokenizer,
            {name: model.parts[name].config.hidden_size for _, name in model.family.text_parts},
            known=[one.name for one in inside],
            warnings=warnings,
        )
        return (*chosen, *inside)

    def _inside_loras(
        self, request: Request, tokenizer: Tokenizer, warnings: list[str] | None
    ) -> list[EmbeddingFile]:
        model = self._model
        asked, _ = asked_of(request)
        if not asked and model.selection is None:
            return []
        adapters = (model.base or model).adapters
        selection = adapters.choose(asked, request.lora_unmatched, after=model.selection)
        is_named = naming(request, tokenizer)
        found = {
            (lora.file.sha256, one.name): one
            for lora in selection.chosen
            for one in bundled(lora.file.header, is_named, warnings)
        }
        return list(found.values())

    def model(self, chosen: Sequence[EmbeddingFile]) -> Model:
        """Return the model with these embeddings; itself without any.

        Raises SafelightError for one that does not fit, or cannot be read.
        """
        if not chosen:
            return self._model
        key = key_of(chosen)
        if key not in self._kept:
            parts = with_embeddings(self._model.parts, self._model.family.text_parts, chosen)
            self._kept[key] = replace(self._model, parts=parts)
            while len(self._kept) > MAX_SETS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


def key_of(chosen: Sequence[EmbeddingFile]) -> tuple[Any, ...]:
    """Return a key that is equal for the same embeddings, as long as their files stay."""
    return tuple((one.name, one.path, stamp_of(one.path)) for one in chosen)


def record(embedding: EmbeddingFile) -> dict[str, Any]:
    """Return an embedding as a recipe has it."""
    return {"name": embedding.name, "sha256": digest_file(embedding.path).sha256}


def naming(request: Request, tokenizer: Tokenizer) -> Callable[[str], bool]:
    """Return a function that says whether the prompts use a name, by the rule of their syntax.

    The rules are those of `safelight.prompt.learned`.
    """
    pieces = _pieces(request)
    if request.prompt_syntax == "comfy":
        return lambda name: any(
            found == name for text in pieces for found, _ in marked(text, name.__eq__)
        )
    texts = [(" ".join(text.lower().split()), text) for text in pieces]

    def is_named(name: str) -> bool:
        plain = " ".join(name.lower().split())
        # A quick test first: most names are not in the text.
        inside = [text for small, text in texts if plain and plain in small]
        if request.prompt_syntax != "a1111":
            return bool(inside)
        return any(_within(tokenizer.ids(name), tokenizer.ids(text)) for text in inside)

    return is_named


def _pieces(request: Request) -> list[str]:
    """Return the texts of all pieces of both prompts, each once."""
    found: dict[str, None] = {}
    for text, negative in ((request.prompt, False), (request.negative_prompt, True)):
        reading = read(
            text,
            request.prompt_syntax,
            steps=request.steps or 50,
            emphasis=request.emphasis,
            negative=negative,
        )
        for part in reading.parts:
            for stage in part.stages:
                found |= dict.fromkeys(piece.text for piece in stage.pieces)
    return list(found)


def _within(ids: Sequence[int], text: Sequence[int]) -> bool:
    return any(text[i : i + len(ids)] == ids for i in range(len(text) - len(ids) + 1))


def _last(name: str) -> str:
    return name.rpartition("/")[2]
