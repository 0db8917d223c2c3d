"""Adapted models: a model with LoRAs merged into copies of the layers that they change.

Nothing of the base model is changed. New weights are computed in float32 from those of the model's
files and converted once, so that no rounding adds up; all else is shared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safelight.adapters.algorithms import OFT, UnfitError
from safelight.adapters.asked import AskedLora
from safelight.adapters.file import AdapterFile, Change, refusal
from safelight.errors import SafelightError
from safelight.fast.replace import with_weights
from safelight.progress import get_on
from safelight.weights.tensors import open_tensors

if TYPE_CHECKING:
    from safelight.model import Model


LARGEST_ALPHA = 1e9
"""Far above what training writes, and far below what overflows."""


@dataclass(frozen=True, eq=False)
class Chosen:
    """A LoRA that was found and fits: its file, what it changes, and by how much."""

    asked: AskedLora
    file: AdapterFile
    changes: Sequence[Change]

    def strength(self, part: str, network: str) -> float:
        """Return its weight in a part. network: the part that denoises."""
        return self.asked.weight if part == network else self.asked.text_weight


Step = tuple[Chosen, Change]
"""A change, and the LoRA that it belongs to."""


def merged(model: Model, chosen: Sequence[Chosen]) -> Model:
    """Return a model with LoRAs merged, in their order. `model` stays as it is.

    Raises SafelightError if a file cannot be read, or holds numbers that are not finite.
    """
    parts = dict(model.parts)
    for part in {change.part for one in chosen for change in one.changes}:
        steps = [
            (one, change)
            for one in chosen
            if one.strength(part, model.family.network)
            for change in one.changes
            if change.part == part
        ]
        if not steps:
            continue
        groups = _together(steps)
        with ExitStack() as stack:
            opened = {id(one): _Opened(one.file, stack) for one in chosen}
            parts[part] = with_weights(
                parts[part],
                _made(model, part, groups, opened),
                lambda names, part=part: (
                    (name, weight.to(model.device, model.dtype))
                    for name, weight in _originals(model, part, names)
                ),
            )
        for one in chosen:
            one.file.hashed.check()
    return replace(model, parts=parts)


def _made(
    model: Model, part: str, groups: Mapping[str, _Group], opened: Mapping[int, _Opened]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the new weights of a part, each group's as soon as its originals are read."""
    held: dict[str, Tensor] = {}
    for name, weight in _originals(model, part, groups):
        group = groups[name]
        held[name] = weight.to(model.device, torch.float32, copy=True).contiguous()
        if group.names <= held.keys():
            values = {one: held.pop(one) for one in group.names}
            yield from _changed(model, values, group.steps, opened).items()


def _originals(model: Model, part: str, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield weights as they are stored; for a model without files, as its networks hold them."""
    if model.stored is not None:
        yield from model.stored.read(part, names)
        return
    there = model.parts[part].state_dict()
    for name in names:
        yield name, there[name]


@dataclass
class _Group:
    """Weights that a file has as one, and what is done to them, in its order.

    A weight that no file has together with others is a group of its own.
    """

    names: set[str]
    steps: list[Step]


def _together(steps: Sequence[Step]) -> dict[str, _Group]:
    """Return the group of each weight that is changed."""
    groups: dict[str, _Group] = {}
    for _, change in steps:
        joined = _Group(set(change.parameters), [])
        for name in change.parameters:
            joined.names |= groups[name].names if name in groups else set()
        groups |= dict.fromkeys(joined.names, joined)
    for one, change in steps:
        groups[change.parameters[0]].steps.append((one, change))
    return groups


def _changed(
    model: Model,
    values: dict[str, Tensor],
    steps: Sequence[Step],
    opened: Mapping[int, _Opened],
) -> dict[str, Tensor]:
    """Return the new values of a group's weights, in the model's precision.

    values: the weights in float32, which may be overwritten.
    """
    get_on()
    for one, change in steps:
        found = opened[id(one)].read(change, model.device)
        strength = one.strength(change.part, model.family.network)
        value = _joined(values, change)
        try:
            value = change.algorithm.apply(found, value, _scale(change, found), strength)
        except UnfitError as error:
            key = change.keys.get(error.slot, change.parameters[0])
            raise refusal(one.file.name, f"{key!r:.70} {error.why}") from None
        values |= _parted(value, change, values)
    converted = {name: value.to(model.dtype) for name, value in values.items()}
    for name, value in converted.items():
        if not all(bool(end.isfinite()) for end in torch.aminmax(value)):
            files = " and ".join(dict.fromkeys(one.file.name for one, _ in steps))
            raise refusal(
                files,
                f"{steps[0][1].part} {name} becomes NaN or Inf in {model.precision}: "
                "take a weight nearer to 0",
            )
    return converted


def _joined(values: Mapping[str, Tensor], change: Change) -> Tensor:
    """Return the weights of a change as its file has them: as one, and in its order of rows."""
    found = [values[name] for name in change.parameters]
    value = found[0] if len(found) == 1 else torch.cat(found)
    return value.roll(len(value) // 2, 0) if change.swapped else value


def _parted(value: Tensor, change: Change, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a change by their names; the inverse of `_joined`."""
    if change.swapped:
        value = value.roll(len(value) // 2, 0)
    parts = value.split([len(values[name]) for name in change.parameters])
    return dict(zip(change.parameters, parts, strict=True))


def _scale(change: Change, found: dict[str, Tensor]) -> float:
    """Return alpha / rank, and take `alpha` out of the tensors that were found.

    Raises UnfitError for an alpha that no training writes.
    """
    given = found.pop("alpha", None)
    alpha = change.alpha if given is None else float(given)
    if alpha is not None and not abs(alpha) <= LARGEST_ALPHA:
        raise UnfitError("alpha", f"has the alpha {alpha:.3g}; at most {LARGEST_ALPHA:g} is taken")
    if change.algorithm is OFT:
        return alpha or 0.0
    rank = change.algorithm.rank({slot: tuple(t.shape) for slot, t in found.items()})
    rank = change.rank if rank is None else rank
    if not alpha or rank is None:  # kohya's scripts write 0 for an alpha equal to the rank
        return 1.0
    return alpha / rank**0.5 if change.rooted else alpha / rank


class _Opened:
    """An adapter's file, mapped."""

    def __init__(self, file: AdapterFile, stack: ExitStack) -> None:
        self._file = file
        try:
            file.hashed.check()
            self._read = stack.enter_context(open_tensors(file.header, file.hashed.openable))
        except SafelightError as error:
            raise SafelightError(f"lora {error}", field="loras") from None

    def read(self, change: Change, device: torch.device) -> dict[str, Tensor]:
        """Return the tensors of a change by slot, in float32."""
        found: dict[str, Tensor] = {}
        for slot, key in change.keys.items():
            tensor = self._read(key).to(torch.float32).to(device)
            if not bool(tensor.isfinite().all()):
                raise refusal(self._file.name, f"{key!r:.70} holds NaN or Inf")
            if slot == "dora_scale" and "magnitude" in key:
                tensor = tensor.flatten()
            found[slot] = tensor
        return found
