"""Files of text encoders, autoencoders and tokenizers give a transformer's file what it lacks."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from safelight import cli
from safelight.families import flux, sd3, zimage
from safelight.families.flow_files import Published
from safelight.fast.quantised import Quantised
from safelight.recipe import read_recipe
from safelight.server.names import Names
from safelight.server.on_ray import on_nodes
from safelight.server.settings import WorkerSettings
from safelight.studio.run import model_options
from safelight.weights import inspect, load_model, tokenizers
from safelight.weights.check import Header, TensorInfo
from safelight.weights.convert import convert
from safelight.weights.encoder_files import place_encoders, read_encoders
from safelight.weights.estimate import estimate
from safelight.weights.find import find, parts_finder
from safelight.weights.library import Library
from safelight.weights.plan import read_plan
from tests.gguf_text import llama_file, llama_name, qwen_metadata, t5_metadata, tokenizer_content
from tests.parity.flow_models import (
    ASKED,
    DEV,
    SD3_SCHEDULER,
    T5,
    configs,
    make_flux,
    make_sd3,
    make_zimage,
)
from tests.parity.test_flow_single import DUAL, ORIGINAL, bare, drawn, of_folder
from tests.weights_tiny import refused

State = dict[str, Tensor]
CPU: dict[str, Any] = {"device": "cpu", "dtype": "float32"}


def qwen_tokenizer(folder: Path) -> None:
    """Write a small tokenizer of Qwen's kind with merges, which GGUF files need."""
    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d"), ("a", "p")]
    tokens = [*letters, *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.add_special_tokens(
        [
            AddedToken(one, normalized=False)
            for one in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
        ]
    )
    whole = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    shutil.rmtree(folder)
    whole.save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    found = {
        "sd3": make_sd3(root / "sd3", **DUAL),
        "flux": make_flux(root / "flux", guided=True),
        "zimage": make_zimage(root / "zimage", shift=6.0),
        "turbo": make_zimage(root / "turbo", shift=3.0),
    }
    for name in ("zimage", "turbo"):
        qwen_tokenizer(found[name] / "tokenizer")
    return found


@pytest.fixture(autouse=True)
def tiny(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Give variants the shapes of the tiny models."""
    shrink(folders, monkeypatch)


def shrink(folders: dict[str, Path], patch: pytest.MonkeyPatch) -> None:
    for module, name, scheduler, sizes in (
        (sd3, "sd3", SD3_SCHEDULER, {"layers": 3}),
        (flux, "flux", DEV, {"layers": 2, "singles": 2}),
    ):
        published = Published(configs(folders[name]), scheduler, 64 if name == "sd3" else 1024)
        first = module.VARIANTS[1 if name == "sd3" else 0]
        patch.setattr(module, "VARIANTS", (replace(first, published=published, **sizes),))
    published = Published(configs(folders["zimage"]), {**SD3_SCHEDULER, "shift": 6.0})
    for name in ("BASE", "TURBO"):
        patch.setattr(zimage, name, replace(getattr(zimage, name), published=published))


@pytest.fixture(scope="module")
def files(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that people have, by the names of models and parts."""
    root = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        shrink(folders, patch)
        for name in ("sd3", "flux", "zimage"):
            convert(str(folders[name]), root / f"{name}-all.safetensors")
    for name in ("sd3", "flux", "zimage"):
        state = load_file(root / f"{name}-all.safetensors")
        save_file(bare(state), root / f"{name}.safetensors")
        prefix = "first_stage_model." if name == "sd3" else "vae."
        ae = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        save_file(ae, root / f"{name}-ae.safetensors")
        for part in sorted(folders[name].glob("text_encoder*")):
            shutil.copyfile(part / "model.safetensors", root / f"{name}-{part.name}.safetensors")
    shutil.copyfile(root / "zimage.safetensors", root / "zimage-turbo.safetensors")
    return root


def parts_of(files: Path, name: str, *more: Path) -> list[Path]:
    """Return an autoencoder and text encoders, in an order that is not that of the family."""
    found = [files / f"{name}-ae.safetensors", *sorted(files.glob(f"{name}-text_encoder*"))[::-1]]
    return [*found, *more]


def tokenizer(folders: dict[str, Path], name: str) -> Path:
    part = {"sd3": "tokenizer_3", "flux": "tokenizer_2"}.get(name, "tokenizer")
    return folders[name] / part


# --- the same picture ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "flux", "zimage", "turbo"])
def test_separate_files_draw_what_the_folder_draws(
    folders: dict[str, Path], files: Path, name: str
) -> None:
    model = {"turbo": "zimage-turbo"}.get(name, name)
    parts = parts_of(files, model.partition("-")[0], tokenizer(folders, name))
    loaded = load_model(files / f"{model}.safetensors", **CPU, parts=parts)
    assert loaded.family.name == load_model(folders[name], **CPU).family.name
    assert drawn(files / f"{model}.safetensors", parts=parts) == of_folder(folders[name])


def test_a_name_tells_turbo_and_else_a_warning(folders: dict[str, Path], files: Path) -> None:
    parts = parts_of(files, "zimage", tokenizer(folders, "zimage"))
    model = load_model(files / "zimage.safetensors", **CPU, parts=parts)
    assert any("which Z-Image it is" in said for said in model.warnings)
    parts[:0] = [folders["turbo"]]
    model = load_model(files / "zimage.safetensors", **CPU, parts=parts)
    assert model.family.name == "z-image-turbo"
    assert not any("which Z-Image it is" in said for said in model.warnings)


def test_a_name_counts_before_the_folder_that_lends(folders: dict[str, Path], files: Path) -> None:
    """Both variants share text encoder and autoencoder: people give the folder that they have."""
    for name in ("zimage", "turbo"):
        model = load_model(files / "zimage-turbo.safetensors", **CPU, parts=folders[name])
        assert model.family.name == "z-image-turbo"
        assert model.scheduler.shift == 3.0
        told = [said for said in model.warnings if "as its name says" in said]
        assert bool(told) == (name == "zimage")
    assert drawn(files / "zimage-turbo.safetensors", parts=folders["zimage"]) == drawn(
        files / "zimage-turbo.safetensors", parts=folders["turbo"]
    )


@pytest.mark.parametrize("order", [1, -1])
def test_a_folder_gives_what_files_leave(folders: dict[str, Path], files: Path, order: int) -> None:
    parts = [files / "flux-text_encoder.safetensors", folders["flux"]][::order]
    model = load_model(files / "flux.safetensors", **CPU, parts=parts)
    assert drawn(files / "flux.safetensors", parts=parts) == of_folder(folders["flux"])
    assert any("flux-text_encoder.safetensors of the parts" in w for w in model.warnings) == (
        order < 0
    )


def prefixed(prefix: str, drop: str = "") -> Callable[[State], State]:
    return lambda state: {prefix + k.removeprefix(drop): v for k, v in state.items()}


def added(**more: Tensor) -> Callable[[State], State]:
    return lambda state: {**state, **more}


def by_their_other_name(state: State) -> State:
    shared = state["shared.weight"]
    rest = {k: v for k, v in state.items() if k != "shared.weight"}
    return {**rest, "encoder.embed_tokens.weight": shared}


CLIP_WAYS: dict[str, Callable[[State], State]] = {
    "transformer": prefixed("transformer."),
    "bare": prefixed("", "text_model."),
    "text_model": lambda state: {
        k if k.startswith("text_") else f"text_model.{k}": v for k, v in state.items()
    },
    "comfyui": prefixed("text_encoders.clip_l.transformer."),
    "any": prefixed("a.b."),
    "more": added(
        **{
            "logit_scale": torch.ones(()),
            "text_projection": torch.randn(16, 16),
            "text_projection.weight": torch.randn(16, 16),
            "text_model.embeddings.position_ids": torch.arange(77)[None],
            "visual_projection.weight": torch.ones(2, 2),
            "vision_model.x.weight": torch.ones(2, 2),
        }
    ),
}
T5_WAYS: dict[str, Callable[[State], State]] = {
    "transformer": prefixed("transformer."),
    "comfyui": prefixed("text_encoders.t5xxl.transformer."),
    "one name": by_their_other_name,
    "both names": lambda state: {**by_their_other_name(state), **state},
    "whole": added(
        **{"lm_head.weight": torch.ones(2, 2), "decoder.block.0.x.weight": torch.ones(2, 2)},
        scaled_fp8=torch.zeros(2, dtype=torch.float8_e4m3fn),
    ),
}


def rewritten(file: Path, out: Path, change: Callable[[State], State]) -> Path:
    save_file({k: v.clone() for k, v in change(load_file(file)).items()}, out)
    return out


@pytest.mark.parametrize("way", CLIP_WAYS)
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_names_of_clip(
    folders: dict[str, Path], files: Path, tmp_path: Path, name: str, way: str
) -> None:
    """The identity is the projection of CLIP-L in Stable Diffusion 3, whatever its file has."""
    parts = parts_of(files, name, tokenizer(folders, name))
    clip = rewritten(parts.pop(-2), tmp_path / "clip.safetensors", CLIP_WAYS[way])
    assert drawn(files / f"{name}.safetensors", parts=[clip, *parts]) == of_folder(folders[name])


@pytest.mark.parametrize("way", T5_WAYS)
def test_names_of_t5(folders: dict[str, Path], files: Path, tmp_path: Path, way: str) -> None:
    parts = parts_of(files, "flux", tokenizer(folders, "flux"))
    t5 = rewritten(parts.pop(1), tmp_path / "t5.safetensors", T5_WAYS[way])
    assert drawn(files / "flux.safetensors", parts=[t5, *parts]) == of_folder(folders["flux"])


def test_separate_files_become_one(folders: dict[str, Path], files: Path, tmp_path: Path) -> None:
    for name in ("sd3", "flux", "zimage"):
        parts = parts_of(files, name, tokenizer(folders, name))
        convert(files / f"{name}.safetensors", tmp_path / f"{name}.safetensors", parts=parts)
        wanted = load_file(files / f"{name}-all.safetensors")
        found = load_file(tmp_path / f"{name}.safetensors")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_names_of_qwen(folders: dict[str, Path], files: Path, tmp_path: Path) -> None:
    ae, qwen, words = parts_of(files, "zimage", tokenizer(folders, "zimage"))
    head = {"lm_head.weight": torch.ones(2, 2)}
    for change in (
        prefixed("model.", "model."),
        prefixed("", "model."),
        prefixed("text_encoders.qwen3_4b.transformer.model.", "model."),
        lambda state: {**state, **head},
    ):
        other = rewritten(qwen, tmp_path / "qwen.safetensors", change)
        parts = [other, words, ae]
        assert drawn(files / "zimage.safetensors", parts=parts) == of_folder(folders["zimage"])


def test_several_text_encoders_in_one_file(
    folders: dict[str, Path], files: Path, tmp_path: Path
) -> None:
    for names in (("clip_l", "clip_g", "t5xxl"), ("a", "b", "c")):
        state: State = {}
        for name, number in zip(names, ("", "_2", "_3"), strict=True):
            one = load_file(files / f"sd3-text_encoder{number}.safetensors")
            state |= prefixed(f"text_encoders.{name}.transformer.")(one)
        save_file(state, tmp_path / "all.safetensors")
        parts = [tmp_path / "all.safetensors", files / "sd3-ae.safetensors"]
        parts.append(tokenizer(folders, "sd3"))
        assert drawn(files / "sd3.safetensors", parts=parts) == of_folder(folders["sd3"])


def test_scaled_float8(folders: dict[str, Path], files: Path, tmp_path: Path) -> None:
    state = load_file(files / "flux-text_encoder_2.safetensors")
    codes, numbers = dict(state), dict(state)
    for key, tensor in state.items():
        if key.endswith(("wi_0.weight", "wo.weight", ".q.weight")):
            scale = tensor.abs().max() / 448
            codes[key] = (tensor / scale).to(torch.float8_e4m3fn)
            codes[key.replace(".weight", ".scale_weight")] = scale[None]
            numbers[key] = codes[key].float() * scale
    codes["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(codes, tmp_path / "t5_scaled.safetensors")
    save_file(numbers, tmp_path / "t5_decoded.safetensors")
    rest = [p for p in parts_of(files, "flux", tokenizer(folders, "flux")) if "_2." not in p.name]
    pictures = [
        drawn(files / "flux.safetensors", parts=[tmp_path / f"t5_{name}.safetensors", *rest])
        for name in ("scaled", "decoded")
    ]
    assert pictures[0] == pictures[1]


# --- GGUF ----------------------------------------------------------------------------------------


def gguf_t5(folders: dict[str, Path], path: Path, kind: str | None = None) -> State:
    state = load_file(folders["flux"] / "text_encoder_2/model.safetensors")
    content = tokenizer_content(folders["flux"] / "tokenizer_2")
    return llama_file(path, state, t5_metadata(content, T5["vocab_size"]), kind)


def gguf_qwen(folders: dict[str, Path], path: Path, kind: str | None = None) -> State:
    state = load_file(folders["zimage"] / "text_encoder/model.safetensors")
    content = tokenizer_content(folders["zimage"] / "tokenizer")
    return llama_file(path, state, qwen_metadata(content, 320, 259), kind)


GGUF = {"flux": (gguf_t5, "_2"), "zimage": (gguf_qwen, "")}


@pytest.mark.parametrize("name", GGUF)
def test_gguf_brings_its_tokenizer(
    folders: dict[str, Path], files: Path, tmp_path: Path, name: str
) -> None:
    write, number = GGUF[name]
    write(folders, tmp_path / "text.gguf")
    parts = [p for p in parts_of(files, name) if f"encoder{number}." not in p.name]
    parts.append(tmp_path / "text.gguf")
    assert drawn(files / f"{name}.safetensors", parts=parts) == of_folder(folders[name])
    assert (
        convert(files / f"{name}.safetensors", tmp_path / "out", dtype="float32", parts=parts) == []
    )
    assert drawn(tmp_path / "out") == of_folder(folders[name])
    assert diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_codes_of_qwen(
    folders: dict[str, Path], files: Path, tmp_path: Path, kind: str, low_memory: bool
) -> None:
    """Its width is a whole block; codes stay, those of embeddings too."""
    numbers = gguf_qwen(folders, tmp_path / "qwen.gguf", kind)
    save_file(numbers, tmp_path / "decoded.safetensors")
    ae, words = files / "zimage-ae.safetensors", tokenizer(folders, "zimage")
    pictures = []
    for parts in ([tmp_path / "qwen.gguf", ae], [tmp_path / "decoded.safetensors", ae, words]):
        model = load_model(files / "zimage.safetensors", **CPU, parts=parts, low_memory=low_memory)
        coded = {
            key
            for key, module in model.parts["text_encoder"].named_modules()
            if isinstance(vars(module).get("weight"), Quantised)
        }
        assert bool(coded) == (parts[0].suffix == ".gguf")
        assert ("embed_tokens" in coded) == bool(coded)
        pictures.append(model.generate("a red apple", **ASKED).images[0].tobytes())
    assert pictures[0] == pictures[1]
    few, many = (
        estimate(files / "zimage.safetensors", parts=parts, **CPU, low_memory=low_memory).weights
        for parts in (
            [tmp_path / "qwen.gguf", ae],
            [folders["zimage"]],
        )
    )
    assert few == many  # both stay in their files


def test_gguf_with_transformers_names(
    folders: dict[str, Path], files: Path, tmp_path: Path
) -> None:
    """As stable-diffusion.cpp writes them."""
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "t5.gguf", "t5")
    for key, tensor in load_file(files / "flux-text_encoder_2.safetensors").items():
        writer.add_tensor(f"text_encoders.t5xxl.transformer.{key}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    rest = [p for p in parts_of(files, "flux", tokenizer(folders, "flux")) if "_2." not in p.name]
    parts = [tmp_path / "t5.gguf", *rest]
    assert drawn(files / "flux.safetensors", parts=parts) == of_folder(folders["flux"])


def test_another_kind_of_gguf(folders: dict[str, Path], files: Path, tmp_path: Path) -> None:
    state = load_file(folders["zimage"] / "text_encoder/model.safetensors")
    llama_file(tmp_path / "llama.gguf", state, arch="llama")
    refused(
        lambda: load_model(files / "zimage.safetensors", **CPU, parts=tmp_path / "llama.gguf"),
        "'llama'",
        "Qwen3",
    )


PUBLISHED = (*ORIGINAL[sd3.__name__], *ORIGINAL[flux.__name__], ORIGINAL[zimage.__name__])


@pytest.mark.parametrize("family", PUBLISHED, ids=str)
@pytest.mark.parametrize("llama", [False, True], ids=["transformers", "llama.cpp"])
def test_published_shapes_tell_the_encoder(family: Any, llama: bool) -> None:
    """No file is written: a header has what is read of one."""
    told = 0
    for name, part in family.parts.items():
        if not name.startswith("text_encoder") or (llama and part.module.endswith("clip")):
            continue
        config, network = part.load_classes()
        with torch.device("meta"):
            net = network(config.from_dict(family.configs[name]))
        shapes = {key: tuple(one.shape) for key, one in net.state_dict().items()}
        tensors = {}
        for key, shape in shapes.items():
            theirs = llama_name(key) if llama else key
            size = 2 * math.prod(shape)
            tensors[theirs] = TensorInfo("F16", shape, 0, size)
        kind: Any = "gguf" if llama else "safetensors"
        header = Header(Path("a"), "a", tensors, {}, kind)
        placed = place_encoders(header, read_encoders(header), family, family.configs, [name])
        assert list(placed.parts) == [name]
        found = {key: weight.shape for key, weight in placed.weights[name].items()}
        if (family.title, name) == ("Stable Diffusion 3", "text_encoder"):
            assert placed.weights[name]["text_projection.weight"].identity
        assert found == shapes
        told += 1
    assert told == sum(not llama or "clip" not in p.module for p in family.parts.values()) - 2


# --- tokenizers ----------------------------------------------------------------------------------


def test_a_file_of_everything_lacks_the_tokenizer_alone(
    folders: dict[str, Path], files: Path, tmp_path: Path
) -> None:
    for name in ("flux", "zimage"):
        file, words = files / f"{name}-all.safetensors", tokenizer(folders, name)
        assert drawn(file, parts=words) == of_folder(folders[name])
        assert drawn(file, parts=words / "tokenizer.json") == of_folder(folders[name])
        write, _ = GGUF[name]
        write(folders, tmp_path / f"{name}.gguf")
        assert drawn(file, parts=tmp_path / f"{name}.gguf") == of_folder(folders[name])


def install(folders: dict[str, Path], root: Path, program: str) -> None:
    """Lay out the tokenizers of ComfyUI or Forge."""
    places = {
        "comfyui": ("comfy/text_encoders/t5_tokenizer", "comfy/text_encoders/qwen25_tokenizer"),
        "forge": (
            "backend/huggingface/black-forest-labs/FLUX.1-dev/tokenizer_2",
            "backend/huggingface/Tongyi-MAI/Z-Image/tokenizer",
        ),
    }[program]
    for name, place, kind in zip(("flux", "zimage"), places, ("T5", "Qwen2"), strict=True):
        shutil.copytree(tokenizer(folders, name), root / place)
        config = root / place / "tokenizer_config.json"
        told = {**json.loads(config.read_text()), "tokenizer_class": f"{kind}Tokenizer"}
        config.write_text(json.dumps(told))
    if program == "comfyui":  # it has Qwen's in the older form
        place = root / places[1]
        content = json.loads((place / "tokenizer.json").read_text())
        (place / "tokenizer.json").unlink()
        merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
        (place / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
        (place / "merges.txt").write_text("\n".join(merges))
        config = place / "tokenizer_config.json"
        told = json.loads(config.read_text())
        told["added_tokens_decoder"] = {str(t["id"]): t for t in content["added_tokens"]}
        config.write_text(json.dumps(told))
    else:  # CLIP's lies beside them
        shutil.copytree(folders["flux"] / "tokenizer", (root / places[0]).with_name("tokenizer"))


@pytest.mark.parametrize("program", ["comfyui", "forge"])
@pytest.mark.parametrize("given", ["", "models"])
def test_an_installation_around_the_models_folder_has_them(
    folders: dict[str, Path], files: Path, tmp_path: Path, program: str, given: str
) -> None:
    install(folders, tmp_path, program)
    (tmp_path / "models").mkdir()
    for name in ("flux", "zimage"):
        file = files / f"{name}-all.safetensors"
        models = {"models_dir": tmp_path / given}
        assert drawn(file, **models) == of_folder(folders[name])
        model = load_model(file, **CPU, **models)
        wanted = {"comfyui": {"flux": "t5_tokenizer", "zimage": "qwen25_tokenizer"}}.get(
            program, {"flux": "FLUX.1-dev/tokenizer_2", "zimage": "Z-Image/tokenizer"}
        )
        assert isinstance(model.other_parts, dict)
        assert model.other_parts["name"] == wanted[name]
        assert not [said for said in inspect(file, **models)["warnings"] if "no tok" in said]
        settings = WorkerSettings("embedded", "", "", models_dir=str(tmp_path / given))
        assert Names(settings)._parts(own=False).library is not None


def test_an_installed_tokenizer_that_does_not_fit_is_passed_over(
    folders: dict[str, Path], files: Path, tmp_path: Path
) -> None:
    """It may have more tokens than the encoder knows, or lack a mark of the chat."""

    def larger(content: dict[str, Any]) -> None:
        content["model"]["vocab"] |= {f"more{i}": 1000 + i for i in range(400)}

    def unmarked(content: dict[str, Any]) -> None:
        content["added_tokens"][1]["content"] = "<other>"

    file = files / "zimage-all.safetensors"
    for number, change in enumerate((larger, unmarked)):
        root = tmp_path / str(number)
        install(folders, root, "forge")
        good = root / "backend/huggingface/Tongyi-MAI/Z-Image/tokenizer"
        bad = root / "backend/huggingface/A/A/tokenizer"  # comes first
        shutil.copytree(good, bad)
        content = tokenizer_content(bad)
        change(content)
        (bad / "tokenizer.json").write_text(json.dumps(content))
        assert Library(root).tokenizers()[0].path == bad
        model = load_model(file, **CPU, models_dir=root)
        assert isinstance(model.other_parts, dict)
        assert model.other_parts["name"] == "Z-Image/tokenizer"
        shutil.rmtree(good)
        refused(lambda root=root: load_model(file, **CPU, models_dir=root), "no tokenizer")
        refused(lambda bad=bad: load_model(file, **CPU, parts=bad), "tokenizer/tokenizer.json")


@pytest.mark.parametrize("name", ["flux", "zimage"])
def test_a_tokenizer_is_read_once_and_not_kept(
    folders: dict[str, Path],
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    file = files / f"{name}-all.safetensors"
    GGUF[name][0](folders, tmp_path / "text.gguf")
    count = []
    for reads in ("read_json", "read_gguf_lists"):
        whole = getattr(tokenizers, reads)
        monkeypatch.setattr(tokenizers, reads, lambda *a, whole=whole: count.append(a) or whole(*a))
    for part in (tokenizer(folders, name) / "tokenizer.json", tmp_path / "text.gguf"):
        plan = read_plan(find(file), parts=parts_finder([part]))
        [home] = [home for lender in plan.lenders for home in lender.homes.values()]
        assert plan.load_tokenizers()
        assert len(count) == 1
        count.clear()
        kept = [value for value in vars(home).values() if isinstance(value, dict)]
        assert all(isinstance(one, Path) for each in kept for one in each.values())
        assert plan.load_tokenizers()  # it is read again
        count.clear()


def test_a_models_folder_on_another_disk(
    folders: dict[str, Path], files: Path, tmp_path: Path
) -> None:
    install(folders, tmp_path / "ComfyUI", "comfyui")
    (tmp_path / "disk").mkdir()
    (tmp_path / "ComfyUI/models").symlink_to(tmp_path / "disk")
    for place, found in (("ComfyUI/models", 2), ("disk", 0)):
        assert len(Library(tmp_path / place).tokenizers()) == found


def test_without_a_tokenizer_the_error_says_what_would_do(
    folders: dict[str, Path], files: Path, tmp_path: Path
) -> None:
    for name, kind in (("flux", "T5"), ("zimage", "Qwen3")):
        words = [
            "--parts",
            f"{kind}'s tokenizer.json",
            "a folder of",
            f"{kind} GGUF",
            "--models-dir ComfyUI's models",
        ]
        file = files / f"{name}-all.safetensors"
        refused(lambda file=file: load_model(file, **CPU), *words)
        parts = parts_of(files, name)
        alone = files / f"{name}.safetensors"
        refused(lambda: load_model(alone, **CPU, parts=parts), *words)  # noqa: B023
        refused(lambda: load_model(alone, **CPU, models_dir=tmp_path, parts=parts), *words)  # noqa: B023
    # Without T5 Stable Diffusion 3 draws; but not where its weights were given.
    model = load_model(files / "sd3-all.safetensors", **CPU)
    assert any("without text_encoder_3" in said for said in model.warnings)
    parts = parts_of(files, "sd3")
    refused(lambda: load_model(files / "sd3.safetensors", **CPU, parts=parts), "no tokenizer_3")


@pytest.mark.parametrize("name", ["flux", "zimage"])
def test_tokenizers_of_other_kinds(
    folders: dict[str, Path], files: Path, tmp_path: Path, name: str
) -> None:
    """Where no class is stated, the content tells."""
    content = tokenizer_content(tokenizer(folders, name))
    file, path = files / f"{name}-all.safetensors", tmp_path / "tokenizer.json"
    for change in (
        {"model": {**content["model"], "vocab": [["<s>", 0.0], ["</s>", 0.0]]}, "added_tokens": []},
        {"model": {**content["model"], "type": "WordPiece"}},
        {"model": {**content["model"], "vocab": 3}, "added_tokens": 3},
        {"model": {**content["model"], "vocab": [3, "x"]}, "added_tokens": [3, None, "x"]},
        {"model": 3},
    ):
        path.write_text(json.dumps({**content, **change}))
        refused(lambda: load_model(file, **CPU, parts=path), "no kind we know")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GemmaTokenizer"}')
    refused(lambda: load_model(file, **CPU, parts=tmp_path), "GemmaTokenizer")


def test_a_tokenizer_without_its_encoder_is_not_looked_for(
    folders: dict[str, Path], files: Path, tmp_path: Path
) -> None:
    install(folders, tmp_path, "comfyui")
    parts = [p for p in parts_of(files, "sd3") if "_3." not in p.name]
    model = load_model(files / "sd3.safetensors", **CPU, parts=parts, models_dir=tmp_path)
    assert any("without text_encoder_3" in said for said in model.warnings)
    assert "t5_tokenizer" not in str(model.other_parts)


# --- what is refused -----------------------------------------------------------------------------


def other_width(state: State) -> State:
    key = "embeddings.token_embedding.weight"
    return {**state, key: torch.ones(49408, 20)}


def fewer_layers(state: State) -> State:
    return {k: v for k, v in state.items() if ".block.1." not in k}


WRONG: dict[str, tuple[str, Callable[[State], State], list[str]]] = {
    "nothing": ("ae", lambda _: {"x.weight": torch.ones(2)}, ["CLIP, T5", "autoencoder"]),
    "a whole model": ("all", lambda state: state, ["a whole model's file", "folder"]),
    "a transformer": ("all", bare, ["nothing that FLUX.1 takes"]),
    "another width": ("text_encoder", other_width, ["3 layers of 20", "3 layers of 16"]),
    "fewer layers": ("text_encoder_2", fewer_layers, ["T5", "1 layers", "2 layers of 48"]),
    "an unknown key": ("text_encoder", added(x=torch.ones(2)), ["x are missing", "nothing"]),
    "a weight less": (
        "text_encoder",
        lambda s: {k: v for k, v in s.items() if "final_layer_norm.bias" not in k},
        ["text_encoder are missing", "final_layer_norm.bias"],
    ),
    "the same twice": (
        "text_encoder",
        lambda s: {**s, "text_model.final_layer_norm.bias": torch.ones(16)},
        ["the same weight"],
    ),
    "other latents": (
        "ae",
        lambda s: {k: v for k, v in s.items() if "conv_in" not in k},
        ["conv_in", "missing"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_that_do_not_fit(
    folders: dict[str, Path], files: Path, tmp_path: Path, case: str
) -> None:
    name, change, words = WRONG[case]
    bad = rewritten(files / f"flux-{name}.safetensors", tmp_path / "bad.safetensors", change)
    parts = [bad, *parts_of(files, "flux", tokenizer(folders, "flux"))]
    if case == "an unknown key":
        words = ["belong to nothing", "x"]
    refused(lambda: load_model(files / "flux.safetensors", **CPU, parts=parts), *words)


def test_another_family_s_encoder(folders: dict[str, Path], files: Path, tmp_path: Path) -> None:
    qwen = files / "zimage-text_encoder.safetensors"
    refused(
        lambda: load_model(files / "flux.safetensors", **CPU, parts=qwen),
        "Qwen3",
        "FLUX.1 reads CLIP and T5",
    )
    words = tokenizer(folders, "zimage")
    refused(
        lambda: load_model(files / "flux-all.safetensors", **CPU, parts=words), "T5TokenizerFast"
    )
    (tmp_path / "folder").mkdir()
    refused(
        lambda: load_model(files / "flux.safetensors", **CPU, parts=tmp_path / "folder"),
        "model_index.json",
    )
    many = {f"p{i}.encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2) for i in range(9)}
    save_file(many, tmp_path / "many.safetensors")
    refused(
        lambda: load_model(files / "flux.safetensors", **CPU, parts=tmp_path / "many.safetensors"),
        "9 text encoders",
    )


def test_what_lends_nothing_is_told(folders: dict[str, Path], files: Path) -> None:
    file, words = files / "flux-all.safetensors", tokenizer(folders, "flux")
    clip = files / "flux-text_encoder.safetensors"
    model = load_model(file, **CPU, parts=[clip, words, folders["flux"]])
    told = [said for said in model.warnings if "is not used" in said]
    assert len(told) == 2
    assert "flux-text_encoder.safetensors of the parts" in told[0]
    assert model.other_parts == load_model(file, **CPU, parts=words).other_parts


# --- recipes and commands ------------------------------------------------------------------------


def test_a_recipe_names_all_parts(
    folders: dict[str, Path], files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = parts_of(files, "flux", tokenizer(folders, "flux"))
    file, png = str(files / "flux.safetensors"), str(tmp_path / "a.png")
    given = [f"--parts={part}" for part in parts]
    size = ["--width", "64", "--height", "64", "--steps", "2", "--device", "cpu"]
    assert cli.run(["generate", "an apple", "--model", file, *given, *size, "--out", png]) == 0
    recipe = read_recipe(png)
    names = ["flux-ae", "flux-text_encoder_2", "flux-text_encoder", "tokenizer_2"]
    assert [one["name"] for one in recipe["parts"]] == names
    assert cli.run(["verify", png, "--model", file, *given[::-1]]) == 0
    capsys.readouterr()
    assert cli.run(["verify", png, "--model", file, "--parts", str(folders["flux"])]) == 2
    assert "flux-ae (" in capsys.readouterr().err


@pytest.mark.parametrize(
    "parts", ["x", 3, [3], ["x"], [{"name": "a"}], [{"name": 1, "sha256": "b"}], [[]], [None]]
)
def test_a_recipe_s_parts_are_names_and_digests(tmp_path: Path, parts: Any) -> None:
    image = Image.new("RGB", (8, 8))
    texts = PngImagePlugin.PngInfo()
    one = {"name": "m", "sha256": "a"}
    told = {"safelight": "0", "model": one, "settings": {}, "parts": parts}
    texts.add_text("safelight", json.dumps(told))
    image.save(tmp_path / "a.png", pnginfo=texts)
    refused(lambda: read_recipe(tmp_path / "a.png"), "did not write")
    told["parts"] = [one] * 40
    texts = PngImagePlugin.PngInfo()
    texts.add_text("safelight", json.dumps(told))
    image.save(tmp_path / "a.png", pnginfo=texts)
    refused(lambda: read_recipe(tmp_path / "a.png"), "did not write")


def comfyui(files: Path, folders: dict[str, Path], root: Path) -> Path:
    """Lay out a models folder as ComfyUI's, with an installation around it; return it."""
    install(folders, root, "comfyui")
    for home, name, wanted in (
        ("diffusion_models", "flux", "flux1-dev"),
        ("vae", "flux-ae", "ae"),
        ("clip", "flux-text_encoder", "clip_l"),
        ("text_encoders", "flux-text_encoder_2", "t5/t5xxl_fp16"),
    ):
        path = root / "models" / home / f"{wanted}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(files / f"{name}.safetensors", path)
    gguf_t5(folders, root / "models/text_encoders/t5.gguf")
    return root / "models"


def test_names_of_the_models_folder(
    folders: dict[str, Path], files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = comfyui(files, folders, tmp_path / "ComfyUI")
    found = {(e.kind, e.name) for e in Library(models).entries()}
    assert found == {
        ("model", "flux1-dev"),
        ("vae", "ae"),
        ("text_encoder", "clip_l"),
        ("text_encoder", "t5"),
        ("text_encoder", "t5/t5xxl_fp16"),
    }
    given = {"models_dir": models, "parts": ["ae", "clip_l", "t5xxl_fp16"]}
    assert drawn("flux1-dev", **given) == of_folder(folders["flux"])  # type: ignore[arg-type]
    given["parts"] = ["clip_l", "t5.gguf", "ae.safetensors", "t5_tokenizer"]
    model = load_model("flux1-dev", **CPU, **given)
    assert any("t5_tokenizer of the parts is not used" in said for said in model.warnings)
    options = ["--models-dir", str(models)]
    png = str(tmp_path / "a.png")
    size = ["--width", "64", "--height", "64", "--steps", "2", "--device", "cpu"]
    parts = ["--parts", "ae", "--parts", "clip_l", "--parts", "t5xxl_fp16"]
    asked = ["generate", "an apple", "--model", "flux1-dev", *parts, *options, *size, "--out", png]
    assert cli.run(asked) == 0
    assert [p["name"] for p in read_recipe(png)["parts"]][-1] == "t5_tokenizer"
    assert cli.run(["verify", png, *options]) == 0  # all by the names in the recipe
    (models / "clip/clip_l.safetensors").rename(models / "clip/renamed.safetensors")
    assert cli.run(["verify", png, *options]) == 0  # by its digest
    shutil.copyfile(files / "zimage-text_encoder.safetensors", models / "clip/t5.safetensors")
    shutil.copyfile(models / "clip/renamed.safetensors", models / "clip/clip_l.safetensors")
    asked[asked.index("t5xxl_fp16")] = "t5.gguf"
    assert cli.run([*asked, "--overwrite"]) == 0
    assert cli.run(["verify", png, *options]) == 0  # of two files of one name, by its digest
    capsys.readouterr()
    assert cli.run(["models", "--all", *options]) == 0
    assert "text_encoder" in capsys.readouterr().out
    given["parts"] = ["nowhere"]
    refused(lambda: load_model("flux1-dev", **CPU, **given), "nowhere")
    given["parts"] = ["ae", "clip_l"]
    refused(lambda: load_model("flux1-dev", **CPU, **given), "no text_encoder_2", "several times")


def test_verify_hashes_no_file_for_an_installed_tokenizer(
    folders: dict[str, Path],
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for program in ("comfyui", "forge"):
        install(folders, tmp_path / program, program)
        models = tmp_path / program / "models"
        (models / "vae").mkdir(parents=True)
        shutil.copyfile(files / "flux-ae.safetensors", models / "vae/ae.safetensors")
        shutil.copyfile(files / "flux-all.safetensors", models / "flux.safetensors")
        options = ["--models-dir", str(models)]
        size = ["--width", "64", "--height", "64", "--steps", "2", "--device", "cpu"]
        png = str(tmp_path / f"{program}.png")
        assert cli.run(["generate", "a", "--model", "flux", *options, *size, "--out", png]) == 0
        with monkeypatch.context() as patch:
            patch.setattr(Library, "by_hash", lambda *_: pytest.fail("it hashes"))
            assert cli.run(["verify", png, *options]) == 0
        # A folder here of that name is not opened for a recipe.
        (tmp_path / "FLUX.1-dev/tokenizer_2").mkdir(parents=True, exist_ok=True)
        (tmp_path / "FLUX.1-dev/tokenizer_2/tokenizer.json").write_text("{")
        monkeypatch.chdir(tmp_path)
        assert cli.run(["verify", png, *options]) == 0


def test_a_whole_clip_and_an_autoencoder_of_training_are_parts(
    folders: dict[str, Path], files: Path, tmp_path: Path
) -> None:
    """In the models folder itself they are found by what they hold."""
    models = tmp_path / "models"
    models.mkdir()
    vision = {f"vision_model.embeddings.{one}": torch.ones(2, 2) for one in ("a", "b.weight")}
    rewritten(
        files / "flux-text_encoder.safetensors", models / "whole.safetensors", added(**vision)
    )
    training = {
        "loss.logvar": torch.ones(()),
        "loss.discriminator.main.0.weight": torch.ones(2, 2),
        "model_ema.decoderconv_inbias": torch.ones(2),
    }
    rewritten(files / "flux-ae.safetensors", models / "kl.sft", added(**training))
    assert {(e.kind, e.file_name) for e in Library(models).entries()} == {
        ("image_encoder", "whole.safetensors"),
        ("vae", "kl.sft"),
    }
    parts = ["kl", "whole", files / "flux-text_encoder_2.safetensors", tokenizer(folders, "flux")]
    given: dict[str, Any] = {"parts": parts, "models_dir": models}
    assert drawn(files / "flux.safetensors", **given) == of_folder(folders["flux"])
    model = load_model(folders["flux"], **CPU, vae="kl", models_dir=models)
    assert model.other_vae is not None


def test_files_in_the_root_are_what_they_hold(
    folders: dict[str, Path], files: Path, tmp_path: Path
) -> None:
    for name in ("flux-text_encoder", "flux-text_encoder_2", "zimage-text_encoder", "flux-all"):
        shutil.copyfile(files / f"{name}.safetensors", tmp_path / f"{name}.safetensors")
    gguf_t5(folders, tmp_path / "t5.gguf")
    gguf_qwen(folders, tmp_path / "qwen.gguf")
    kinds = {entry.name: entry.kind for entry in Library(tmp_path).entries()}
    assert kinds.pop("flux-all") == "model"
    assert set(kinds.values()) == {"text_encoder"}
    assert len(kinds) == 5


def test_a_server_and_others_take_several(
    folders: dict[str, Path], files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [str(part) for part in parts_of(files, "flux", tokenizer(folders, "flux"))]
    file = str(files / "flux.safetensors")
    settings = WorkerSettings(file, "sqlite://", "/", parts=parts)
    assert Names(settings).plan().tokenizer_folder("tokenizer_2") is not None
    assert settings.loading["parts"] == parts
    assert [one for one in model_options(settings) if "--parts" in one] == [
        f"--parts={part}" for part in parts
    ]
    assert on_nodes(settings).parts == parts
    assert estimate(file, parts=parts, **CPU).weights == estimate(folders["flux"], **CPU).weights
    given = [f"--parts={part}" for part in parts]
    assert cli.run(["tokens", "a red apple", "--model", file, *given]) == 0
    assert cli.run(["convert", file, "--out", str(tmp_path / "out"), *given]) == 0
    assert drawn(tmp_path / "out") == of_folder(folders["flux"])
    capsys.readouterr()
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "an apple", "steps": 1, "width": 64, "height": 64}))
    batch = ["batch", str(rows), "--model", file, *given, "--out", str(tmp_path / "b")]
    assert cli.run([*batch, "--device", "cpu"]) == 0
    assert cli.run([*batch, "--device", "cpu"]) == 0  # goes on with the same parts


def test_downloads_fetch_what_others_leave(
    folders: dict[str, Path], files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [str(part) for part in parts_of(files, "flux")]
    source = find(files / "flux.safetensors")
    plan = read_plan(source, parts=parts_finder(parts), partial=True)
    assert plan.lacking == ("tokenizer_2",)
    finder = parts_finder([*parts, "org/flux"], download=False)
    with pytest.raises(Exception, match=r"--parts-for \S+ --parts \S+ae.safetensors"):
        finder.find(3, source, plan.lacking)
    assert cli.run(["download", "org/flux", "--parts", parts[0]]) == 2
    assert "--parts-for" in capsys.readouterr().err


def test_one_part_is_recorded_as_before(folders: dict[str, Path], files: Path) -> None:
    model = load_model(files / "flux.safetensors", **CPU, parts=[folders["flux"]])
    assert isinstance(model.other_parts, dict)
    assert model.other_parts["name"] == "flux"
