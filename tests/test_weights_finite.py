"""Weights are checked while their file is hashed: each number once, wherever it lies."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from safelight.weights import digest
from safelight.weights.check import read_header
from safelight.weights.digest import digest_file
from safelight.weights.finite import FiniteCheck, _largest
from tests.weights_tiny import raw_file

INF, NAN = float("inf"), float("nan")


def checked(path: Path, dtype: torch.dtype) -> FiniteCheck:
    header = read_header(path)
    found = FiniteCheck(header, dict.fromkeys(header.tensors, dtype))
    done = digest_file(path, found.check_piece)
    found.finish(path, done.stamp)
    return found


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Make pieces small, so that tensors cross their ends."""
    monkeypatch.setattr(digest, "_PIECE", 64)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("place", [0, 31, 32, 99])
def test_what_is_not_finite_is_not_seen(
    tmp_path: Path, stored: torch.dtype, value: float, place: int
) -> None:
    bad = torch.arange(-50, 50).to(stored)
    bad[place] = value
    path = tmp_path / "a.safetensors"
    save_file({"bad": bad, "good": torch.full((100,), -3.5).to(stored)}, path)
    assert set(checked(path, torch.float32).finite_keys) == {"good"}


@pytest.mark.parametrize(
    ("stored", "dtype", "largest"),
    [
        (torch.float16, torch.bfloat16, 65504.0),
        (torch.float32, torch.float32, torch.finfo(torch.float32).max),
        (torch.float32, torch.float16, 65519.99609375),
        (torch.bfloat16, torch.float16, 65280.0),
    ],
)
def test_the_largest_number_is_that_of_the_precision(
    tmp_path: Path, stored: torch.dtype, dtype: torch.dtype, largest: float
) -> None:
    bits = {2: torch.int16, 4: torch.int32}[stored.itemsize]
    limit = torch.tensor([_largest(stored, dtype)], dtype=bits).view(stored)
    assert limit.item() == largest
    beyond = torch.tensor([_largest(stored, dtype) + 1], dtype=bits).view(stored)
    path = tmp_path / "a.safetensors"
    save_file({"fits": -limit, "not": -beyond}, path)
    assert set(checked(path, dtype).finite_keys) == {"fits"}


@pytest.mark.parametrize("odd", [False, True])
def test_numbers_that_are_not_aligned_are_left_for_later(tmp_path: Path, odd: bool) -> None:
    header = json.dumps({"a": {"dtype": "F16", "shape": [3], "data_offsets": [0, 6]}}).encode()
    header += b" " * (len(header) % 2 != odd)
    path = raw_file(tmp_path / "a.safetensors", header, bytes(6))
    assert set(checked(path, torch.float32).finite_keys) == (set() if odd else {"a"})


def test_what_was_seen_is_remembered_as_long_as_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(9)}, path)
    found = checked(path, torch.float32)
    stamp = digest_file(path).stamp
    found.keep(path, stamp)
    header = read_header(path)
    again = FiniteCheck(header, {"a": torch.float32})
    again.finish(path, stamp)
    assert set(again.finite_keys) == {"a"}
    for dtype, when in ((torch.float16, stamp), (torch.float32, (*stamp[:-1], 0))):
        other = FiniteCheck(header, {"a": dtype})
        other.finish(path, when)
        assert not other.finite_keys
    assert list((tmp_path / "cache" / "safelight").iterdir())
