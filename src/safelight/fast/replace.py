"""A copy of a network with some other weights, which shares everything else.

Where `net` keeps large weights in files to save memory, the copy does, too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from typing import Any

from torch import Tensor, nn

from safelight.fast import layers as fast
from safelight.fast.layers import FastGEGLU, FastHeads, MappedEmbedding, MappedLinear
from safelight.fast.quantised import Quantised
from safelight.fast.store import Shelf, in_file

_PACKED = ("_product", "_float", "_own", "_halves", "_text")
"""Attributes that fast layers make from weights at their first use."""

_JOINED: dict[type[nn.Module], tuple[str, ...]] = {
    FastHeads: ("to_q", "to_k", "to_v"),
    FastGEGLU: ("proj",),
}
"""Fast layers that pack the weights of their submodules, and the names of those."""

Named = Iterable[tuple[str, Tensor]]
Read = Callable[[Iterable[str]], Named]


def keeps_in_file(net: nn.Module, name: str, numbers: int, low_memory: bool = False) -> bool:
    """Return whether a copy of `net` with another weight of this name keeps that in a file.

    numbers: in the weight. low_memory: as if `net` were loaded with it.
    """
    path, _, leaf = name.rpartition(".")
    layer: Any = net.get_submodule(path)
    if leaf != "weight" or numbers < fast.LARGE:
        return False
    if isinstance(layer, MappedLinear | MappedEmbedding):
        return True
    if low_memory and hasattr(layer, "shelf"):
        return True
    return getattr(layer, "shelf", None) is not None or _is_coded(layer)


def with_weights(net: nn.Module, changed: Named, read: Read) -> nn.Module:
    """Return a network that computes with other weights. `net` stays as it is, to the byte.

    changed: new weights and their names, in the precision that the network computes in. Each may
    be made when it is asked for: large ones go to a file at once, see `keeps_in_file`. read:
    returns weights of `net` by name, for layers that have released theirs after packing.
    """
    layers = dict(net.named_modules())
    filed, joined = set[str](), set[str]()

    def kept(named: Named) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, value in named:
            if keeps_in_file(net, name, value.numel()):
                filed.add(name)
                value = in_file(value, "a LoRA")
            found[name] = value
        return found

    weights = kept(changed)
    touched = {name.rpartition(".")[0] for name in weights}
    for path, layer in layers.items():
        inside = [_under(path, name) for name in _members(layer)]
        if not touched.isdisjoint(inside):
            joined.add(path)
        elif not any(one.startswith(f"{path}.") for one in touched) or _is_packed(layer):
            continue
        # Layers that this one packs together must not be shared, or one network would take their
        # weights from the other. The layers of a text's keys and values pack themselves.
        touched |= {one for one in inside if not _is_packed(layers[one])}
    missing = [
        f"{path}.weight"
        for path in touched
        if f"{path}.weight" not in weights and _let_go(layers[path])
    ]
    weights |= kept(read(missing)) if missing else {}
    return _Copier(weights, touched, joined, filed).copied("", net)


class _Copier:
    """Copies the modules that change.

    touched: layers whose weights change or are read again. joined: those that pack others' weights.
    filed: names of the weights that are in a file.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], touched: set[str], joined: set[str], filed: set[str]
    ) -> None:
        self._weights, self._touched, self._filed = weights, touched, filed
        self._changed = touched | joined
        self._shelf: Shelf | None = None

    def copied(self, path: str, module: Any) -> Any:
        """Return a module, copied if something in it changes."""
        begins = f"{path}." if path else ""
        if path not in self._changed and not any(p.startswith(begins) for p in self._changed):
            return module
        new = copy(module)
        for name, value in vars(module).items():
            if isinstance(value, OrderedDict):  # hooks: those added later belong to one network
                new.__dict__[name] = value.copy()
        new._parameters = dict(module._parameters)
        new._modules = {
            name: None if child is None else self.copied(_under(path, name), child)
            for name, child in module._modules.items()
        }
        if path in self._changed:
            for name in _PACKED:
                new.__dict__.pop(name, None)
        if path in self._touched:
            self._fill(path, new)
        return new

    def _fill(self, path: str, layer: Any) -> None:
        found: Any = layer
        was_coded = _is_coded(layer)
        for name in ("weight", "bias"):
            value = self._weights.get(_under(path, name))
            if value is not None:
                found.__dict__.pop(name, None)  # codes
                layer._parameters[name] = nn.Parameter(value, requires_grad=False)
        if isinstance(layer, MappedLinear):
            layer.mapped = f"{path}.weight" in self._filed or f"{path}.weight" not in self._weights
        elif was_coded or getattr(found, "shelf", None) is not None:
            # The changed layers have a file of their own, which is closed with them.
            self._shelf = self._shelf or Shelf()
            found.shelf = self._shelf


def _under(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _members(layer: nn.Module) -> tuple[str, ...]:
    return next((names for kind, names in _JOINED.items() if isinstance(layer, kind)), ())


def _is_coded(layer: nn.Module) -> bool:
    return isinstance(vars(layer).get("weight"), Quantised)


def _let_go(layer: nn.Module) -> bool:
    """Return whether a layer's weight was released, as it or another layer has packed it."""
    released = "weight" in layer._parameters and layer._parameters["weight"] is None
    return released and not _is_coded(layer)


def _is_packed(layer: nn.Module) -> bool:
    return any(vars(layer).get(name) is not None for name in ("_product", "_own", "_halves"))
