"""AMX in software (emulated_amx.cpp), for processors that have AVX512-BF16 but no AMX.

The tests of the AMX kernels use it by `needs`. With `pytest --emulate-amx`, every test does.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

from safelight.fast import kernels

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = "-O3 -std=c++17 -mfma -mavx512f -mavx512vnni -shared -fPIC"
COMPILER = next(filter(shutil.which, ("g++", "clang++")), "")


def lacks() -> str:
    """Return why AMX cannot be emulated here; "" if it can."""
    if sys.platform != "linux" or kernels.lacks("avx512"):
        return f"this processor has no {kernels.lacks('amx')}"
    if not COMPILER or not kernels.built("amx"):
        return "no C++ compiler was there to build the kernels"
    return ""


def build(source: Path, flags: str, folder: Path) -> Path:
    """Compile a library for this process; return its file."""
    out = folder / f"{source.stem}.so"
    both = shlex.split(f"{FLAGS} {flags} {os.environ.get('CXXFLAGS', '')}")
    subprocess.run([COMPILER, *both, str(source), "-o", str(out)], check=True)
    return out


@cache
def library() -> ctypes.CDLL:
    """Return the emulator, which is compiled if need be."""
    with tempfile.TemporaryDirectory() as folder:
        return ctypes.CDLL(str(build(SOURCE, "", Path(folder))))


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Safelight find AMX in this processor, and this process obey its instructions."""
    has_not = kernels.lacks
    if not has_not("amx"):
        return
    assert library().emulate() == 0
    monkeypatch.setattr(kernels, "lacks", lambda name: "" if name == "amx" else has_not(name))
    monkeypatch.setattr(kernels.Library, "permitted", lambda self: True)
    monkeypatch.setattr(kernels, "_first", cache(kernels._first.__wrapped__))
