"""Reads prompts as a model does, without its weights: for `safelight tokens` and for a server."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from safelight.adapters.asked import asked_of
from safelight.adapters.embedding import EmbeddingFile, bundled
from safelight.adapters.embeddings import EmbeddingFinder, naming
from safelight.adapters.learned import words_of
from safelight.errors import SafelightError
from safelight.families.flow import FlowFamily
from safelight.families.flow_texts import MARKED, is_marked, read_whole
from safelight.prompt.chunks import chunks_by_text
from safelight.prompt.dialects import read
from safelight.prompt.reading import Reading
from safelight.prompt.show import describe, describe_whole
from safelight.prompt.tokenizer import Tokenizer
from safelight.request import Request
from safelight.weights.headers import plain_header_of
from safelight.weights.plan import Plan

STEPS = 50
"""Steps of which schedules are shares, if a request does not say how many."""


class PromptReader:
    """Reads prompts with a model's tokenizer and with the embeddings that a finder finds."""

    def __init__(self, plan: Plan, finder: EmbeddingFinder) -> None:
        self.plan, self._finder = plan, finder

    def describe(self, request: Request, *, negative: bool = False) -> dict[str, Any]:
        """Return how the prompt of a request is read, as `safelight.prompt.show.describe` does.

        negative: whether it is the negative prompt. If the model has several text encoders, the
        reading of the first is returned, or of the one that reads the most. Raises SafelightError
        for a model that reads no prompt, and for an embedding that is not there.
        """
        if not self.plan.family.uses_prompt:
            raise SafelightError(
                f"{self.plan.source.name} reads no prompt: name a model that does", field="prompt"
            )
        if isinstance(self.plan.family, FlowFamily):
            text, reading = self._read_whole(request, negative=negative)
            reader = self.plan.family.reader(self._tokenizers)
            found = describe_whole(reading, text, reader, request.prompt_syntax)
            if is_marked(reading):
                found["warnings"].append(f"it has {MARKED.format(self.plan.source.name)}")
            return found
        reading, tokenizer, said = self._read(request, negative=negative)
        found = describe(reading, tokenizer, request.prompt_syntax, self.plan.words)
        found["warnings"] += said
        return found

    def check(self, request: Request) -> None:
        """Raise SafelightError for a prompt that cannot be read, such as one that is too long."""
        if isinstance(self.plan.family, FlowFamily):
            for negative in (False, True):
                self._read_whole(request, negative=negative)
        elif self.plan.family.text_parts:
            for negative in (False, True):
                reading, tokenizer, _ = self._read(request, negative=negative)
                known = tokenizer.with_words(self.plan.words)
                chunks_by_text(known, reading, request.prompt_syntax)

    def _read_whole(self, request: Request, *, negative: bool) -> tuple[str, Reading]:
        """Return the words that a model of flow matching reads of a prompt, and the reading."""
        return read_whole(
            request.negative_prompt if negative else request.prompt,
            request.prompt_syntax,
            request.emphasis,
            steps=request.steps or STEPS,
            negative=negative,
        )

    def _read(self, request: Request, *, negative: bool) -> tuple[Reading, Tokenizer, list[str]]:
        """Return a prompt's reading, the tokenizer that knows its embeddings, and warnings."""
        name, encoder = self.plan.family.text_parts[0]
        tokenizer = self._tokenizers[name]
        widths = {key: config.hidden_size for key, config in self.encoders.items()}
        said: list[str] = []
        inside = self._inside_loras(request, tokenizer, said)
        known = [one.name for one in inside]
        chosen = self._finder.choose(request, tokenizer, widths, known=known, warnings=said)
        chosen = (*chosen, *inside)
        tokenizer = tokenizer.with_learned(list(words_of(self.encoders, chosen)[encoder]))
        reading = read(
            request.negative_prompt if negative else request.prompt,
            request.prompt_syntax,
            steps=request.steps or STEPS,
            emphasis=request.emphasis,
            negative=negative,
        )
        return reading, tokenizer, said

    def _inside_loras(
        self, request: Request, tokenizer: Tokenizer, warnings: list[str]
    ) -> list[EmbeddingFile]:
        """Return the embeddings inside the LoRAs of a request that are in the models folder."""
        library, found = self._finder.library, dict[tuple[Path, str], EmbeddingFile]()
        if library is None:
            return []
        for lora in asked_of(request)[0]:
            entries = library.matches(lora.name, "lora")
            if len(entries) == 1 and (lora.weight or lora.text_weight):
                path = entries[0].path
                header = plain_header_of(path, "a LoRA")
                inside = bundled(header, naming(request, tokenizer), warnings)
                found |= {(path, one.name): one for one in inside}
        return list(found.values())

    @property
    def encoders(self) -> dict[str, Any]:
        """The configs of the text encoders."""
        plan = self.plan
        return {encoder: plan.configs[encoder] for _, encoder in plan.family.text_parts}

    @cached_property
    def _tokenizers(self) -> dict[str, Any]:
        return self.plan.load_tokenizers()
