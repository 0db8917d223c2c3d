"""Linear layers in 8-bit integers: the kernel, the layers that use it, the setting."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import safelight
from safelight.bench.shortcuts import psnr
from safelight.engine.requests import resolve_request
from safelight.errors import SafelightError
from safelight.fast import accelerate, int8, kernels, layers, onednn
from safelight.fast.int8 import Matrix
from safelight.nets.layers import FeedForward
from safelight.nets.unet import UNet2DConditionModel, UNetConfig
from safelight.request import Request
from tests.needs import needs

TINY = UNetConfig(
    sample_size=16,
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=48,
    attention_head_dim=2,
)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["portable", "avx512", "amx"])
def by_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the kernel in each variant."""
    name = str(request.param)
    needs(name, monkeypatch)
    monkeypatch.setattr(kernels, "allowed", lambda: (name,))


@pytest.fixture
def takes_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip without AVX512, which brings oneDNN's bfloat16 and a kernel that counts as fast."""
    needs("avx512", monkeypatch)
    assert int8.available(torch.device("cpu"), torch.bfloat16)


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.double().norm().clamp_min(1e-30))


def rounded(rows: Tensor) -> Tensor:
    """Return rows in float64, each rounded to multiples of a 127th of its largest number."""
    rows = rows.float()
    peak = rows.abs().amax(-1, keepdim=True)
    return (rows * (127 / peak)).round().double() * (peak.double() / 127)


# --- the kernel ----------------------------------------------------------------------------------

SHAPES = [
    (0, 64, 32),
    (1, 16, 16),
    (1, 336, 48),
    (31, 80, 16),
    (33, 64, 96),
    (257, 1312, 64),
    (1100, 48, 160),
]


@pytest.mark.usefixtures("by_kernel")
@pytest.mark.parametrize(("rows", "inner", "columns"), SHAPES)
def test_a_product_is_that_of_rounded_numbers(rows: int, inner: int, columns: int) -> None:
    torch.set_num_threads(3)
    weight = (torch.randn(columns, inner) * torch.rand(columns, 1)).bfloat16()
    bias, plus = torch.randn(columns).bfloat16(), torch.randn(1, rows, columns).bfloat16()
    x = torch.randn(1, rows, inner + 16).bfloat16()[..., 16:]
    product = rounded(x) @ rounded(weight).T if rows else torch.zeros(1, 0, columns)
    for b, p in ((bias, plus), (bias, None), (None, plus), (None, None)):
        true = product if b is None else product + b.double()
        true = true if p is None else true + p.double()
        # The result is rounded once, to 2⁻⁸ of it at most.
        assert distance(Matrix(weight, b)(x, p), true) < 2**-8


@pytest.mark.soak
@pytest.mark.usefixtures("by_kernel")
@pytest.mark.parametrize("seed", range(40))
def test_any_shape(seed: int) -> None:
    random = Random(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(random.choice([1, 2, 3]))
    rows, inner, columns = (random.randint(1, random.choice([3, 33, 90])) for _ in range(3))
    x = torch.randn(1, rows * random.choice([1, 13]), 16 * inner).bfloat16()
    weight = torch.randn(16 * columns, 16 * inner).bfloat16()
    true = rounded(x) @ rounded(weight).T
    assert distance(Matrix(weight, None)(x), true) < 2**-8, (x.shape, weight.shape)


@pytest.mark.usefixtures("by_kernel")
def test_a_product_is_as_near_as_its_steps_are_small() -> None:
    """A number is off by up to half a step, 1/√12 of a step on average, and so is a sum of many."""
    weight, x = torch.randn(96, 640).bfloat16(), torch.randn(1, 200, 640).bfloat16()

    def off(rows: Tensor) -> float:
        step = rows.float().abs().amax(-1) / 127
        return float(
            step.norm() / math.sqrt(12) / (rows.float().norm() / math.sqrt(rows.shape[-1]))
        )

    found = distance(Matrix(weight, None)(x), x.double() @ weight.double().T)
    assert found < 1.1 * math.hypot(off(weight), off(x), 2**-9)
    assert found < 0.015


@pytest.mark.usefixtures("by_kernel")
def test_rows_that_hurt() -> None:
    """Zeros, NaN, infinity, the largest and the smallest numbers affect only their own row."""
    bias = torch.randn(32).bfloat16()
    weight = torch.randn(32, 80).bfloat16()
    product = Matrix(weight, bias)
    x = torch.randn(1, 70, 80).bfloat16()
    wanted = product(x)
    lost = [(3, torch.nan), (17, torch.inf), (69, -torch.inf)]
    for row, value in lost:
        x[0, row, row] = value
    x[0, 5], x[0, 40] = 0, x[0, 40] * 2.0**-125
    x[0, 50] *= 2.0**120
    found = product(x)
    assert all(found[0, row].isnan().all() for row, _ in lost)
    for row in (5, 40):  # 2⁻¹²⁵ is nothing beside a bias
        assert found[0, row].equal(bias)
    changed = [row for row, _ in lost] + [5, 40, 50]
    same = [row for row in range(70) if row not in changed]
    assert found[0, same].equal(wanted[0, same])
    assert distance(found[0, 50], rounded(x[0, 50]) @ rounded(weight).T) < 2**-8


@pytest.mark.usefixtures("by_kernel")
def test_columns_that_hurt() -> None:
    weight = torch.randn(48, 64).bfloat16()
    weight[2], weight[20, 7], weight[33, 9] = 0, torch.nan, torch.inf
    found = Matrix(weight, None)(torch.randn(1, 5, 64).bfloat16())[0]
    assert not found[:, 2].any()
    assert not found[:, [20, 33]].isfinite().any()
    others = [column for column in range(48) if column not in (20, 33)]
    assert found[:, others].isfinite().all()


@pytest.mark.usefixtures("by_kernel")
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sum_does_not_overflow(sign: int) -> None:
    x, weight = torch.ones(1, 2, 1 << 16).bfloat16(), torch.ones(16, 1 << 16).bfloat16()
    assert (Matrix(weight, None)(sign * x) == sign * (1 << 16)).all()
    assert not int8.fits(torch.empty(16, (1 << 16) + 16, dtype=torch.bfloat16))


@pytest.mark.usefixtures("by_kernel")
def test_threads_change_no_byte() -> None:
    product = Matrix(torch.randn(80, 128).bfloat16(), None)
    x, found = torch.randn(1, 333, 128).bfloat16(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(product(x))
    assert all(one.equal(found[0]) for one in found)
    # The number of threads changes no bit; neither do the rows beside a row.
    assert product(x[:, 100:101]).equal(found[0][:, 100:101])


@pytest.mark.usefixtures("by_kernel")
def test_what_does_not_fit_is_refused() -> None:
    product = Matrix(torch.randn(32, 64).bfloat16(), None)
    for x in (torch.randn(1, 3, 64), torch.randn(1, 3, 48).bfloat16()):
        with pytest.raises(ValueError, match="by a matrix of 64 rows"):
            product(x)
    for shape in ((24, 64), (32, 65), (32, 1)):
        assert not int8.fits(torch.empty(shape, dtype=torch.bfloat16))
    assert not int8.fits(torch.empty(32, 64))


# --- the layers ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("takes_int8")
def test_what_is_asked_for_depends_on_nothing_that_was_drawn_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both kinds of layer are asked for in turns, for one text; the first call packs weights."""
    net = UNet2DConditionModel(TINY).eval().bfloat16()
    given = torch.randn(1, 4, 16, 16).bfloat16(), torch.tensor([500.0])
    context = torch.randn(2, 7, 48).bfloat16()

    def draw(net: Any, yes: bool) -> Tensor:
        with int8.asked(yes):
            found: Tensor = net(*given, context)
        return found

    def fresh() -> Any:
        other = copy.deepcopy(net)
        accelerate(other, torch.bfloat16)
        return other

    alone = [draw(fresh(), False), draw(fresh(), True)]
    assert 1e-3 < distance(alone[1], alone[0].double()) < 0.1
    for first in (False, True):
        used = fresh()
        for yes in (first, not first, first):
            assert draw(used, yes).equal(alone[yes])
    monkeypatch.setattr(layers, "LARGE", 1)
    low = copy.deepcopy(net)
    accelerate(low, torch.bfloat16, low_memory=True)
    for yes in (True, False, True):
        assert draw(low, yes).equal(alone[yes])


@pytest.mark.usefixtures("takes_int8")
def test_a_feed_forward_that_had_many_tokens_computes_in_integers_too() -> None:
    """Whichever call comes first packs the weights for all."""
    net = torch.nn.Sequential(FeedForward(32)).eval().bfloat16()
    x = torch.randn(1, 64, 32).bfloat16()
    found = []
    for first in (x, torch.randn(1, 2 * layers.PART, 32).bfloat16()):
        used: Any = copy.deepcopy(net)
        accelerate(used, torch.bfloat16)
        used[0](first)
        with int8.asked(True):
            found.append(used[0](x))
    assert found[0].equal(found[1])


@pytest.mark.usefixtures("takes_int8")
def test_an_added_number_and_a_bias_come_through() -> None:
    weight, bias = torch.randn(64, 96).bfloat16(), torch.randn(64).bfloat16()
    x, plus = torch.randn(2, 9, 96).bfloat16(), torch.randn(2, 9, 64).bfloat16()
    either = int8.Either(onednn.Matrix(weight, bias), bias)
    plain = F.linear(x.double(), weight.double(), bias.double()) + plus
    near = distance(either(x, plus), plain)
    with int8.asked(True):
        assert near < distance(either(x, plus), plain) < 0.02
    assert distance(either(x, plus), plain) == near


# --- the setting ---------------------------------------------------------------------------------

PROMPTS = ("a red apple", "a cat", "a blue bird")


def drawn(dtype: str, **asked: Any) -> list[Any]:
    model = safelight.load("embedded-fast", dtype=dtype)
    made = [model.generate(prompt, seed=3, steps=5, **asked).images[0] for prompt in PROMPTS]
    return [np.asarray(image) for image in made]


@pytest.mark.usefixtures("takes_int8")
def test_pictures_are_as_near_as_their_products() -> None:
    """int8 in place of bfloat16 costs pictures at most the decibels that it costs a product.

    They are distances to float32. The errors of many products add up in both alike. One decibel
    more is allowed, since a network's numbers are not those of this product.
    """
    x, weight = torch.randn(1, 256, 96), torch.randn(96, 96)
    product, low = x.double() @ weight.double().T, (x.bfloat16(), weight.bfloat16())
    near = distance(onednn.Matrix(low[1], None)(low[0]), product)
    more = 20 * math.log10(distance(Matrix(low[1], None)(low[0]), product) / near)
    assert 10 < more < 18
    true, half = drawn("float32"), drawn("bfloat16")
    whole = drawn("bfloat16", linears="int8")
    assert not any(np.array_equal(*pair) for pair in zip(half, whole, strict=True))
    exact = np.stack(true)
    assert psnr(np.stack(whole), exact) > psnr(np.stack(half), exact) - more - 1


@pytest.mark.usefixtures("takes_int8")
def test_the_recipe_has_it() -> None:
    model = safelight.load("embedded", dtype="bfloat16")
    result = model.generate("a cat", linears="int8", steps=2, seed=1)
    assert result.settings["linears"] == "int8"
    assert resolve_request(model, Request(prompt="a cat", fast=2)).linears == "int8"
    assert (
        resolve_request(model, Request(prompt="a cat", fast=2, linears="plain")).linears == "plain"
    )
    assert not any("linears" in warning for warning in result.warnings)
    again = model.generate(Request.from_dict(result.settings))
    assert again.images[0].tobytes() == result.images[0].tobytes()


def test_what_cannot_be_had_is_told_once_and_drawn_plainly() -> None:
    model = safelight.load("embedded", dtype="float32")
    result = model.generate("a cat", linears="int8", steps=2, seed=1, count=2)
    said = [warning for warning in result.warnings if "linears int8 needs" in warning]
    assert len(said) == 1
    assert result.settings["linears"] == "plain"
    plain = model.generate("a cat", steps=2, seed=1)
    assert plain.images[0].tobytes() == result.images[0].tobytes()
    assert not any("linears" in warning for warning in plain.warnings)


def test_a_processor_without_it_draws_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    if not onednn.takes(torch.bfloat16):
        pytest.skip("this processor has no bfloat16")
    model = safelight.load("embedded", dtype="bfloat16")
    monkeypatch.setattr(kernels, "vectors", lambda: None)
    asked = Request(prompt="a cat", linears="int8")
    assert resolve_request(model, asked).linears == "plain"


def test_a_wrong_value_is_told() -> None:
    with pytest.raises(SafelightError, match="linears must be plain or int8"):
        Request(prompt="a cat", linears="int4")  # type: ignore[arg-type]
