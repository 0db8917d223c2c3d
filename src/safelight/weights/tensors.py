"""The tensors of a weight file whose header has been read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from safelight.weights.check import Header, refusal
from safelight.weights.pickles import INERT, leaves

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""The dtypes of PyTorch, by their names in a header."""


@contextmanager
def open_tensors(header: Header, path: str | None = None) -> Iterator[Callable[[str], Tensor]]:
    """Yield a function that returns a tensor by its key. The bytes stay in the mapped file.

    path: where the file is opened, if not where its header was read.

    Raises SafelightError if the file cannot be read.
    """
    path = str(header.path) if path is None else path
    try:
        if header.pickled:
            yield _unpickled(header, path).__getitem__
        else:
            with safe_open(path, framework="pt") as file:
                yield file.get_tensor
    except (SafetensorError, OSError) as e:
        raise refusal(header.name, f"cannot be read: {e}") from None


def is_finite(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Return whether all values are finite in `dtype`: a large float32 is not, as float16."""
    # The smallest and the largest are NaN if any value is, and conversion keeps their order.
    return all(bool(end.to(dtype).isfinite()) for end in torch.aminmax(tensor))


class _Inert:
    """Stands for a class that a pickle names and that is not used."""


def _unpickled(header: Header, path: str) -> dict[str, Tensor]:
    """Return the tensors of a file that torch.save wrote: exactly those of its checked header."""
    try:
        inert = torch.serialization.safe_globals([(_Inert, name) for name in INERT])
        with inert, Path(path).open("rb") as file:
            # torch.load goes by the name where that ends in ".safetensors".
            where = f"/dev/fd/{file.fileno()}" if path.endswith(".safetensors") else path
            root = torch.load(where, map_location="cpu", weights_only=True, mmap=True)
        found = {key: value for key, value in leaves(root) if isinstance(value, Tensor)}
    except Exception as e:  # for a broken file it raises whatever its parts raise
        why = str(e).strip().splitlines() or [type(e).__name__]
        raise refusal(header.name, f"cannot be read: {why[-1]}") from None
    if found.keys() != header.tensors.keys():
        raise refusal(header.name, "it changed while it was read; load it again")
    for key, tensor in found.items():
        told = header.tensors[key]
        if tensor.dtype != DTYPES.get(told.dtype) or tuple(tensor.shape) != told.shape:
            raise refusal(header.name, "it changed while it was read; load it again")
        found[key] = tensor.detach().contiguous()
    return found
