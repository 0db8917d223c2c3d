"""Write safetensors files a tensor at a time, so that a model of any size takes little memory.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.weights.check import ITEM_SIZES
from safelight.weights.library import is_model_folder

PIECE = 2**26
"""Bytes that are written at once."""


@dataclass(frozen=True, slots=True)
class Out:
    """A tensor to write. dtype: as a header names it. read: returns it when it is written."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


def write_tensors(
    path: Path, tensors: Mapping[str, Out], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file. Raises OSError, and what reading a tensor raises."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    # Wide numbers first, so that each tensor lies at a multiple of its width.
    order = sorted(tensors, key=lambda name: (-ITEM_SIZES[tensors[name].dtype], name))
    at = 0
    for name in order:
        out = tensors[name]
        end = at + out.bytes
        header[name] = {"dtype": out.dtype, "shape": out.shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            _write(file, tensors[name].read())
        file.flush()
        os.fsync(file.fileno())


def _write(file: BinaryIO, tensor: Tensor) -> None:
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    for piece in flat.split(PIECE):
        file.write(piece.numpy().data)


@contextmanager
def written(path: Path, need: int, *, overwrite: bool, folder: bool) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which takes its name when all has gone well.

    need: bytes on the disk. folder: whether a folder is written; else it is a file.

    Raises SafelightError if `path` exists and overwrite is false, or if it cannot be written. What
    was there before stays until the new one is complete.
    """
    parent = path.resolve().parent
    if path.exists() or path.is_symlink():
        if not overwrite:
            raise SafelightError(f"{_shown(path)} is there already: give --overwrite to replace it")
        if path.is_dir() != folder or (folder and not is_model_folder(path)):
            raise SafelightError(f"{_shown(path)} is no model, and is not replaced by one")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
        if need > free:
            raise SafelightError(
                f"{_shown(path)} takes {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there"
            )
        room = Path(tempfile.mkdtemp(prefix=f".{path.name[:60]}.", dir=parent))
    except OSError as error:
        raise SafelightError(f"{_shown(path)} cannot be written: {error.strerror}") from None
    try:
        new = room / "new"
        if folder:
            new.mkdir()
        yield new
        if folder and path.is_dir():
            path.replace(room / "old")
        new.replace(path)
    except OSError as error:
        raise SafelightError(f"{_shown(path)} cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _shown(path: Path) -> str:
    return repr(str(path)[-100:])
