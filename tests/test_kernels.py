"""The C side of the kernels: what it refuses, difficult shapes, threads; test_fast has more."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.fast import kernels, memory, split, tiles, vectors, winograd
from safelight.fast.kernels import Library
from tests.needs import needs


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["portable", "avx2", "avx512", "amx"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Library:
    """Use each library, and check that it is in use."""
    name = str(request.param)
    needs(name, monkeypatch)
    monkeypatch.setattr(kernels, "allowed", lambda: (name,))
    monkeypatch.setattr(memory, "total", lambda: 16 << 30)
    found = kernels._first((name,), next(iter(kernels._ARGUMENTS[name])))
    assert isinstance(found, Library)
    return found


def distance(found: Tensor, wanted: Tensor) -> float:
    wanted = wanted.double()
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


# --- what is refused -----------------------------------------------------------------------------


def steps(value: int = 0) -> dict[str, Any]:
    return dict.fromkeys(kernels._STEPS.split(), value)


def fields(**all_: Any) -> dict[str, Any]:
    return all_


NUMBERS = torch.zeros(4096)
ATTENTION = fields(
    q=NUMBERS, k=NUMBERS, v=NUMBERS, out=NUMBERS, batch=1, heads=1, queries=2
) | fields(keys=2, size=16, scale=1.0, **steps())
GATE = fields(value=NUMBERS, gate=NUMBERS, out=NUMBERS, count=16)
NORM = fields(
    x=NUMBERS, plus=None, total=None, factor=NUMBERS, shift=NUMBERS, out=NUMBERS
) | fields(rows=1, channels=16, eps=1e-5)
GOOD: dict[str, dict[str, Any]] = {
    "attend": ATTENTION,
    "split_attend": ATTENTION,
    "gate": GATE,
    "int8_linear": fields(x=NUMBERS, weights=NUMBERS, factors=NUMBERS, offsets=NUMBERS)
    | fields(bias=None, plus=None, out=NUMBERS, rows=1, inner=64, columns=32),
    "layer_norm": NORM,
    "moments": fields(x=NUMBERS, scale=NUMBERS, shift=NUMBERS, factors=NUMBERS, images=1)
    | fields(positions=1, channels=16, groups=2, eps=1e-5),
    "normalise": fields(
        x=NUMBERS, factors=NUMBERS, out=NUMBERS, images=1, positions=1, channels=16, active=1
    ),
    "lay": fields(x=NUMBERS, factors=None, out=NUMBERS, plane=9 * 32, images=1, height=1)
    | fields(width=1, channels=32, first=0, last=1),
    "conv": fields(x=NUMBERS, weights=torch.zeros(9216), bias=None, plus=None, out=NUMBERS)
    | fields(plane=9 * 32, bias_step=0, images=1, height=1, width=1, border=2, channels=32)
    | fields(columns=32, side=3, spread=1, down=0, right=0),
    "split_linear": fields(x=NUMBERS, weights=NUMBERS, bias=None, plus=None, out=NUMBERS)
    | fields(rows=1, inner=32, columns=32),
    "winograd": fields(x=NUMBERS, weights=torch.zeros(8192), bias=None, plus=None, out=NUMBERS)
    | fields(bias_step=0, images=1, rows=2, height=2, width=2, inner=16, channels=16)
    | fields(side=2, scale=1, above=0, relu=0),
}
GOOD |= {f"{name}_floats": GOOD[name] for name in kernels._EITHER}
"""The arguments of each kernel."""

ODD = {"channels", "count", "columns", "inner"}
ANY = {"scale", "eps", "right", "down", "active", *kernels._STEPS.split()}


def test_what_is_wrong_is_refused_before_anything_is_read(library: Library) -> None:
    for name in kernels._ARGUMENTS[library.variant]:
        good = GOOD[name]
        library.call(name, **good)
        for field, value in good.items():
            if isinstance(value, Tensor):
                wrong: list[Any] = [None, value.data_ptr() + 1]
            elif value is None:
                wrong = [NUMBERS.data_ptr() + 1]
            elif field in ANY:
                continue
            else:
                wrong = [-1, 1 << 40] + ([value + 1] if field in ODD else [])
            if field == "total":  # it is not written to without `plus`
                continue
            for one in wrong:
                with pytest.raises(ValueError, match=rf"(?s){name}\(.*not "):
                    library.call(name, **good | {field: one})


def test_what_does_not_fit_together_is_refused(library: Library) -> None:
    of = {
        "attend": [{"keys": 0}],
        "moments": [{"groups": 3}, {"groups": 0}, {"positions": 0}],
        "lay": [{"first": 1, "last": 0}, {"last": 2}, {"plane": 9 * 32 - 1}],
        "conv": [{"side": 9}, {"spread": 3}, {"down": 1}, {"border": 1}, {"plane": 31}],
        "winograd": [
            *({"side": 3}, {"scale": 0}, {"scale": 3}, {"rows": 4}, {"above": 2}),
            *({"above": 1, "rows": 3}, {"above": 1, "rows": 4, "scale": 2}),
            {"scale": 2, "width": 3},
        ],
        "split_linear": [{"inner": 0}],
        "int8_linear": [{"inner": 0}, {"inner": (1 << 16) + 16}],
    }
    of |= {f"{name}_floats": of[name] for name in kernels._EITHER if name in of}
    for name, changes in of.items():
        for change in changes if name in kernels._ARGUMENTS[library.variant] else ():
            with pytest.raises(ValueError, match="not "):
                library.call(name, **GOOD[name] | change)


def test_too_little_memory_is_an_error(library: Library) -> None:
    """These need more than any processor can address."""
    for name in kernels._ARGUMENTS[library.variant]:
        if "attend" in name:
            more = fields(keys=1 << 31, size=1 << 20)
        elif "moments" in name:
            more = fields(positions=1 << 31, channels=1 << 31)
        else:
            continue
        with pytest.raises(MemoryError, match=name):
            library.call(name, **(GOOD[name] | more))


@cache
def in_a_fresh_process(test: str) -> tuple[int, str]:
    """Return the exit code and the output of a test, with all its parameters."""
    run = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", test]
    found = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    env = {**found, "FRESH_PROCESS": "1"}
    done = subprocess.run(run, cwd=Path(__file__).parents[1], env=env, capture_output=True)
    return done.returncode, done.stdout.decode()


@pytest.mark.xdist_group("fresh process")  # one for all libraries
@pytest.mark.skipif(memory._libc() is None, reason="nothing here tells what a process takes")
def test_memory_of_a_large_picture_is_given_back(
    library: Library, request: pytest.FixtureRequest
) -> None:
    if "FRESH_PROCESS" not in os.environ:
        # After many tests the heap is in pieces, and holds what it would give back.
        code, output = in_a_fresh_process(request.node.nodeid.partition("[")[0])
        assert code == 0, output
        return

    def own() -> int:
        memory.give_back()
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    name, dtype, _ = kernels_of_attention(library)[0]
    k = torch.randn(1, 1, 20480, 512).to(dtype)
    q = k[:, :, :1]
    vectors.attend_by(library, name, dtype, q, k[:, :, :32], k[:, :, :32])
    before = own()
    vectors.attend_by(library, name, dtype, q, k, k)  # packs 40 MB or more
    assert own() - before < 16 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="the compilers of other systems differ")
def test_clang_compiles_where_there_is_no_gcc(tmp_path: Path) -> None:
    compiler = tmp_path / "clang++"
    compiler.write_text('#!/bin/sh\nfor out; do :; done\nprintf "%s\\n" "$@" >"$out"\n')
    compiler.chmod(0o755)
    found = {"PATH": str(tmp_path), "CXXFLAGS": "-DNAME='two words'"}
    build = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)]
    subprocess.run(build, cwd=Path(__file__).parents[1], env=found, check=True)
    given = (tmp_path / "safelight" / "fast" / "_portable.so").read_text().splitlines()
    assert "-DNAME=two words" in given


def test_names_of_arguments_are_those_of_the_struct(library: Library) -> None:
    name = next(iter(kernels._ARGUMENTS[library.variant]))
    with pytest.raises(TypeError, match=f"{name} takes"):
        library.call(name, **GOOD[name] | {"more": 1})
    with pytest.raises(TypeError, match=f"{name} takes"):
        library.call(name)


# --- shapes that hurt ----------------------------------------------------------------------------


SHAPES = [
    (0, 5, 8),
    (1, 1, 1),
    (1, 2, 3),
    (31, 257, 127),
    (257, 1031, 7),
    (2053, 13, 17),
    (33, 31, 512),
    (37, 4099, 40),
]


def kernels_of_attention(library: Library) -> list[tuple[str, torch.dtype, float]]:
    """Return names, precisions, and how far results may be from float64."""
    all_ = [
        ("attend", torch.bfloat16, 6e-3),
        ("attend_floats", torch.float32, 3e-6),
        ("split_attend", torch.float32, 3e-5),
    ]
    return [one for one in all_ if one[0] in kernels._ARGUMENTS[library.variant]]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return plain attention in float64, in the layout of vectors.attend."""
    q, k, v = (t.double() for t in (q, k, v))
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("queries", "keys", "size"), SHAPES)
def test_attention(library: Library, queries: int, keys: int, size: int) -> None:
    q, k, v = (torch.randn(1, 3, n, size) for n in (queries, keys, keys))
    for name, dtype, most in kernels_of_attention(library):
        given = [t.to(dtype) for t in (q, k, v)]
        found = vectors.attend_by(library, name, dtype, *given)
        assert distance(found, attention(*given)) < most


def test_attention_of_views(library: Library) -> None:
    """Heads of one product, one key's values for all, every second query, a transposed matrix."""
    both = torch.randn(2, 70, 3 * 2 * 24)
    q, k, v = (t.unflatten(-1, (2, 24)).transpose(1, 2) for t in both.chunk(3, dim=-1))
    one = torch.randn(1, 1, 70, 24).expand(2, 2, 70, 24)
    turned = torch.randn(2, 2, 24, 70).mT
    for name, dtype, most in kernels_of_attention(library):
        for views in ((q, k, v), (q[:, :, ::2], k, one), (one, turned, v), (turned, q, turned)):
            given = [t.to(dtype) if t.dtype != dtype else t for t in views]
            found = vectors.attend_by(library, name, dtype, *given)
            assert distance(found, attention(*given)) < most
        with pytest.raises(ValueError, match="keys > 0"):
            vectors.attend_by(
                library, name, dtype, *(t.to(dtype)[:, :, :n] for t, n in ((q, 3), (k, 0), (v, 0)))
            )


def test_threads_change_no_byte(library: Library) -> None:
    """Attention of one head or several, fewer or more than the threads; and a group norm's sums."""
    for heads in (1, 3, 16):
        q, k, v = (torch.randn(1, heads, n, 40) for n in (130, 600, 600))
        for name, dtype, _ in kernels_of_attention(library):
            given = [t.to(dtype) for t in (q, k, v)]
            found = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                found.append(vectors.attend_by(library, name, dtype, *given))
            assert all(one.equal(found[0]) for one in found)
    for dtype, _ in kernels_of_norms(library):
        norm, x, found = nn.GroupNorm(3, 48), torch.randn(2, 48, 40, 33).to(dtype), []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(vectors.moments(norm, x, norm.weight, norm.bias))
        assert all(one.equal(found[0]) for one in found)


def kernels_of_norms(library: Library) -> list[tuple[torch.dtype, float]]:
    """Return the precisions of norms and gates here, and how far results may be from float64."""
    all_ = [("moments", torch.bfloat16, 5e-3), ("moments_floats", torch.float32, 2e-6)]
    return [one[1:] for one in all_ if one[0] in kernels._ARGUMENTS[library.variant]]


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 13), (3, 97, 2), (2, 1, 31), (0, 4, 4)])
def test_maps(library: Library, shape: tuple[int, int, int]) -> None:
    """Norms, convolutions and enlargements."""
    batch, height, width = shape
    torch.set_num_threads(3)
    for dtype, most in kernels_of_norms(library):
        norm = nn.GroupNorm(3, 48, eps=1e-3)
        x = torch.randn(batch, 48, height, width).to(dtype)
        found = vectors.group_norm(norm, x, norm.weight, norm.bias)
        if batch and height * width > 1:
            assert distance(found, norm.double()(x.double())) < most
    if "conv" in kernels._ARGUMENTS[library.variant]:
        conv = nn.Conv2d(96, 32, 3, padding=1).bfloat16()
        x = torch.randn(batch, 96, height, width).bfloat16()
        true = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
        assert distance(tiles.Convolution(conv.weight, conv)(x), true) < 4e-3
    for dtype, _ in kernels_of_norms(library):
        conv = nn.Conv2d(80, 32, 3, padding=1).to(dtype)
        x = torch.randn(batch, 80, height, width).to(dtype)
        true = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
        most = 2.5e-3 if dtype == torch.bfloat16 else 5e-6
        assert distance(winograd.Convolution(conv.weight, conv)(x), true) < most


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(40))
def test_any_shape(library: Library, seed: int) -> None:
    random = Random(seed)
    torch.manual_seed(seed)

    def some(most: int, each: int = 1) -> int:
        """Return a multiple of `each`; small ones are as likely as those up to `most` of them."""
        return each * random.randint(1, random.choice([1, 3, 33, most]))

    torch.set_num_threads(random.choice([1, 2, 3]))
    for name, dtype, most in kernels_of_attention(library):
        queries, keys, size = some(300), some(1100), some(200)
        q, k, v = (torch.randn(2, n, 3, size).transpose(1, 2) for n in (queries, keys, keys))
        given = [t.to(dtype) for t in (q, k, v)]
        found = vectors.attend_by(library, name, dtype, *given)
        assert distance(found, attention(*given)) < most, (name, queries, keys, size)
    if "conv" not in kernels._ARGUMENTS[library.variant]:
        return
    conv = nn.Conv2d(some(9, 32), some(7, 32), 3, padding=1).bfloat16()
    x = torch.randn(some(2), conv.in_channels, some(40), some(40)).bfloat16()
    weight, bias = conv.weight.double(), conv.bias.double()
    for kind, scale in ((tiles.Convolution, 1), (tiles.Doubling, 2)):
        wide = F.interpolate(x.double(), scale_factor=scale)
        true = F.conv2d(wide, weight, bias, padding=1)
        assert distance(kind(conv.weight, conv)(x), true) < 5e-3, (kind, x.shape, weight.shape)
    weight = torch.randn(some(9, 32), some(45, 32))
    x = torch.randn(1, some(1100), weight.shape[1])
    found = split.Matrix(weight, None)(x)
    assert distance(found, x.double() @ weight.double().T) < 2**-17, (x.shape, weight.shape)


@pytest.mark.parametrize("rows", [0, 1, 257])
def test_rows(library: Library, rows: int) -> None:
    """Norms, gates and linear layers."""
    torch.set_num_threads(3)
    for dtype, most in kernels_of_norms(library):
        norm = nn.LayerNorm(80)
        x = torch.randn(rows, 80).to(dtype)
        total, found = vectors.layer_norm(norm, x, norm.weight, norm.bias, x)
        assert distance(total, 2 * x) == 0
        assert distance(found, norm.double()(2 * x.double())) < most
        found = vectors.gate(x, 30 * x)
        assert distance(found, x.double() * F.gelu(30 * x.double())) < most
        wide = torch.cat([x, torch.full((rows, 16), 1e30, dtype=dtype)], -1)
        true = 3 * F.gelu(wide.double())
        assert distance(vectors.gate(torch.full_like(wide, 3), wide), true) < most
    if "split_linear" in kernels._ARGUMENTS[library.variant]:
        weight, x = torch.randn(96, 1312), torch.randn(1, rows, 1312)
        assert distance(split.Matrix(weight, None)(x), x.double() @ weight.double().T) < 2**-17
