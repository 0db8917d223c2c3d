"""Our own kernels: compiled when the package is built, where a compiler is at hand, and not needed.

What they do not take, and every processor that they are not for, is oneDNN's.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn


def load(name: str, arguments: dict[str, list[Any]]) -> Any:
    """The library of these functions, or None: not built, or switched off with
    SAFELIGHT_KERNELS=0.
    """
    built = sorted(Path(__file__).parent.glob(f"_{name}*.so"))
    if not built or os.environ.get("SAFELIGHT_KERNELS") == "0":
        return None
    found = ctypes.CDLL(str(built[0]))
    for function, types in arguments.items():
        getattr(found, function).argtypes = types
        getattr(found, function).restype = None
    return found


def plain_3x3(conv: nn.Conv2d, lanes: int) -> bool:
    """Whether it is a 3×3 convolution with a border of one, of whole `lanes` of channels."""
    return (
        not (conv.in_channels % lanes or conv.out_channels % lanes)
        and conv.kernel_size == (3, 3)
        and conv.padding == (1, 1)
        and conv.stride == conv.dilation == (1, 1)
    )


def at(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers begin."""
    return None if tensor is None else tensor.data_ptr()
