"""Reads prompts as a model does, without its weights: for `safelight tokens` and for a server."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from safelight.adapters.embeddings import EmbeddingFinder
from safelight.adapters.learned import words_of
from safelight.errors import SafelightError
from safelight.prompt.dialects import read
from safelight.prompt.show import describe
from safelight.request import Request
from safelight.weights.plan import Plan

STEPS = 50
"""Steps that schedules are shares of, where a request does not say."""


class PromptReader:
    """A model's tokenizer, and where embeddings are found."""

    def __init__(self, plan: Plan, finder: EmbeddingFinder) -> None:
        self.plan, self._finder = plan, finder

    def describe(self, request: Request, *, negative: bool = False) -> dict[str, Any]:
        """Return how the prompt of a request is read, as `safelight.prompt.show.describe` does.

        negative: its negative prompt. With two text encoders, it is as the first one reads it.
        Raises SafelightError for a model that reads no prompt, and for an embedding that is not
        there.
        """
        if not self.plan.family.text_parts:
            raise SafelightError(
                f"{self.plan.source.name} reads no prompt: name a model that does", field="prompt"
            )
        name, encoder = self.plan.family.text_parts[0]
        tokenizer = self._tokenizers[name]
        widths = {key: config.hidden_size for key, config in self.encoders.items()}
        said: list[str] = []
        chosen = self._finder.choose(request, tokenizer, widths, warnings=said)
        tokenizer = tokenizer.with_learned(list(words_of(self.encoders, chosen)[encoder]))
        reading = read(
            request.negative_prompt if negative else request.prompt,
            request.prompt_syntax,
            steps=request.steps or STEPS,
            emphasis=request.emphasis,
            negative=negative,
        )
        found = describe(reading, tokenizer, request.prompt_syntax, self.plan.words)
        found["warnings"] += said
        return found

    def check(self, request: Request) -> None:
        """Raise SafelightError for a prompt that cannot be read, such as one that is too long."""
        if self.plan.family.text_parts:
            for negative in (False, True):
                self.describe(request, negative=negative)

    @property
    def encoders(self) -> dict[str, Any]:
        """The configs of the text encoders."""
        plan = self.plan
        return {encoder: plan.configs[encoder] for _, encoder in plan.family.text_parts}

    @cached_property
    def _tokenizers(self) -> dict[str, Any]:
        return self.plan.family.load_tokenizers(self.plan.folder, self.plan.configs)
