"""Our own compiled kernels: which of them this process uses, and why not the others.

They are built with the package where a compiler is at hand. Each is optional: what no kernel takes
is oneDNN's. There are three libraries.

- `_amx`: products in bfloat16 for CPUs with AMX and AVX512-BF16 (Linux).
- `_avx2`: Winograd convolutions in float32.
- `_portable`: the sources of both in plain C++, for any processor. It is slower than oneDNN
  wherever it was measured. It exists so that every machine can test the kernels' logic.

SAFELIGHT_KERNELS chooses: `auto` (the default: what this processor has), `avx2` (no AMX),
`portable` (the portable library in place of both), or `off`.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import c_float, c_int, c_long, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safelight.errors import SafelightError

SETTINGS = ("auto", "avx2", "portable", "off")

_TILES = {
    "safelight_pack": [c_void_p] * 2 + [c_long] * 2,
    "safelight_conv": [c_void_p, c_long, c_void_p, c_void_p, c_long, c_void_p, c_void_p]
    + [c_long] * 6
    + [c_int]
    + [c_long] * 3,
    "safelight_moments": [c_void_p] * 4 + [c_long] * 4 + [c_float],
    "safelight_normalise": [c_void_p] * 3 + [c_long] * 3,
    "safelight_layer_norm": [c_void_p] * 6 + [c_long] * 2 + [c_float],
    "safelight_gate": [c_void_p] * 3 + [c_long],
    "safelight_lay": [c_void_p] * 3 + [c_long] * 7,
    "safelight_attend": [c_void_p] * 5 + [c_long] * 5 + [c_float],
    "safelight_split_pack": [c_void_p] * 2 + [c_long] * 2,
    "safelight_split_linear": [c_void_p] * 5 + [c_long] * 3,
    "safelight_split_gate": [c_void_p] * 3 + [c_long],
    "safelight_split_attend": [c_void_p] * 5 + [c_long] * 5 + [c_float],
}
_WINOGRAD = {
    "safelight_spread": [c_void_p] * 2 + [c_long] * 8,
    "safelight_gather": [c_void_p] * 2 + [c_long] + [c_void_p] * 2 + [c_long] * 6,
}
_ARGUMENTS = {"amx": _TILES, "avx2": _WINOGRAD, "portable": _TILES | _WINOGRAD}


def setting() -> str:
    """What SAFELIGHT_KERNELS says. SafelightError if there is no such setting."""
    said = os.environ.get("SAFELIGHT_KERNELS", "") or "auto"
    said = {"0": "off", "1": "auto"}.get(said, said)
    if said not in SETTINGS:
        raise SafelightError(f"SAFELIGHT_KERNELS is {said!r:.40}; it may be {', '.join(SETTINGS)}")
    return said


def tiles() -> Any:
    """The library of products by tiles (AMX, or portable where that is asked for), or None."""
    return _usable({"auto": "amx", "portable": "portable"}.get(setting()))


def winograd() -> Any:
    """The library of Winograd convolutions, or None."""
    named = {"auto": "avx2", "avx2": "avx2", "portable": "portable"}
    return _usable(named.get(setting()))


@cache
def _usable(name: str | None) -> Any:
    return None if name is None or refusal(name) else _load(name)


def refusal(name: str) -> str:
    """Why the library "amx", "avx2" or "portable" cannot run here; empty if it can."""
    if name == "amx" and not has_amx():
        return "this processor has no AMX"
    if name == "avx2" and not torch.cpu._is_avx2_supported():
        return "this processor has no AVX2"
    if built(name) is None:
        return "not built: there was no C++ compiler when Safelight was installed"
    return "" if _load(name) is not None else "the operating system does not permit AMX"


def has_amx() -> bool:
    """Whether this processor has what the library "amx" needs."""
    return torch.cpu._is_amx_tile_supported() and torch.cpu._is_avx512_bf16_supported()


def built(name: str) -> Path | None:
    """The file of a library, if it was built."""
    return next(iter(sorted(Path(__file__).parent.glob(f"_{name}.*so"))), None)


@cache
def _load(name: str) -> Any:
    found = ctypes.CDLL(str(built(name)))
    for function, types in _ARGUMENTS[name].items():
        getattr(found, function).argtypes = types
        getattr(found, function).restype = None
    return found if name == "avx2" or found.safelight_init() else None


def plain_3x3(conv: nn.Conv2d, lanes: int) -> bool:
    """Whether it is a 3×3 convolution with a border of one, of whole `lanes` of channels."""
    return (
        not (conv.in_channels % lanes or conv.out_channels % lanes)
        and conv.kernel_size == (3, 3)
        and conv.padding == (1, 1)
        and conv.stride == conv.dilation == (1, 1)
    )


def at(tensor: Tensor | None) -> int | None:
    """The address of a tensor's first number."""
    return None if tensor is None else tensor.data_ptr()
