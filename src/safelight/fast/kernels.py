"""Our own kernels, compiled: which there are, which are used.

They are loaded by ctypes, one library for each set of instructions.

- `_amx`: products by tiles, attention, norms and gates in bfloat16, and float32 as products of
  bfloat16, for CPUs with AMX and AVX512-BF16 (Linux).
- `_avx512`: attention, norms and gates in bfloat16, and attention in float32, for CPUs with
  AVX512-BF16.
- `_avx2`: Winograd convolutions and attention in float32.
- `_portable`: the sources of all in plain C++, for any processor. It is slower than oneDNN
  wherever it was measured. It exists so that every machine can test the kernels' logic.

SAFELIGHT_KERNELS chooses: `auto` (the default: what this processor has), `avx512` (no AMX), `avx2`
(no AVX512 either), `portable` (the portable library in place of all), or `off`.
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

SETTINGS = ("auto", "avx512", "avx2", "portable", "off")
LIBRARIES = ("amx", "avx512", "avx2", "portable")

_VECTORS = {
    "safelight_moments": [c_void_p] * 4 + [c_long] * 4 + [c_float],
    "safelight_normalise": [c_void_p] * 3 + [c_long] * 3,
    "safelight_layer_norm": [c_void_p] * 6 + [c_long] * 2 + [c_float],
    "safelight_gate": [c_void_p] * 3 + [c_long],
    "safelight_attend": [c_void_p] * 5 + [c_long] * 5 + [c_float],
}
_TILES = {
    "safelight_pack": [c_void_p] * 2 + [c_long] * 2,
    "safelight_conv": [c_void_p, c_long, c_void_p, c_void_p, c_long, c_void_p, c_void_p]
    + [c_long] * 6
    + [c_int]
    + [c_long] * 3,
    "safelight_lay": [c_void_p] * 3 + [c_long] * 7,
    "safelight_split_pack": [c_void_p] * 2 + [c_long] * 2,
    "safelight_split_linear": [c_void_p] * 5 + [c_long] * 3,
    "safelight_split_gate": [c_void_p] * 3 + [c_long],
    "safelight_split_attend": [c_void_p] * 5 + [c_long] * 5 + [c_float],
}
_WINOGRAD = {
    "safelight_spread": [c_void_p] * 2 + [c_long] * 8,
    "safelight_gather": [c_void_p] * 2 + [c_long] + [c_void_p] * 2 + [c_long] * 6,
}
_FLOATS = {"safelight_attend_floats": [c_void_p] * 5 + [c_long] * 5 + [c_float]}
_ARGUMENTS = {
    "amx": _VECTORS | _TILES,
    "avx512": _VECTORS | _FLOATS,
    "avx2": _WINOGRAD | _FLOATS,
    "portable": _VECTORS | _TILES | _WINOGRAD | _FLOATS,
}


def setting() -> str:
    """What SAFELIGHT_KERNELS says. SafelightError if there is no such setting."""
    said = os.environ.get("SAFELIGHT_KERNELS", "") or "auto"
    said = {"0": "off", "1": "auto"}.get(said, said)
    if said not in SETTINGS:
        raise SafelightError(f"SAFELIGHT_KERNELS is {said!r:.40}; it may be {', '.join(SETTINGS)}")
    return said


def allowed() -> tuple[str, ...]:
    """The libraries that SAFELIGHT_KERNELS lets through, the fastest first."""
    return {
        "auto": ("amx", "avx512", "avx2"),
        "avx512": ("avx512", "avx2"),
        "avx2": ("avx2",),
        "portable": ("portable",),
        "off": (),
    }[setting()]


def tiles() -> Any:
    """The library of products by tiles (AMX, or portable where that is asked for), or None."""
    return _first(allowed(), "safelight_conv")


def vectors() -> Any:
    """The library of attention, norms and gates in bfloat16, or None."""
    return _first(allowed(), "safelight_attend")


def floats() -> Any:
    """The library of attention in float32, or None."""
    return _first(allowed(), "safelight_attend_floats")


def winograd() -> Any:
    """The library of Winograd convolutions, or None."""
    return _first(allowed(), "safelight_spread")


@cache
def _first(names: tuple[str, ...], function: str) -> Any:
    """The first of these libraries that has a function and can run here, or None."""
    for name in names:
        if function in _ARGUMENTS[name] and not refusal(name):
            return _load(name)
    return None


def refusal(name: str) -> str:
    """Why a library cannot run here; empty if it can."""
    if name == "amx" and not has_amx():
        return "this processor has no AMX"
    if name == "avx512" and not has_avx512():
        return "this processor has no AVX512-BF16"
    if name == "avx2" and not torch.cpu._is_avx2_supported():
        return "this processor has no AVX2"
    if built(name) is None:
        return "not built: there was no C++ compiler when Safelight was installed"
    return "" if _load(name) is not None else "the operating system does not permit AMX"


def has_amx() -> bool:
    """Whether this processor has what the library "amx" needs."""
    return torch.cpu._is_amx_tile_supported() and has_avx512()


def has_avx512() -> bool:
    """Whether this processor has what the library "avx512" needs."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") and has.get("avx512_vbmi"))


def built(name: str) -> Path | None:
    """The file of a library, if it was built."""
    return next(iter(sorted(Path(__file__).parent.glob(f"_{name}.*so"))), None)


@cache
def _load(name: str) -> Any:
    found: Any = ctypes.CDLL(str(built(name)))
    found.variant = name
    for function, types in _ARGUMENTS[name].items():
        getattr(found, function).argtypes = types
        getattr(found, function).restype = None
    return found if name != "amx" or found.safelight_init() else None


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
