"""The LoRAs that a request asks for, by name and with their weights. Needs no PyTorch."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from safelight.errors import SafelightError
from safelight.prompt.networks import split_networks

if TYPE_CHECKING:
    from safelight.request import Request
    from safelight.weights.library import Entry, Library

MAX_LORAS = 64
"""LoRAs of one request. A prompt has room for 1,800, each of which is looked up and applied."""

MAX_NAME = 1024
MAX_WEIGHT = 100.0

Unmatched = Literal["error", "warn"]
"""What is done about a LoRA's keys that belong to nothing in the model."""


@dataclass(frozen=True, slots=True)
class AskedLora:
    """A LoRA by name or path, its weight in the denoising network, and that in text encoders.

    tagged: it stands in the prompt, and is no path.
    """

    name: str
    weight: float = 1.0
    text_weight: float = 1.0
    tagged: bool = False

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return what `name`, `name:weight` or `name:weight:text_weight` asks for.

        A text weight that is left out equals the weight. Raises SafelightError.
        """
        name, weights = text.strip(), list[float]()
        while len(weights) < 2:
            rest, colon, last = name.rpartition(":")
            weight = _number(last)
            if not colon or weight is None:
                break
            name, weights = rest, [weight, *weights]
        weights = weights or [1.0]
        return cls(_name(name, text), _weight(weights[0], text), _weight(weights[-1], text))

    @classmethod
    def of_tag(cls, tag: tuple[str, ...]) -> Self:
        """Return what A1111's `<lora:name:text_weight:weight>` asks for.

        tag: its parts. A weight that is left out equals the text weight. `te=` and `unet=` name
        the weights. Raises SafelightError.
        """
        shown = f"<{':'.join(tag)}>"
        plain = [part for part in tag[1:] if "=" not in part]
        named = dict(part.split("=", 1) for part in tag[1:] if "=" in part)
        numbers = [_number(part) for part in plain[1:]]
        if len(numbers) > 2 or "dyn" in named:
            raise SafelightError(
                f"prompt has {shown:.60}: a rank of its own (dyn) is not supported"
            )
        text_weight, weight = named.pop("te", None), named.pop("unet", None)
        if named or None in numbers or not plain:
            raise SafelightError(
                f"prompt has {shown:.60}: expected a name and numbers, as in <lora:ink:0.8>",
                field="prompt",
            )
        te = _number(text_weight) if text_weight is not None else (*numbers, 1.0)[0]
        unet = _number(weight) if weight is not None else (*numbers[1:], te)[0]
        if te is None or unet is None:
            raise SafelightError(
                f"prompt has {shown:.60}: te= and unet= are numbers", field="prompt"
            )
        return cls(_name(plain[0], shown), _weight(unet, shown), _weight(te, shown), tagged=True)

    def __str__(self) -> str:
        if self.text_weight != self.weight:
            return f"{self.name}:{self.weight!r}:{self.text_weight!r}"
        return f"{self.name}:{self.weight!r}"


def asked_of(request: Request) -> tuple[list[AskedLora], list[str]]:
    """Return the LoRAs that a request's setting and prompt ask for, and warnings.

    With `prompt_syntax` plain a prompt is text alone; a LoRA's tag in it gives a warning.
    """
    asked = [AskedLora.parse(text) for text in request.loras]
    _, tags = split_networks(request.prompt, loras_alone=True)
    if tags and request.prompt_syntax == "plain":
        told = f"<{':'.join(tags[0])}>"
        return asked, [f"prompt: {told:.60} is text in prompt_syntax plain: use loras, or a1111"]
    if len(asked) + len(tags) > MAX_LORAS:
        raise SafelightError(
            f"loras must be at most {MAX_LORAS}, those in the prompt included, "
            f"not {len(asked) + len(tags)}",
            field="loras",
        )
    return asked + [AskedLora.of_tag(tag) for tag in tags], []


def found_in(library: Library, asked: AskedLora) -> Entry:
    """Return the LoRA in a models folder.

    Raises SafelightError if it is not there. It names the weight if that alone is wrong.
    """
    try:
        return library.find(asked.name, "lora")
    except SafelightError:
        name, colon, weight = asked.name.rpartition(":")
        if colon and name and library.matches(name := AskedLora.parse(name).name, "lora"):
            raise SafelightError(
                f"lora {name:.60}: the weight must be a number, not {weight!r:.60}", field="loras"
            ) from None
        raise


def _name(name: str, text: str) -> str:
    if not name or len(name) > MAX_NAME or any(unicodedata.category(c)[0] == "C" for c in name):
        raise SafelightError(
            f"loras must each begin with a name, as in ink:0.8, not {text!r:.60}", field="loras"
        )
    return name


def _weight(weight: float, text: str) -> float:
    if not abs(weight) <= MAX_WEIGHT:
        raise SafelightError(
            f"loras must have weights from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}, not {text!r:.60}",
            field="loras",
        )
    return weight


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
