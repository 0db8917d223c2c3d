"""Networks without weights, to which a checkpoint's weights are held."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from safelight.weights.check import refusal
from safelight.weights.names import Weight, some
from safelight.weights.plan import Plan
from safelight.weights.stored import CODED

_FLOATS = ("F16", "BF16", "F32", "F64", *CODED)


class _Unfilled(TorchFunctionMode):
    """A context in which networks are built without drawing random weights.

    The file's weights take their place. To draw normal numbers on the meta device, torch imports
    its compiler, which takes longer than the rest of a small picture.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def frame(plan: Plan, part: str) -> Any:
    """Return a network without weights, after a check that the file's weights fit it."""
    _, network_class = plan.parts[part].load_classes()
    with torch.device("meta"), _Unfilled():
        network = network_class(plan.configs[part])
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    plan.weights[part].update(_with_axes(plan.weights[part], shapes))
    _check_fit(plan.source_of(part).name, part, network, plan.weights[part])
    return network


def _with_axes(
    weights: Mapping[str, Weight], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Weight]:
    """Return the weights of GGUF files that lack axes of length 1, or have more, with their shapes.

    ggml stores no leading axes of 1, and stable-diffusion.cpp adds axes to some matrices.
    """
    return {
        name: replace(weight, shape=shapes[name])
        for name, weight in weights.items()
        if weight.header.format == "gguf"
        and name in shapes
        and not (weight.rows or weight.transposed or weight.identity)
        and [n for n in weight.shape if n != 1] == [n for n in shapes[name] if n != 1]
    }


def _check_fit(model: str, part: str, network: nn.Module, weights: Mapping[str, Weight]) -> None:
    """Raise SafelightError unless names, shapes and types of the weights fit the network."""
    wanted = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    for what, names in (
        ("are missing", wanted.keys() - weights.keys()),
        ("belong to nothing", weights.keys() - wanted.keys()),
    ):
        if names:
            raise refusal(model, f"{len(names)} weights of {part} {what}: {some(names)}")
    for name, weight in weights.items():
        if weight.shape != wanted[name]:
            shapes = f"{weight.shape} in the file, {wanted[name]} by the config"
            raise refusal(model, f"{part} {name}: {shapes}")
        if weight.dtype not in _FLOATS:
            raise refusal(model, f"{part} {name}: stored as {weight.dtype}; floats are needed")
