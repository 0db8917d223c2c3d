"""The parts of a model: its networks and tokenizers, and what folders call them.

Importing this does not import PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from safelight.nets.config import NetConfig

NO_PART = (None, None)
"""The value in model_index.json of a part that is absent."""


def encoder_of(tokenizer: str) -> str:
    """Return the name of the text encoder that reads a tokenizer's tokens, as folders have it."""
    return tokenizer.replace("tokenizer", "text_encoder")


def tokenizer_of(encoder: str) -> str:
    """Return the name of the tokenizer of a text encoder, as folders have it."""
    return encoder.replace("text_encoder", "tokenizer")


@dataclass(frozen=True, slots=True)
class Part:
    """One network of a model.

    module, network, config: names of the module, of the network's class and of its config's class.
      As they are names, PyTorch is imported only when the network is built.
    classes: names that model_index.json may give it; if empty, only `network`.
    stem: the name of its weight files in a folder.
    rename: from a key of a folder's file to our name, None for a key that is not used.
    reshape: from name and stored shape to the shape that is read.
    others: parts that a folder may have in its place, by their class in model_index.json.
    whole: whether all that a published file has of the network is read.
    """

    module: str
    network: str
    config: str
    classes: tuple[str, ...] = ()
    stem: str = "diffusion_pytorch_model"
    rename: Callable[[str], str | None] = lambda key: key
    reshape: Callable[[str, tuple[int, ...]], tuple[int, ...]] = lambda name, shape: shape
    others: Mapping[str, Part] = field(default_factory=dict)
    whole: bool = True

    def load_classes(self) -> tuple[type[NetConfig], type[nn.Module]]:
        """Return the classes of the config and of the network."""
        module = import_module(self.module)
        return getattr(module, self.config), getattr(module, self.network)
