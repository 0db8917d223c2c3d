"""The fast layers against the plain ones: the same names, the same weights, the same result."""

from __future__ import annotations

import contextlib
import copy
import errno
import io
import mmap
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.fast import (
    accelerate,
    helps,
    kernels,
    layers,
    memory,
    onednn,
    remark,
    split,
    store,
    strips,
    tiles,
    vectors,
    winograd,
)
from safelight.fast.onednn import Convolution, Doubling, takes
from safelight.nets.clip import CLIPTextConfig, CLIPTextModel
from safelight.nets.layers import FeedForward, ResnetBlock2D, Upsample2D
from safelight.nets.unet import UNet2DConditionModel, UNetConfig
from safelight.nets.unet2d import UNet2DConfig, UNet2DModel
from safelight.nets.vae import AutoencoderKL, VAEConfig
from tests.crossed import crossed
from tests.needs import needs

SD1 = UNetConfig(
    sample_size=16,
    block_out_channels=(32, 64, 64, 64),
    cross_attention_dim=48,
    attention_head_dim=4,
)
SD2 = UNetConfig(
    sample_size=16,
    block_out_channels=(64, 96),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=48,
    attention_head_dim=(2, 3),
    use_linear_projection=True,
    only_cross_attention=True,
    norm_num_groups=16,
)
PIXELS = UNet2DConfig(
    sample_size=16,
    block_out_channels=(32, 64),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=16,
    attention_head_dim=16,
)


@pytest.fixture(params=["portable", "amx"])
def by_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the kernels of tiles in each variant; every machine has the portable one."""
    _use(request.param, monkeypatch)
    assert kernels.tiles() is not None, kernels.refusal(request.param)


@pytest.fixture(params=["portable", "avx512", "amx"])
def by_vectors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the kernels of attention, norms and gates in bfloat16 in each variant."""
    _use(request.param, monkeypatch)
    assert kernels.vectors().variant == request.param


def _use(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a library's kernels, or skip the test."""
    needs(variant, monkeypatch)
    monkeypatch.setenv("SAFELIGHT_KERNELS", {"amx": "auto"}.get(variant, variant))


@pytest.fixture(params=["portable", "avx2", "avx512"])
def by_winograd(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the kernel of Winograd's products in float32 in each variant."""
    _use(request.param, monkeypatch)
    assert kernels.floats().variant == request.param


@pytest.fixture(params=["auto", "portable", "off"])
def kernels_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Use this processor's kernels, the portable ones, or none."""
    monkeypatch.setenv("SAFELIGHT_KERNELS", request.param)
    return str(request.param)


def plain_bound() -> float:
    """Return how far a network in float32 may be from the plain one.

    Products are rounded to 2⁻²⁴. A network's few hundred sums in another order make that about
    1e-6. Split products keep 16 of 24 bits, which makes 3e-6 each.
    """
    return 2e-5 if split.available(torch.float32) else 1e-5


@pytest.fixture(autouse=True)
def inference() -> Any:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def fast(net: nn.Module) -> Any:
    net = copy.deepcopy(net)
    accelerate(net, next(net.parameters()).dtype)
    return net


def text(config: UNetConfig, rows: int) -> Tensor:
    return torch.randn(rows, 7, config.cross_attention_dim)


@pytest.mark.usefixtures("kernels_of")
@pytest.mark.parametrize(
    ("config", "sides", "batch"), crossed([SD1, SD2], [(16, 16), (8, 24), (12, 20)], [1, 2])
)
def test_unet_in_float32(config: UNetConfig, sides: tuple[int, int], batch: int) -> None:
    net = UNet2DConditionModel(config).eval()
    x, context = torch.randn(batch, 4, *sides), text(config, 2 * batch)
    t = torch.tensor([500.0, 30.5])[:batch]
    swapped = fast(net)
    for _ in range(2):  # the first call packs
        assert distance(swapped(x, t, context), net(x, t, context)) < plain_bound()


@pytest.mark.parametrize("config", [SD1, SD2], ids=["sd1", "sd2"])
def test_one_row_for_both_halves_of_guidance(config: UNetConfig) -> None:
    net = UNet2DConditionModel(config).eval()
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([500.0, 30.0]), text(config, 4)
    each = net(x.repeat_interleave(2, 0), t.repeat_interleave(2), context)
    assert distance(net(x, t, context), each) < 1e-5


@pytest.mark.usefixtures("kernels_of")
@pytest.mark.parametrize("config", [SD1, SD2], ids=["sd1", "sd2"])
def test_bfloat16_is_no_further_from_float32_than_plain_bfloat16(config: UNetConfig) -> None:
    net = UNet2DConditionModel(config).eval()
    x, t, context = torch.randn(1, 4, 16, 16), torch.tensor([500.0]), text(config, 2)
    true = net(x, t, context)
    half = copy.deepcopy(net).bfloat16()
    plain = distance(half(x.bfloat16(), t, context.bfloat16()), true)
    assert distance(fast(half)(x.bfloat16(), t, context.bfloat16()), true) < 1.1 * plain


def test_another_prompt_is_not_answered_with_the_last_one() -> None:
    net = UNet2DConditionModel(SD1).eval()
    swapped = fast(net)
    x, t = torch.randn(1, 4, 16, 16), torch.tensor([500.0])
    for _ in range(3):
        context = text(SD1, 2)
        assert distance(swapped(x, t, context), net(x, t, context)) < plain_bound()


@pytest.mark.usefixtures("kernels_of")
def test_size_and_batch_may_change_between_calls() -> None:
    net = UNet2DConditionModel(SD1).eval()
    swapped, half = fast(net), copy.deepcopy(net).bfloat16()
    swapped_half = fast(half)
    for batch, sides in ((1, (16, 16)), (3, (8, 8)), (1, (32, 16)), (2, (9, 20)), (1, (16, 16))):
        x, t, context = torch.randn(batch, 4, *sides), torch.full((batch,), 9.0), text(SD1, batch)
        true = net(x, t, context)
        # On the smallest map the norms divide by the spread of a few numbers.
        assert distance(swapped(x, t, context), true) < 1e-4
        low = (x.bfloat16(), t, context.bfloat16())
        assert distance(swapped_half(*low), true) < 1.5 * distance(half(*low), true)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_byte_depends_on_what_was_drawn_before(dtype: torch.dtype) -> None:
    """The first map packs the weights: each size comes once first, and once after others."""
    net = UNet2DConditionModel(SD1).eval().to(dtype)
    inputs = [
        (torch.randn(batch, 4, *sides).to(dtype), torch.full((batch,), 9.0), text(SD1, batch))
        for batch, sides in ((1, (8, 8)), (1, (12, 8)), (2, (8, 8)))
    ]
    alone = [fast(net)(x, t, context.to(dtype)) for x, t, context in inputs]
    used = fast(net)
    for (x, t, context), wanted in zip(reversed(inputs), reversed(alone), strict=True):
        assert used(x, t, context.to(dtype)).equal(wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [(40, 144), (64, 64), (320, 192), (512, 128)])
def test_a_weight_is_packed_for_the_maps_that_come(
    channels: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN's own choice for a shape is used too, and few copies are kept."""
    monkeypatch.setattr(onednn, "KEPT", 1)
    monkeypatch.setattr(onednn, "SHAPES_KEPT", 4)
    monkeypatch.setattr(onednn, "_ORDERS", {})
    if not takes(dtype):
        dtype = torch.float32
    conv = nn.Conv2d(*channels, 3, padding=1).to(dtype)
    shapes = [(b, channels[0], side, side) for b in (1, 2, 3) for side in (1, 4, 9)] * 2
    used = Convolution(conv.weight.data, conv)
    for shape in shapes:
        x = torch.randn(shape).to(dtype)
        result = used(x)
        assert result.equal(Convolution(conv.weight.data, conv)(x))
        true = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
        assert distance(result, true) <= 1.1 * distance(conv(x), true) + 1e-6
        wanted = torch.ops.mkldnn._reorder_convolution_weight(conv.weight.data, *used.how, shape)
        assert _order(used._packed_for(x.shape, used.how)) == _order(wanted)
        assert len(used._packed) <= 2
        assert len(onednn._ORDERS) <= 4


def _order(packed: torch.Tensor) -> bytes:
    told: torch.Tensor = torch.ops.mkldnn._get_mkldnn_serialized_md(packed)
    return told.numpy().tobytes()


@pytest.mark.usefixtures("kernels_of")
@pytest.mark.parametrize("tokens", [2 * layers.PART - 1, 2 * layers.PART, 2 * layers.PART + 5])
def test_a_feed_forward_of_many_tokens(tokens: int) -> None:
    net = nn.Sequential(FeedForward(32)).eval()
    x, plus = torch.randn(1, tokens, 32), torch.randn(1, tokens, 32)
    swapped = fast(net)[0]
    for more in (None, plus):
        wanted = net[0](x, more)
        assert distance(swapped(x, more), wanted) < plain_bound()
        # The last tokens are a part of their own.
        assert distance(swapped(x, more)[:, -5:], wanted[:, -5:]) < plain_bound()


def test_pixel_model() -> None:
    net = UNet2DModel(PIXELS).eval()
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([500.0, 30.0])
    true = net(x, t)
    assert distance(fast(net)(x, t), true) < plain_bound()
    half = copy.deepcopy(net).bfloat16()
    plain = distance(half(x.bfloat16(), t), true)
    assert distance(fast(half)(x.bfloat16(), t), true) < 1.1 * plain


@pytest.mark.usefixtures("kernels_of")
def test_autoencoder() -> None:
    net = AutoencoderKL(VAEConfig(block_out_channels=(32, 64), latent_channels=4)).eval()
    z = torch.randn(1, 4, 16, 16)
    true, swapped = net.decode(z), fast(net)
    assert distance(swapped.decode(z), true) < plain_bound()
    for found, wanted in zip(swapped.encode(true), net.encode(true), strict=True):
        assert distance(found, wanted) < plain_bound()
    half = copy.deepcopy(net).bfloat16()
    plain = distance(half.decode(z.bfloat16()), true)
    assert distance(fast(half).decode(z.bfloat16()), true) < 1.1 * plain


def test_loaded_weights_are_let_go_once_packed() -> None:
    net = fast(UNet2DConditionModel(SD1).eval())
    before = sum(p.numel() for p in net.parameters())
    net(torch.randn(1, 4, 16, 16), torch.tensor([1.0]), text(SD1, 1))
    assert sum(p.numel() for p in net.parameters()) < before / 5


def test_a_packing_that_was_interrupted_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """After Ctrl-C in the first picture, or a full disk, the network draws the next picture."""
    net, calls, real = UNet2DConditionModel(SD1).eval(), [], layers._packed

    def packed(*given: Any) -> Any:
        calls.append(given)
        if len(calls) % 3 == 1:
            raise KeyboardInterrupt
        return real(*given)

    arguments = torch.randn(1, 4, 16, 16), torch.tensor([1.0]), text(SD1, 1)
    wanted, used, found = fast(net)(*arguments), fast(net), None
    monkeypatch.setattr(layers, "_packed", packed)
    while found is None:
        with contextlib.suppress(KeyboardInterrupt):
            found = used(*arguments)
    assert found.equal(wanted)
    assert len(calls) > 20


def test_blocks_of_memory_where_the_system_has_no_private_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Windows has none."""
    monkeypatch.delattr(mmap, "MAP_PRIVATE")
    assert store.Arena().room(100).fill_(1).sum() == 128


def test_too_little_memory_for_weights_is_an_error_that_a_picture_may_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", none)
    with pytest.raises(MemoryError, match="no 64 MB for packed weights"):
        store.Arena().room(100)


def test_doubling_is_enlarging_and_convolving() -> None:
    plain = Upsample2D(32).eval()
    x = torch.randn(2, 32, 5, 7)
    assert distance(Doubling(plain.conv.weight, plain.conv)(x), plain(x)) < 1e-6


def test_float16_and_other_devices_are_left_alone() -> None:
    assert helps(torch.device("cpu"), torch.float32)
    assert not helps(torch.device("cpu"), torch.float16)
    assert not helps(torch.device("meta"), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_loaded_in_float16_are_converted_as_they_are_packed(dtype: torch.dtype) -> None:
    loaded = UNet2DConditionModel(SD1).eval().half()
    other = copy.deepcopy(loaded).to(dtype)
    accelerate(loaded, dtype)
    assert loaded.conv_in.weight.dtype == torch.float16
    for sides in ((16, 16), (9, 20)):  # the second enlarges by other than two
        x, t = torch.randn(1, 4, *sides).to(dtype), torch.tensor([1.0])
        context = text(SD1, 1).to(dtype)
        found = loaded(x, t, context)
        assert found.dtype == dtype
        assert distance(found, other(x, t, context)) < (1e-4 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_text_encoder_in_float16_computes_in_what_is_asked(dtype: torch.dtype) -> None:
    net = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=9,
        )
    )
    net = net.eval().half()
    other, ids = copy.deepcopy(net).to(dtype), torch.randint(100, (2, 9))
    accelerate(net, dtype)
    if onednn.takes(dtype):
        assert torch.equal(net(ids), other(ids))
    else:  # in float32, and so nearer to it
        true = copy.deepcopy(other).float()(ids)
        assert distance(net(ids), true) <= distance(other(ids), true)


# --- the kernels ---------------------------------------------------------------------------------


def kernels_of_attention() -> list[tuple[Any, torch.dtype]]:
    """Return our kernels, each with its precision; that of split numbers needs tiles."""
    found: list[tuple[Any, torch.dtype]] = [(vectors, torch.bfloat16)]
    return found + ([(split, torch.float32)] if kernels.tiles() is not None else [])


SHAPES = [(64, 64, 40), (100, 77, 40), (33, 300, 80), (256, 1, 160), (1, 513, 64), (50, 33, 24)]


@pytest.mark.usefixtures("by_vectors")
@pytest.mark.parametrize(("queries", "keys", "size"), SHAPES)
def test_attention(queries: int, keys: int, size: int) -> None:
    q, k, v = (torch.randn(2, n, 3, size).bfloat16() for n in (queries, keys, keys))
    q, k, v = (t.transpose(1, 2) for t in (3 * q, k, v))
    true = F.scaled_dot_product_attention(q.float(), k.float(), v.float()).transpose(1, 2)
    assert distance(vectors.attend(q, k, v), true.flatten(2)) < 5e-3


@pytest.fixture(params=["portable", "avx2", "avx512"])
def by_floats(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the kernels of attention, norms and gates in float32 in each variant."""
    _use(request.param, monkeypatch)
    assert kernels.floats().variant == request.param


@pytest.mark.usefixtures("by_floats")
@pytest.mark.parametrize(("queries", "keys", "size"), [*SHAPES, (7, 40, 5), (70, 260, 33)])
def test_attention_in_float32(queries: int, keys: int, size: int) -> None:
    q, k, v = (torch.randn(2, n, 3, size) for n in (queries, keys, keys))
    q, k, v = (t.transpose(1, 2) for t in (3 * q, k, v))
    true = F.scaled_dot_product_attention(q.double(), k.double(), v.double()).transpose(1, 2)
    # A weight is exp of a score, whose rounding is of the largest terms that it is summed of.
    rounding = 2**-24 * float((q.double().abs() @ k.double().abs().mT).max()) * size**-0.5
    assert distance(vectors.attend(q, k, v), true.flatten(2)) < 1e-6 + rounding


@pytest.mark.usefixtures("by_floats")
def test_attention_in_float32_of_scores_far_apart() -> None:
    q = torch.full((1, 1, 32, 32), 4.0)
    k = torch.linspace(-40, 40, 600)[None, None, :, None].repeat(1, 1, 1, 32)
    v = torch.randn(1, 1, 600, 32)
    true = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert distance(vectors.attend(q, k, v), true) < 1e-3
    for place in range(3):
        for wrong in (torch.nan, torch.inf, -torch.inf):
            qkv = [torch.randn(1, 1, 64, 40) for _ in range(3)]
            qkv[place][0, 0, 3, 5] = wrong
            assert not vectors.attend(*qkv).isfinite().all(), (place, wrong)


@pytest.mark.usefixtures("by_tiles")
@pytest.mark.parametrize(("queries", "keys", "size"), SHAPES)
def test_attention_of_split_numbers(queries: int, keys: int, size: int) -> None:
    # More digits than bfloat16 has, and at steps of their own.
    q, k, v = (torch.randn(2, n, 3, size) for n in (queries, keys, keys))
    q, k, v = (t.transpose(1, 2) for t in (3 * q, k, v))
    true = F.scaled_dot_product_attention(q.double(), k.double(), v.double()).transpose(1, 2)
    assert distance(split.attend(q, k, v), true.flatten(2)) < 3e-5


@pytest.mark.usefixtures("by_vectors")
def test_attention_of_scores_far_apart() -> None:
    # Most weights underflow, and the largest score comes late: what was summed before shrinks.
    q = torch.full((1, 1, 32, 32), 4.0).bfloat16()
    k = torch.linspace(-40, 40, 600)[None, None, :, None].expand(1, 1, 600, 32).bfloat16()
    v = torch.randn(1, 1, 600, 32).bfloat16()
    true = F.scaled_dot_product_attention(q.float(), k.float(), v.float()).transpose(1, 2)
    for kernel, dtype in kernels_of_attention():
        found = kernel.attend(*(t.contiguous().to(dtype) for t in (q, k, v)))
        assert found.isfinite().all()
        assert distance(found, true.flatten(2)) < (5e-3 if kernel is vectors else 3e-5)


@pytest.mark.usefixtures("by_tiles")
@pytest.mark.parametrize("sides", [(16, 16), (8, 8), (1, 1), (9, 20), (5, 48), (40, 3)])
@pytest.mark.parametrize("channels", [(32, 32), (96, 64), (320, 96)])
def test_convolution(sides: tuple[int, int], channels: tuple[int, int]) -> None:
    conv = nn.Conv2d(*channels, 3, padding=1).bfloat16()
    x = torch.randn(2, channels[0], *sides).bfloat16()
    plus = torch.randn(2, channels[1], *sides).bfloat16()
    shift = torch.randn(2, channels[1]).bfloat16()
    kernel = tiles.Convolution(conv.weight, conv)
    weight, bias = conv.weight.float(), conv.bias.float()
    true = F.conv2d(x.float(), weight, bias, padding=1)
    assert distance(kernel(x), true) < 3e-3
    everything = true + plus.float() + shift.float()[:, :, None, None]
    assert distance(kernel(x, plus, shift), everything) < 3e-3
    assert distance(kernel(x, plus, shift[:1])[:1], everything[:1]) < 3e-3


@pytest.mark.usefixtures("by_tiles")
@pytest.mark.parametrize("sides", [(16, 16), (8, 8), (3, 17)])
def test_doubling(sides: tuple[int, int]) -> None:
    plain = Upsample2D(64).eval()
    x = torch.randn(2, 64, *sides).bfloat16()
    true = plain(x.float())
    conv = plain.conv.bfloat16()
    assert distance(tiles.Doubling(conv.weight, conv)(x), true) < 5e-3


@pytest.mark.usefixtures("by_tiles")
def test_a_large_map_is_convolved_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = nn.GroupNorm(8, 32)
    conv = nn.Conv2d(32, 64, 3, padding=1).bfloat16()
    x, shift = torch.randn(2, 32, 13, 18).bfloat16(), torch.randn(2, 64)
    plus = torch.randn(2, 64, 13, 18).bfloat16()
    double = tiles.Doubling(conv.weight, conv)
    kernel = tiles.Convolution(conv.weight, conv)

    def outputs() -> list[Tensor]:
        normed = tiles.Map(x, vectors.moments(norm, x, norm.weight, norm.bias))
        return [kernel(x, plus, shift), kernel(normed), double(x)]

    whole = outputs()
    monkeypatch.setattr(tiles, "STRIP", 5 * 20 * 32)
    assert len(tiles.Map(x).strips()) == 10
    for found, wanted in zip(outputs(), whole, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.usefixtures("kernels_of")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_a_large_map_is_normed_in_strips(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, mean: float
) -> None:
    net = ResnetBlock2D(48, 32, temb=16, groups=8, eps=1e-6).eval()
    x, temb = torch.randn(2, 48, 13, 10) + mean, torch.randn(2, 16)
    true = net(x, temb)
    net, x, temb = net.to(dtype), x.to(dtype), temb.to(dtype)
    bound = plain_bound() if dtype == torch.float32 else 1.5 * distance(net(x, temb), true)
    monkeypatch.setattr(layers, "HUGE", 1)
    for rows in (1, 4, 13):
        monkeypatch.setattr(strips, "STRIP", rows * 48 * 10)
        swapped = fast(net)
        assert distance(swapped(x, temb), true) < bound * (1 + mean)
        read = swapped.norm1.silu(x, swapped.conv1)
        assert isinstance(read, strips.Normed | tiles.Map)  # whose strips are made by the kernel


@pytest.mark.usefixtures("kernels_of")
@pytest.mark.parametrize("kind", [onednn.Convolution, winograd.Convolution])
@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("consume", [False, True])
def test_a_convolution_adds_and_ends_in_relu(kind: Any, rows: int, consume: bool) -> None:
    """rows: rows of the shift; 0 for no shift."""
    if kind is winograd.Convolution and not winograd.ready():
        kind = onednn.Convolution
    conv = nn.Conv2d(32, 32, 3, padding=1)
    x, plus = torch.randn(2, 32, 9, 12), torch.randn(2, 32, 9, 12)
    shift = torch.randn(rows, 32) if rows else None
    added = 0 if shift is None else shift[:, :, None, None]
    product = kind(conv.weight, conv)
    true = F.relu(conv(x) + added)
    assert distance(product(x, None, shift, False, True), true) < 1e-5
    true = F.relu(conv(x) + added + plus)
    bordered = F.pad(x, (0, 0, 1, 1))
    found = product(bordered, plus.clone(), shift, consume, tall=True)
    assert distance(F.relu(found), true) < 1e-5
    found = product(bordered, plus.clone(), shift, consume, True, tall=True)
    assert distance(found, true) < 1e-5
    assert distance(product(x, plus.clone(), shift, consume, True), true) < 1e-5


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_a_bias_may_begin_at_any_address(offset: int) -> None:
    """In a file, it does. Without AVX, oneDNN crashes for some addresses of a bias in a sum."""
    conv, linear = nn.Conv2d(64, 64, 3, padding=1), nn.Linear(64, 64)
    for layer in (conv, linear):
        moved = torch.empty(64 + offset)[offset:]
        layer.bias.data = moved.copy_(layer.bias)
    x, plus = torch.randn(2, 64, 4, 4), torch.randn(2, 64, 4, 4)
    found = onednn.Convolution(conv.weight, conv)(x, plus.clone(), consume=True)
    assert distance(found, conv(x) + plus) < 1e-5
    shift = torch.randn(64 + offset)[offset:].view(1, 64)
    bare = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    found = onednn.Convolution(bare.weight, bare)(x, plus.clone(), shift, consume=True)
    assert distance(found, bare(x) + plus + shift[:, :, None, None]) < 1e-5
    rows = torch.randn(5, 64)
    assert distance(onednn.Matrix(linear.weight, linear.bias)(rows), linear(rows)) < 1e-5


@pytest.fixture(
    params=[
        *(("bfloat16", variant) for variant in ("portable", "avx512", "amx")),
        *(("float32", variant) for variant in ("portable", "avx2", "avx512")),
    ],
    ids=lambda param: "-".join(param),
)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Yield each precision that norms and gates have kernels for, in each variant."""
    name, variant = request.param
    _use(variant, monkeypatch)
    dtype = getattr(torch, name)
    assert vectors._library(dtype).variant == variant
    return dtype


def affine(norm: Any) -> Any:
    norm.weight.copy_(torch.randn(norm.weight.shape))
    norm.bias.copy_(torch.randn(norm.bias.shape))
    return copy.deepcopy(norm).double()


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("mean", [0.0, 30.0, -1000.0])
@pytest.mark.parametrize("sides", [(1, 2), (5, 7), (40, 33)])
def test_group_norm(dtype: torch.dtype, sides: tuple[int, int], mean: float, silu: bool) -> None:
    norm = nn.GroupNorm(8, 48)
    true = affine(norm)
    x = (torch.randn(2, 48, *sides) + mean).to(dtype)
    wanted = F.silu(true(x.double())) if silu else true(x.double())
    found = vectors.group_norm(norm, x, norm.weight, norm.bias, silu=silu)
    assert found.dtype == dtype
    if mean == -1000:  # the sums of squares leave a spread of 1 a few digits
        assert distance(found, wanted) < (0.3 if dtype == torch.bfloat16 else 0.05)
    else:
        assert distance(found, wanted) < (5e-3 if dtype == torch.bfloat16 else 1e-4)
        assert mean or dtype == torch.bfloat16 or distance(found, wanted) < 1e-6


def test_the_sums_of_a_large_map_keep_their_digits(dtype: torch.dtype) -> None:
    """Added one by one in float32, a third of a million numbers lose four digits."""
    norm = nn.GroupNorm(2, 16)
    x = (torch.randn(1, 16, 600, 603).abs() + 1).to(dtype)
    factors = vectors.moments(norm, x, norm.weight, norm.bias)
    groups = x.double().unflatten(1, (2, 8)).flatten(2)
    factor = (groups.var(-1, correction=0) + norm.eps).rsqrt().repeat_interleave(8, 1)
    assert distance(factors[:, 0], factor) < 1e-6
    addend = -groups.mean(-1).repeat_interleave(8, 1) * factor
    assert distance(factors[:, 1], addend) < 1e-6


def test_layer_norm(dtype: torch.dtype) -> None:
    norm = nn.LayerNorm(48)
    true = affine(norm)
    x, plus = (torch.randn(2, 37, 48) * 3 + 20).to(dtype), torch.randn(2, 37, 48).to(dtype)
    for more in (None, plus):
        total, found = vectors.layer_norm(norm, x, norm.weight, norm.bias, more)
        assert torch.equal(total, x if more is None else x + more)
        assert distance(found, true(total.double())) < (5e-3 if dtype == torch.bfloat16 else 1e-6)


def test_gate(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 64) * 4
    x[0, 0, 32:] = torch.linspace(-30, 30, 32)
    value, gate = x.to(dtype).chunk(2, dim=-1)
    true = value.double() * F.gelu(gate.double())
    found = vectors.gate(value, gate)
    assert distance(found, true) < (3e-3 if dtype == torch.bfloat16 else 1e-6)
    # erfc is right to 2e-7, in bfloat16 to 6e-5; and the result is rounded.
    most = 1e-4 if dtype == torch.bfloat16 else 5e-7
    rounding = true.abs() * torch.finfo(dtype).eps
    assert ((found - true).abs() <= most * (value * gate).abs().double() + rounding).all()
    far = torch.tensor([1e30, -1e30]).repeat(8).to(dtype)
    assert vectors.gate(torch.ones_like(far), far).allclose(F.relu(far))


def test_silu_of_numbers_far_below_zero_is_zero(dtype: torch.dtype) -> None:
    x = torch.tensor([-88.0, -1e9, -2e9, -1e20] * 4).to(dtype).view(1, 16, 1, 1)
    factors = torch.tensor([1.0, 0.0]).repeat_interleave(16).view(1, 2, 16)
    assert vectors.normalise(x, factors, silu=True).abs().max() < 1e-17


def test_norms_and_gates_hide_no_nan(dtype: torch.dtype) -> None:
    for wrong in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(1, 32, 4, 4).to(dtype)
        x[0, 3, 1, 2] = wrong
        norm, rows = nn.GroupNorm(8, 32), nn.LayerNorm(32)
        for silu in (False, True):
            found = vectors.group_norm(norm, x, norm.weight, norm.bias, silu=silu)
            assert not found.isfinite().all()
        tokens = x.flatten(2).mT
        assert not vectors.layer_norm(rows, tokens, rows.weight, rows.bias)[1].isfinite().all()
        ones = torch.ones_like(tokens)
        assert not vectors.gate(tokens, ones).isfinite().all()
        if wrong != -torch.inf:
            assert not vectors.gate(ones, tokens).isfinite().all()


@pytest.mark.usefixtures("by_tiles")
def test_a_map_is_laid_in_planes_with_a_border() -> None:
    norm = nn.GroupNorm(8, 64)
    x = (torch.randn(2, 64, 5, 7)).bfloat16()
    for map_, true in (
        (tiles.Map(x), x.float()),
        (
            tiles.Map(x, vectors.moments(norm, x, norm.weight, norm.bias)),
            F.silu(norm(x.float())),
        ),
    ):
        memory, plane = map_.laid(slice(0, 2), 0, 5)
        assert plane == 2 * 7 * 9 * 32
        laid = memory[: 2 * plane].view(2, 2, 7, 9, 32)  # plane, picture, row, place, channel
        found = laid.permute(1, 0, 4, 2, 3).flatten(1, 2)
        assert distance(found[:, :, 1:-1, 1:-1], true) < 5e-3
        assert not found[:, :, 0].any()
        assert not found[:, :, :, -1].any()


@pytest.mark.usefixtures("by_vectors")
@pytest.mark.parametrize("size", [40, 64])
def test_scores_far_above_those_of_the_first_keys(size: int) -> None:
    q, k, v = (torch.randn(1, 2, n, size).bfloat16() for n in (70, 600, 600))
    k[:, :, 500] *= 200  # the first pass ends at 256
    true = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert (q.float() @ k.float().mT).max() * size**-0.5 > 200
    for kernel, dtype in kernels_of_attention():
        found = kernel.attend(*(t.to(dtype) for t in (q, k, v)))
        most = 1e-2 if kernel is vectors else 1e-3
        assert distance(found.unflatten(-1, (2, size)).transpose(1, 2), true) < most


@pytest.mark.usefixtures("by_vectors")
def test_a_nan_is_not_hidden() -> None:
    for kernel, dtype in kernels_of_attention():
        for place in range(3):  # in queries, keys or values alone
            for wrong in (torch.nan, torch.inf, -torch.inf):
                qkv = [torch.randn(1, 1, 64, 40).to(dtype) for _ in range(3)]
                qkv[place][0, 0, 3, 5] = wrong
                assert not kernel.attend(*qkv).isfinite().all(), (kernel, place, wrong)
    if kernels.tiles() is not None:
        q = torch.randn(1, 1, 32, 32)
        q[0, 0, 3] = torch.nan
        assert split.Matrix(torch.randn(32, 32), None)(q)[0, 0, 3].isnan().all()


@pytest.mark.usefixtures("kernels_of")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_memory_changes_no_picture(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(layers, "LARGE", 1)
    net = UNet2DConditionModel(SD1).eval().to(dtype)
    arguments = (
        torch.randn(1, 4, 16, 16).to(dtype),
        torch.tensor([500.0]),
        text(SD1, 2).to(dtype),
    )
    wanted, low = fast(net)(*arguments), copy.deepcopy(net)
    accelerate(low, dtype, low_memory=True)
    for _ in range(2):  # when weights are put away, and when they are fetched
        assert low(*arguments).equal(wanted)


class OnSmallDisk(io.BytesIO):
    """A file that may have so many bytes."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def write(self, data: Any) -> int:
        if self.tell() == self.most:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data[: self.most - self.tell()])


def test_a_weight_that_found_a_full_disk_takes_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: OnSmallDisk(100))
    shelf, one, two = store.Shelf(), torch.ones(10), torch.ones(15)
    first = shelf.keep(one)
    for _ in range(2):
        with pytest.raises(SafelightError, match="No space left"):
            shelf.keep(torch.zeros(50))
    second = shelf.keep(two)
    assert first().equal(one)
    assert second().equal(two)


def test_weights_are_kept_in_a_file_where_there_is_no_pread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Windows has none; a copy has a file of its own."""
    for name in ("pwrite", "preadv"):
        monkeypatch.delattr(f"os.{name}", raising=False)
    shelf, weights = store.Shelf(), torch.randn(3, 3, 5).unbind()
    first = shelf.keep(weights[0])
    copied = copy.deepcopy(shelf).keep(weights[1].half())
    second = shelf.keep(weights[2])
    assert first().equal(weights[0])
    assert copied().equal(weights[1].half())
    assert second().equal(weights[2])


@pytest.mark.usefixtures("by_tiles")
def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "LARGE", 1)
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: OnSmallDisk(0))
    net = UNet2DConditionModel(SD1).eval().bfloat16()
    accelerate(net, torch.bfloat16, low_memory=True)
    with pytest.raises(SafelightError, match="No space left on device; name another folder in TMP"):
        net(
            torch.randn(1, 4, 16, 16).bfloat16(),
            torch.tensor([1.0]),
            text(SD1, 1).bfloat16(),
        )


@pytest.mark.usefixtures("by_tiles")
def test_the_kernels_are_used() -> None:
    net = UNet2DConditionModel(SD1).eval().bfloat16()
    accelerate(net, torch.bfloat16)
    low = torch.randn(1, 4, 16, 16).bfloat16()
    net(low, torch.tensor([1.0]), text(SD1, 1).bfloat16())
    kinds = {type(module._product) for module in net.modules() if hasattr(module, "_product")}
    assert {tiles.Convolution, tiles.Doubling} <= kinds
    net = UNet2DConditionModel(SD1).eval()
    accelerate(net, torch.float32)
    net(low.float(), torch.tensor([1.0]), text(SD1, 1))
    kinds = {type(module._product) for module in net.modules() if hasattr(module, "_product")}
    assert split.Matrix in kinds


@pytest.mark.usefixtures("by_tiles")
@pytest.mark.parametrize("rows", [1, 31, 64, 300, 1100])
@pytest.mark.parametrize(("inner", "columns"), [(32, 32), (96, 160), (1312, 64)])
def test_linear_of_split_numbers(rows: int, inner: int, columns: int) -> None:
    weight, bias = torch.randn(columns, inner), torch.randn(columns)
    x, plus = torch.randn(1, rows, inner + 5)[..., 5:], torch.randn(1, rows, columns)
    for b, p in ((bias, plus), (bias, None), (None, plus), (None, None)):
        true = F.linear(x.double(), weight.double(), None if b is None else b.double())
        true = true if p is None else true + p
        # Of a number 2⁻¹⁸ is left out, and so of a product of two twice that.
        assert distance(split.Matrix(weight, b)(x, p), true) < 2**-17


@pytest.mark.usefixtures("by_tiles")
def test_what_does_not_fit_is_refused() -> None:
    """It is refused before a kernel reads beyond its end."""
    matrix = split.Matrix(torch.randn(64, 32), None)
    for x in (torch.randn(1, 3, 64), torch.randn(1, 3, 32).double(), torch.randn(1, 3, 16)):
        with pytest.raises(ValueError, match="by a matrix of 32 rows"):
            matrix(x)
    with pytest.raises(RuntimeError):
        matrix(torch.randn(1, 3, 32), torch.randn(1, 2, 64))
    q = torch.randn(2, 3, 5, 40)
    for k, v in ((q[:1], q[:1]), (q, q[:, :2]), (q, q[:, :, :4]), (q[..., :8], q), (q, q.double())):
        with pytest.raises(ValueError, match="attention of"):
            split.attend(q, k, v)
    turned = torch.randn(2, 3, 40, 5).mT
    true = F.scaled_dot_product_attention(turned, q, q).transpose(1, 2).flatten(2)
    assert distance(split.attend(turned, q, q), true) < 3e-5


@pytest.mark.usefixtures("by_tiles")
def test_memory_of_threads_that_ended_is_given_back() -> None:
    q = torch.randn(1, 2, 1024, 512)

    def own() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def once() -> None:
        thread = threading.Thread(target=split.attend, args=(q[:, :, :32], q, q))
        thread.start()
        thread.join()

    for _ in range(12):  # until the allocator has its arenas
        once()
    before = own()
    for _ in range(12):
        once()
    # Each takes ten megabytes. In a process of thousands of tests, some memory is allocated again.
    assert own() - before < 60 << 20


@pytest.mark.usefixtures("by_tiles")
def test_numbers_far_apart_are_split() -> None:
    """bfloat16 has float32's exponents: very large and very small numbers are good."""
    x = torch.randn(64, 64) * 10.0 ** torch.linspace(-30, 30, 64)[:, None]
    weight = torch.randn(32, 64)
    true = x.double() @ weight.double().T
    found = split.Matrix(weight, None)(x)
    assert ((found - true).norm(dim=1) / true.norm(dim=1)).max() < 1e-5


@pytest.mark.usefixtures("by_tiles")
def test_what_has_no_tokens_is_not_split() -> None:
    """A timestep's embedding has one row for each picture."""
    net = fast(UNet2DConditionModel(SD1).eval())
    net(torch.randn(1, 4, 16, 16), torch.tensor([1.0]), text(SD1, 1))
    assert isinstance(net.time_embedding.linear_1._product, onednn.Matrix)


# --- Winograd's products -------------------------------------------------------------------------


@pytest.fixture(params=[2, 4])
def side(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the side of a tile's results."""
    monkeypatch.setattr(winograd, "FEW", 0)
    monkeypatch.setattr(winograd, "SMALL", 1 << 40 if request.param == 2 else 0)
    return int(request.param)


def convolved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    assert conv.bias is not None
    return F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)


@pytest.mark.usefixtures("by_winograd")
@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 16, 12), (3, 7, 9), (1, 1, 1), (2, 5, 30)])
@pytest.mark.parametrize("scale", [1, 2])
def test_winograd(shape: tuple[int, int, int], scale: int, side: int) -> None:
    batch, height, width = shape
    # Channels of a whole part and some more, to those of a whole panel of weights and half a one.
    conv = nn.Conv2d(80, 48, 3, padding=1)
    x = torch.randn(batch, 80, height, width)
    large = F.interpolate(x, scale_factor=scale, mode="nearest")
    kernel = winograd.Convolution(conv.weight, conv, scale)
    assert kernel.side == side
    assert distance(kernel(x), convolved(conv, large)) < 5e-6


@pytest.mark.usefixtures("by_winograd")
@pytest.mark.parametrize("tiles", [1, 5, 11, 23, 31, 33, 34, 35, 36, 37, 71, 72])
def test_winograd_of_any_number_of_tiles(tiles: int, side: int) -> None:
    """Tiles are taken several at once; a part's last ones with those that come after it."""
    conv = nn.Conv2d(80, 48, 3, padding=1)
    x = torch.randn(1, 80, side, side * tiles)
    kernel, used = winograd.Convolution(conv.weight, conv), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert distance(kernel(x), convolved(conv, x)) < 5e-6
    finally:
        torch.set_num_threads(used)


@pytest.fixture(params=["portable", "avx512", "amx"])
def by_winograd_in_bfloat16(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    _use(request.param, monkeypatch)


@pytest.mark.usefixtures("by_winograd_in_bfloat16")
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 9), (1, 1, 1), (2, 5, 30)])
def test_winograd_in_bfloat16_rounds_its_results_alone(shape: tuple[int, int, int]) -> None:
    batch, height, width = shape
    conv = nn.Conv2d(80, 80, 3, padding=1).bfloat16()
    x = torch.randn(batch, 80, height, width).bfloat16()
    plus, shift = (
        torch.randn(batch, 80, height, width).bfloat16(),
        torch.randn(batch, 80).bfloat16(),
    )
    assert winograd.fits_conv(conv, torch.bfloat16) == (kernels.tiles() is None)
    kernel, true = winograd.Convolution(conv.weight, conv), convolved(conv, x)
    rounded = distance(true.bfloat16(), true)
    assert distance(kernel(x), true) < rounded + 1e-5
    true = (true + shift[:, :, None, None].double() + plus.double()).relu()
    assert distance(kernel(x, plus, shift, relu=True), true) < 2.5e-3


@pytest.mark.usefixtures("by_winograd")
def test_winograd_refuses_what_its_weights_do_not_fit() -> None:
    conv = nn.Conv2d(32, 32, 3, padding=1)
    kernel, x = winograd.Convolution(conv.weight, conv), torch.randn(1, 32, 8, 8)
    for wrong in (x.bfloat16(), x.double(), torch.randn(1, 48, 8, 8)):
        with pytest.raises(ValueError, match=r"by 32 channels of torch\.float32"):
            kernel(wrong)


@pytest.mark.usefixtures("by_winograd")
def test_winograd_gives_the_same_bytes_in_company_and_by_any_threads(side: int) -> None:
    """Tiles are divided among threads in parts; if there are few tiles, channels are too."""
    conv = nn.Conv2d(32, 80, 3, padding=1)
    kernel, x = winograd.Convolution(conv.weight, conv), torch.randn(3, 32, 21, 18)
    used, alone = torch.get_num_threads(), kernel(x[1:2])
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            assert kernel(x)[1:2].equal(alone)
            assert kernel(x[1:2]).equal(alone)
            rows = kernel(x[1:2, :, 3:14], tall=True)
            assert distance(rows, alone[:, :, 4:13]) < 1e-6
    finally:
        torch.set_num_threads(used)


@pytest.mark.usefixtures("by_winograd")
def test_winograd_adds_what_follows(side: int) -> None:
    conv = nn.Conv2d(32, 64, 3, padding=1)
    x, plus = torch.randn(2, 32, 9, 6), torch.randn(2, 64, 9, 6)
    kernel = winograd.Convolution(conv.weight, conv)
    for rows in (1, 2):
        shift = torch.randn(rows, 64)
        true = conv(x) + shift[:, :, None, None] + plus
        assert distance(kernel(x, plus, shift), true) < 1e-5
    own = plus.contiguous(memory_format=torch.channels_last)
    kept = own.clone()
    assert distance(kernel(x, own), conv(x) + kept) < 1e-5
    assert torch.equal(own, kept)
    consumed = kernel(x, own, consume=True)
    assert consumed.data_ptr() == own.data_ptr()
    assert distance(consumed, conv(x) + kept) < 1e-5
    conv.bias = None
    assert distance(winograd.Convolution(conv.weight, conv)(x), conv(x)) < 1e-5


@pytest.mark.usefixtures("by_winograd")
@pytest.mark.parametrize("relu", [False, True])
def test_winograd_lets_nan_through(side: int, relu: bool) -> None:
    conv = nn.Conv2d(16, 16, 3, padding=1)
    x = torch.randn(1, 16, 8, 8)
    x[0, 3, 4, 5] = torch.nan
    found = winograd.Convolution(conv.weight, conv)(x, relu=relu)
    assert found[:, :, 3:6, 4:7].isnan().all()


@pytest.mark.usefixtures("by_winograd")
def test_winograd_takes_the_large_convolutions_of_float32() -> None:
    net = AutoencoderKL(VAEConfig(block_out_channels=(256, 256), latent_channels=4)).eval()
    z = torch.randn(1, 4, 8, 12)
    true, swapped = net.decode(z), fast(net)
    assert distance(swapped.decode(z), true) < plain_bound()
    found: Any = list(swapped.decoder.modules())
    packed = [type(m._product) for m in found if hasattr(m, "_product")]
    assert packed.count(winograd.Convolution) > 10


@pytest.mark.usefixtures("by_winograd")
def test_low_memory_convolves_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are put into the kernel's order at each use."""
    monkeypatch.setattr(layers, "LARGE", 1)
    net = AutoencoderKL(VAEConfig(block_out_channels=(256, 256), latent_channels=4)).eval()
    z = torch.randn(1, 4, 8, 12)
    wanted, low = fast(net).decode(z), copy.deepcopy(net)
    accelerate(low, torch.float32, low_memory=True)
    for _ in range(2):
        assert low.decode(z).equal(wanted)
    found: Any = list(low.modules())
    assert not any(isinstance(getattr(m, "_product", 0), winograd.Convolution) for m in found)


def test_an_unknown_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFELIGHT_KERNELS", "fast")
    with pytest.raises(SafelightError, match="'fast'; it may be auto, avx512, avx2, portable, off"):
        kernels.tiles()


def test_a_precision_that_saves_no_time_is_remarked(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert not remark(cpu, torch.float32)
    assert "float32" in remark(cpu, torch.float16)
    monkeypatch.setattr(onednn, "takes", lambda dtype: dtype == torch.float32)
    assert "multiplied in float32" in remark(cpu, torch.bfloat16)
    assert not remark(torch.device("cuda"), torch.bfloat16)


def test_what_onednn_does_not_take_is_computed_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any processor does here as one without bfloat16: only float32 gives these bytes."""
    monkeypatch.setattr(onednn, "takes", lambda dtype: dtype == torch.float32)
    monkeypatch.setenv("SAFELIGHT_KERNELS", "off")
    net = UNet2DConditionModel(SD1).eval()
    x, t, context = torch.randn(1, 4, 9, 16), torch.tensor([500.0]), text(SD1, 2)
    true = net(x, t, context)
    half = copy.deepcopy(net).bfloat16()
    plain = distance(half(x.bfloat16(), t, context.bfloat16()), true)
    found = fast(half)(x.bfloat16(), t, context.bfloat16())
    assert found.dtype == torch.bfloat16
    assert distance(found, true) < plain


def test_memory_is_counted() -> None:
    assert memory.total() > 1 << 28


@pytest.mark.skipif(memory._libc() is None, reason="this C library has no such settings")
@pytest.mark.parametrize("mapped", [False, True])
def test_large_blocks_come_from_what_was_freed_or_from_the_kernel(mapped: bool) -> None:
    program = (
        "import torch\n"
        "from safelight.fast import memory\n"
        "memory.keep_freed()\n"
        f"memory.map_large({mapped})\n"
        "block = torch.ones(48 << 18)\n"
        "heap = next(line for line in open('/proc/self/maps') if '[heap]' in line)\n"
        "first, last = (int(x, 16) for x in heap.split()[0].split('-'))\n"
        "print(first <= block.data_ptr() < last)\n"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert told.stdout.strip() == str(not mapped).encode()
