"""The emulator of AMX against the manual; on a processor with AMX, the processor itself."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from safelight.fast import kernels, split
from tests import emulated_amx
from tests.needs import needs

CALLS = """
#include <immintrin.h>
extern "C" void configure(const void* from) { _tile_loadconfig(from); }
extern "C" void configuration(void* to) { _tile_storeconfig(to); }
extern "C" void release() { _tile_release(); }
extern "C" void multiply(void* sums, const void* a, const void* b, const long* steps, int bytes) {
    _tile_loadd(5, sums, steps[0]);
    _tile_loadd(1, a, steps[1]);
    _tile_stream_loadd(7, b, steps[2]);
    if (bytes) _tile_dpbusd(5, 1, 7);
    else _tile_dpbf16ps(5, 1, 7);
    _tile_stored(5, sums, steps[0]);
}
extern "C" void zero(void* out) {
    _tile_zero(5);
    _tile_stored(5, out, 64);
}
"""


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a library of functions of an instruction each, or a few."""
    folder = tmp_path_factory.mktemp("amx")
    (folder / "calls.cpp").write_text(CALLS)
    flags = "-mamx-tile -mamx-int8 -mamx-bf16"
    return emulated_amx.build(folder / "calls.cpp", flags, folder)


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ctypes.CDLL:
    needs("amx", monkeypatch)
    assert not kernels.refusal("amx")
    return ctypes.CDLL(str(request.getfixturevalue("calls")))


def configuration(rows: int, columns: int, depth: int) -> np.ndarray:
    """Return 64 bytes, for products of rows by columns of `depth` words."""
    out = np.zeros(64, np.uint8)
    out[0] = 1
    for tile, height, width in ((5, rows, columns), (1, rows, depth), (7, depth, columns)):
        out[16 + 2 * tile], out[48 + tile] = 4 * width, height
    return out


def address(a: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(a.ctypes.data)


SIZES = [(16, 16, 16), (5, 12, 7), (1, 1, 1), (16, 3, 16)]


def multiply(amx: ctypes.CDLL, a: np.ndarray, b: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Return sums + a·b in tiles, whose rows are 80, 96 and 112 bytes apart in memory."""
    (rows, columns), depth = sums.shape, len(b)
    memory = [np.full(16 * step, 0xAB, np.uint8).reshape(16, step) for step in (80, 96, 112)]
    for place, values in zip(memory, (sums, a, b), strict=True):
        place[: len(values), : 4 * values.shape[1] // (4 // values.itemsize)] = (
            np.ascontiguousarray(values).view(np.uint8)
        )
    untouched = memory[0].copy()
    amx.configure(address(configuration(rows, columns, depth)))
    steps = np.array([80, 96, 112], np.int64)
    amx.multiply(*map(address, (*memory, steps)), int(a.dtype == np.uint8))
    amx.release()
    found = memory[0][:rows, : 4 * columns].copy()
    memory[0][:rows, : 4 * columns] = untouched[:rows, : 4 * columns]
    assert (memory[0] == untouched).all()
    return np.ascontiguousarray(found).view(sums.dtype)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Return numbers in bfloat16, as bits."""
    return torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()


def numbers(bits: np.ndarray) -> np.ndarray:
    """Return numbers of bfloat16 in float64."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@pytest.mark.parametrize(("rows", "columns", "depth"), SIZES)
def test_products_of_bfloat16(amx: ctypes.CDLL, rows: int, columns: int, depth: int) -> None:
    """Numbers are near enough to one another that a sum of two is exact in float64."""
    random = np.random.default_rng(0)
    a = bfloat16(random.standard_normal((rows, 2 * depth)))
    b = bfloat16(random.standard_normal((depth, 2 * columns)))
    sums = random.standard_normal((rows, columns)).astype(np.float32)
    pairs = np.zeros((2, rows, columns))
    for k in range(depth):
        for i in range(2):
            added = pairs[i] + np.outer(numbers(a)[:, 2 * k + i], numbers(b)[k, i::2])
            pairs[i] = added.astype(np.float32)
    wanted = sums + (pairs[0] + pairs[1]).astype(np.float32)
    assert (multiply(amx, a, b, sums) == wanted).all()


def test_small_numbers_count_as_zero(amx: ctypes.CDLL) -> None:
    """Below 2⁻¹²⁶, in the tiles, in their products, and in sums."""
    small, least, one = 2.0**-127, 2.0**-126, 1.0
    for row, column, start, wanted in (
        (small, one, 0, 0),
        (one, small, 0, 0),
        (least, 0.5, 0, 0),
        (0, 0, small, 0),
        (least, one, -1.5 * least, 0),
        (least, one, 0, least),
        (0, 0, least, least),
    ):
        a = bfloat16(np.array([[row, 0]]))
        b = bfloat16(np.array([[column, 0]]))
        found = multiply(amx, a, b, np.array([[start]], np.float32))
        assert found == np.float32(wanted), (row, column, start)


@pytest.mark.parametrize(("rows", "columns", "depth"), SIZES)
def test_products_of_bytes(amx: ctypes.CDLL, rows: int, columns: int, depth: int) -> None:
    random = np.random.default_rng(0)
    a = random.integers(0, 256, (rows, 4 * depth), np.uint8)
    b = random.integers(-128, 128, (depth, 4 * columns), np.int8)
    sums = random.integers(-(2**31), 2**31, (rows, columns), np.int32)
    wide = b.astype(np.int32).reshape(depth, columns, 4).transpose(0, 2, 1).reshape(-1, columns)
    assert (multiply(amx, a, b, sums) == sums + a.astype(np.int32) @ wide).all()


def test_tiles_are_configured_as_before(amx: ctypes.CDLL) -> None:
    """Those of this thread may be oneDNN's."""
    torch.set_num_threads(1)
    kernel = split.Matrix(torch.randn(32, 32), None)
    assert kernels.required(kernels.tiles()).variant == "amx"
    for given in (configuration(5, 12, 7), np.zeros(64, np.uint8)):
        amx.configure(address(given))
        kernel(torch.randn(1, 40, 32))
        found = np.empty(64, np.uint8)
        amx.configuration(address(found))
        assert (found == given).all()
    out = np.ones((16, 16), np.float32)
    amx.configure(address(configuration(16, 16, 16)))
    amx.zero(address(out))
    amx.release()
    assert not out.any()


REFUSED = """
import ctypes, sys
emulator, amx = map(ctypes.CDLL, sys.argv[1:3])
emulator.emulate()
given = bytearray.fromhex(sys.argv[3])
if given:
    amx.configure((ctypes.c_char * 64).from_buffer(given))
amx.multiply(*[(ctypes.c_long * 256)(64, 64, 64)] * 4, 0)
"""


def test_what_a_processor_refuses_ends_the_process(tmp_path: Path, amx: ctypes.CDLL) -> None:
    if torch.cpu.get_capabilities().get("amx_tile"):
        return  # nothing is emulated
    emulator = emulated_amx.build(emulated_amx.SOURCE, "", tmp_path)
    cases: list[tuple[dict[int, int] | None, str]] = [
        (None, "not configured"),
        ({48 + 7: 9}, "do not fit"),
        ({16 + 2 * 1: 30}, "not configured"),
        ({16 + 2 * 5: 68}, "size"),
        ({0: 2}, "palette"),
        ({3: 1}, "reserved"),
    ]
    for changes, why in cases:
        given = configuration(16, 16, 16) if changes else np.zeros(0, np.uint8)
        for place, value in (changes or {}).items():
            given[place] = value
        command = [sys.executable, "-c", REFUSED, emulator, amx._name, given.tobytes().hex()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGILL, done.stderr
        assert why in done.stderr
