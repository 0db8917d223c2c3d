"""Checkpoints that would cost time or memory, or draw something else than was hashed."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safelight import cli
from safelight.nets.clip import CLIPTextConfig
from safelight.nets.config import BOUNDS, MAX_LAYERS
from safelight.nets.unet import UNet2DConditionModel, UNetConfig
from safelight.nets.unet2d import UNet2DConfig
from safelight.nets.vae import VAEConfig
from safelight.recipe import read_recipe
from safelight.weights import digest, frames, load, load_model
from safelight.weights.headers import header_of
from weights_tiny import (
    NETS,
    UNET,
    change,
    pixel_folder,
    raw_file,
    refused,
    refused_cheaply,
    text_folder,
    write,
)

SMALL = {"seed": 1, "steps": 1, "sampler": "euler", "width": 64, "height": 64}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return text_folder(root / "text"), pixel_folder(root / "pixels")


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "tiny")


@pytest.fixture
def pixels(made, tmp_path):
    return shutil.copytree(made[1], tmp_path / "pixels")


def weight_file(folder, part):
    stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    return folder / part / f"{stem}.safetensors"


# --- kinds of number -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_weights_of_eight_bits_are_converted(folder, dtype, part, asked):
    file = weight_file(folder, part)
    small = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file(small, file)
    model = load_model(folder, device="cpu", dtype=asked)
    wanted = getattr(torch, asked)
    for name, tensor in getattr(model, part).state_dict().items():
        assert torch.equal(tensor.to(wanted), small[name].to(wanted))
    assert model.generate("a", **SMALL).images


@pytest.mark.parametrize("plain", [False, True])
def test_a_nan_of_eight_bits_is_found(folder, plain):
    file = weight_file(folder, "unet")
    tensors = load_file(file)
    tensors["conv_in.bias"][0] = torch.nan
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}, file)
    refused(lambda: load_model(folder, device="cpu", plain=plain), "conv_in.bias", "NaN")


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]
)
def test_weights_that_are_no_fractions_are_refused(folder, dtype):
    file = weight_file(folder, "unet")
    tensors = load_file(file)
    save_file({**tensors, "conv_in.bias": tensors["conv_in.bias"].to(dtype)}, file)
    refused(lambda: load_model(folder, device="cpu"), "conv_in.bias: stored as")


@pytest.mark.parametrize("dtype", ["C64", "F8_E8M0", "F4", "F6_E2M3", "I4"])
def test_kinds_of_number_that_no_network_has_are_refused(folder, dtype):
    header = {"conv_in.bias": {"dtype": dtype, "shape": [2], "data_offsets": [0, 16]}}
    raw_file(weight_file(folder, "unet"), header, b"\0" * 16)
    refused(lambda: load_model(folder, device="cpu"), "unknown dtype")


# --- what is looked at before it costs -----------------------------------------------------------


def sparse(path, shape, name="conv_in.weight", keep=True, size=None):
    """Add a tensor of this shape to a file, as a hole that takes no room on the disk."""
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
        data = f.read()
    header.pop("__metadata__", None)
    if not keep:
        header, data = {}, b""
    numbers = 4
    for side in shape:
        numbers *= side
    header.pop(name, None) if not keep else None
    header[name] = {
        "dtype": "F32",
        "shape": list(shape),
        "data_offsets": [len(data), len(data) + numbers],
    }
    raw_file(path, header, data)
    with path.open("r+b") as f:
        f.truncate(path.stat().st_size + numbers)


@pytest.fixture
def no_hashing(monkeypatch):
    def hashed(*_):
        raise AssertionError("hashed before it was checked")

    monkeypatch.setattr(load, "digest_files", hashed)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_sparse_file_of_64_gb_is_refused_by_its_header(folder, part, no_hashing):
    sparse(weight_file(folder, part), (2**34,), name="conv_in.weight", keep=False)
    refused_cheaply(lambda: load_model(folder, device="cpu"))


def test_a_left_over_tensor_of_64_gb_is_refused_by_its_header(folder, no_hashing):
    sparse(weight_file(folder, "vae"), (2**34,), name="left.over")
    refused_cheaply(lambda: load_model(folder, device="cpu"), "left.over")


def test_an_ignored_tensor_of_64_gb_is_refused_by_its_header(folder, no_hashing):
    sparse(weight_file(folder, "text_encoder"), (2**34,), name="embeddings.position_ids")
    refused_cheaply(lambda: load_model(folder, device="cpu"), "mostly not weights", "position_ids")


def test_weights_that_fit_their_config_and_no_machine_are_refused(folder, monkeypatch, no_hashing):
    monkeypatch.setattr(load.memory, "total", lambda: 1000)
    refused_cheaply(lambda: load_model(folder, device="cpu"), "this machine has")


def empty_tensors(count):
    return {
        f"layers.{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(count)
    }


@pytest.mark.parametrize("count", [2000, 8000])
@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("text_encoder", "num_hidden_layers"),
        ("unet", "layers_per_block"),
        ("unet", "transformer_layers_per_block"),
        ("vae", "layers_per_block"),
    ],
)
def test_layers_in_thousands_are_refused_before_they_are_built(
    folder, part, key, count, monkeypatch, no_hashing
):
    def built(*_):
        raise AssertionError("built before it was checked")

    network = NETS[part][1]
    change(folder / part / "config.json", key, count)
    raw_file(weight_file(folder, part), empty_tensors(count))
    monkeypatch.setattr(network, "__init__", built)
    refused_cheaply(lambda: load_model(folder, device="cpu"))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_an_empty_weight_is_refused(folder, part, no_hashing):
    file = weight_file(folder, part)
    tensors = load_file(file)
    first = sorted(tensors)[0]
    save_file({**tensors, first: torch.zeros(0, 4)}, file)
    refused_cheaply(lambda: load_model(folder, device="cpu"), first, "is empty")


def test_the_deepest_network_that_is_allowed_has_few_modules():
    """Building one module takes some tenths of a millisecond."""
    config = {
        **UNET,
        "block_out_channels": [32] * 4,
        "down_block_types": ["CrossAttnDownBlock2D"] * 4,
        "up_block_types": ["CrossAttnUpBlock2D"] * 4,
        "layers_per_block": 2,
        "transformer_layers_per_block": MAX_LAYERS // 20,
    }
    config = UNetConfig.from_dict(config)
    assert MAX_LAYERS - 20 < config.depth <= MAX_LAYERS
    with torch.device("meta"), frames._Unfilled():
        network = UNet2DConditionModel(config)
    assert sum(1 for _ in network.modules()) < 5000


# --- configs -------------------------------------------------------------------------------------

CONFIGS = (UNetConfig, UNet2DConfig, VAEConfig, CLIPTextConfig)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_number_of_a_config_has_bounds_that_its_default_keeps(config):
    config.from_dict({})
    for field in dataclasses.fields(config):
        if "int" in str(field.type) or "float" in str(field.type):
            assert field.name in BOUNDS


HUGE = ["1" + "0" * 400, "-1" + "0" * 400, "1e999", "-1e999", "NaN", "-Infinity", "1e308", "-1"]
NUMBERS = [
    (part, field.name)
    for part, config in (("unet", UNetConfig), ("vae", VAEConfig), ("text_encoder", CLIPTextConfig))
    for field in dataclasses.fields(config)
    if field.name in BOUNDS
]


@pytest.mark.parametrize(("part", "key"), NUMBERS)
def test_a_number_beyond_its_bounds_is_one_line(folder, part, key, no_hashing):
    path = folder / part / "config.json"
    content = json.loads(path.read_text())
    for number in HUGE[:-1] if key == "shift_factor" else HUGE:  # that may be −1
        for value in (number, f"[{number}, {number}]"):
            write(path, json.dumps({**content, key: "HERE"}).replace('"HERE"', value))
            refused(lambda: load_model(folder, device="cpu"))


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("unet", "downsample_padding", 4000),
        ("unet", "downsample_padding", 2),
        ("unet", "sample_size", 8192),
        ("unet", "sample_size", 2048),  # with an autoencoder of factor 2
        ("unet", "freq_shift", 16),
        ("unet", "time_cond_proj_dim", 2),
        ("unet", "in_channels", 5),
        ("unet", "norm_eps", 0.0),
        ("unet", "attention_head_dim", [2] * 5000),
        ("vae", "scaling_factor", 0),
        ("vae", "scaling_factor", 0.0),
        ("vae", "scaling_factor", -0.18215),
        ("vae", "scaling_factor", 1e-300),
        ("vae", "in_channels", 1),
        ("vae", "out_channels", 4),
        ("vae", "block_out_channels", [16] * 40),
        ("text_encoder", "layer_norm_eps", 1e300),
        ("text_encoder", "max_position_embeddings", 1),
        ("text_encoder", "hidden_act", ["gelu"] * 10**5),
        ("scheduler", "trained_betas", [10**400] * 1000),
        ("scheduler", "beta_start", -(10**400)),
        ("scheduler", "steps_offset", 10**400),
        ("tokenizer", "model_max_length", -(10**400)),
        ("tokenizer", "model_max_length", 10**400),
    ],
)
def test_a_config_that_cannot_be_drawn_with_is_one_line(folder, part, key, value, no_hashing):
    names = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
    change(folder / part / names.get(part, "config.json"), key, value)
    refused_cheaply(lambda: load_model(folder, device="cpu"))


@pytest.mark.parametrize(
    ("key", "value"),
    [("sample_size", 8192), ("in_channels", 4), ("out_channels", 6), ("downsample_padding", 4000)],
)
def test_a_model_of_pixels_that_cannot_be_drawn_with_is_one_line(pixels, key, value, no_hashing):
    change(pixels / "unet/config.json", key, value)
    refused_cheaply(lambda: load_model(pixels, device="cpu"))


@pytest.mark.parametrize("name", [b"caf\xe9", b"\xff\xfe", b"a\x80.safetensors"])
def test_a_folder_whose_name_is_not_utf8_is_a_model_as_any(made, tmp_path, name, capfd):
    folder = tmp_path / os.fsdecode(name)
    try:
        shutil.copytree(made[0], folder)
    except OSError:
        pytest.skip("this file system takes no such names")
    model = load_model(folder, device="cpu", dtype="float32")
    assert model.name.encode().decode() == model.name
    (path,) = model.generate("a", **SMALL).save(tmp_path / "out.png")
    assert read_recipe(path)["model"]["name"] == model.name
    assert cli.run(["inspect", str(folder), "--json"]) == 0
    assert cli.run(["inspect", str(folder)]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[0])["name"] == model.name


@pytest.mark.parametrize("name", [b"none\xff", b"\xed\xa0\x80/x", b"org/\xff"])
def test_a_name_that_is_not_utf8_and_not_there_is_one_line(name):
    refused(lambda: load_model(os.fsdecode(name)), "no model")


# --- weights that change -------------------------------------------------------------------------


def overwrite(path, value=0.5):
    """Write other numbers over the end of a file, in place."""
    with path.open("r+b") as f:
        f.seek(-4096, os.SEEK_END)
        f.write(torch.full((1024,), value).numpy().tobytes())


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_overwritten_before_their_first_use_are_found(folder, part, dtype):
    file = weight_file(folder, part)
    # As the part computes: a converted tensor does not need its file any more.
    kind = torch.float32 if part == "vae" else getattr(torch, dtype)
    save_file({name: tensor.to(kind) for name, tensor in load_file(file).items()}, file)
    model = load_model(folder, device="cpu", dtype=dtype)
    overwrite(file)
    refused(lambda: model.generate("a", **SMALL), file.name, "overwritten")


def test_forged_times_do_not_hide_that_weights_were_overwritten(folder):
    file = weight_file(folder, "unet")
    model = load_model(folder, device="cpu", dtype="float32")
    times = file.stat()
    overwrite(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    refused(lambda: model.generate("a", **SMALL), "overwritten")


def test_a_file_cut_short_is_found_and_not_read_beyond_its_end(folder):
    model = load_model(folder, device="cpu", dtype="float32")
    with weight_file(folder, "unet").open("r+b") as f:
        f.truncate(100)
    refused(lambda: model.generate("a", **SMALL), "overwritten")


def test_weights_overwritten_between_two_pictures_are_found(folder):
    model = load_model(folder, device="cpu", dtype="float32")
    model.generate("a", **SMALL)
    overwrite(weight_file(folder, "text_encoder"))
    refused(lambda: model.generate("b", **SMALL), "overwritten")


def test_weights_overwritten_while_they_are_loaded_are_found(folder, monkeypatch):
    file = weight_file(folder, "unet")
    plain = digest.digest_files

    def slow(*given):
        found = plain(*given)
        overwrite(file)
        return found

    monkeypatch.setattr(load, "digest_files", slow)
    refused(lambda: load_model(folder, device="cpu"), "overwritten")


def replaced(folder, file):
    save_file({"other": torch.zeros(3)}, folder / "new")
    (folder / "new").replace(file)


HARMLESS = [
    lambda folder, file: file.touch(),
    lambda folder, file: file.chmod(0o400),
    lambda folder, file: file.unlink(),
    lambda folder, file: file.write_bytes(file.read_bytes()),
    replaced,
    lambda folder, file: shutil.rmtree(folder),
]


@pytest.mark.parametrize("harmless", HARMLESS)
def test_what_leaves_the_loaded_bytes_alone_changes_nothing(folder, harmless):
    model = load_model(folder, device="cpu", dtype="float32")
    wanted = load_model(folder, device="cpu", dtype="float32").generate("a", **SMALL).images[0]
    harmless(folder, weight_file(folder, "unet"))
    assert model.generate("a", **SMALL).images[0].tobytes() == wanted.tobytes()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="opens a file as Linux can")
@pytest.mark.parametrize("harmless", HARMLESS)
def test_a_lora_is_merged_into_the_loaded_bytes(folder, harmless, tmp_path):
    """A LoRA needs the weights as they are stored, so their files are opened again."""
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    halves = {"down": torch.ones(2, 32), "up": torch.ones(32, 2)}
    ink = tmp_path / "ink.safetensors"
    save_file({f"{name}.lora_{half}.weight": each for half, each in halves.items()}, ink)
    wanted = load_model(folder, device="cpu", dtype="float32").adapted([str(ink)])
    model = load_model(folder, device="cpu", dtype="float32")
    harmless(folder, weight_file(folder, "unet"))
    inked = model.adapted([str(ink)])
    assert all(
        torch.equal(weight, wanted.unet.state_dict()[key])
        for key, weight in inked.unet.state_dict().items()
    )


def test_where_a_file_cannot_be_opened_anew_another_one_is_refused(folder, monkeypatch):
    """macOS has no /proc."""
    file = digest.HashedFile(digest.digest_file(weight_file(folder, "unet")))
    monkeypatch.setattr(digest, "REOPENED", "/nowhere/{}")
    assert file.openable == str(weight_file(folder, "unet"))
    replaced(folder, weight_file(folder, "unet"))
    refused(lambda: file.openable, "replaced after it was loaded")
    weight_file(folder, "unet").unlink()
    refused(lambda: file.openable, "replaced after it was loaded")


def test_a_header_names_the_file_that_a_link_led_to(made, tmp_path):
    """The link may lead to another version when the tensors are read again."""
    pixels = weight_file(made[1], "unet")
    link = tmp_path / "link.safetensors"
    link.symlink_to(pixels)
    assert header_of(link).path == pixels.resolve()


def test_converted_weights_need_their_file_no_more(folder):
    model = load_model(folder, device="cpu", dtype="bfloat16", plain=True)
    wanted = load_model(folder, device="cpu", dtype="bfloat16", plain=True).generate("a", **SMALL)
    for part in ("unet", "text_encoder"):  # the autoencoder computes in float32, as it is stored
        weight_file(folder, part).write_bytes(b"")
    assert model.generate("a", **SMALL).images[0].tobytes() == wanted.images[0].tobytes()
