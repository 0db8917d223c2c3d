"""Give the layers of a network their fast classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from safelight.fast.layers import (
    FastAttention,
    FastConv2d,
    FastEnlargingConv2d,
    FastFeedForward,
    FastGEGLU,
    FastGroupNorm,
    FastLayerNorm,
    FastLinear,
    FastPointwise,
    FastProduct,
    FastSpatialAttention,
    MappedEmbedding,
    MappedLinear,
)
from safelight.fast.quantised import Quantised
from safelight.fast.store import Shelf
from safelight.nets import layers, tokens

_MAPPED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: MappedLinear,
    layers.Linear: MappedLinear,
    nn.Embedding: MappedEmbedding,
}
_FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FastLinear,
    layers.Linear: FastLinear,
    nn.Conv2d: FastConv2d,
    layers.Conv2d: FastConv2d,
    layers.Pointwise: FastPointwise,
    nn.GroupNorm: FastGroupNorm,
    layers.GroupNorm: FastGroupNorm,
    nn.LayerNorm: FastLayerNorm,
    layers.LayerNorm: FastLayerNorm,
    layers.GEGLU: FastGEGLU,
    layers.FeedForward: FastFeedForward,
    layers.EnlargingConv2d: FastEnlargingConv2d,
    layers.Attention: FastAttention,
    layers.SpatialAttention: FastSpatialAttention,
    tokens.Product: FastProduct,
}
_WAITING = (
    FastLinear | FastConv2d | FastPointwise | FastEnlargingConv2d | MappedLinear | MappedEmbedding
)
"""Layers whose weights stay as loaded until they are used."""


def runs_once(net: nn.Module | type[nn.Module]) -> bool:
    """Return whether a network runs once per prompt, so that its weights are not packed.

    net: the network, or its class.
    """
    return getattr(net, "runs_once", False)


def keep_codes(net: nn.Module, codes: Mapping[str, Quantised]) -> None:
    """Give layers of `net`, in place, weights by name that stay as codes; see `takes_codes`."""
    for name, weight in codes.items():
        layer = net.get_submodule(name.removesuffix(".weight"))
        layer._parameters["weight"] = None
        layer.__dict__["weight"] = weight  # a parameter could only be a tensor


def takes_codes(net: nn.Module) -> set[str]:
    """Return the names of the weights of `net` that its fast layers can decode at each use.

    Linear layers can, but not those that another layer packs together; and the embeddings of a
    network that runs once, which decode the rows of a text's tokens.
    """
    names = {name: module for name, module in net.named_modules() if type(module) in _MAPPED}
    joined: set[int] = set()
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding)
    if not runs_once(net):
        kinds = (nn.Linear,)
        whole = (m for m in net.modules() if isinstance(m, layers.Attention | layers.GEGLU))
        joined = {id(inner) for module in whole for inner in module.modules()}
    return {
        f"{name}.weight"
        for name, module in names.items()
        if isinstance(module, kinds) and id(module) not in joined
    }


def swap(net: nn.Module, precision: torch.dtype, shelf: Shelf | None = None) -> None:
    """Give the layers of `net`, in place, their fast classes.

    Weights that will be packed keep the precision they were loaded in until then; all other
    parameters are converted.
    """
    for module in net.modules():
        kind = _FAST.get(type(module), type(module))
        if kind is FastConv2d and module.kernel_size == (1, 1):
            kind = FastPointwise
        module.__class__ = kind
        if isinstance(module, FastLinear | FastConv2d | FastEnlargingConv2d):
            module.shelf = shelf
        _convert(module, precision)


def leave_mapped(net: nn.Module, precision: torch.dtype) -> None:
    """Leave the matrices of `net` in the mapped file; each use converts them."""
    for module in net.modules():
        module.__class__ = _MAPPED.get(type(module), type(module))
        _convert(module, precision)


def _convert(module: Any, precision: torch.dtype) -> None:
    """Convert a layer's parameters, except a weight of `_WAITING`."""
    waits = isinstance(module, _WAITING)
    if waits:
        module.precision = precision
    for name, parameter in module.named_parameters(recurse=False):
        if not (waits and name == "weight"):
            setattr(module, name, nn.Parameter(parameter.to(precision), requires_grad=False))
