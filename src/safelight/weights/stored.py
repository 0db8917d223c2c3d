"""Read a model's weights from its files again, after the networks have packed them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from safelight.fast.quantised import GGML, Quantised, joined, of_floats
from safelight.weights.digest import HashedFile
from safelight.weights.names import Weight
from safelight.weights.tensors import open_tensors

SMALL = ("F8_E4M3", "F8_E5M2")
"""Types that torch keeps and does not compute in."""

CODED = (*SMALL, *GGML)
"""Types of which a network keeps codes, and decodes them when it computes; see `Quantised`."""

Read = Callable[[str], Tensor | Quantised]
"""What `open_tensors` yields."""


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
        """Yield weights of a network, see `stored_tensor`, in the order of their files.

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


def stored_bytes(weight: Weight) -> int:
    """Return how many bytes a weight takes in its file, which may hold several in one tensor."""
    info = weight.header.tensors[weight.key]
    return (info.end - info.start) * math.prod(weight.shape) // math.prod(info.shape)


def has_codes(weight: Weight) -> bool:
    """Return whether `stored_weight` can return a weight as codes."""
    if weight.dtype not in GGML:
        return weight.dtype in SMALL
    shape = weight.header.tensors[weight.key].shape
    return math.prod(shape[1:]) % GGML[weight.dtype].numbers == 0


def _is_of_one_frame(weight: Weight) -> bool:
    """Return whether a weight is the last slice in time of a convolution over frames."""
    stored = weight.header.tensors[weight.key].shape
    return len(stored) == 5 and weight.shape == (*stored[:2], *stored[3:])


def stored_tensor(read: Read, weight: Weight) -> Tensor:
    """Return a weight in its shape, as it is stored; decoded to float32 if no dtype holds it."""
    found = stored_weight(read, weight)
    return found.to(torch.float32) if isinstance(found, Quantised) else found


def stored_weight(read: Read, weight: Weight) -> Tensor | Quantised:
    """Return a weight in its shape, as it is stored. read: see `open_tensors`."""
    found = read(weight.key)
    if weight.identity:
        dtype = found.dtype if isinstance(found, Tensor) else torch.float32
        return torch.eye(weight.shape[0], dtype=torch.float32).to(dtype)
    if weight.scale is not None:
        scale = read(weight.scale)
        assert isinstance(found, Tensor)
        assert isinstance(scale, Tensor)
        found = of_floats(found, scale)
    if isinstance(found, Quantised):
        whole = len(found.shape) > 1 and not weight.transposed
        if whole and weight.rows and weight.shape[1:] == found.shape[1:]:
            return joined([found[start:end] for start, end in weight.rows])
        if whole and not weight.rows and weight.shape[:1] == found.shape[:1]:
            return replace(found, shape=torch.Size(weight.shape))
        found = found.to(torch.float32)  # its rows are not those of the codes
    if _is_of_one_frame(weight):
        found = found[:, :, -1].contiguous()
    if weight.rows:
        pieces = [found[start:end] for start, end in weight.rows]
        # One piece stays in the mapped file.
        found = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    if weight.transposed:
        found = found.t().contiguous()
    return found.reshape(weight.shape)
