"""The models folder: what is found in it by name and by hash, and what is never found."""

import base64
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from safelight import cli
from safelight.adapters.embeddings import EmbeddingFinder
from safelight.weights import library as module
from safelight.weights import load_model, plan
from safelight.weights.digest import digest_file
from safelight.weights.find import find
from safelight.weights.kinds import kind_of
from safelight.weights.library import Library, open_library
from weights_tiny import pixel_folder, refused, text_folder, write

LORA = {"lora_unet_x.lora_down.weight": torch.ones(2, 4), "lora_unet_x.alpha": torch.ones(())}
EMBEDDING = {"emb_params": torch.ones(2, 24)}
VAE = {"encoder.conv_in.weight": torch.ones(2), "decoder.conv_in.weight": torch.ones(2)}
MODEL = {f"model.diffusion_model.{i}": torch.ones(2) for i in range(5)}
A1111 = {
    "model": "models/Stable-diffusion",
    "lora": "models/Lora",
    "vae": "models/VAE",
    "embedding": "embeddings",
}
COMFY = {"model": "checkpoints", "lora": "loras", "vae": "vae", "embedding": "embeddings"}
ALONE = {**COMFY, "model": "diffusion_models"}
"""Where ComfyUI looks for files of the network that denoises alone; in older versions, `unet`."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SAFELIGHT_MODELS", raising=False)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def file(path: Path, tensors=LORA, metadata=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(
    "folders",
    [A1111, COMFY, {k: f"models/{v}" for k, v in COMFY.items()}, ALONE, {**ALONE, "model": "unet"}],
)
def test_the_folders_of_other_programs_are_known(root, folders):
    for folder in folders.values():
        file(root / folder / "sub/one.safetensors")
        write(root / folder / "two.pt", "x")
        write(root / folder / "note.txt", "x")
    library = Library(root)
    for kind in folders:
        assert [e.name for e in library.entries(kind)] == ["sub/one", "two"]
        for name in ("sub/one", "one", "one.safetensors", "sub/one.safetensors", "ONE", "Sub/One"):
            assert library.find(name, kind).path.name == "one.safetensors"
    assert len(library.entries()) == 8


def test_a_list_of_models_does_not_read_the_folders_of_other_kinds(root, monkeypatch):
    for folder in COMFY.values():
        file(root / folder / "one.safetensors")
    walked = []
    walk = module._walk

    def walking(home, kind, links):
        walked.append(kind)
        return walk(home, kind, links)

    monkeypatch.setattr(module, "_walk", walking)
    assert [entry.kind for entry in Library(root).entries("model")] == ["model"]
    assert walked == ["model"]
    assert {entry.kind for entry in Library(root).entries()} == {*COMFY}


def test_an_autoencoder_with_what_training_needs_is_one(root):
    beside = {"loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(1)}
    file(root / "kl.ckpt", {**VAE, **beside})
    below = {f"first_stage_model.{key}": tensor for key, tensor in {**VAE, **beside}.items()}
    file(root / "whole.sft", {**below, "quant_conv.num_batches_tracked": torch.zeros(1)})
    file(root / "loss.sft", beside)
    file(root / "model.sft", {**MODEL, **below})
    kinds = {entry.file_name: entry.kind for entry in Library(root).entries()}
    assert kinds == {
        "kl.ckpt": "vae",
        "whole.sft": "vae",
        "loss.sft": "model",
        "model.sft": "model",
    }
    assert Library(root).find("whole", "vae") == Library(root).find("whole.sft", "vae")


def test_an_image_encoder_among_the_controlnets_is_listed_alone_too(root):
    tensors = {"class_embedding": torch.zeros(4), "patch_embedding.weight": torch.zeros(4, 3, 2, 2)}
    tensors = {f"vision_model.embeddings.{name}": tensor for name, tensor in tensors.items()}
    file(
        root / "ControlNet/vit.safetensors", {**tensors, "visual_projection.weight": torch.ones(2)}
    )
    library = Library(root)
    assert [entry.kind for entry in library.entries()] == ["image_encoder"]
    assert library.entries("image_encoder") == library.entries()
    assert library.entries("controlnet") == []


def test_a_file_in_the_root_is_what_its_content_says(root):
    for kind, tensors in (
        ("lora", LORA),
        ("embedding", EMBEDDING),
        ("vae", VAE),
        ("model", MODEL),
    ):
        file(root / f"{kind}-file.safetensors", tensors)
    write(root / "broken.safetensors", "x")
    pixel_folder(root / "pixels")
    write(root / "notes/a.safetensors", "a folder that no program has")
    found = {(e.kind, e.name) for e in Library(root).entries()}
    assert found == {(k, f"{k}-file") for k in A1111} | {("model", "pixels")}


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["conv_first.weight", "body.0.rdb1.conv1.weight"], "upscaler"),
        (["body.0.weight", "body.1.weight"], "upscaler"),
        (["conv_in.weight", "body.0.block1.weight"], "controlnet"),
        (["body.0.in_conv.weight", "body.0.body.0.block1.weight"], "controlnet"),
    ],
)
def test_upscalers_are_no_t2i_adapters(tmp_path, names, kind):
    tensors = {name: torch.zeros(1, 1, 1, 1) for name in names}
    assert kind_of(tensors) == kind
    told = {"upscaler": "this is an upscaler", "controlnet": "this is a T2I-Adapter"}[kind]
    path = file(tmp_path / "a.safetensors", tensors)
    refused(lambda: load_model(path), told)


def test_a_lora_of_diffusers_older_names_is_no_model(root):
    names = [f"unet.down.attn1.processor.to_q_lora.{half}.weight" for half in ("down", "up")]
    file(root / "old.safetensors", {name: torch.ones(2, 2) for name in names})
    assert [(e.kind, e.name) for e in Library(root).entries()] == [("lora", "old")]


def test_a_picture_with_an_embedding_is_one_and_its_preview_is_not(root, capsys):
    content = {"string_to_param": {"*": {"TORCHTENSOR": [[0.5] * 24]}}, "name": "its own"}
    text = base64.b64encode(json.dumps(content).encode()).decode()
    home = root / "embeddings/styles"
    home.mkdir(parents=True)
    for name, texts in (("ink", {"sd-ti-embedding": text}), ("ink.preview", {}), ("moss", {})):
        Image.new("RGB", (8, 8)).save(home / f"{name}.png", pnginfo=plain_text(texts))
    Image.new("RGB", (8, 8)).save(root / "a.png", pnginfo=plain_text({"sd-ti-embedding": text}))
    write(home / "broken.png", "x")
    library = Library(root)
    assert [e.name for e in library.entries()] == ["styles/ink"]
    assert library.find("ink.png", "embedding").path == home / "ink.png"
    found = EmbeddingFinder(library).located("ink")
    assert (found.name, found.token, found.widths) == ("ink", "its own", (24,))
    assert cli.run(["models", "--all", "--models-dir", str(root)]) == 0
    [line] = [each for each in capsys.readouterr().out.splitlines() if "styles/ink" in each]
    assert line.endswith("models folder")


def plain_text(texts):
    info = PngImagePlugin.PngInfo()
    for key, value in texts.items():
        info.add_text(key, value)
    return info


def test_models_are_found_by_name(root, monkeypatch):
    folder = text_folder(root / "checkpoints/my/tiny")
    for how in ({"models_dir": root}, {"models_dir": str(root)}, {}):
        if not how:
            monkeypatch.setenv("SAFELIGHT_MODELS", str(root))
        for name in ("tiny", "my/tiny", "TINY"):
            assert find(name, **how).path == folder
    model = load_model("tiny", device="cpu")
    assert (model.name, model.library.root) == ("my/tiny", root)
    assert load_model(folder, device="cpu", models_dir=None).library is not None


def test_a_path_and_a_built_in_name_come_before_the_folder(root, tmp_path, monkeypatch):
    text_folder(root / "checkpoints/embedded")
    text_folder(root / "checkpoints/here")
    here = text_folder(tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    assert find("embedded", models_dir=root).path.parent.name == "models"
    assert find("here", models_dir=root).path == Path("here")
    assert here.is_dir()


def test_a_folder_of_other_things_hides_no_model(root, tmp_path, monkeypatch):
    there = text_folder(root / "checkpoints/tiny")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find("tiny", models_dir=root).path == there
    assert find("empty", models_dir=root).path == Path("empty")


def test_the_folder_of_a_lora_is_named_by_the_folder(root):
    weights = file(root / "loras/mine/adapter_model.safetensors")
    file(root / "loras/other/checkpoint-5/pytorch_lora_weights.safetensors")
    file(root / "loras/adapter_model.safetensors")
    library = Library(root)
    names = [entry.name for entry in library.entries("lora")]
    assert names == ["adapter_model", "mine", "other/checkpoint-5"]
    assert library.find("mine", "lora").path == weights
    assert library.find("loras/mine/adapter_model.safetensors", "lora").path == weights


def test_a_name_of_two_files_is_an_error_that_lists_both(root):
    file(root / "loras/a/eyes.safetensors")
    file(root / "loras/b/eyes.safetensors")
    write(root / "loras/a/eyes.pt", "x")
    library = Library(root)
    refused(lambda: library.find("eyes", "lora"), "loras/a/eyes", "loras/", "more of its path")
    refused(lambda: library.find("a/eyes", "lora"), "a/eyes.pt", "a/eyes.safetensors")
    assert library.find("a/eyes.pt", "lora").path.suffix == ".pt"
    assert library.find("b/eyes", "lora").path.parent.name == "b"
    assert library.find("loras/a/eyes.pt", "lora") == library.find("a/eyes.pt", "lora")
    refused(lambda: find("x", models_dir=root), "not in the models folder")


def test_a_name_in_full_comes_before_the_same_name_deeper_down(root):
    file(root / "loras/eyes.safetensors")
    file(root / "loras/more/eyes.safetensors")
    file(root / "loras/more/EYES.safetensors")
    assert Library(root).find("eyes", "lora").path == root / "loras/eyes.safetensors"
    assert Library(root).find("EYES", "lora").path == root / "loras/more/EYES.safetensors"


def test_a_lora_is_found_by_what_its_training_called_it(root):
    file(root / "loras/download-17.safetensors", metadata={"ss_output_name": "Blue Eyes"})
    assert Library(root).find("Blue Eyes", "lora").name == "download-17"
    refused(lambda: Library(root).find("Blue", "lora"), "no lora 'Blue'", "download-17")
    refused(lambda: Library(root).find("Blue Eyes", "model"), "no model")


NAMES = [
    "../outside", "../../outside", "loras/../../outside", "/etc/passwd", "~/x", "..", ".", "",
    "a\0b", "a\nb", "x" * 9999, "sub/../eyes", "./eyes", "//eyes", "loras/eyes", "eyes/", "*",
    "\udcff", "C:\\x", "..\\outside", "https://example.com/x", "%2e%2e/outside",
]  # fmt: skip


@pytest.mark.parametrize("kind", list(A1111))
@pytest.mark.parametrize("name", NAMES)
def test_no_name_leads_out_of_the_folder(root, tmp_path, name, kind):
    file(tmp_path / "outside.safetensors")
    for folder in COMFY.values():
        file(root / folder / "eyes.safetensors")
    refused(lambda: Library(root).find(name, kind), f"no {kind}")


def test_a_name_beyond_the_folder_itself_is_refused_where_a_path_is_absolute(root, tmp_path):
    outside = file(tmp_path / "outside.safetensors")
    refused(lambda: Library(root).find(str(outside), "lora"), "no lora")


def test_links_to_files_are_followed_and_links_to_folders_are_not(root, tmp_path):
    big = file(tmp_path / "disk/big.safetensors")
    (root / "loras").mkdir()
    (root / "loras/linked.safetensors").symlink_to(big)
    (root / "loras/gone.safetensors").symlink_to(tmp_path / "nowhere")
    (root / "loras/all").symlink_to(big.parent)
    (root / "checkpoints").symlink_to(big.parent)
    (root / "loras/self").symlink_to(root / "loras")
    library = Library(root)
    assert [e.name for e in library.entries()] == ["linked"]
    assert library.find("linked", "lora").path.read_bytes() == big.read_bytes()
    refused(lambda: library.find("all", "lora"), "a link to a folder", "link its files")
    refused(lambda: library.find("checkpoints", "model"), "a link to a folder")


def test_a_linked_models_folder_is_one(root, tmp_path):
    file(root / "loras/eyes.safetensors")
    (tmp_path / "link").symlink_to(root)
    assert Library(tmp_path / "link").find("eyes", "lora")


def test_a_file_is_found_by_each_of_its_hashes(root):
    other = {**LORA, "lora_unet_x.alpha": torch.zeros(())}
    file(root / "loras/other.safetensors", other)
    path = file(root / "loras/eyes.safetensors", LORA, {"note": "edited since"})
    named = file(root / "loras/named.safetensors", other, {"sshs_model_hash": "AB" * 32})
    content = path.read_bytes()
    whole = hashlib.sha256(content).hexdigest()
    tensors = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    library = Library(root)
    for text in (whole, whole[:10], whole.upper(), tensors[:12], tensors):
        assert library.by_hash(text, "lora").path == path
    assert library.by_hash("ab" * 6, "lora").path == named
    for text in ("", "0" * 64, whole[:7], "not hex at all", whole[:9] + "\n"):
        assert library.by_hash(text, "lora") is None
    assert library.by_hash(whole, "model") is None


def test_the_old_hash_of_models_is_known(root):
    path = file(root / "checkpoints/a.safetensors", {"w": torch.rand(300_000)})
    old = hashlib.sha256(path.read_bytes()[2**20 : 2**20 + 2**16]).hexdigest()[:8]
    assert Library(root).by_hash(old, "model").path == path


def test_what_was_read_of_a_file_is_remembered_as_long_as_it_stays(root, monkeypatch):
    path = file(root / "one.safetensors", LORA)
    assert Library(root).entries()[0].kind == "lora"
    read = module.header_of
    monkeypatch.setattr(module, "header_of", lambda p: pytest.fail(f"{p} was read again"))
    assert Library(root).entries()[0].kind == "lora"
    monkeypatch.setattr(module, "header_of", read)
    file(path, EMBEDDING)
    assert Library(root).entries()[0].kind == "embedding"


def test_large_files_are_hashed_once(root, monkeypatch):
    path = file(root / "loras/big.safetensors", {"a.lora_down.weight": torch.zeros(5 * 2**20)})
    whole = digest_file(path).sha256
    monkeypatch.setattr(module, "digest_file", lambda p: pytest.fail("hashed again"))
    assert Library(root).by_hash(whole, "lora").path == path
    os.utime(path)
    monkeypatch.undo()


def test_a_damaged_file_beside_it_hides_nothing(root):
    write(root / "loras/a.safetensors", "\xff" * 99)
    write(root / "loras/b.safetensors", "")
    path = file(root / "loras/c.safetensors")
    whole = hashlib.sha256(path.read_bytes()).hexdigest()
    assert Library(root).by_hash("0" * 12, "lora") is None
    assert Library(root).by_hash(whole, "lora").path == path


@pytest.mark.parametrize("how", ["argument", "variable"])
def test_a_folder_that_is_not_there_is_one_line(how, tmp_path, monkeypatch):
    absent = tmp_path / "none"
    if how == "variable":
        monkeypatch.setenv("SAFELIGHT_MODELS", str(absent))
    given = absent if how == "argument" else None
    refused(lambda: open_library(given), "no models folder")
    refused(lambda: load_model("embedded", models_dir=given), "no models folder")


def test_no_folder_is_no_library(monkeypatch):
    assert open_library() is None
    monkeypatch.setenv("SAFELIGHT_MODELS", "")
    assert open_library() is None
    refused(lambda: find("x"), "SAFELIGHT_MODELS not set")


def test_the_command_line_takes_a_models_folder(root, tmp_path, capsys, monkeypatch):
    text_folder(root / "Stable-diffusion/tiny")
    shutil.copytree(root / "Stable-diffusion", root / "more")
    monkeypatch.chdir(tmp_path)
    small = [
        "-W",
        "64",
        "-H",
        "64",
        "--steps",
        "1",
        "--sampler",
        "euler",
        "--models-dir",
        str(root),
        "-m",
        "tiny",
    ]
    assert cli.run(["generate", "app", *small, "--out", "a.png"]) == 0
    assert cli.run(["inspect", "tiny", "--models-dir", str(root)]) == 0
    assert "family: custom" in capsys.readouterr().out
    assert cli.run(["verify", "a.png", "--models-dir", str(root)]) == 0
    monkeypatch.setenv("SAFELIGHT_MODELS", str(root))
    assert cli.run(["verify", "a.png"]) == 0
    (root / "Stable-diffusion/tiny").rename(root / "Stable-diffusion/renamed")
    assert cli.run(["generate", "app", *small]) == 2


# --- what is there -------------------------------------------------------------------------------


@pytest.fixture
def filled(root, monkeypatch):
    """A models folder with one of each kind, and what is no model."""
    text_folder(root / "checkpoints/tiny")
    file(root / "checkpoints/odd.safetensors")
    write(root / "checkpoints/broken.ckpt", "PK\3\4")
    file(root / "loras/eyes.safetensors", metadata={"ss_base_model_version": "sd_v1"})
    file(root / "embeddings/word.safetensors", EMBEDDING)
    file(root / "vae/blue.safetensors", {k: t.half() for k, t in VAE.items()})
    monkeypatch.setenv("SAFELIGHT_MODELS", str(root))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root / "none"))
    return root


def test_models_are_listed_with_family_size_and_precision(filled, capsys):
    assert cli.run(["models", "--json"]) == 0
    listed = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    tiny = listed["tiny"]
    weights = sum(f.stat().st_size for f in (filled / "checkpoints/tiny").rglob("*.safetensors"))
    assert (tiny["family"], tiny["dtypes"], tiny["where"]) == ("custom", ["F32"], "models folder")
    assert weights < tiny["bytes"] < weights + 50_000
    assert listed["embedded"]["where"] == "ships with Safelight"
    assert "LoRA" in listed["odd"]["why_not"]
    assert "broken.ckpt: " in listed["broken"]["why_not"]
    assert "eyes" not in listed
    assert cli.run(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["NAME", "FAMILY", "SIZE", "PRECISION", "WHERE"]
    assert any(line.split()[:2] == ["tiny", "custom"] for line in lines)


def test_all_kinds_are_listed(filled, capsys):
    assert cli.run(["models", "--all", "--json", "--models-dir", str(filled)]) == 0
    listed = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert {listed[name]["kind"] for name in ("eyes", "word", "blue", "tiny")} == set(A1111)
    assert listed["eyes"]["family"] == "sd_v1"
    assert listed["blue"]["dtypes"] == ["F16"]
    assert cli.run(["models", "--all"]) == 0
    assert capsys.readouterr().out.startswith("KIND")


def test_a_second_listing_reads_no_header(filled, capsys, monkeypatch):
    assert cli.run(["models", "--json"]) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr(plan, "read_plan", lambda *_: pytest.fail("read again"))
    assert cli.run(["models", "--json"]) == 0
    assert capsys.readouterr().out == first
