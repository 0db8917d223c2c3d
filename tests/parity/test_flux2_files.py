"""FLUX.2's weights in few bits, and its autoencoder on its own."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from safelight import cli
from safelight.engine import preview
from safelight.families import flux2
from safelight.families.flow_files import Published
from safelight.recipe import read_recipe
from safelight.weights import load_model
from safelight.weights.convert import convert
from safelight.weights.estimate import estimate
from safelight.weights.find import find, parts_finder
from safelight.weights.hub import files_of
from safelight.weights.kinds import kind_of
from safelight.weights.names_flux2_vae import flux2_vae_folder_name, flux2_vae_names
from safelight.weights.plan import read_plan
from tests.gguf_text import llama_file, qwen_metadata, tokenizer_content
from tests.parity.flow_models import ASKED, DEV, VAE_16, configs, make_klein
from tests.parity.test_quantised import WHOLE, as_codes, float8_file, gguf_file, per_row
from tests.weights_tiny import refused

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_klein(tmp_path_factory.mktemp("few") / "klein", distilled=True)


@pytest.fixture(autouse=True)
def tiny(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = Published(configs(folder), {**DEV, "shift": 3.0})
    small = tuple(
        replace(flux2.VARIANTS[i], layers=2, singles=3, published=published) for i in (0, 2)
    )
    monkeypatch.setattr(flux2, "VARIANTS", small)


@pytest.fixture
def whole(folder: Path, tmp_path: Path) -> State:
    convert(str(folder), tmp_path / "whole.safetensors")
    return load_file(tmp_path / "whole.safetensors")


def drawn(path: Path, **given: Any) -> tuple[Any, bytes]:
    model = load_model(str(path), device="cpu", dtype="float32", **given)
    return model, model.generate("a red apple", **ASKED).images[0].tobytes()


# --- weights in few bits -------------------------------------------------------------------------


def test_gguf(folder: Path, whole: State, tmp_path: Path) -> None:
    """As people quantise the transformer: codes draw what their numbers draw."""
    path = gguf_file(whole, tmp_path / "klein.gguf")
    numbers = path.with_suffix(".decoded.safetensors")
    model, picture = drawn(path, parts=folder)
    assert picture == drawn(numbers, parts=folder)[1]
    assert model.family.name == "flux2-klein-4b"
    short, picture = drawn(path, parts=folder, low_memory=True)
    assert "transformer.transformer_blocks.0.ff.linear_in" in as_codes(short)
    assert picture == drawn(numbers, parts=folder, low_memory=True)[1]


def test_float8(folder: Path, whole: State, tmp_path: Path) -> None:
    """With scales, as the authors and ComfyUI write it."""
    path = float8_file(whole, tmp_path / "klein.safetensors", per_row)
    numbers = path.with_suffix(".decoded.safetensors")
    assert drawn(path, parts=folder)[1] == drawn(numbers, parts=folder)[1]


# --- its autoencoder -----------------------------------------------------------------------------


def other_vae(path: Path, **config: Any) -> Path:
    """Write another autoencoder than that of the folder."""
    make_klein(path, distilled=True, batch_norm_eps=0.02, **config)
    return path / "vae"


def test_an_autoencoder_in_each_layout(folder: Path, tmp_path: Path) -> None:
    vae = other_vae(tmp_path / "other")
    own = drawn(folder)[1]
    wanted = drawn(folder, vae=vae)[1]
    assert own != wanted
    # A file has no config: it is read with that of the model's own autoencoder.
    config = vae / "config.json"
    config.write_text(config.read_text().replace("0.02", "0.0001"))
    wanted = drawn(folder, vae=vae)[1]
    weights = load_file(vae / "diffusion_pytorch_model.safetensors")
    assert kind_of(weights) == "vae"
    convert(str(vae.parent), tmp_path / "whole.safetensors")
    original = {
        key.removeprefix("vae."): tensor
        for key, tensor in load_file(tmp_path / "whole.safetensors").items()
        if key.startswith("vae.")
    }
    assert "encoder.quant_conv.weight" in original
    for prefix in ("", "vae."):
        for state in (weights, original):
            named = {prefix + key: tensor.contiguous() for key, tensor in state.items()}
            save_file(named, file := tmp_path / "vae.safetensors")
            assert drawn(folder, vae=file)[1] == wanted


def test_a_smaller_decoder(folder: Path, tmp_path: Path) -> None:
    vae = other_vae(tmp_path / "other", decoder_block_out_channels=(4, 8, 8, 12))
    assert drawn(folder, vae=vae)[1] != drawn(folder)[1]


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_files_of_a_smaller_decoder(folder: Path, tmp_path: Path, layout: str) -> None:
    """A file has no config: the decoder's widths are those of its tensors, here and there."""
    small = tmp_path / "small"
    make_klein(small, distilled=True, decoder_block_out_channels=(4, 8, 8, 12))
    files = {}
    for one in (small, folder):
        state = load_file(one / "vae" / "diffusion_pytorch_model.safetensors")
        if layout == "original":
            config = json.loads((one / "vae" / "config.json").read_text())
            back = flux2_vae_names(config)
            names = {ours: theirs for theirs, ours in back.items()}
            state = {original(key, names): tensor for key, tensor in state.items()}
        files[one] = tmp_path / f"{one.name}.safetensors"
        save_file(state, files[one])
    wanted = {one: drawn(folder, vae=one / "vae")[1] for one in files}
    assert wanted[small] != wanted[folder]
    for model in files:
        for one, file in files.items():
            assert drawn(model, vae=file)[1] == drawn(model, vae=one / "vae")[1]


def original(key: str, names: dict[str, str]) -> str:
    """Return a key of a folder in the authors' names. names: of modules, from ours to theirs."""
    ours = flux2_vae_folder_name(key) or key
    module = max((name for name in names if ours.startswith(f"{name}.")), key=len, default=None)
    return key if module is None else names[module] + ours.removeprefix(module)


def test_autoencoders_of_other_families_are_refused(folder: Path, tmp_path: Path) -> None:
    given: Any = {"device": "cpu", "dtype": "float32"}
    diffusers.AutoencoderKL(**VAE_16).save_pretrained(tmp_path / "flux")
    refused(lambda: load_model(folder, vae=tmp_path / "flux", **given), "8 pixels a latent", "16")
    state = load_file(tmp_path / "flux/diffusion_pytorch_model.safetensors")
    save_file(state, tmp_path / "flux.safetensors")
    refused(lambda: load_model(folder, vae=tmp_path / "flux.safetensors", **given), "channels")
    five = {"block_out_channels": [8] * 5, "norm_num_groups": 4}
    five |= {"down_block_types": ["DownEncoderBlock2D"] * 5}
    five |= {"up_block_types": ["UpDecoderBlock2D"] * 5}
    diffusers.AutoencoderKL(**VAE_16 | five).save_pretrained(tmp_path / "five")
    refused(lambda: load_model(folder, vae=tmp_path / "five", **given), "vae gives 16 numbers")
    mine = folder / "vae"
    refused(lambda: load_model("embedded", vae=mine, **given), "an autoencoder of 16 channels")


def test_previews_are_decoded_smaller(folder: Path) -> None:
    """No table of colours is known for these latents."""
    model = drawn(folder)[0]
    assert model.family.latent_rgb is None
    latents = torch.randn(1, model.vae.config.channels, 48, 32)
    assert preview.preview(model, latents).size == (11 * 16, 16 * 16)


# --- folders -------------------------------------------------------------------------------------


def test_the_estimate_counts_all_parts(folder: Path, whole: State, tmp_path: Path) -> None:
    alone = {key.removeprefix(WHOLE): t for key, t in whole.items() if key.startswith(WHOLE)}
    save_file(alone, file := tmp_path / "alone.safetensors")
    found = estimate(file, device="cpu", dtype="float32", parts=folder, low_memory=True)
    own = estimate(folder, device="cpu", dtype="float32", low_memory=True)
    assert (found.weights, found.work) == (own.weights, own.work)
    assert found.family.name == own.family.name == "flux2-klein-4b"
    assert found.native_size == (1024, 1024)


def test_what_a_file_takes_from_the_hub(folder: Path, whole: State) -> None:
    """The index says what is distilled; the scheduler is that of all of them."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    index = json.loads((folder / "model_index.json").read_text())
    taken = files_of(index, names, "klein", lacking=["vae", "text_encoder", "tokenizer"])
    assert {name.partition("/")[0] for name in taken} == {
        "model_index.json",
        "vae",
        "text_encoder",
        "tokenizer",
    }


@pytest.mark.parametrize(
    ("part", "changed", "said"),
    [
        ("transformer", {"joint_attention_dim": 64}, "text encoder gives 96 numbers"),
        ("transformer", {"in_channels": 32}, "vae gives 64 numbers"),
        ("transformer", {"out_channels": 32}, "transformer gives 32 numbers"),
        ("transformer", {"guidance_embeds": True}, "guidance_embeds=True is not supported"),
        ("text_encoder", {"num_hidden_layers": 26, "layer_types": None}, "26 layers; FLUX.2 reads"),
        ("vae", {"patch_size": [1, 1]}, "patch_size"),
    ],
)
def test_parts_that_do_not_fit(
    folder: Path, tmp_path: Path, part: str, changed: dict[str, Any], said: str
) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / part / "config.json").read_text())
    (other / part / "config.json").write_text(json.dumps({**config, **changed}))
    refused(lambda: load_model(other, device="cpu"), said)


def test_the_command_line(folder: Path, whole: State, tmp_path: Path, capsys: Any) -> None:
    alone = {key: tensor for key, tensor in whole.items() if key.startswith(WHOLE)}
    save_file(alone, file := tmp_path / "alone.safetensors")
    png, parts = str(tmp_path / "a.png"), ["--parts", str(folder)]
    size = ["--width", "64", "--height", "64", "--device", "cpu"]
    asked = ["generate", "a red apple", "--model", str(file), *parts, *size, "--out", png]
    assert cli.run(asked) == 0
    assert cli.run(["verify", png, "--model", str(file), *parts]) == 0
    assert read_recipe(Path(png))["settings"]["steps"] == 4
    capsys.readouterr()
    assert cli.run(["inspect", str(file)]) == 0
    told = capsys.readouterr().out
    assert "flux2-klein-base-4b" in told
    assert "no vae, text_encoder and tokenizer" in told
    # FLUX.2 dev: a folder by its pipeline, a file by what reads the guidance scale.
    save_file({**alone, f"{WHOLE}guidance_in.in_layer.weight": torch.ones(2, 2)}, file)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/model_index.json").write_text('{"_class_name": "Flux2Pipeline"}')
    for model in (file, tmp_path / "dev"):
        assert cli.run(["generate", "a red apple", "--model", str(model)]) == 2
        [line] = capsys.readouterr().err.strip().splitlines()
        assert "this is FLUX.2 dev" in line


# --- its tokenizer -------------------------------------------------------------------------------


def with_words(folder: Path, place: Path, **config: Any) -> Path:
    """Copy the tokenizer, with settings of its config changed; None removes one."""
    shutil.copytree(folder / "tokenizer", place)
    told = json.loads((place / "tokenizer_config.json").read_text()) | config
    said = {key: value for key, value in told.items() if value is not None}
    (place / "tokenizer_config.json").write_text(json.dumps(said))
    return place


def test_a_prompt_is_filled_up_with_qwen_s_mark(folder: Path, tmp_path: Path) -> None:
    """Whatever a file says: a tokenizer.json alone names none, and GGUF files name another."""
    convert(str(folder), file := tmp_path / "klein-all.safetensors")
    wanted = drawn(folder)[1]
    assert drawn(file, parts=folder / "tokenizer/tokenizer.json")[1] == wanted
    for number, pad in enumerate((None, "<|im_end|>")):
        place = with_words(folder, tmp_path / f"words-{number}", pad_token=pad)
        (place / "special_tokens_map.json").unlink(missing_ok=True)
        assert drawn(file, parts=place)[1] == wanted
    state = load_file(folder / "text_encoder/model.safetensors")
    del state["lm_head.weight"]
    llama_file(tmp_path / "qwen.gguf", state, qwen_metadata(plain_words(folder), 320, pad=259))
    plan = read_plan(find(file), parts=parts_finder([tmp_path / "qwen.gguf"]))
    assert plan.load_tokenizers()["tokenizer"].pad == 257


def plain_words(folder: Path) -> dict[str, Any]:
    """Return the tokenizer with one merge, as no list in a GGUF file is empty."""
    content = tokenizer_content(folder / "tokenizer")
    content["model"]["vocab"]["re"] = 256
    content["model"]["merges"] = ["r e"]
    for told in content["added_tokens"]:
        told["id"] += 1
    return content


@pytest.mark.parametrize(
    "mark", ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|endoftext|>"]
)
def test_a_mark_of_the_chat_is_one_token(folder: Path, tmp_path: Path, mark: str) -> None:
    """The tokenizers of older Qwens have no <think>."""
    convert(str(folder), file := tmp_path / "klein-all.safetensors")
    place = with_words(folder, tmp_path / "words", pad_token=None, eos_token=None)
    (place / "special_tokens_map.json").unlink(missing_ok=True)
    text = (place / "tokenizer.json").read_text(encoding="utf-8")
    (place / "tokenizer.json").write_text(text.replace(mark, "<other>"), encoding="utf-8")
    told = json.loads((place / "tokenizer_config.json").read_text())
    told["tokenizer_class"] = "Qwen2Tokenizer"
    told.pop("added_tokens_decoder", None)
    (place / "tokenizer_config.json").write_text(json.dumps(told))
    refused(lambda: drawn(file, parts=place), f"{mark} is not a single token")
    home = tmp_path / "comfy/text_encoders/qwen25_tokenizer"
    shutil.copytree(place, home)
    refused(lambda: drawn(file, models_dir=tmp_path), "no tokenizer")
    shutil.copytree(folder / "tokenizer", tmp_path / "backend/huggingface/a/klein/tokenizer")
    model, _ = drawn(file, models_dir=tmp_path)
    assert model.other_parts["name"] == "klein/tokenizer"
