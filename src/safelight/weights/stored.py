"""Read a model's weights from its files again, after the networks have packed them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from safelight.weights.digest import HashedFile
from safelight.weights.names import Weight
from safelight.weights.tensors import open_tensors

SMALL = ("F8_E4M3", "F8_E5M2")
"""Types that torch keeps and does not compute in."""


@dataclass(frozen=True, eq=False)
class Stored:
    """The weights of each network by name, and the files that they are in, by path."""

    weights: Mapping[str, Mapping[str, Weight]]
    files: Mapping[Path, HashedFile]

    @property
    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """The shape of each weight, by network and name."""
        return {
            part: {name: weight.shape for name, weight in weights.items()}
            for part, weights in self.weights.items()
        }

    def read(self, part: str, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield weights of a network as they are stored, in the order of their files.

        Raises SafelightError if a file no longer holds what was loaded.
        """
        wanted = set(names)
        by_file: dict[Path, dict[str, Weight]] = {}
        for name, weight in self.weights[part].items():
            if name in wanted:
                by_file.setdefault(weight.header.path, {})[name] = weight
        for path, weights in by_file.items():
            file = self.files[path]
            header = next(iter(weights.values())).header
            file.check()
            with open_tensors(header, file.openable) as stored:
                for name, weight in weights.items():
                    yield name, stored_tensor(stored, weight)
            file.check()


def stored_tensor(read: Callable[[str], Tensor], weight: Weight) -> Tensor:
    """Return a weight in its shape, as it is stored. read: see `open_tensors`."""
    tensor = read(weight.key)
    if weight.identity:
        return torch.eye(weight.shape[0], dtype=torch.float32).to(tensor.dtype)
    if weight.rows:
        pieces = [tensor[start:end] for start, end in weight.rows]
        # One piece stays in the mapped file.
        tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    if weight.transposed:
        tensor = tensor.t().contiguous()
    return tensor.reshape(weight.shape)
