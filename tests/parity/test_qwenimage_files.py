"""Qwen-Image's files as people have them: each draws what its folder draws, to the byte."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from safelight import cli
from safelight.adapters.keys import family_of, family_of_keys
from safelight.errors import SafelightError
from safelight.families import qwenimage
from safelight.families.flow_files import Published
from safelight.families.latent import TINY_PART, VAE_PART
from safelight.families.qwenimage import QWEN_VAE_PART
from safelight.families.qwenimage_files import other_kind
from safelight.recipe import read_recipe
from safelight.weights import load_model
from safelight.weights.convert import convert
from safelight.weights.estimate import estimate
from safelight.weights.find import Source
from safelight.weights.hub import files_of
from safelight.weights.kinds import kind_of
from safelight.weights.library import Library
from safelight.weights.vae_file import check_kind
from tests.gguf_text import llama_file, qwen_metadata
from tests.parity.flow_models import (
    ASKED,
    FLUX_VAE,
    QWEN_IMAGE_SCHEDULER,
    configs,
    make_qwen_image,
)
from tests.parity.test_flow_loras import KOHYA, LAYERS, PEFT, pairs, same, written
from tests.parity.test_flow_parts import qwen_tokenizer
from tests.parity.test_quantised import WHOLE, as_codes, float8_file, gguf_file, per_row
from tests.parity.test_qwenimage_nets import wan_names
from tests.weights_tiny import refused

State = dict[str, torch.Tensor]
CPU: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
TEXTS = "text_encoders.qwen25_7b.transformer."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_qwen_image(tmp_path_factory.mktemp("files") / "qwen-image")
    qwen_tokenizer(made / "tokenizer")  # with merges, as GGUF files need them
    return made


@pytest.fixture(autouse=True)
def tiny(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = configs(folder)
    told["text_encoder"] |= told["text_encoder"].pop("text_config")
    published = Published(told, QWEN_IMAGE_SCHEDULER)
    monkeypatch.setattr(qwenimage, "BASE", replace(qwenimage.BASE, published=published))


@pytest.fixture(scope="module")
def states(folder: Path) -> dict[str, State]:
    """The weights of each network, the autoencoder's in their original names."""
    found = {
        name: load_file(next((folder / name).glob("*.safetensors")))
        for name in ("transformer", "vae", "text_encoder")
    }
    config = json.loads((folder / "vae/config.json").read_text())
    found["vae"] = wan_names(found["vae"], config)
    return found


@pytest.fixture(scope="module")
def files(states: dict[str, State], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The networks as ComfyUI's users have them, each in a file of its own."""
    root = tmp_path_factory.mktemp("comfy")
    found = {name: root / f"{name}.safetensors" for name in states}
    for name, state in states.items():
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, found[name])
    return found


def drawn(path: Path | str, **given: Any) -> tuple[Any, bytes]:
    model = load_model(path, **CPU, **given)
    return model, model.generate("a red apple", **ASKED).images[0].tobytes()


@pytest.fixture(scope="module")
def wanted(folder: Path) -> bytes:
    return drawn(folder)[1]


def others(files: dict[str, Path], folder: Path) -> list[Path]:
    return [files["vae"], files["text_encoder"], folder / "tokenizer/tokenizer.json"]


# --- single files --------------------------------------------------------------------------------


def test_files_of_comfyui(folder: Path, files: dict[str, Path], wanted: bytes) -> None:
    model, found = drawn(files["transformer"], parts=others(files, folder))
    assert found == wanted
    assert model.family is qwenimage.BASE
    assert model.warnings == []
    kinds = {name: kind_of(load_file(path)) for name, path in files.items()}
    assert kinds == {"transformer": "model", "vae": "vae", "text_encoder": "text_encoder"}


def test_a_folder_lends_what_a_file_lacks(
    folder: Path, states: dict[str, State], wanted: bytes, tmp_path: Path
) -> None:
    whole = {f"{WHOLE}{key}": tensor for key, tensor in states["transformer"].items()}
    save_file(whole, file := tmp_path / "qwen.safetensors")
    assert drawn(file, parts=folder)[1] == wanted


def test_a_file_of_all_parts(
    folder: Path, states: dict[str, State], wanted: bytes, tmp_path: Path
) -> None:
    """As checkpoints of ComfyUI have them; it lacks a tokenizer alone."""
    prefixes = {"transformer": WHOLE, "vae": "vae.", "text_encoder": TEXTS}
    whole = {
        f"{prefixes[name]}{key}": tensor.contiguous()
        for name, state in states.items()
        for key, tensor in state.items()
    }
    save_file(whole, file := tmp_path / "qwen-all.safetensors")
    assert drawn(file, parts=folder / "tokenizer")[1] == wanted
    home = tmp_path / "comfy/text_encoders/qwen25_tokenizer"
    shutil.copytree(folder / "tokenizer", home)
    (tmp_path / "models").mkdir()
    model, found = drawn(file, models_dir=tmp_path / "models")
    assert found == wanted
    assert model.other_parts["name"] == "qwen25_tokenizer"
    refused(lambda: load_model(file, **CPU), "no tokenizer", "Qwen2.5-VL's tokenizer.json")


def test_newer_names_of_the_text_encoder(
    folder: Path, files: dict[str, Path], wanted: bytes, tmp_path: Path
) -> None:
    """transformers has the language model below a name since its version 4.52."""
    state = load_file(files["text_encoder"])
    named = {
        key.replace("model.", "model.language_model.", 1)
        if key.startswith("model.")
        else key.replace("visual.", "model.visual."): tensor
        for key, tensor in state.items()
    }
    save_file(named, new := tmp_path / "new.safetensors")
    parts = [files["vae"], new, folder / "tokenizer"]
    assert drawn(files["transformer"], parts=parts)[1] == wanted


def test_float8(
    folder: Path, states: dict[str, State], files: dict[str, Path], tmp_path: Path
) -> None:
    """qwen_image_fp8_e4m3fn and qwen_2.5_vl_7b_fp8_scaled: text encoder and transformer."""
    whole = {f"{WHOLE}{key}": tensor for key, tensor in states["transformer"].items()}
    file = float8_file(whole, tmp_path / "qwen.safetensors", per_row)
    codes, numbers = dict(states["text_encoder"]), dict(states["text_encoder"])
    codes["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    for key, tensor in states["text_encoder"].items():
        if key.startswith("model.layers.") and tensor.dim() == 2:
            scale = tensor.abs().max() / 448
            codes[key] = (tensor / scale).to(torch.float8_e4m3fn)
            codes[f"{key.removesuffix('weight')}scale_weight"] = scale[None]
            numbers[key] = codes[key].float() * scale
    save_file(codes, few := tmp_path / "text-few.safetensors")
    save_file(numbers, plain := tmp_path / "text.safetensors")
    words = folder / "tokenizer"
    found = drawn(file, parts=[few, files["vae"], words])[1]
    decoded = file.with_suffix(".decoded.safetensors")
    assert found == drawn(decoded, parts=[plain, files["vae"], words])[1]
    assert estimate(file, parts=folder, **CPU).family.name == "qwen-image"


def test_gguf(
    folder: Path, states: dict[str, State], files: dict[str, Path], tmp_path: Path
) -> None:
    """The transformer has the names of its folder, the text encoder those of llama.cpp."""
    whole = {f"{WHOLE}{key}": tensor for key, tensor in states["transformer"].items()}
    file = gguf_file(whole, tmp_path / "qwen.gguf")
    state = {
        key: tensor for key, tensor in states["text_encoder"].items() if key.startswith("model.")
    }
    content = json.loads((folder / "tokenizer/tokenizer.json").read_text(encoding="utf-8"))
    said = qwen_metadata(content, 320)
    text = tmp_path / "qwen2.5-vl.gguf"
    numbers = llama_file(text, state, said, "Q8_0", arch="qwen2vl")
    save_file(numbers, plain := tmp_path / "text.safetensors")
    model, found = drawn(file, parts=[text, files["vae"]])
    decoded = file.with_suffix(".decoded.safetensors")
    assert found == drawn(decoded, parts=[plain, files["vae"], folder / "tokenizer"])[1]
    assert any(name.startswith("text_encoder.layers.0.") for name in as_codes(model))
    short, found = drawn(file, parts=[text, files["vae"]], low_memory=True)
    assert "transformer.transformer_blocks.0.img_mlp.net.2" in as_codes(short)
    low = {"low_memory": True, "parts": [plain, files["vae"], folder / "tokenizer"]}
    assert found == drawn(decoded, **low)[1]


def test_what_a_file_takes_from_the_hub(folder: Path) -> None:
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    index = json.loads((folder / "model_index.json").read_text())
    taken = files_of(index, names, "qwen", lacking=["vae", "text_encoder", "tokenizer"])
    places = {name.partition("/")[0] for name in taken}
    assert places == {"model_index.json", "vae", "text_encoder", "tokenizer"}


def test_the_command_line(
    folder: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names of a models folder, and of the parts in it."""
    models = tmp_path / "models"
    for home, name in (
        ("diffusion_models", "transformer"),
        ("text_encoders", "text_encoder"),
        ("vae", "vae"),
    ):
        (models / home).mkdir(parents=True)
        shutil.copyfile(files[name], models / home / f"qwen-{name}.safetensors")
    shutil.copytree(folder / "tokenizer", tmp_path / "comfy/text_encoders/qwen25_tokenizer")
    found = {(entry.kind, entry.name) for entry in Library(models).entries()}
    assert found == {
        ("model", "qwen-transformer"),
        ("text_encoder", "qwen-text_encoder"),
        ("vae", "qwen-vae"),
    }
    png, options = str(tmp_path / "a.png"), ["--models-dir", str(models)]
    parts = ["--parts", "qwen-text_encoder", "--parts", "qwen-vae"]
    size = ["--width", "64", "--height", "64", "--steps", "2", "--device", "cpu"]
    asked = ["generate", "a red apple", "--model", "qwen-transformer", *parts, *options, *size]
    assert cli.run([*asked, "--out", png]) == 0
    assert cli.run(["verify", png, *options]) == 0
    assert read_recipe(Path(png))["settings"]["guidance_scale"] == 4.0
    capsys.readouterr()
    assert cli.run(["inspect", str(files["transformer"])]) == 0
    told = capsys.readouterr().out
    assert "qwen-image" in told
    assert "no vae, text_encoder and tokenizer" in told


# --- its autoencoder -----------------------------------------------------------------------------


def test_an_autoencoder_in_each_layout(
    folder: Path, files: dict[str, Path], wanted: bytes, tmp_path: Path
) -> None:
    torch.manual_seed(9)
    config = json.loads((folder / "vae/config.json").read_text())
    other = diffusers.AutoencoderKLQwenImage.from_config(config)
    other.save_pretrained(tmp_path / "vae")
    own = drawn(folder, vae=tmp_path / "vae")[1]
    assert own != wanted
    state = load_file(tmp_path / "vae/diffusion_pytorch_model.safetensors")
    for prefix in ("", "vae."):
        for one in (state, wan_names(state, config)):
            named = {prefix + key: tensor.contiguous() for key, tensor in one.items()}
            save_file(named, file := tmp_path / "other.safetensors")
            assert drawn(folder, vae=file)[1] == own
    assert drawn(folder, vae=files["vae"])[1] == wanted


def test_autoencoders_of_other_families_are_refused(
    folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    """Those of FLUX.1 have as many channels."""
    diffusers.AutoencoderKL(**FLUX_VAE).save_pretrained(tmp_path / "flux")
    refused(lambda: load_model(folder, vae=tmp_path / "flux", **CPU), "AutoencoderKL does not fit")
    state = load_file(tmp_path / "flux/diffusion_pytorch_model.safetensors")
    save_file(state, file := tmp_path / "flux.safetensors")
    refused(lambda: load_model(folder, vae=file, **CPU), "AutoencoderKL does not fit")
    parts = [file, files["text_encoder"], folder / "tokenizer"]
    refused(
        lambda: load_model(files["transformer"], parts=parts, **CPU), "AutoencoderKL does not fit"
    )
    refused(lambda: load_model("embedded", vae=files["vae"], **CPU), "AutoencoderKLQwenImage does")


# --- LoRAs ---------------------------------------------------------------------------------------

LORA = (*LAYERS, "img_mlp.net.2", "txt_mlp.net.0.proj", "img_mod.1")


def test_tiny_autoencoders_are_of_other_latents() -> None:
    """Those of FLUX.1 and Stable Diffusion 3 have as many channels."""
    source = Source("taef1", Path("taef1"))
    refused(lambda: check_kind(source, TINY_PART, QWEN_VAE_PART), "AutoencoderTiny does not fit")
    check_kind(source, TINY_PART, VAE_PART)


def test_loras(folder: Path, tmp_path: Path) -> None:
    """In the names of diffusers and of trainers; the files for few steps have bare names."""
    model = load_model(folder, **CPU, plain=True)
    pipe: Any = diffusers.QwenImagePipeline.from_pretrained(folder)
    named = pairs(model.network, LORA)
    path = tmp_path / "a.safetensors"
    written(path, {f"transformer.{key}": two for key, two in named.items()}, PEFT)
    pipe.load_lora_weights(tmp_path, weight_name=path.name)
    pipe.fuse_lora(lora_scale=0.75)
    pipe.unload_lora_weights()
    fused = pipe.transformer.state_dict()
    same(model.adapted([f"{path}:0.75"]).network, fused, model.network)
    flat = {f"lora_unet_{key.replace('.', '_')}": two for key, two in named.items()}
    for other in (named, {f"diffusion_model.{key}": two for key, two in named.items()}, flat):
        tensors = written(path, other, KOHYA)
        save_file(tensors | {f"{key}.alpha": torch.tensor(4.0) for key in other}, path)
        same(model.adapted([f"{path}:0.75"]).network, fused, model.network)


def test_a_lora_of_another_family(folder: Path, tmp_path: Path) -> None:
    for key in (
        "transformer_blocks.0.img_mod.1.alpha",
        "x_transformer_blocks_0_img_mlp_net_2.alpha",
    ):
        assert family_of_keys([key]) == "Qwen-Image"
    assert family_of({}, {"modelspec.architecture": "qwen-image/lora"}) == "Qwen-Image"
    file = {"transformer_blocks.0.img_mlp.net.2.lora_down.weight": torch.ones(2, 8)}
    file["transformer_blocks.0.img_mlp.net.2.lora_up.weight"] = torch.ones(8, 2)
    save_file(file, tmp_path / "qwen.safetensors")
    model = load_model("embedded", **CPU)
    with pytest.raises(SafelightError, match="for Qwen-Image, and this model is custom"):
        model.adapted([str(tmp_path / "qwen.safetensors")])


# --- what is refused -----------------------------------------------------------------------------


def edited(states: dict[str, State], root: Path, name: str, **more: torch.Tensor) -> Path:
    save_file(states["transformer"] | more, path := root / f"{name}.safetensors")
    return path


def test_other_models_of_the_kind(states: dict[str, State], tmp_path: Path) -> None:
    """Their networks read a picture. Of the first ones only the name tells."""
    one = torch.zeros(1)
    layers = {"time_text_embed.addition_t_embedding.weight": torch.ones(2, 64)}
    files = {
        "Qwen-Image-Edit": edited(states, tmp_path, "qwen_image_edit_2509_fp8_e4m3fn"),
        "Qwen-Image-Edit is": edited(states, tmp_path, "renamed", __index_timestep_zero__=one),
        "Qwen-Image-Layered": edited(states, tmp_path, "other", **layers),
        "Qwen-Image-Layered is": edited(states, tmp_path, "Qwen_Image_Layered"),
    }
    for said, path in files.items():
        refused(lambda path=path: load_model(path, **CPU), said, "from text alone")
    named = edited(states, tmp_path, "qwen-image-special-edition")
    refused(lambda: load_model(named, **CPU), "the file has no vae")


def test_names_of_other_models_of_the_kind() -> None:
    def told(name: str) -> str | None:
        return other_kind(cast(Any, SimpleNamespace(name=name, tensors={})), "")

    for name in (
        "qwenImageEditRapid_v90",
        "qwenEdit_v1",
        "Qwen-Image-EditPlus",
        "QWEN_IMAGE_EDIT",
        "qwenimageedit2511",
        "qwen-edit",
    ):
        assert told(f"{name}.safetensors") == "Qwen-Image-Edit", name
    for name in ("Edition", "EDITION", "edition", "Credit", "CREDIT", "meditation"):
        assert told(f"Qwen-Image-{name}.gguf") is None, name
        assert told(f"qwenImage{name}.gguf") is None, name


@pytest.mark.parametrize("kind", ["Edit", "EditPlus", "Layered", "ControlNet", "21"])
def test_other_pipelines(folder: Path, tmp_path: Path, kind: str) -> None:
    name = f"QwenImage{kind}Pipeline"
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    refused(lambda: load_model(tmp_path, **CPU), name, "from text alone")


def changed(folder: Path, place: Path, part: str, **values: Any) -> Path:
    other = shutil.copytree(folder, place)
    config = json.loads((other / part / "config.json").read_text())
    (other / part / "config.json").write_text(json.dumps({**config, **values}))
    return other


@pytest.mark.parametrize(
    ("part", "values", "said"),
    [
        ("transformer", {"joint_attention_dim": 64}, "text encoder gives 32 numbers"),
        ("transformer", {"in_channels": 32}, "vae gives 64 numbers"),
        ("transformer", {"out_channels": 8}, "transformer gives 8 numbers"),
        ("transformer", {"zero_cond_t": True}, "zero_cond_t=True is not supported"),
        ("vae", {"attn_scales": [0.5]}, "attn_scales"),
    ],
)
def test_parts_that_do_not_fit(
    folder: Path, tmp_path: Path, part: str, values: dict[str, Any], said: str
) -> None:
    other = changed(folder, tmp_path / "other", part, **values)
    refused(lambda: load_model(other, device="cpu"), said)


def test_what_would_not_be_whole(folder: Path, tmp_path: Path) -> None:
    for name in ("other", "other.safetensors"):
        refused(lambda name=name: convert(str(folder), tmp_path / name), "cannot be converted")
    assert not [*tmp_path.iterdir()]


def test_controlnets(folder: Path, tmp_path: Path) -> None:
    control = {"controlnet_x_embedder.weight": torch.ones(2, 2)}
    save_file(control, file := tmp_path / "control.safetensors")
    given: Callable[[], Any] = lambda: load_model(folder, controlnet=file, **CPU)  # noqa: E731
    refused(given, "Qwen-Image", "takes no ControlNet yet")
