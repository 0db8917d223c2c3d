"""A copy of a network with some other weights, which shares everything else."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from typing import Any

from torch import Tensor, nn

from safelight.fast.layers import FastGEGLU, FastHeads, MappedLinear
from safelight.fast.store import Shelf

_PACKED = ("_product", "_float", "_own", "_halves", "_text")
"""Attributes that fast layers make from weights at their first use."""

_JOINED: dict[type[nn.Module], tuple[str, ...]] = {
    FastHeads: ("to_q", "to_k", "to_v"),
    FastGEGLU: ("proj",),
}
"""Fast layers that pack the weights of their submodules, and the names of those."""

Read = Callable[[Iterable[str]], Mapping[str, Tensor]]


def with_weights(net: nn.Module, changed: Mapping[str, Tensor], read: Read) -> nn.Module:
    """Return a network that computes with other weights. `net` stays as it is, to the byte.

    changed: new weights by name, in the precision that the network computes in. read: returns
    weights of `net` by name, for layers that have released theirs after packing.
    """
    layers = dict(net.named_modules())
    weights, joined = dict(changed), set[str]()
    touched = {name.rpartition(".")[0] for name in changed}
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
    weights.update(read(missing) if missing else {})
    return _Copier(weights, touched, joined).copied("", net)


class _Copier:
    """Copies the modules that change.

    touched: layers whose weights change or are read again. joined: those that pack others' weights.
    """

    def __init__(self, weights: Mapping[str, Tensor], touched: set[str], joined: set[str]) -> None:
        self._weights, self._touched, self._joined = weights, touched, joined
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
        for name in ("weight", "bias"):
            value = self._weights.get(_under(path, name))
            if value is not None:
                layer._parameters[name] = nn.Parameter(value, requires_grad=False)
        if isinstance(layer, MappedLinear):
            layer.mapped = False
        if getattr(found, "shelf", None) is not None:
            # The changed layers have a file of their own, which is closed with them.
            self._shelf = self._shelf or Shelf()
            found.shelf = self._shelf


def _under(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _members(layer: nn.Module) -> tuple[str, ...]:
    return next((names for kind, names in _JOINED.items() if isinstance(layer, kind)), ())


def _let_go(layer: nn.Module) -> bool:
    """Return whether a layer's weight was released, as it or another layer has packed it."""
    return "weight" in layer._parameters and layer._parameters["weight"] is None


def _is_packed(layer: nn.Module) -> bool:
    return any(vars(layer).get(name) is not None for name in ("_product", "_own", "_halves"))
