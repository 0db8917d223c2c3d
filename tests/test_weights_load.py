import json
import math
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safelight import cli
from safelight.families import FAMILIES, sd
from safelight.machine import pick_device
from safelight.nets.clip import CLIPTextModel
from safelight.nets.unet import UNet2DConditionModel
from safelight.nets.unet2d import UNet2DModel
from safelight.weights import inspect, load, load_model
from safelight.weights.find import Source
from safelight.weights.lender import missing
from safelight.weights.load import pick_dtype
from safelight.weights.names import open_clip_names, unet_names, vae_names
from safelight.weights.plan import read_plan
from weights_tiny import FAMILY, change, part_weights, pixel_folder, refused, text_folder, write


@pytest.fixture
def folder(tmp_path):
    return text_folder(tmp_path / "tiny")


def edit(file, change_tensors):
    """Rewrite a weight file through a function of its tensors."""
    tensors = {k: v.clone() for k, v in load_file(file).items()}
    save_file(change_tensors(tensors) or tensors, file)


def unet_file(folder):
    return folder / "unet/diffusion_pytorch_model.safetensors"


def test_a_folder_loads(folder):
    write(folder / "safelight.json", {"words": ["apple", "red"], "made_by": "us"})
    model = load_model(str(folder), device="cpu", dtype="float32")
    assert (model.name, model.kind, model.family.name) == ("tiny", "text", "custom")
    assert model.native_size == (16, 16)
    assert model.words == {"apple", "red"}
    assert model.notes == {"made_by": "us"}
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert model.scheduler.beta_schedule == "scaled_linear"
    assert model.warnings == []
    assert len(model.sha256) == 64
    assert isinstance(model.text_encoder, CLIPTextModel)
    assert isinstance(model.unet, UNet2DConditionModel)
    for part in ("unet", "vae", "text_encoder"):
        network = getattr(model, part)
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())
        state = network.state_dict()
        wanted = part_weights(part)
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[k], wanted[k]) for k in wanted)
    assert model.tokenizer is not None
    ids = torch.tensor([model.tokenizer.encode("an apple").ids])
    context = model.text_encoder(ids)
    out = model.unet(torch.randn(1, 4, 8, 8), torch.tensor([5.0]), context)
    assert out.isfinite().all()


def test_a_model_of_pixels_loads(tmp_path):
    model = load_model(str(pixel_folder(tmp_path / "p")), device="cpu")
    assert (model.kind, model.family.name, model.native_size) == ("pixels", "pixels", (8, 8))
    assert isinstance(model.unet, UNet2DModel)
    assert (model.tokenizer, model.text_encoder, model.vae) == (None, None, None)


def test_the_digest_is_of_all_that_was_read(folder):
    def digest():
        return load_model(str(folder), device="cpu").sha256

    first = digest()
    assert digest() == first
    write(folder / "README.md", "read by people")
    assert digest() == first
    change(folder / "scheduler/scheduler_config.json", "steps_offset", 1)
    second = digest()
    assert second != first
    change(folder / "tokenizer/tokenizer_config.json", "pad_token", "?")
    third = digest()
    assert third not in (first, second)
    edit(unet_file(folder), lambda t: {**t, "conv_in.bias": t["conv_in.bias"] + 1})
    assert digest() not in (first, second, third)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("asked", ["float32", "float16", "bfloat16"])
def test_weights_are_converted(folder, stored, asked):
    edit(unet_file(folder), lambda t: {k: v.to(stored) for k, v in t.items()})
    model = load_model(str(folder), device="cpu", dtype=asked)
    wanted, dtype = load_file(unet_file(folder)), getattr(torch, asked)
    for name, tensor in model.unet.state_dict().items():
        assert torch.equal(tensor.to(dtype), wanted[name].to(dtype))
    out = model.unet(
        torch.ones(1, 4, 8, 8, dtype=dtype), torch.ones(1), torch.ones(1, 5, 24, dtype=dtype)
    )
    assert out.dtype == dtype


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_weights_that_need_no_conversion_stay_in_the_file(tmp_path):
    folder = text_folder(tmp_path / "m")
    edit(unet_file(folder), lambda t: {k: v.half() for k, v in t.items()})
    model = load_model(str(folder), device="cpu", dtype="float16")
    storages = {t.untyped_storage().data_ptr() for t in model.unet.state_dict().values()}
    # Another test's file may have a name that is no text.
    maps = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    mapped = [line.split()[0] for line in maps if line.endswith(str(unet_file(folder)))]
    spans = [tuple(int(x, 16) for x in m.split("-")) for m in mapped]
    assert all(any(a <= s < b for a, b in spans) for s in storages)


def test_tensors_that_the_file_does_not_align_are_aligned(folder):
    raw = unet_file(folder).read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    unet_file(folder).write_bytes(struct.pack("<Q", n + 1) + raw[8 : 8 + n] + b" " + raw[8 + n :])
    model = load_model(str(folder), device="cpu")
    for tensor in model.unet.state_dict().values():
        assert tensor.data_ptr() % tensor.element_size() == 0
    assert torch.equal(model.unet.conv_in.weight, part_weights("unet")["conv_in.weight"])


def test_missing_weights_are_named(folder):
    def drop(t):
        return {k: v for k, v in t.items() if not k.startswith("conv_") or k == "conv_in.bias"}

    edit(unet_file(folder), drop)
    refused(
        lambda: load_model(str(folder), device="cpu"),
        "5 weights of unet are missing: conv_in.weight, conv_norm_out.bias, conv_norm_out.weight …",
    )


def test_left_over_weights_are_named(folder):
    edit(unet_file(folder), lambda t: {**t, "conv_on.bias": torch.zeros(1)})
    refused(
        lambda: load_model(str(folder), device="cpu"),
        "1 weights of unet belong to nothing: conv_on.bias",
    )


def test_a_wrong_shape_is_named(folder):
    edit(unet_file(folder), lambda t: {**t, "conv_in.bias": torch.zeros(31)})
    refused(lambda: load_model(str(folder), device="cpu"), "conv_in.bias: (31,)", "(32,) by the")


def test_whole_numbers_are_no_weights(folder):
    edit(unet_file(folder), lambda t: {**t, "conv_in.bias": t["conv_in.bias"].to(torch.int8)})
    refused(lambda: load_model(str(folder), device="cpu"), "conv_in.bias: stored as I8")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_named(folder, part, value):
    (file,) = (folder / part).glob("*.safetensors")
    name = sorted(load_file(file))[3]

    def spoil(t):
        t[name].view(-1)[-1] = value

    edit(file, spoil)
    refused(lambda: load_model(str(folder), device="cpu"), name, "NaN or Inf")


def test_weights_too_large_for_the_dtype_are_named_and_large_ones_pass(folder):
    large = torch.full((32, 4, 3, 3), 3e38)
    edit(unet_file(folder), lambda t: {**t, "conv_in.weight": large})
    assert torch.equal(load_model(str(folder), device="cpu").unet.conv_in.weight, large)
    refused(lambda: load_model(str(folder), device="cpu", dtype="float16"), "conv_in.weight")


def test_names_of_older_and_newer_writers_are_read(folder):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    (vae,) = (folder / "vae").glob("*.safetensors")
    (text,) = (folder / "text_encoder").glob("*.safetensors")

    def older(t):
        found = {}
        for name, tensor in t.items():
            for new, before in old.items():
                name = name.replace(f".{new}.", f".{before}.")
            found[name] = tensor
        assert any(".proj_attn." in name for name in found)
        return found

    edit(vae, older)
    edit(text, lambda t: {k.removeprefix("text_model."): v for k, v in t.items()})
    edit(text, lambda t: {**t, "embeddings.position_ids": torch.arange(16)[None]})
    model = load_model(str(folder), device="cpu")
    assert torch.equal(
        model.vae.state_dict()["encoder.mid_block.attentions.0.to_q.weight"],
        part_weights("vae")["encoder.mid_block.attentions.0.to_q.weight"],
    )


def test_one_weight_under_two_names_is_refused(folder):
    (text,) = (folder / "text_encoder").glob("*.safetensors")
    name = "final_layer_norm.bias"
    edit(text, lambda t: {**t, name: torch.zeros(24)})
    refused(lambda: load_model(str(folder), device="cpu"), "are the same weight")


@pytest.mark.parametrize(
    ("part", "key", "value", "told"),
    [
        ("text_encoder", "hidden_size", 48, "gives 48 numbers for a word, and its unet reads 24"),
        ("vae", "latent_channels", 8, "decodes 8 channels, and its unet gives 4"),
    ],
)
def test_networks_that_do_not_fit_one_another(folder, part, key, value, told):
    """Each network has its own weights, as if two checkpoints had been mixed up."""
    change(folder / part / "config.json", key, value)
    config = json.loads((folder / part / "config.json").read_text())
    (file,) = (folder / part).glob("*.safetensors")
    save_file(part_weights(part, config), file)
    refused(lambda: load_model(str(folder), device="cpu"), told)


def test_shards_load(folder):
    tensors = load_file(unet_file(folder))
    names = sorted(tensors)
    unet_file(folder).unlink()
    weight_map = {}
    for i, some in enumerate((names[::2], names[1::2])):
        shard = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        save_file({n: tensors[n] for n in some}, folder / "unet" / shard)
        weight_map |= dict.fromkeys(some, shard)
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    write(index, {"metadata": {}, "weight_map": weight_map})
    model = load_model(str(folder), device="cpu", dtype="float32")
    assert all(torch.equal(t, tensors[n]) for n, t in model.unet.state_dict().items())
    write(index, {"weight_map": {**weight_map, names[0]: weight_map[names[1]]}})
    refused(lambda: load_model(str(folder), device="cpu"), "does not list what its files hold")
    (folder / "unet" / weight_map[names[0]]).unlink()
    refused(lambda: load_model(str(folder), device="cpu"), weight_map[names[0]], "is missing")


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_a_variant_is_used_if_it_is_alone(folder, variant):
    unet_file(folder).rename(folder / f"unet/diffusion_pytorch_model.{variant}.safetensors")
    assert load_model(str(folder), device="cpu").unet


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("unet", "layers_per_block", 2**24),
        ("unet", "block_out_channels", [32] * 2**16),
        ("unet", "block_out_channels", []),
        ("unet", "block_out_channels", [2**24, 2**24]),
        ("unet", "block_out_channels", [-32, 64]),
        ("unet", "cross_attention_dim", "24"),
        ("unet", "attention_head_dim", 0),
        ("unet", "norm_num_groups", 0),
        ("unet", "down_block_types", ["os.system", "DownBlock2D"]),
        ("unet", "act_fn", "__import__"),
        ("unet", "in_channels", 10**30),
        ("unet", "in_channels", 0),
        ("unet", "sample_size", -8),
        ("vae", "block_out_channels", None),
        ("vae", "layers_per_block", 2**20),
        ("vae", "latent_channels", 0),
        ("vae", "norm_num_groups", 7),
        ("text_encoder", "num_hidden_layers", 2**24),
        ("text_encoder", "num_attention_heads", 0),
        ("text_encoder", "hidden_act", "eval"),
        ("text_encoder", "vocab_size", True),
        ("text_encoder", "hidden_size", 2**24),
        ("text_encoder", "layer_norm_eps", "x" * 500),
        ("scheduler", "beta_schedule", "evil"),
        ("scheduler", "num_train_timesteps", 0),
        ("scheduler", "prediction_type", ["epsilon"]),
    ],
)
def test_a_hostile_config_is_refused(folder, part, key, value):
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    change(folder / part / name, key, value)
    refused(lambda: load_model(str(folder), device="cpu"))


@pytest.mark.parametrize("words", ["apple", [1], {"a": 1}])
def test_words_are_a_list_of_words(folder, words):
    write(folder / "safelight.json", {"words": words})
    refused(lambda: load_model(str(folder), device="cpu"), "safelight.json", "words")


def test_settings_that_are_not_there_are_named(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    refused(lambda: load_model(str(folder), device="cuda"), "'cuda' is not there", "cpu")
    refused(
        lambda: load_model(str(folder), device="toaster"),
        "'toaster' is not there",
        "a GPU is called",
    )
    refused(lambda: load_model(str(folder), device="cpu", dtype="int8"), "'int8'", "float32")
    refused(lambda: load_model(str(folder), device="cpu", prediction_type="v"), "v_prediction")


def test_devices_and_dtypes(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    refused(lambda: pick_device("cuda:2"), "cuda:0, cuda:1, mps, cpu")
    assert pick_device(torch.device("cpu")) == torch.device("cpu")
    assert pick_dtype("auto", torch.device("cuda")) == torch.float16
    monkeypatch.setattr("safelight.weights.load.native_bfloat16", lambda: False)
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    monkeypatch.setattr("safelight.weights.load.native_bfloat16", lambda: True)
    assert pick_dtype("auto", torch.device("cpu")) == torch.bfloat16
    assert pick_dtype(torch.bfloat16, torch.device("cpu")) == torch.bfloat16


def test_the_prediction_can_be_forced(folder):
    model = load_model(str(folder), device="cpu", prediction_type="v_prediction")
    assert model.scheduler.prediction_type == "v_prediction"


def test_inspect_reads_no_weights(folder, monkeypatch):
    monkeypatch.setattr("safelight.weights.tensors.safe_open", None)
    edit(unet_file(folder), lambda t: {k: v.half() for k, v in t.items()})
    found = inspect(str(folder))
    counts = {p: sum(t.numel() for t in part_weights(p).values()) for p in found["components"]}
    assert {p: c["parameters"] for p, c in found["components"].items()} == counts
    assert found["components"]["unet"]["dtypes"] == ["F16"]
    assert found["components"]["unet"]["bytes"] == 2 * counts["unet"]
    assert found["parameters"] == sum(counts.values())
    assert found["dtypes"] == ["F16", "F32"]
    assert found["size_on_disk"] > 2 * counts["unet"] + 4 * counts["vae"]
    assert (found["kind"], found["family"], found["name"]) == ("text", "custom", "tiny")
    assert found["prediction_type"] == "epsilon"
    assert found["native_size"] == (16, 16)
    json.dumps(found)


def single_file(path, family, metadata=None, extra=None):
    """A single file of a tiny family, by the original code's names."""
    tensors = dict(extra or {})
    text_table = open_clip_names(family.text_encoder["num_hidden_layers"])
    for part, prefix, table in (
        ("unet", "model.diffusion_model.", unet_names(family.unet)),
        ("vae", "first_stage_model.", vae_names(family.vae)),
        ("text_encoder", "cond_stage_model.model.", text_table),
    ):
        back = {b: a for a, b in table.items()}
        weights = part_weights(part, family.configs[part])
        for name, tensor in weights.items():
            if "q_proj" in name:
                third = [weights[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
                key, tensor = name.replace("self_attn.q_proj.", "attn.in_proj_"), torch.cat(third)
                layer = name.split(".self_attn")[0]
                key = back[layer] + key.removeprefix(layer)
            elif "k_proj" in name or "v_proj" in name:
                continue
            else:
                module, rest = name, ""
                while module not in back:
                    module, dot, leaf = module.rpartition(".")
                    rest = dot + leaf + rest
                key = back[module] + rest
                if part == "vae" and ".attentions." in name and tensor.ndim == 2:
                    tensor = tensor[:, :, None, None]
            tensors[prefix + key] = tensor.contiguous()
    save_file(tensors, path, metadata)
    return path


IGNORED = {
    "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(1),
    "model_ema.num_updates": torch.zeros((), dtype=torch.int32),
    "alphas_cumprod": torch.zeros(1000),
    "sqrt_recipm1_alphas_cumprod": torch.zeros(1000),
    "posterior_mean_coef1": torch.zeros(1000),
    "cond_stage_model.model.logit_scale": torch.tensor(1.0),
    "cond_stage_model.model.text_projection": torch.zeros(24, 24),
    "cond_stage_model.model.transformer.resblocks.2.ln_1.bias": torch.zeros(24),
    "first_stage_model.loss.logvar": torch.zeros(()),
}


@pytest.fixture
def tiny_family(monkeypatch):
    monkeypatch.setattr(sd, "VARIANTS", (FAMILY,))


def test_a_single_file_loads(tiny_family, tmp_path):
    file = single_file(tmp_path / "model.safetensors", FAMILY, extra=IGNORED)
    model = load_model(str(file), device="cpu", dtype="float32")
    assert (model.name, model.family.name, model.native_size) == ("model", "tiny", (16, 16))
    for part in ("unet", "vae", "text_encoder"):
        state = getattr(model, part).state_dict()
        wanted = part_weights(part, FAMILY.configs[part])
        assert all(torch.equal(state[k], wanted[k]) for k in wanted)
    assert model.tokenizer is not None
    assert model.tokenizer.encode("cat").ids[:4] == [49406, 2368, 49407, 0]
    assert len(model.warnings) == 1
    assert "safelight convert --prediction-type v_prediction" in model.warnings[0]
    assert model.scheduler.prediction_type == "epsilon"


@pytest.mark.parametrize(
    ("metadata", "prediction", "size"),
    [
        ({"modelspec.prediction_type": "v"}, "v_prediction", 24),
        ({"modelspec.prediction_type": "epsilon"}, "epsilon", 16),
        ({"modelspec.predict_key": "v"}, "v_prediction", 24),
        ({"modelspec.predict_key": "epsilon"}, "epsilon", 16),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction", 24),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon", 16),
        ({"modelspec.prediction_type": "v", "modelspec.resolution": "72x72"}, "v_prediction", 72),
        ({"modelspec.prediction_type": "v", "modelspec.resolution": "56x56"}, "v_prediction", 24),
        ({"modelspec.prediction_type": "v", "modelspec.resolution": "9992x64"}, "v_prediction", 24),
    ],
)
def test_a_single_file_may_say_what_it_predicts(metadata, prediction, size, tiny_family, tmp_path):
    file = single_file(tmp_path / "model.safetensors", FAMILY, metadata)
    found = inspect(str(file))
    assert found["prediction_type"] == prediction
    assert found["native_size"] == (size, size)
    assert found["warnings"] == []


def test_a_single_file_may_be_marked_as_comfyui_does(tiny_family, tmp_path):
    """By empty tensors, in the files of every family."""
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    file = single_file(tmp_path / "model.safetensors", FAMILY, extra=marks)
    model = load_model(str(file), device="cpu")
    assert (model.warnings, model.native_size) == ([], (24, 24))
    assert model.scheduler.prediction_type == "v_prediction"
    assert model.scheduler.rescale_betas_zero_snr
    assert model.scheduler.timestep_spacing == "trailing"


def test_a_link_may_lead_elsewhere_while_a_model_loads(tiny_family, tmp_path, monkeypatch):
    """What is hashed and read is the file whose header was read."""
    file = single_file(tmp_path / "model.safetensors", FAMILY)
    wanted = load_model(str(file), device="cpu").sha256
    (link := tmp_path / "link.safetensors").symlink_to(file)
    plan = read_plan(Source("link", link))
    link.unlink()
    link.symlink_to(single_file(tmp_path / "other.safetensors", FAMILY, {"modelspec.title": "b"}))
    monkeypatch.setattr(load, "read_plan", lambda *_, **__: plan)
    assert load_model(str(link), device="cpu").sha256 == wanted


def test_a_forced_prediction_needs_no_warning(tiny_family, tmp_path):
    file = single_file(tmp_path / "model.safetensors", FAMILY)
    model = load_model(str(file), device="cpu", prediction_type="v_prediction")
    assert (model.warnings, model.native_size) == ([], (24, 24))


def test_unknown_keys_of_a_single_file_are_named(tiny_family, tmp_path):
    extra = {"model.diffusion_model.input_blocks.99.0.x": torch.zeros(1), "evil": torch.zeros(1)}
    file = single_file(tmp_path / "model.safetensors", FAMILY, extra=extra)
    refused(lambda: inspect(str(file)), "2 keys that we do not know: evil, model.diffusion_model")


def test_a_single_file_without_a_part_is_refused(tiny_family, tmp_path):
    file = single_file(tmp_path / "model.safetensors", FAMILY)
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if not k.startswith("first_stage")}, file)
    refused(lambda: load_model(str(file)), "no vae (first_stage_model.*)")
    save_file({k: v for k, v in tensors.items() if not k.startswith("cond_stage")}, file)
    refused(lambda: load_model(str(file)), "no text_encoder (cond_stage_model.", "give a folder of")


def test_tokens_are_shown_for_a_single_file_without_an_autoencoder(tiny_family, tmp_path, capsys):
    file = single_file(tmp_path / "model.safetensors", FAMILY)
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if not k.startswith("first_stage")}, file)
    assert cli.run(["tokens", "a", "--model", str(file)]) == 0
    assert capsys.readouterr().err == ""


def test_tokens_are_shown_for_a_network_alone(tiny_family, tmp_path, capsys):
    file = single_file(tmp_path / "model.safetensors", FAMILY)
    alone = {k: v for k, v in load_file(file).items() if k.startswith("model.diffusion_model")}
    save_file(alone, file)
    assert cli.run(["tokens", "a", "--model", str(file)]) == 0
    # With a folder of parts, its tokenizer reads the prompt: its vocabulary is letters.
    folder = text_folder(tmp_path / "parts")
    assert cli.run(["tokens", "abc", "--model", str(file), "--parts", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "a|b|c" in out


def test_what_a_file_lacks_never_hides_the_way_to_give_it():
    """An error of a file is cut at 200 characters."""
    for family in FAMILIES:
        lacking = [*family.parts, *family.tokenizers]
        assert missing(family, lacking, ()).startswith(f"give a folder of {family.title}, or")


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        (["conditioner.embedders.0.x"], "Stable Diffusion XL"),
        (["control_model.x"], "ControlNet"),
        (["lora_unet_x.alpha"], "LoRA"),
        (["down_blocks.0.x"], "give the folder's path"),
        (["text_model.x"], "give the folder's path"),
        (["encoder.conv_in.weight"], "one part of a model"),
        (["transformer_blocks.0.x"], "as transformer/diffusion_pytorch_model.safetensors"),
        (["text_encoders.x", "text_encoders.y"], "one or more text encoders"),
        (["text_encoders.x", "y"], "not a checkpoint"),
        (["unet.x.weight", "unet.x.weight.absmax"], "4-bit weights of bitsandbytes"),
        (["x.weight.quant_state.bitsandbytes__nf4"], "4-bit weights of bitsandbytes"),
        (["x"], "not a checkpoint"),
        ([], "not a checkpoint"),
    ],
)
def test_other_files_are_told_what_they_are(keys, word, tmp_path):
    save_file({k: torch.zeros(1) for k in keys}, tmp_path / "x.safetensors")
    refused(lambda: load_model(str(tmp_path / "x.safetensors"), device="cpu"), word)


def test_a_unet_of_another_shape_is_refused(tmp_path, monkeypatch):
    family = replace(FAMILY, in_channels=5)
    file = single_file(tmp_path / "x.safetensors", family)
    monkeypatch.setattr(sd, "VARIANTS", (FAMILY,))
    refused(lambda: inspect(str(file)), "5 input channels")
