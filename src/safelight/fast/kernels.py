"""Our own compiled kernels: which exist, and which are used.

They are loaded by ctypes, one library for each set of instructions.

- `_amx`: products by tiles, attention, norms, gates, Winograd convolutions and 8-bit products in
  bfloat16, and attention and products in float32 as products of bfloat16, for CPUs with AMX and
  AVX512-BF16 (Linux).
- `_avx512`: attention, norms, gates and Winograd convolutions in bfloat16 and float32, and 8-bit
  products, for CPUs with AVX512-BF16.
- `_avx2`: attention, norms, gates and Winograd convolutions in float32, for CPUs with AVX2.
- `_portable`: all of them in plain C++, for any processor. It is slower than oneDNN wherever it was
  measured. It exists so that every machine can test the kernels' logic.

SAFELIGHT_KERNELS chooses: `auto` (the default: what this processor has), `avx512` (no AMX), `avx2`
(no AVX512 either), `portable` (the portable library in place of all), or `off`.
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safelight.errors import SafelightError

SETTINGS = ("auto", "avx512", "avx2", "portable", "off")
LIBRARIES = ("amx", "avx512", "avx2", "portable")
SUFFIX = ".dll" if sys.platform == "win32" else ".so"

INTERFACE = 8
"""The result of a library's safelight_interface(); call.h has the same number."""

_STEPS = " ".join(
    f"{name}_{dim}" for name in ("q", "k", "v", "out") for dim in ("batch", "row", "head")
)


def _struct(pointers: str, sizes: str, floats: str = "") -> type[Structure]:
    """Return a kernel's arguments, in the order of its struct in C++."""
    groups = {c_void_p: pointers, c_int64: sizes, c_float: floats}
    fields = [(name, kind) for kind, names in groups.items() for name in names.split()]
    return type("Arguments", (Structure,), {"_fields_": fields})


_ATTENTION = _struct("q k v out", f"{_STEPS} batch heads queries keys size", "scale")
_EITHER = {
    "attend": _ATTENTION,
    "gate": _struct("value gate out", "count"),
    "layer_norm": _struct("x plus total factor shift out", "rows channels", "eps"),
    "moments": _struct("x scale shift factors", "images positions channels groups", "eps"),
    "normalise": _struct("x factors out", "images positions channels active"),
    "winograd": _struct(
        "x weights bias plus out",
        "bias_step images rows height width inner channels side scale above relu",
    ),
}
_VECTORS = _EITHER | {
    "int8_linear": _struct("x weights factors offsets bias plus out", "rows inner columns")
}
_TILES = {
    "conv": _struct(
        "x weights bias plus out",
        "plane bias_step images height width border channels columns side spread down right",
    ),
    "lay": _struct("x factors out", "plane images height width channels first last"),
    "split_attend": _ATTENTION,
    "split_linear": _struct("x weights bias plus out", "rows inner columns"),
}
_FLOATS = {f"{name}_floats": struct for name, struct in _EITHER.items()}
_ARGUMENTS = {
    "amx": _VECTORS | _TILES,
    "avx512": _VECTORS | _FLOATS,
    "avx2": _FLOATS,
    "portable": _VECTORS | _TILES | _FLOATS,
}


class Library:
    """A compiled library. Its kernels are called by name, with the fields of their structs."""

    def __init__(self, variant: str, file: Path) -> None:
        self.variant = variant
        self._library = ctypes.CDLL(str(file))
        self._kernels: dict[str, Any] = {}
        if not self.fits():
            return
        for name, struct in _ARGUMENTS[variant].items():
            kernel: Any = getattr(self._library, f"safelight_{name}")
            kernel.argtypes, kernel.restype = [POINTER(struct)], c_char_p
            self._kernels[name] = kernel, struct, {field[0] for field in struct._fields_}

    def fits(self) -> bool:
        """Return whether it was compiled from sources of this version."""
        return (
            hasattr(self._library, "safelight_interface")
            and self._library.safelight_interface() == INTERFACE
        )

    def permitted(self) -> bool:
        """Return whether the operating system lets this process use its instructions."""
        return self.variant != "amx" or bool(self._library.safelight_init())

    def call(self, name: str, **arguments: Tensor | int | float | None) -> None:
        """Run a kernel. A tensor is passed as the address of its first number.

        Raises ValueError with the C++ condition that the arguments break, or MemoryError, before
        anything is computed, and TypeError for other names than the kernel's.
        """
        kernel, struct, names = self._kernels[name]
        if arguments.keys() != names:
            raise TypeError(f"{name} takes {sorted(names)}")
        given = {n: a.data_ptr() if isinstance(a, Tensor) else a for n, a in arguments.items()}
        broken = kernel(byref(struct(**given)))
        if broken == b"memory":
            raise MemoryError(f"too little memory for {name}")
        if broken is not None:
            raise ValueError(f"{name}({given}): not {broken.decode()}")


def setting() -> str:
    """Return the value of SAFELIGHT_KERNELS. Raises SafelightError if it is unknown."""
    said = os.environ.get("SAFELIGHT_KERNELS", "") or "auto"
    said = {"0": "off", "1": "auto"}.get(said, said)
    if said not in SETTINGS:
        raise SafelightError(f"SAFELIGHT_KERNELS is {said!r:.40}; it may be {', '.join(SETTINGS)}")
    return said


def allowed() -> tuple[str, ...]:
    """Return the libraries that SAFELIGHT_KERNELS allows, the fastest first."""
    return {
        "auto": ("amx", "avx512", "avx2"),
        "avx512": ("avx512", "avx2"),
        "avx2": ("avx2",),
        "portable": ("portable",),
        "off": (),
    }[setting()]


def tiles() -> Library | None:
    """Return the library of products by tiles (AMX, or portable if that is set), or None."""
    return _first(allowed(), "conv")


def vectors() -> Library | None:
    """Return the library of attention, norms, gates and Winograd in bfloat16, or None."""
    return _first(allowed(), "attend")


def floats() -> Library | None:
    """Return the library of attention, norms, gates and Winograd in float32, or None."""
    return _first(allowed(), "attend_floats")


def required(library: Library | None) -> Library:
    """Return the library. Raises RuntimeError if it is None."""
    if library is None:
        raise RuntimeError("these kernels cannot run here: `safelight doctor` says why")
    return library


@cache
def _first(names: tuple[str, ...], kernel: str) -> Library | None:
    """Return the first of these libraries that has a kernel and can run here, or None."""
    return next((_load(n) for n in names if kernel in _ARGUMENTS[n] and not refusal(n)), None)


NOT_BUILT = (
    "not built: there was no C++ compiler that could (g++ 11, clang++ 14, or later) when Safelight "
    "was installed"
)
_AVX512 = "fma3 avx512_f avx512_bw avx512_dq avx512_vl avx512_bf16 avx512_vbmi avx512_vnni"
_INSTRUCTIONS = {
    "amx": ("AMX", f"amx_tile amx_bf16 amx_int8 {_AVX512}"),
    "avx512": ("AVX512-BF16", _AVX512),
    "avx2": ("AVX2", "avx2 fma3"),
    "portable": ("", ""),
}
"""The instructions of each library: in a word, and as PyTorch names them. pyproject.toml has them
as flags of the compiler."""


def lacks(name: str) -> str:
    """Return the instructions of a library that this processor lacks; "" if none."""
    word, names = _INSTRUCTIONS[name]
    has = torch.cpu.get_capabilities()
    return "" if all(has.get(one) for one in names.split()) else word


def refusal(name: str) -> str:
    """Return why a library cannot run here; "" if it can."""
    if missing := lacks(name):
        return f"this processor has no {missing}"
    file = built(name)
    if file is None:
        return NOT_BUILT
    try:
        library = _load(name)
    except OSError as e:
        return "cannot be loaded: " + str(e).replace(f"{file.parent}{os.sep}", "")
    if not library.fits():
        return "built from other sources: install Safelight again"
    return "" if library.permitted() else "the operating system does not permit AMX"


def missing() -> list[str]:
    """Return the names of libraries that this processor could use but that cannot be loaded."""
    return [name for name in allowed() if not lacks(name) and refusal(name)]


def built(name: str) -> Path | None:
    """Return the file of a library, or None if it was not built."""
    file = Path(__file__).with_name(f"_{name}{SUFFIX}")
    return file if file.exists() else None


@cache
def _load(name: str) -> Library:
    return Library(name, Path(__file__).with_name(f"_{name}{SUFFIX}"))


def plain_3x3(conv: nn.Conv2d, lanes: int) -> bool:
    """Return whether it is a plain 3×3 convolution, padding 1, channels multiples of `lanes`."""
    return (
        not (conv.in_channels % lanes or conv.out_channels % lanes)
        and conv.kernel_size == (3, 3)
        and conv.padding == (1, 1)
        and conv.stride == conv.dilation == (1, 1)
    )
