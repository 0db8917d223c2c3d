"""What requests may name on this server: LoRAs, embeddings, autoencoders and styles.

It is looked up without PyTorch, so that a name which is not there is refused at once.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import cached_property
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from safelight.adapters.asked import asked_of
from safelight.adapters.embedding import EmbeddingFile, look_at
from safelight.adapters.embeddings import EmbeddingFinder
from safelight.adapters.learned import encoder_of, words_of
from safelight.errors import SafelightError
from safelight.prompt.dialects import read
from safelight.prompt.show import describe
from safelight.prompt.styles import Style, apply_styles, read_styles
from safelight.request import Request
from safelight.server.settings import Settings
from safelight.weights.check import read_header
from safelight.weights.find import find
from safelight.weights.library import Entry, Library, open_library
from safelight.weights.plan import Plan, read_plan

if TYPE_CHECKING:
    from safelight.prompt.tokenizer import Tokenizer


class Names:
    """The files that requests may name, and how their prompts are read. For threads: it reads
    files at each question, so that new ones are found.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()

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
                if self._tokenizers:
                    one.fitting({key: net.hidden_size for key, net in self._encoders.items()})
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
        if request.dynamic_prompts:
            styled = "", ""
        request = request.replace(prompt=styled[0], negative_prompt=styled[1], styles=())
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
        """Return how a request's prompt is read, as `safelight.prompt.show.describe` does.

        negative: its negative prompt. Raises SafelightError for a model that reads no prompt, and
        for an embedding that is not there.
        """
        tokenizer = self._tokenizers.get("tokenizer")
        if tokenizer is None:
            raise SafelightError(f"{self._settings.model} reads no prompt", field="prompt")
        tokenizer = self._learned(tokenizer, request)
        reading = read(
            request.negative_prompt if negative else request.prompt,
            request.prompt_syntax,
            steps=request.steps or 50,
            emphasis=request.emphasis,
            negative=negative,
        )
        return describe(reading, tokenizer, request.prompt_syntax, self._plan.words)

    def _learned(self, tokenizer: Tokenizer, request: Request) -> Tokenizer:
        """Return the tokenizer with the embeddings of a request."""
        chosen = EmbeddingFinder(self.library).choose(request, tokenizer)
        encoder = encoder_of("tokenizer")
        return tokenizer.with_learned(list(words_of(self._encoders, chosen)[encoder]))

    @cached_property
    def _plan(self) -> Plan:
        with self._lock:
            settings = self._settings
            return read_plan(find(settings.model, models_dir=settings.models_dir, download=False))

    @cached_property
    def _tokenizers(self) -> dict[str, Any]:
        return self._plan.family.load_tokenizers(self._plan.folder, self._plan.configs)

    @property
    def _encoders(self) -> dict[str, Any]:
        """The configs of the text encoders."""
        return {encoder_of(name): self._plan.configs[encoder_of(name)] for name in self._tokenizers}
