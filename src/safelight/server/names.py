"""What requests may name on this server: LoRAs, embeddings, autoencoders and styles.

It is looked up without PyTorch, so that a name which is not there is refused at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import PurePath
from typing import Any

from safelight.adapters.asked import asked_of
from safelight.adapters.embedding import EmbeddingFile, look_at
from safelight.adapters.embeddings import EmbeddingFinder
from safelight.adapters.reader import PromptReader
from safelight.errors import SafelightError
from safelight.prompt.styles import Style, apply_styles, read_styles
from safelight.request import Request
from safelight.server.settings import Settings
from safelight.weights.check import read_header
from safelight.weights.find import find
from safelight.weights.library import Entry, Library, open_library
from safelight.weights.plan import read_plan


class Names:
    """The files that requests may name, and how their prompts are read. For threads: it reads
    files at each question, so that new ones are found.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @cached_property
    def library(self) -> Library | None:
        """The models folder, None if the server has none."""
        return open_library(self._settings.models_dir)

    def styles(self) -> Mapping[str, Style]:
        """Return the styles by name; none without a file of them."""
        file = self._settings.styles_file
        return {} if file is None else read_styles(file)

    @property
    def vae(self) -> str | None:
        """The autoencoder that was chosen in place of the model's own, by its name."""
        chosen = self._settings.vae
        return None if chosen is None else PurePath(chosen).name

    @property
    def has_wildcards(self) -> bool:
        """Whether dynamic prompts have a folder of words."""
        return self._settings.wildcards_dir is not None

    def entries(self, kind: str) -> list[Entry]:
        """Return what the models folder has of a kind; see `Library.entries`."""
        return [] if self.library is None else self.library.entries(kind)

    def embeddings(self) -> dict[str, EmbeddingFile | SafelightError]:
        """Return the embeddings of the models folder by name, an error for those that are none."""
        found: dict[str, EmbeddingFile | SafelightError] = {}
        for entry in self.entries("embedding"):
            name = entry.name.rpartition("/")[2]
            try:
                one = look_at(entry.path, name)
                one.fitting({k: net.hidden_size for k, net in self._reader.encoders.items()})
                found[name] = one
            except SafelightError as error:
                found[name] = error
        return found

    def metadata(self, entry: Entry) -> dict[str, str]:
        """Return what a LoRA's file says of itself; nothing of one that cannot be read."""
        try:
            return read_header(entry.path).metadata
        except SafelightError:
            return {}

    def check(self, request: Request) -> None:
        """Raise SafelightError for a name in a request that is not there.

        What dynamic prompts will name is not known yet.
        """
        styled = apply_styles(
            self.styles(), request.styles, request.prompt, request.negative_prompt
        )
        words = ("", "") if request.dynamic_prompts else styled
        # A copy as it is: to check it anew would convert its pictures once more.
        update: dict[str, Any] = dict(zip(("prompt", "negative_prompt"), words, strict=True))
        request = request.model_copy(update=update)
        finder = EmbeddingFinder(self.library)
        for name in request.embeddings:
            finder.located(name)
        for lora in asked_of(request)[0]:
            if self.library is None:
                raise SafelightError(
                    f"no lora {lora.name[:60]!r}: this server has no models folder (--models-dir)",
                    code="no_model",
                    field="loras",
                )
            self.library.find(lora.name, "lora")

    def describe(self, request: Request, *, negative: bool = False) -> dict[str, Any]:
        """Return how a request's prompt is read; see `PromptReader.describe`."""
        return self._reader.describe(request, negative=negative)

    @cached_property
    def _reader(self) -> PromptReader:
        settings = self._settings
        source = find(settings.model, models_dir=settings.models_dir, download=False)
        return PromptReader(read_plan(source), EmbeddingFinder(self.library))
