"""Files of weights in few bits draw what files of the decoded numbers draw, to the byte."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safelight.families import flux, sd3
from safelight.families.flow_files import Published
from safelight.fast import int8, layers, memory
from safelight.fast.quantised import GGML, Quantised
from safelight.fast.store import in_file
from safelight.model import Model
from safelight.weights import load, load_model
from safelight.weights.convert import convert
from safelight.weights.estimate import estimate
from tests.parity.flow_models import ASKED, SCHNELL, SD3_SCHEDULER, configs, make_flux, make_sd3
from tests.weights_tiny import refused, text_folder

WHOLE = "model.diffusion_model."
TEXTS = "text_encoders."
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_flux(tmp_path_factory.mktemp("quantised") / "flux", guided=False)


@pytest.fixture(autouse=True)
def tiny(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [schnell] = [one for one in flux.VARIANTS if not one.guided]
    published = Published(configs(folder), SCHNELL)
    small = replace(schnell, layers=2, singles=2, published=published)
    monkeypatch.setattr(flux, "VARIANTS", (small,))


@pytest.fixture(scope="module")
def state(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> State:
    """A whole model as one file has it."""
    with pytest.MonkeyPatch.context() as patch:
        tiny.__wrapped__(folder, patch)  # type: ignore[attr-defined]
        path = tmp_path_factory.mktemp("file") / "flux.safetensors"
        convert(str(folder), path)
    return load_file(path)


def is_matrix(key: str, tensor: Tensor) -> bool:
    return tensor.dim() == 2 and key.startswith((WHOLE, TEXTS)) and "embed" not in key


def draw(
    path: Path, folder: Path | None, dtype: str = "float32", **given: Any
) -> tuple[Model, bytes]:
    model = load_model(str(path), device="cpu", dtype=dtype, parts=folder, **given)
    return model, model.generate("a red apple", **ASKED).images[0].tobytes()


def as_codes(model: Model) -> set[str]:
    """Return the names of the weights that are kept as codes."""
    return {
        f"{part}.{name}"
        for part in model.configs
        for name, module in model.parts[part].named_modules()
        if isinstance(vars(module).get("weight"), Quantised)
    }


# --- how a file has them -------------------------------------------------------------------------


def per_tensor(key: str, tensor: Tensor) -> tuple[State, Tensor]:
    """As ComfyUI wrote scaled float8 first."""
    scale = tensor.abs().max() / 448
    codes = (tensor / scale).to(torch.float8_e4m3fn)
    module = key.removesuffix(".weight")
    return {key: codes, f"{module}.scale_weight": scale[None]}, codes.float() * scale


def per_row(key: str, tensor: Tensor) -> tuple[State, Tensor]:
    """As ComfyUI writes scaled float8 now, with what products in float8 need."""
    scale = tensor.abs().amax(1, keepdim=True) / 448
    codes, module = (tensor / scale).to(torch.float8_e4m3fn), key.removesuffix(".weight")
    said = torch.frombuffer(bytearray(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    beside = {f"{module}.input_scale": torch.ones(()), f"{module}.comfy_quant": said}
    return {key: codes, f"{module}.weight_scale": scale, **beside}, codes.float() * scale


def plain(key: str, tensor: Tensor) -> tuple[State, Tensor]:
    codes = tensor.to(torch.float8_e4m3fn)
    return {key: codes}, codes.float()


WAYS = {"scaled": per_tensor, "rows": per_row, "plain": plain, "whole": plain}


def float8_file(
    state: State,
    path: Path,
    way: Callable[[str, Tensor], tuple[State, Tensor]],
    whole: bool = False,
) -> Path:
    """Write a file of float8, and beside it one of the numbers that it stands for.

    whole: norms, biases and the autoencoder are in float8, too.
    """
    codes, numbers = dict(state), dict(state)
    for key, tensor in state.items():
        if whole or is_matrix(key, tensor):
            found, numbers[key] = way(key, tensor)
            codes |= found
    if way is per_tensor:
        for network in (WHOLE, f"{TEXTS}t5xxl.transformer."):
            codes[f"{network}scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(codes, path)
    save_file(numbers, path.with_suffix(".decoded.safetensors"))
    return path


def gguf_file(state: State, path: Path, few: str = "") -> Path:
    """Write a transformer as people quantise it, and beside it a file of its numbers.

    few: a vector that is quantised too.
    """
    writer = gguf.GGUFWriter(path, "flux")
    numbers = {key: tensor for key, tensor in state.items() if key.startswith(WHOLE)}
    for i, (key, tensor) in enumerate(numbers.items()):
        kind, array = gguf.GGMLQuantizationType.F32, tensor.numpy()
        if key == few or is_matrix(key, tensor):
            names = ("Q8_0", "Q5_1", "Q4_0", "BF16") if i % 3 else ("Q5_0", "Q4_1", "Q8_0", "F16")
            name = "BF16" if tensor.shape[-1] % 32 else names[i % 4]
            name = "Q8_0" if key == few else name
            kind = gguf.GGMLQuantizationType[name]
            array = gguf.quants.quantize(array, kind)
            numbers[key] = torch.from_numpy(np.array(gguf.quants.dequantize(array, kind)))
        raw = None if kind.name in ("F32", "F16") else kind
        writer.add_tensor(key.removeprefix(WHOLE), array, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(numbers, path.with_suffix(".decoded.safetensors"))
    return path


@pytest.fixture(scope="module", params=[*WAYS, "gguf"])
def file(
    request: pytest.FixtureRequest, state: State, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "gguf":
        return gguf_file(state, folder / "flux.gguf")
    whole = request.param == "whole"
    return float8_file(state, folder / "flux.safetensors", WAYS[request.param], whole)


# --- what it does --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pictures(file: Path, folder: Path, dtype: str) -> None:
    _, wanted = draw(file.with_suffix(".decoded.safetensors"), folder, dtype)
    packed, picture = draw(file, folder, dtype)
    assert picture == wanted
    kept, picture = draw(file, folder, dtype, low_memory=True)
    assert picture == wanted
    more = as_codes(kept) - as_codes(packed)
    assert {name.partition(".")[0] for name in more} == {"transformer"}
    assert len(more) > 20


def test_text_encoders_stay_as_codes(state: State, folder: Path, tmp_path: Path) -> None:
    model, _ = draw(float8_file(state, tmp_path / "a.safetensors", per_tensor), folder)
    assert {name.partition(".")[0] for name in as_codes(model)} == {
        "text_encoder",
        "text_encoder_2",
    }


def test_codes_stay_where_memory_is_short(
    state: State, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = float8_file(state, tmp_path / "a.safetensors", per_row)
    model, wanted = draw(file, folder)
    assert not any(name.startswith("transformer") for name in as_codes(model))
    monkeypatch.setattr(memory, "free", lambda: 1 << 20)
    model, picture = draw(file, folder)
    assert any(name.startswith("transformer") for name in as_codes(model))
    assert picture == wanted


def test_the_estimate_counts_codes(
    state: State, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = float8_file(state, tmp_path / "a.safetensors", plain)
    given = {"device": "cpu", "dtype": "float32", "parts": folder}
    whole, kept = (estimate(file, low_memory=low, **given) for low in (False, True))
    matrices = [t for k, t in state.items() if k.startswith(WHOLE) and is_matrix(k, t)]
    # None in place of four bytes, and room to decode the largest matrix, of a modulation.
    saved = sum(4 * tensor.numel() for tensor in matrices)
    assert whole.weights - kept.weights == saved - 4 * (6 * 64 * 64)
    monkeypatch.setattr(memory, "free", lambda: 1 << 20)
    short = estimate(file, **given)
    assert short.weights - kept.weights == saved // 4  # they are better kept in memory


def test_a_lora_changes_codes_as_it_changes_numbers(
    state: State, folder: Path, tmp_path: Path
) -> None:
    file = float8_file(state, tmp_path / "a.safetensors", per_tensor)
    torch.manual_seed(0)
    low = torch.randn(2, 64) * 0.5, torch.randn(64, 2) * 0.5
    lora = {
        f"transformer.single_transformer_blocks.{i}.attn.to_q.lora_{letter}.weight": tensor.clone()
        for i in range(2)
        for letter, tensor in zip("AB", low, strict=True)
    }
    save_file(lora, tmp_path / "lora.safetensors")
    asked = {**ASKED, "loras": [str(tmp_path / "lora.safetensors")]}
    pictures = []
    for path in (file, file.with_suffix(".decoded.safetensors")):
        model = load_model(str(path), device="cpu", dtype="float32", parts=folder, low_memory=True)
        before = model.generate("a red apple", **ASKED).images[0].tobytes()
        pictures.append(model.generate("a red apple", **asked).images[0].tobytes())
        assert pictures[-1] != before
        assert model.generate("a red apple", **ASKED).images[0].tobytes() == before
    assert pictures[0] == pictures[1]


def test_it_becomes_a_folder_for_diffusers(file: Path, folder: Path, tmp_path: Path) -> None:
    convert(str(file), tmp_path / "out", parts=folder)
    network = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
    convert(str(file.with_suffix(".decoded.safetensors")), tmp_path / "numbers", parts=folder)
    numbers = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "numbers" / "transformer")
    for key, wanted in numbers.state_dict().items():
        found = network.state_dict()[key].float()
        assert torch.allclose(found, wanted, rtol=2**-10, atol=1e-6), key


def test_diffusers_draws_the_same_from_gguf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It decodes five of the types in float16, so that weights differ by their last bits."""
    folder = make_sd3(tmp_path / "sd3", qk_norm="rms_norm")
    published = Published(configs(folder), SD3_SCHEDULER, 64)
    small = replace(sd3.VARIANTS[-1], layers=3, published=published)
    monkeypatch.setattr(sd3, "VARIANTS", (small,))
    convert(str(folder), tmp_path / "whole.safetensors")
    file = gguf_file(load_file(tmp_path / "whole.safetensors"), tmp_path / "sd3.gguf")
    network = diffusers.SD3Transformer2DModel.from_single_file(
        str(file),
        config=str(folder),
        subfolder="transformer",
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, transformer=network)
    wanted = pipe(
        "a red apple",
        num_inference_steps=2,
        guidance_scale=7.0,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images[0]
    model = load_model(file, device="cpu", dtype="float32", parts=folder, low_memory=True)
    picture = model.generate("a red apple", **ASKED, guidance_scale=7.0).images[0]
    assert np.abs((wanted * 255).round() - np.asarray(picture, dtype=float)).max() <= 2


def test_axes_of_one_may_be_lost_or_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ggml's writer drops leading ones, and stable-diffusion.cpp's adds some at the end."""
    folder = make_sd3(tmp_path / "sd3")
    published = Published(configs(folder), SD3_SCHEDULER, 64)
    monkeypatch.setattr(sd3, "VARIANTS", (replace(sd3.VARIANTS[0], layers=3, published=published),))
    convert(str(folder), tmp_path / "whole.safetensors")
    state = load_file(tmp_path / "whole.safetensors")
    places, last = f"{WHOLE}pos_embed", f"{WHOLE}final_layer.linear.weight"
    other = {**state, places: state[places][0], last: state[last][..., None, None]}
    file = gguf_file(other, tmp_path / "sd3.gguf")
    numbers = load_file(file.with_suffix(".decoded.safetensors"))
    numbers |= {places: numbers[places][None], last: numbers[last][..., 0, 0]}
    save_file({k: v.contiguous() for k, v in numbers.items()}, tmp_path / "numbers.safetensors")
    _, wanted = draw(tmp_path / "numbers.safetensors", folder)
    for low_memory in (False, True):
        assert draw(file, folder, low_memory=low_memory)[1] == wanted


def test_a_stacked_bias_in_few_bits(state: State, folder: Path, tmp_path: Path) -> None:
    """Its numbers are one row of codes, of which no rows can be taken."""
    key = f"{WHOLE}double_blocks.0.img_attn.qkv.bias"
    file = gguf_file(state, tmp_path / "flux.gguf", few=key)
    numbers = load_file(file.with_suffix(".decoded.safetensors"))
    assert not torch.equal(numbers[key], state[key])
    _, wanted = draw(file.with_suffix(".decoded.safetensors"), folder)
    for low_memory in (False, True):
        assert draw(file, folder, low_memory=low_memory)[1] == wanted


def test_large_decoded_weights_go_to_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of a UNet that another layer packs are decoded; with low_memory they are mapped."""
    model = text_folder(tmp_path / "model")
    [weights] = (model / "unet").glob("*.safetensors")
    tensors = load_file(weights)
    save_file({key: t.to(torch.float8_e4m3fn) for key, t in tensors.items()}, weights)
    monkeypatch.setattr(layers, "LARGE", 1000)
    filed: list[int] = []

    def noted(tensor: Tensor, what: str) -> Tensor:
        filed.append(tensor.numel())
        return in_file(tensor, what)

    monkeypatch.setattr(load, "in_file", noted)
    pictures = [
        load_model(model, device="cpu", dtype="float32", low_memory=low)
        .generate("a", steps=2, sampler="euler", seed=1, width=64, height=64)
        .images[0]
        .tobytes()
        for low in (False, True)
    ]
    assert pictures[0] == pictures[1]
    assert len(filed) > 10
    assert min(filed) >= 1000


def test_codes_lie_in_the_mapped_file(state: State, folder: Path, tmp_path: Path) -> None:
    """Rows of a stacked matrix are not copied out of it."""
    file = gguf_file(state, tmp_path / "flux.gguf")
    model, _ = draw(file, folder, low_memory=True)
    network = model.parts["transformer"]
    codes = [vars(m)["weight"].codes for m in network.modules() if "weight" in vars(m)]
    spans = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(file) in line:
            start, end = line.split()[0].split("-")
            spans.append((int(start, 16), int(end, 16)))
    mapped = [any(a <= one.data_ptr() < b for a, b in spans) for one in codes]
    assert len(codes) > 20
    assert sum(not one for one in mapped) <= 1  # the last norm's halves are exchanged


def test_int8_is_the_same_whether_codes_stay(folder: Path, state: State, tmp_path: Path) -> None:
    file = float8_file(state, tmp_path / "a.safetensors", plain)
    pictures = []
    for low_memory in (False, True):
        model = load_model(
            str(file), device="cpu", dtype="bfloat16", parts=folder, low_memory=low_memory
        )
        if not int8.available(model.device, model.dtype):
            refused(lambda: model.generate("a red apple", **ASKED, linears="int8"), "int8")  # noqa: B023
            return
        pictures.append(model.generate("a red apple", **ASKED, linears="int8").images[0].tobytes())
        assert pictures[-1] != model.generate("a red apple", **ASKED).images[0].tobytes()
    assert pictures[0] == pictures[1]


def test_a_server_counts_what_was_loaded(state: State, folder: Path, tmp_path: Path) -> None:
    file = float8_file(state, tmp_path / "a.safetensors", plain)
    held = {
        low: load_model(
            str(file), device="cpu", dtype="float32", parts=folder, low_memory=low
        ).weights_held
        for low in (False, True)
    }
    found = estimate(file, device="cpu", dtype="float32", parts=folder)
    assert held[False] == found.weights
    assert held[True] < held[False]


def test_a_model_can_be_copied(state: State, folder: Path, tmp_path: Path) -> None:
    file = gguf_file(state, tmp_path / "flux.gguf")
    given = {"device": "cpu", "dtype": "float32", "parts": folder, "low_memory": True}
    copied = copy.deepcopy(load_model(str(file), **given))
    _, wanted = draw(file, folder)
    assert copied.generate("a red apple", **ASKED).images[0].tobytes() == wanted


def test_parts_of_several_types_become_one(state: State, folder: Path, tmp_path: Path) -> None:
    """q is stored as float8, k and v are not; one file has the three as one matrix."""
    convert(str(folder), tmp_path / "model")
    weights = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    name = "transformer_blocks.0.attn.to_q.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, weights)
    convert(str(tmp_path / "model"), tmp_path / "one.safetensors")
    _, found = draw(tmp_path / "one.safetensors", folder)
    tensors[name] = tensors[name].float()
    save_file(tensors, weights)
    assert found == draw(tmp_path / "model", None)[1]


# --- hostile files -------------------------------------------------------------------------------


KEY = f"{WHOLE}img_in"
FLOAT8 = torch.full((64, 64), 0.5).to(torch.float8_e4m3fn)
BAD = {
    "shape": ({f"{KEY}.scale_weight": torch.ones(3)}, "img_in.scale_weight", "(3,)"),
    "integers": (
        {f"{KEY}.weight": FLOAT8, f"{KEY}.scale_weight": torch.ones(1, dtype=torch.int32)},
        "I32 for F8_E4M3",
    ),
    "two": (
        {
            f"{KEY}.weight": FLOAT8,
            f"{KEY}.scale_weight": torch.ones(1),
            f"{KEY}.weight_scale": torch.ones(1),
        },
        "two",
    ),
    "not finite": (
        {f"{KEY}.weight": FLOAT8, f"{KEY}.scale_weight": torch.tensor(torch.inf)},
        "NaN or Inf",
    ),
    "of nothing": ({f"{KEY}s.scale_weight": torch.ones(1)}, "img_ins"),
    "of float32": ({f"{KEY}.scale_weight": torch.ones(1)}, "F32 for F32"),
    "another kind": ({f"{KEY}.weight_scale_2": torch.ones(1)}, "weight_scale_2"),
}


@pytest.mark.parametrize("case", BAD)
def test_hostile_scales(case: str, state: State, folder: Path, tmp_path: Path) -> None:
    change, *words = BAD[case]
    save_file({**state, **change}, tmp_path / "bad.safetensors")
    given = {"device": "cpu", "dtype": "float32", "parts": folder}
    refused(lambda: load_model(str(tmp_path / "bad.safetensors"), **given), *words)


@pytest.mark.parametrize("low_memory", [False, True])
def test_codes_that_are_not_finite(
    low_memory: bool, state: State, folder: Path, tmp_path: Path
) -> None:
    codes = state[f"{KEY}.weight"].to(torch.float8_e4m3fn)
    codes.view(torch.uint8)[3, 5] = 0x7F
    save_file({**state, f"{KEY}.weight": codes}, tmp_path / "bad.safetensors")
    refused(
        lambda: load_model(
            str(tmp_path / "bad.safetensors"), device="cpu", parts=folder, low_memory=low_memory
        ),
        "img_in.weight",
        "NaN or Inf",
    )


def test_every_type_has_a_size_that_is_gguf_s() -> None:
    for name, blocks in GGML.items():
        kind = gguf.GGMLQuantizationType[name]
        assert gguf.GGML_QUANT_SIZES[kind] == (blocks.numbers, blocks.size)
