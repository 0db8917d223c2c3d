"""What single files of models of flow matching may hold, lack and be refused for."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from safelight import cli
from safelight.families import family_of_file, flux, flux2, sd3, zimage
from safelight.families.flow_files import Published
from safelight.recipe import read_recipe
from safelight.server.names import Names
from safelight.server.settings import WorkerSettings
from safelight.weights import inspect, load_model
from safelight.weights.check import read_header
from safelight.weights.convert import convert
from safelight.weights.estimate import estimate
from safelight.weights.frames import _check_fit
from safelight.weights.names import original_names
from tests.parity.flow_models import (
    ASKED,
    DEV,
    SD3_SCHEDULER,
    configs,
    make_flux,
    make_klein,
    make_sd3,
    make_zimage,
)
from tests.weights_tiny import refused, sparse_file

WHOLE = "model.diffusion_model."
ORIGINAL = {
    sd3.__name__: sd3.VARIANTS,
    flux.__name__: flux.VARIANTS,
    flux2.__name__: flux2.VARIANTS,
    zimage.__name__: zimage.BASE,
}
DUAL = {"dual_attention_layers": [0, 1], "qk_norm": "rms_norm"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("single")
    return {
        "sd3": make_sd3(root / "sd3", **DUAL),
        "bare": make_sd3(root / "bare", t5=False, **DUAL),
        "flux": make_flux(root / "flux", guided=True),
        "klein": make_klein(root / "klein", distilled=True),
        "klein-base": make_klein(root / "klein-base", distilled=False),
        "zimage": make_zimage(root / "zimage", shift=6.0),
        "turbo": make_zimage(root / "turbo", shift=3.0),
    }


@pytest.fixture(autouse=True)
def tiny(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Give variants the shapes of the tiny models."""
    published = Published(configs(folders["sd3"]), SD3_SCHEDULER, 64)
    small = replace(sd3.VARIANTS[1], layers=3, published=published)
    monkeypatch.setattr(sd3, "VARIANTS", (small,))
    published = Published(configs(folders["flux"]), DEV)
    small_ones = tuple(
        replace(flux.VARIANTS[i], layers=2, singles=2, published=published) for i in (0, 2)
    )
    monkeypatch.setattr(flux, "VARIANTS", small_ones)
    published = Published(configs(folders["klein"]), {**DEV, "shift": 3.0})
    small_ones = tuple(
        replace(flux2.VARIANTS[i], layers=2, singles=3, published=published) for i in (0, 2)
    )
    monkeypatch.setattr(flux2, "VARIANTS", small_ones)
    published = Published(configs(folders["zimage"]), {**SD3_SCHEDULER, "shift": 6.0})
    for name in ("BASE", "TURBO"):
        monkeypatch.setattr(zimage, name, replace(getattr(zimage, name), published=published))


@pytest.fixture(scope="module")
def whole(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of whole models, by the names of their folders."""
    return {"root": tmp_path_factory.mktemp("whole")}


def file_of(name: str, folders: dict[str, Path], whole: dict[str, Path]) -> Path:
    if name not in whole:
        whole[name] = whole["root"] / f"{name}.safetensors"
        convert(str(folders[name]), whole[name])
    return whole[name]


def changed(
    file: Path, path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> Path:
    save_file({k: v.contiguous() for k, v in change(load_file(file)).items()}, path)
    return path


def bare(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the transformer alone, as its authors name it."""
    return {k.removeprefix(WHOLE): v for k, v in state.items() if k.startswith(WHOLE)}


def drawn(model: Path, **given: Any) -> bytes:
    """Return the bytes of a picture, with all weights at equal alignments.

    Where a file has them, products of the same numbers may differ in their last bits.
    """
    loaded = load_model(str(model), device="cpu", dtype="float32", plain=True, **given)
    for name in loaded.configs:
        network = loaded.parts[name]
        state = {key: tensor.clone() for key, tensor in network.state_dict().items()}
        network.load_state_dict(state, assign=True)
    return loaded.generate("a red apple", **ASKED).images[0].tobytes()


@cache
def of_folder(folder: Path) -> bytes:
    """Return the bytes of the picture of a folder that no test changes."""
    return drawn(folder)


@pytest.mark.parametrize("name", ["sd3", "flux", "klein", "klein-base", "zimage", "turbo"])
def test_whole_and_bare_files_draw_what_folders_draw(
    folders: dict[str, Path], whole: dict[str, Path], tmp_path: Path, name: str
) -> None:
    file = file_of(name, folders, whole)
    wanted = of_folder(folders[name])
    assert drawn(file, parts=folders[name]) == wanted
    alone = changed(file, tmp_path / "alone.safetensors", bare)
    assert drawn(alone, parts=folders[name]) == wanted


def test_stable_diffusion_3_without_t5_needs_no_parts(
    folders: dict[str, Path], whole: dict[str, Path]
) -> None:
    file = file_of("bare", folders, whole)
    assert drawn(file) == of_folder(folders["bare"])
    told = load_model(file, device="cpu", dtype="float32", parts=folders["bare"])
    assert any("without text_encoder_3" in said for said in told.warnings)
    assert any("parts is not used: it has no text_encoder_3" in said for said in told.warnings)
    assert told.other_parts is None


@pytest.mark.parametrize("name", ["flux", "klein"])
def test_the_scales_of_flux_s_norms_have_two_names(
    folders: dict[str, Path], whole: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """Newer versions of ComfyUI write `weight`."""

    def newer(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key.replace("_norm.scale", "_norm.weight"): v for key, v in state.items()}

    file = changed(file_of(name, folders, whole), tmp_path / "newer.safetensors", newer)
    assert load_file(file).keys() != load_file(whole[name]).keys()
    assert drawn(file, parts=folders[name]) == of_folder(folders[name])


def test_flux_2_s_autoencoder_has_two_layouts(
    folders: dict[str, Path], whole: dict[str, Path], tmp_path: Path
) -> None:
    """The authors' convolutions around the latents are in encoder and decoder, with a count."""
    file = file_of("klein", folders, whole)
    assert {"vae.encoder.quant_conv.weight", "vae.bn.running_var"} <= load_file(file).keys()

    def other(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for half in ("encoder.quant_conv", "decoder.post_quant_conv"):
            for leaf in ("weight", "bias"):
                key = f"vae.{half}.{leaf}"
                state[f"vae.{half.partition('.')[2]}.{leaf}"] = state.pop(key)
        return {**state, "vae.bn.num_batches_tracked": torch.tensor(7)}

    changed(file, tmp_path / "other.safetensors", other)
    given = {"parts": folders["klein"]}
    assert drawn(tmp_path / "other.safetensors", **given) == of_folder(folders["klein"])


@pytest.mark.parametrize("prefix", ["", WHOLE])
def test_z_image_with_the_names_of_its_folder(
    folders: dict[str, Path], tmp_path: Path, prefix: str
) -> None:
    theirs = load_file(folders["zimage"] / "transformer/diffusion_pytorch_model.safetensors")
    file = tmp_path / "named.safetensors"
    save_file({prefix + key: tensor for key, tensor in theirs.items()}, file)
    assert drawn(file, parts=folders["zimage"]) == of_folder(folders["zimage"])


def test_what_writers_add_is_not_read(
    folders: dict[str, Path], whole: dict[str, Path], tmp_path: Path
) -> None:
    def more(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        texts = "text_encoders."
        shared = state[f"{texts}t5xxl.transformer.shared.weight"]
        return {
            **state,
            f"{texts}clip_l.logit_scale": torch.ones(()),
            f"{texts}t5xxl.logit_scale": torch.ones(()),
            f"{texts}t5xxl.transformer.encoder.embed_tokens.weight": shared.clone(),
            f"{texts}clip_l.transformer.text_projection.weight": torch.randn(16, 16),
        }

    file = changed(file_of("flux", folders, whole), tmp_path / "more.safetensors", more)
    assert drawn(file, parts=folders["flux"]) == of_folder(folders["flux"])


def test_weights_in_float8(
    folders: dict[str, Path], whole: dict[str, Path], tmp_path: Path
) -> None:
    def small(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            k: v.to(torch.float8_e4m3fn) if k.startswith("text_encoders.") else v
            for k, v in state.items()
        }

    file = changed(file_of("sd3", folders, whole), tmp_path / "fp8.safetensors", small)
    loaded = load_model(str(file), device="cpu", dtype="float32", parts=folders["sd3"])
    assert loaded.generate("a red apple", **ASKED).images


def test_the_scheduler_of_the_folder_tells_turbo(
    folders: dict[str, Path], whole: dict[str, Path]
) -> None:
    file = file_of("zimage", folders, whole)
    for name, family in (("zimage", "z-image"), ("turbo", "z-image-turbo")):
        model = load_model(str(file), device="cpu", parts=folders[name])
        assert model.family.name == family
        assert model.scheduler.shift == {"zimage": 6.0, "turbo": 3.0}[name]


def test_the_folder_tells_what_is_distilled(
    folders: dict[str, Path], whole: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "two.safetensors"
    shutil.copyfile(file_of("klein", folders, whole), file)
    for name, family in (("klein", "flux2-klein-4b"), ("klein-base", "flux2-klein-base-4b")):
        model = load_model(str(file), device="cpu", parts=folders[name])
        assert model.family.name == family
        assert model.family.distilled == (name == "klein")
        convert(str(file), tmp_path / name, parts=folders[name])
        assert load_model(tmp_path / name, device="cpu").family.name == family
        assert not any("as its name says" in said for said in load_told(file, folders[name]))
    lost = "one file does not say that it is flux2-klein-4b: "
    for name, told in (
        ("one", [f"{lost}a folder for --parts says it"]),
        ("klein-base", [f"{lost}its name says flux2-klein-base-4b"]),
        ("klein", []),
    ):
        said = convert(str(folders["klein"]), tmp_path / f"{name}.safetensors")
        assert [line for line in said if "say" in line] == told
    assert inspect(tmp_path / "one.safetensors")["family"] == "flux2-klein-base-4b"
    index = folders["klein"] / "model_index.json"
    wrong = shutil.copytree(folders["klein"], tmp_path / "wrong") / "model_index.json"
    wrong.write_text(index.read_text().replace('"is_distilled": true', '"is_distilled": "no"'))
    refused(lambda: load_model(tmp_path / "wrong", device="cpu"), "is_distilled", "true or false")


def test_a_name_or_a_folder_tells_kontext(
    folders: dict[str, Path], whole: dict[str, Path], tmp_path: Path
) -> None:
    """Without a word of it a file is dev, and no warning says so."""
    edits = shutil.copytree(folders["flux"], tmp_path / "edits")
    index = edits / "model_index.json"
    index.write_text(index.read_text().replace("FluxPipeline", "FluxKontextPipeline"))
    for name, parts, family in (
        ("flux1", folders["flux"], "flux-dev"),
        ("flux1", edits, "flux-kontext"),
        ("flux1-Kontext", folders["flux"], "flux-kontext"),
    ):
        file = tmp_path / f"{name}.safetensors"
        shutil.copyfile(file_of("flux", folders, whole), file)
        model = load_model(str(file), device="cpu", parts=parts)
        assert model.family.name == family
        assert not model.warnings
    said = convert(str(edits), tmp_path / "one.safetensors")
    lost = "one file does not say that it is flux-kontext: "
    assert [line for line in said if "say" in line] == [f"{lost}a folder for --parts says it"]
    convert(str(file), tmp_path / "again", parts=folders["flux"])
    assert load_model(tmp_path / "again", device="cpu").family.name == "flux-kontext"


def load_told(file: Path, parts: Path) -> list[str]:
    """Return the warnings of loading a file with a folder of parts."""
    return load_model(str(file), device="cpu", parts=parts).warnings


@pytest.mark.parametrize("name", ["flux-2-klein-4b", "flux-2-klein-base-4b"])
def test_the_name_of_a_file_counts_before_the_folder(
    folders: dict[str, Path], whole: dict[str, Path], tmp_path: Path, name: str
) -> None:
    file = tmp_path / f"{name}.safetensors"
    shutil.copyfile(file_of("klein", folders, whole), file)
    for folder in ("klein", "klein-base"):
        model = load_model(str(file), device="cpu", parts=folders[folder])
        assert model.family.distilled == ("base" not in name)
        told = [said for said in model.warnings if "as its name says" in said]
        assert bool(told) == (("base" in name) != ("base" in folder))
        if told:
            lent = f"as its name says; {folder}, which lends it parts, is of flux2-{folder}-4b"
            assert told == [f"{name}.safetensors is drawn as {model.family.name}, {lent}"]


def test_one_file_does_not_say_that_it_is_turbo(folders: dict[str, Path], tmp_path: Path) -> None:
    told = convert(str(folders["turbo"]), tmp_path / "one.safetensors")
    assert any("scheduler's shift" in line for line in told)
    assert inspect(tmp_path / "one.safetensors")["family"] == "z-image"


def test_the_recipe_names_the_folder(
    folders: dict[str, Path], whole: dict[str, Path], tmp_path: Path
) -> None:
    file = file_of("flux", folders, whole)
    model = load_model(str(file), device="cpu", parts=folders["flux"])
    assert model.other_parts is not None
    assert model.other_parts["name"] == "flux"
    [path] = model.generate("a red apple", **ASKED).save(tmp_path)
    assert read_recipe(path)["parts"] == model.other_parts


def minimal(folder: Path, out: Path, *kept: str) -> Path:
    """Return a model's folder with few of its parts."""
    for name in kept:
        shutil.copytree(folder / name, out / name)
    shutil.copyfile(folder / "model_index.json", out / "model_index.json")
    return out


def test_a_folder_of_parts_needs_only_what_the_file_lacks(
    folders: dict[str, Path], whole: dict[str, Path], tmp_path: Path
) -> None:
    file = file_of("flux", folders, whole)
    parts = minimal(folders["flux"], tmp_path / "parts", "tokenizer_2")
    assert drawn(file, parts=parts) == of_folder(folders["flux"])
    convert(str(file), tmp_path / "out", parts=parts)
    assert (tmp_path / "out/tokenizer/vocab.json").is_file()


def test_a_folder_that_tells_turbo_needs_its_scheduler(
    folders: dict[str, Path], whole: dict[str, Path], tmp_path: Path
) -> None:
    file = file_of("zimage", folders, whole)
    parts = minimal(folders["turbo"], tmp_path / "parts", "tokenizer")
    given = {"device": "cpu", "dtype": "float32", "parts": parts}
    refused(lambda: load_model(file, **given), "scheduler_config.json is missing")
    shutil.copytree(folders["turbo"] / "scheduler", parts / "scheduler")
    assert load_model(file, **given).family.name == "z-image-turbo"


def test_a_prediction_type_is_not_for_models_of_flow_matching(
    folders: dict[str, Path], whole: dict[str, Path], tmp_path: Path
) -> None:
    given: dict[str, Any] = {"device": "cpu", "prediction_type": "v_prediction"}
    refused(lambda: load_model(folders["flux"], **given), "prediction_type", "flow matching")
    stated = tmp_path / "stated.safetensors"
    save_file(load_file(file_of("flux", folders, whole)), stated, {"modelspec.predict_key": "v"})
    model = load_model(stated, device="cpu", parts=folders["flux"])
    assert model.scheduler.prediction_type == "flow_prediction"


def test_a_folder_needs_no_parts(folders: dict[str, Path]) -> None:
    model = load_model(str(folders["flux"]), device="cpu", parts=folders["flux"])
    assert any("lacks nothing" in said for said in model.warnings)
    assert model.other_parts is None


def state_of(network: Any) -> dict[str, torch.Tensor]:
    """Return a network's weights; those of a language model without its head."""
    state = getattr(network, "state_dict", dict)()
    return {k.removeprefix("model."): v for k, v in state.items() if k != "lm_head.weight"}


def test_a_file_and_parts_become_a_folder(
    folders: dict[str, Path], whole: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("flux", "klein", "zimage", "sd3"):
        file = changed(file_of(name, folders, whole), tmp_path / f"{name}.safetensors", bare)
        assert convert(str(file), tmp_path / name, parts=folders[name]) == []
        assert drawn(tmp_path / name) == of_folder(folders[name])
        pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / name)
        theirs = diffusers.DiffusionPipeline.from_pretrained(folders[name])
        assert type(pipe) is type(theirs)
        for part, network in theirs.components.items():
            mine = state_of(pipe.components[part])
            for key, tensor in state_of(network).items():
                assert torch.equal(mine[key], tensor), (part, key)


def test_inspect_says_what_is_missing(
    folders: dict[str, Path], whole: dict[str, Path], tmp_path: Path
) -> None:
    file = changed(file_of("flux", folders, whole), tmp_path / "alone.safetensors", bare)
    told = inspect(file)
    assert told["family"] == "flux-dev"
    assert list(told["components"]) == ["transformer"]
    assert "no vae, text_encoder, text_encoder_2 and tokenizer_2" in told["warnings"][-1]


PUBLISHED = (*sd3.VARIANTS, *flux.VARIANTS[:2], *flux2.VARIANTS[2:], zimage.BASE)


@pytest.mark.parametrize("family", PUBLISHED, ids=str)
@pytest.mark.parametrize("alone", [False, True], ids=["whole", "bare"])
def test_published_shapes_tell_the_variant(
    family: Any, alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sparse file has the full size; only its header is read."""
    tables = ((sd3, "VARIANTS"), (flux, "VARIANTS"), (flux2, "VARIANTS"), (zimage, "BASE"))
    for module, name in tables:
        monkeypatch.setattr(module, name, ORIGINAL[module.__name__])
    nets, shapes = {}, {}
    for name, part in family.parts.items():
        config, network = part.load_classes()
        with torch.device("meta"):
            nets[name] = network(config.from_dict(family.configs[name]))
        shapes[name] = {key: tuple(t.shape) for key, t in nets[name].state_dict().items()}
    file: dict[str, tuple[int, ...]] = {}
    for key, original in original_names(family.sections(), shapes).items():
        first = shapes[original.part][original.names[0]]
        rows = sum(shapes[original.part][name][0] for name in original.names)
        file[key] = (rows, *first[1:], *(1,) * original.conv) if first else first
    if alone:
        file = {k.removeprefix(WHOLE): v for k, v in file.items() if k.startswith(WHOLE)}
    header = read_header(sparse_file(tmp_path / "full.safetensors", file))
    found = family_of_file(header)
    assert found.name == family.name
    read = found.single_file(header)
    for part, weights in read.weights.items():
        if weights or not alone:
            _check_fit(family.name, part, nets[part], weights)


def without(*prefixes: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda state: {k: v for k, v in state.items() if not k.startswith(prefixes)}


def with_key(key: str, *shape: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {**state, key: torch.ones(shape)}


def twice(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**state, "txt_in.weight": state[f"{WHOLE}txt_in.weight"].clone()}


HOSTILE = {
    "no encoder": ("sd3", without("text_encoders.clip_g."), None, ["text_encoder_2", "--parts"]),
    "no vae": ("sd3", without("first_stage_model."), None, ["no vae", "--vae"]),
    "no tokenizer": ("flux", without(), None, ["no tokenizer_2", "--parts"]),
    "other family's parts": ("flux", without(), "sd3", ["Stable Diffusion 3", "FLUX.1"]),
    "two families": ("flux", with_key(f"{WHOLE}joint_blocks.0.x.weight", 2), "flux", ["joint"]),
    "same weight twice": ("flux", twice, "flux", ["the same weight"]),
    "scaled": ("flux", with_key(f"{WHOLE}img_in.scale_weight", 1), "flux", ["float8"]),
    "wrong shape": ("flux", with_key(f"{WHOLE}txt_in.bias", 3), "flux", ["context_embedder.bias"]),
    "other width": ("flux", with_key(f"{WHOLE}img_in.weight", 64, 384), "flux", ["384"]),
    "no dimension": ("sd3", with_key(f"{WHOLE}pos_embed"), "sd3", ["other shapes"]),
    "a layer more": ("sd3", with_key(f"{WHOLE}joint_blocks.9.y.bias", 1), "sd3", ["other shapes"]),
    "flux 2 dev": (
        "klein",
        with_key(f"{WHOLE}guidance_in.in_layer.weight", 3, 3),
        "klein",
        ["FLUX.2 dev", "Mistral", "klein"],
    ),
    "a block more": ("klein", with_key("single_blocks.9.linear1.weight", 3, 3), "klein", ["know"]),
    "flux 1's parts": ("klein", without(), "flux", ["FLUX.1", "FLUX.2"]),
    "no statistics": ("klein", without("vae.bn."), "klein", ["2 weights of vae", "missing"]),
    "a bare number": ("zimage", with_key(f"{WHOLE}norm_final.weight", 3), None, ["no tokenizer"]),
    "half a norm": ("flux", with_key(f"{WHOLE}final_layer.adaLN_modulation.1.bias", 3), "flux", []),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(
    folders: dict[str, Path], whole: dict[str, Path], tmp_path: Path, case: str
) -> None:
    name, change, parts, words = HOSTILE[case]
    file = changed(file_of(name, folders, whole), tmp_path / "bad.safetensors", change)
    given = {} if parts is None else {"parts": folders[parts]}
    refused(lambda: load_model(str(file), device="cpu", **given), *words)


def test_parts_are_a_folder(folders: dict[str, Path], whole: dict[str, Path]) -> None:
    file = file_of("flux", folders, whole)
    refused(lambda: load_model(str(file), device="cpu", parts=file), "folder")


def test_a_projection_that_changes_something_is_not_left_out(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    for path in sorted(folders["sd3"].rglob("*")):
        target = folder / path.relative_to(folders["sd3"])
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    weights = folder / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    state["text_projection.weight"] = state["text_projection.weight"] * 2
    save_file(state, weights, {"format": "pt"})
    refused(lambda: convert(str(folder), tmp_path / "one.safetensors"), "text_projection")


def test_the_command_line_draws_and_verifies(
    folders: dict[str, Path],
    whole: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, png = str(file_of("flux", folders, whole)), str(tmp_path / "a.png")
    parts = ["--parts", str(folders["flux"])]
    size = ["--width", "64", "--height", "64", "--steps", "2", "--device", "cpu"]
    assert cli.run(["generate", "a red apple", "--model", file, *parts, *size, "--out", png]) == 0
    assert cli.run(["verify", png, "--model", file, *parts]) == 0
    capsys.readouterr()
    assert cli.run(["verify", png, "--model", file, "--parts", str(folders["sd3"])]) == 2
    assert "--parts" in capsys.readouterr().err


def test_a_server_reads_the_plan_with_its_parts(
    folders: dict[str, Path], whole: dict[str, Path]
) -> None:
    file = str(file_of("flux", folders, whole))
    settings = WorkerSettings(file, "sqlite://", "/", parts=str(folders["flux"]))
    assert Names(settings).plan().tokenizer_folder("tokenizer_2") is not None
    assert Names(settings).plan().tokenizer_folder("tokenizer") is None  # CLIP's ships with us
    with_parts = estimate(file, device="cpu", parts=folders["flux"])
    assert with_parts.weights == estimate(folders["flux"], device="cpu").weights
    refused(lambda: estimate(file, device="cpu"), "--parts")
