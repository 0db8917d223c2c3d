"""What guides the network for one picture."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from safelight.engine.control import Control
    from safelight.nets.image_prompt import ImagePrompt


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The text and the other inputs that guide the network for one picture.

    tokens: text states [n, tokens, width], one row for each evaluation of the network: with
      guidance two, those of the negative prompt first. None: the network reads no text.
    pooled: states of whole texts, [n, width]. sizes: numbers about the picture, [n, numbers].
    guidance: the scale, for two or more evaluations or a network that was distilled with it.
    extra: channels that the network reads beside the state, [1, channels, h, w].
    control: what guides the network by pictures.
    image: what it reads of a picture that is a prompt, a row for each evaluation; None: of none.
    references: clean latents of the reference pictures, each [1, channels, any, any].
    lengths: how many of each text's states the network reads, [n]; None: all.
    weights: of each evaluation after the negative one, multiplied by guidance. None: 1 for each.
    later: conditionings that take over, each with the step, counted from 0, at which it does. They
      have as many evaluations, and states of the same shapes.
    """

    tokens: Tensor | None = None
    pooled: Tensor | None = None
    sizes: Tensor | None = None
    guidance: float = 1.0
    extra: Tensor | None = None
    control: tuple[Control, ...] = ()
    lengths: tuple[int, ...] | None = None
    weights: tuple[float, ...] | None = None
    later: tuple[tuple[int, Conditioning], ...] = ()
    image: ImagePrompt | None = None
    references: tuple[Tensor, ...] = ()

    def at(self, step: int) -> Conditioning:
        """Return the conditioning of a step, counted from 0."""
        place = bisect_right(self.later, step, key=lambda one: one[0])
        return self.later[place - 1][1] if place else self

    def with_extra(self, extra: Tensor) -> Conditioning:
        """Return the same at each step, with extra channels."""
        later = tuple((step, replace(one, extra=extra)) for step, one in self.later)
        return replace(self, extra=extra, later=later)

    @property
    def evaluations(self) -> int:
        """Evaluations of the network per step."""
        return 1 if self.tokens is None else len(self.tokens)

    @property
    def call_key(self) -> tuple[Any, ...]:
        """Equal for two pictures of one size that can share a call of the network."""
        tensors = (self.tokens, self.pooled, self.sizes, self.extra)
        shapes = tuple(None if t is None else tuple(t.shape[1:]) for t in tensors)
        referred = tuple(one.shape for one in self.references)
        return (*shapes, tuple(map(id, self.control)), self.image is None, referred)

    @property
    def is_finite(self) -> bool:
        tensors = (self.tokens, self.pooled, *self.references)
        mine = all(t is None or bool(t.isfinite().all()) for t in tensors)
        mine = mine and (self.image is None or self.image.is_finite)
        return mine and all(one.is_finite for _, one in self.later)

    def positive(self) -> Conditioning:
        """Return the prompt's own part, without the negative prompt and guidance.

        For a composed prompt, that is its last part.
        """

        def last(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[-1:]

        tokens, pooled, sizes = map(last, (self.tokens, self.pooled, self.sizes))
        lengths = None if self.lengths is None else self.lengths[-1:]
        scale, extra, control = self.guidance, self.extra, self.control
        image = None if self.image is None else self.image.last()
        made = Conditioning(tokens, pooled, sizes, scale, extra, control, lengths, image=image)
        return replace(made, references=self.references)


Cached = Callable[[Hashable, Callable[[], Conditioning]], Conditioning]
"""Returns what the function returned for this key before, else calls it."""
