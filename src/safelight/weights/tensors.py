"""The tensors of a weight file whose header has been read."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from safelight.errors import SafelightError
from safelight.fast.quantised import GGML, Quantised, of_ggml
from safelight.weights.check import Header, refusal
from safelight.weights.gguf import read_gguf_header
from safelight.weights.headers import ZIP
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
def open_tensors(
    header: Header, path: str | None = None
) -> Iterator[Callable[[str], Tensor | Quantised]]:
    """Yield a function that returns a tensor by its key. The bytes stay in the mapped file.

    path: where the file is opened, if not where its header was read. Only a GGUF file has
    `Quantised` tensors. Those whose rows do not begin with a block are returned in float32.

    Raises SafelightError if the file cannot be read.
    """
    path = str(header.path) if path is None else path
    try:
        if header.format == "gguf":
            yield _of_gguf(header, path)
        elif header.format == "torch":
            yield _unpickled(header, path).__getitem__
        else:
            with safe_open(path, framework="pt") as file:
                yield file.get_tensor
    except (SafetensorError, OSError) as e:
        raise refusal(header.name, f"cannot be read: {e}") from None


def is_finite(tensor: Tensor | Quantised, dtype: torch.dtype) -> bool:
    """Return whether all values are finite in `dtype`: a large float32 is not, as float16."""
    if isinstance(tensor, Quantised):
        return all(is_finite(piece, dtype) for piece in tensor.pieces())
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
            mapped = file.read(len(ZIP)) == ZIP  # files of PyTorch before 1.6 cannot be mapped
            file.seek(0)
            root = torch.load(where, map_location="cpu", weights_only=True, mmap=mapped)
        found = {key: value for key, value in leaves(root) if isinstance(value, Tensor)}
    except Exception as e:  # for a broken file it raises whatever its parts raise
        why = str(e).strip().splitlines() or [type(e).__name__]
        raise refusal(header.name, f"cannot be read: {why[-1]}") from None
    if found.keys() != header.tensors.keys():
        raise _changed(header)
    for key, tensor in found.items():
        told = header.tensors[key]
        if tensor.dtype != DTYPES.get(told.dtype) or tuple(tensor.shape) != told.shape:
            raise _changed(header)
        found[key] = tensor.detach().contiguous()
    return found


def _of_gguf(header: Header, path: str) -> Callable[[str], Tensor | Quantised]:
    """Return a function that returns the tensors of a GGUF file by their keys."""
    now = read_gguf_header(Path(path), header.name)
    if (now.start, now.tensors) != (header.start, header.tensors):
        raise _changed(header)
    end = header.start + max(info.end for info in now.tensors.values())
    try:
        with Path(path).open("rb") as file:
            # Copied on writing, because PyTorch warns about memory that cannot be written.
            content = mmap.mmap(file.fileno(), end, access=mmap.ACCESS_COPY)
    except ValueError:  # the file is shorter
        raise _changed(header) from None

    def read(key: str) -> Tensor | Quantised:
        info = header.tensors[key]
        count, at = math.prod(info.shape), header.start + info.start
        if (blocks := GGML.get(info.dtype)) is None:
            dtype = DTYPES[info.dtype]
            if not count:  # frombuffer takes no empty ones
                return torch.empty(info.shape, dtype=dtype)
            return torch.frombuffer(content, dtype=dtype, count=count, offset=at).view(info.shape)
        codes = torch.frombuffer(content, dtype=torch.uint8, count=info.end - info.start, offset=at)
        if len(info.shape) > 1 and math.prod(info.shape[1:]) % blocks.numbers:
            flat = of_ggml(codes, info.dtype, (count // blocks.numbers, blocks.numbers))
            return flat.to(torch.float32).view(info.shape)
        return of_ggml(codes, info.dtype, info.shape)

    return read


def _changed(header: Header) -> SafelightError:
    return refusal(header.name, "it changed while it was read; load it again")
