"""Models written in another layout load again, here and in diffusers, equal to the bit."""

import json
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from safelight import cli
from safelight.families import family_of_file, sd, sdxl
from safelight.weights import load_model
from safelight.weights.check import Header, TensorInfo
from safelight.weights.convert import convert
from safelight.weights.frames import _Unfilled
from safelight.weights.headers import header_of
from safelight.weights.names import original_names
from test_weights_autoencoders import tiny_vae
from test_weights_load import single_file as sd_file
from tests.parity.sdxl_models import REFINER, UNET, ZERO_SNR, make_folder, tiny_family
from tests.parity.sdxl_models import single_file as sdxl_file
from weights_tiny import FAMILY, VAE, part_weights, pixel_folder, refused, text_folder, write

SD1 = replace(FAMILY, name="sd1", pad=sd.END)
SD2 = replace(FAMILY, name="sd2")
SMALL = {"seed": 3, "steps": 2, "sampler": "euler", "width": 64, "height": 64}
KINDS = ("sd1", "sd2", "sdxl", "sdxl-v", "sdxl-inpainting", "sdxl-refiner")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A single file of each kind, which neither program wrote."""
    root = tmp_path_factory.mktemp("files")
    found = {}
    for family in (SD1, SD2):
        found[family.name] = sd_file(root / f"{family.name}.safetensors", family)
    tensors = {k: t for k, t in load_file(found["sd1"]).items() if "cond_stage" not in k}
    text = part_weights("text_encoder", SD1.text_encoder)
    tensors |= {f"{sd.CLIP}{name}": tensor for name, tensor in text.items()}
    save_file(tensors, found["sd1"])
    named = {"sdxl": UNET, "sdxl-v": UNET, "sdxl-inpainting": {**UNET, "in_channels": 9}}
    for name, unet in {**named, "sdxl-refiner": REFINER}.items():
        marks = ("v_pred", "ztsnr") if name == "sdxl-v" else ()
        family = tiny_family(name.removesuffix("-v"))
        scheduler = ZERO_SNR if marks else {"_class_name": "EulerDiscreteScheduler"}
        folder = make_folder(root / name, unet, scheduler)
        found[name] = sdxl_file(folder, root / f"{name}.safetensors", family, *marks)
    return found


@pytest.fixture(autouse=True)
def published(monkeypatch, request):
    """The tiny models' sizes in place of the published ones."""
    family = SD1 if "sd1" in request.node.name else SD2
    monkeypatch.setattr(sd, "VARIANTS", (family,))
    names = ("sdxl", "sdxl-inpainting", "sdxl-refiner")
    monkeypatch.setattr(sdxl, "VARIANTS", tuple(map(tiny_family, names)))


def drawn(path: Path, **how) -> bytes:
    model = load_model(path, device="cpu", dtype="float32", **how)
    return model.generate("a cat", **SMALL).images[0].tobytes()


@pytest.mark.parametrize(
    "kind",
    [
        "sd1",
        "sd2",
        "sdxl-refiner",
        pytest.param("sdxl-v", marks=pytest.mark.soak),
        pytest.param("sdxl", marks=pytest.mark.soak),
        pytest.param("sdxl-inpainting", marks=pytest.mark.soak),
    ],
)
def test_a_file_becomes_a_folder_and_the_same_file_again(files, tmp_path, kind):
    """diffusers reads both with the same weights, and the folder with the same settings."""
    folder, again = tmp_path / "folder", tmp_path / "again.safetensors"
    assert convert(files[kind], folder) == []
    assert convert(folder, again) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.safetensors", "folder"]
    wanted, found = load_file(files[kind]), load_file(again)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    ours = load_model(folder, device="cpu", dtype="float32", plain=True)
    assert_equal(pipe, ours)
    assert pipe.scheduler.config.prediction_type == ours.scheduler.prediction_type
    single = type(pipe).from_single_file(
        again, config=str(folder), local_files_only=True, torch_dtype=torch.float32
    )
    assert_equal(single, ours)
    if kind in ("sd2", "sdxl-v"):
        assert len({drawn(path) for path in (files[kind], folder, again)}) == 1


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_unet_alone_takes_the_rest_of_a_folder(files, tmp_path, kind):
    convert(files[kind], tmp_path / "folder")
    alone = tmp_path / "unet.safetensors"
    unet = {k: v for k, v in load_file(files[kind]).items() if k.startswith(sd.UNET)}
    save_file({key.removeprefix(sd.UNET): tensor for key, tensor in unet.items()}, alone)
    refused(lambda: load_model(alone, device="cpu"), "no vae", "text_encoder", "--parts")
    assert drawn(alone, parts=tmp_path / "folder") == drawn(tmp_path / "folder")
    files_of_parts = sorted((tmp_path / "folder").glob("text_encoder*/model.safetensors"))
    files_of_parts.append(tmp_path / "folder/vae/diffusion_pytorch_model.safetensors")
    assert drawn(alone, parts=files_of_parts) == drawn(tmp_path / "folder")


PUBLISHED = (*sd.VARIANTS, *sdxl.VARIANTS)


@pytest.mark.parametrize("family", PUBLISHED, ids=str)
def test_the_published_networks_have_a_place_for_every_weight(family, monkeypatch):
    """Each of our weights keeps its name and shape when written by the original names and read."""
    monkeypatch.undo()
    wanted: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, part in family.parts.items():
        config_class, network_class = part.load_classes()
        with torch.device("meta"), _Unfilled():
            network = network_class(config_class.from_dict(family.configs[name]))
        wanted[name] = {key: tuple(t.shape) for key, t in network.state_dict().items()}
    tensors: dict[str, TensorInfo] = {}
    for key, original in original_names(family.sections(), wanted).items():
        rows = [wanted[original.part][name] for name in original.names]
        shape = (sum(row[0] for row in rows), *rows[0][1:]) if len(rows) > 1 else rows[0]
        shape = (*(shape[::-1] if original.transposed else shape), *(1,) * original.conv)
        tensors[key] = TensorInfo("F16", shape, 0, 1)
    header = Header(Path("x"), "x", tensors, {})
    assert family_of_file(header) is family
    read = family.single_file(header).weights
    assert {part: {k: w.shape for k, w in read[part].items()} for part in wanted} == wanted


def assert_equal(pipe, model) -> None:
    for part in model.family.parts:
        theirs = getattr(pipe, part).state_dict()
        theirs = {k.removeprefix("text_model."): v for k, v in theirs.items()}
        for name, tensor in model.parts[part].state_dict().items():
            assert torch.equal(theirs[name.removeprefix("text_model.")], tensor), (part, name)


def test_a_folder_that_diffusers_wrote_comes_back(tmp_path):
    """Scheduler, configs and tokenizers come back too, also of sdxl-v."""
    folder = make_folder(tmp_path / "theirs", UNET, ZERO_SNR, zeros=False)
    assert convert(folder, tmp_path / "ours") == []
    for path in folder.rglob("*.json"):
        theirs = json.loads(path.read_text())
        ours = json.loads((tmp_path / "ours" / path.relative_to(folder)).read_text())
        assert ours == theirs or ours == {**theirs, **ours}, path
    assert drawn(folder) == drawn(tmp_path / "ours")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_another_precision(files, tmp_path, dtype):
    kind = getattr(torch, dtype)
    assert convert(files["sd2"], tmp_path / "x.safetensors", dtype=dtype) == []
    wanted = load_file(files["sd2"])
    for key, tensor in load_file(tmp_path / "x.safetensors").items():
        assert torch.equal(tensor, wanted[key].to(kind))
    convert(tmp_path / "x.safetensors", tmp_path / "folder")
    header = header_of(tmp_path / "folder/unet/diffusion_pytorch_model.safetensors")
    names = {"float16": "F16", "bfloat16": "BF16"}
    assert {info.dtype for info in header.tensors.values()} == {names[dtype]}


def test_float8_stays_and_can_be_widened(files, tmp_path):
    small = {k: t.to(torch.float8_e4m3fn) for k, t in load_file(files["sd2"]).items()}
    save_file(small, tmp_path / "small.safetensors")
    convert(tmp_path / "small.safetensors", tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(again[k].float(), t.float()) for k, t in small.items())
    convert(tmp_path / "small.safetensors", tmp_path / "wide", dtype="float16")
    assert drawn(tmp_path / "small.safetensors") == drawn(tmp_path / "wide")


def test_a_ckpt_becomes_safetensors(files, tmp_path):
    torch.save({"state_dict": load_file(files["sd2"])}, tmp_path / "x.ckpt")
    convert(tmp_path / "x.ckpt", tmp_path / "x.safetensors")
    assert drawn(tmp_path / "x.safetensors") == drawn(files["sd2"])


def test_another_autoencoder_is_written_with_it(files, tmp_path):
    write(tmp_path / "vae/config.json", {"_class_name": "AutoencoderKL", **VAE})
    convert(files["sd2"], tmp_path / "folder")
    stem = "diffusion_pytorch_model.safetensors"
    other = load_file(tmp_path / "folder/vae" / stem)
    save_file({k: t.flip(0).contiguous() for k, t in other.items()}, tmp_path / "vae" / stem)
    wanted = drawn(files["sd2"], vae=tmp_path / "vae")
    for out in ("baked", "baked.safetensors"):
        convert(files["sd2"], tmp_path / out, vae=tmp_path / "vae")
        assert drawn(tmp_path / out) == wanted


def test_a_tiny_autoencoder_is_part_of_a_folder_and_of_no_file(files, tmp_path):
    tiny = tiny_vae(tmp_path / "tiny")
    convert(files["sd2"], tmp_path / "folder", vae=tiny)
    assert drawn(tmp_path / "folder") == drawn(files["sd2"], vae=tiny)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "folder")
    assert type(pipe.vae).__name__ == "AutoencoderTiny"
    refused(lambda: convert(tmp_path / "folder", tmp_path / "x.safetensors"), "write a folder")


def test_models_of_other_shapes_are_folders(tmp_path):
    pixels = pixel_folder(tmp_path / "pixels")
    assert convert(pixels, tmp_path / "again") == []
    assert load_model(tmp_path / "again").kind == "pixels"
    refused(lambda: convert(pixels, tmp_path / "x.safetensors"), "write a folder")
    text = text_folder(tmp_path / "text")  # its vocabulary is not CLIP's
    refused(lambda: convert(text, tmp_path / "x.safetensors"), "cannot be one file", "config")
    assert not (tmp_path / "x.safetensors").exists()


def test_a_folder_brings_its_credits_and_its_decoder_of_previews(files, tmp_path):
    folder = tmp_path / "folder"
    convert(files["sd2"], folder)
    (folder / "NOTICE").write_text("by someone")
    tiny = tiny_vae(tmp_path / "tiny")
    stem = "diffusion_pytorch_model"
    (tiny / f"{stem}.safetensors").rename(tiny / f"{stem}.fp16.safetensors")
    (folder / "preview_vae").symlink_to(tiny)
    assert convert(folder, tmp_path / "again") == []
    for name in ("NOTICE", "preview_vae/config.json", f"preview_vae/{stem}.fp16.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert len([*(tmp_path / "again" / "preview_vae").iterdir()]) == 2
    assert load_model(tmp_path / "again").preview_vae is not None
    refused(lambda: convert(folder, tiny, overwrite=True), "is or holds what is read")
    (told,) = convert(folder, tmp_path / "x.safetensors")
    assert told == "one file does not hold the model's NOTICE and preview_vae"
    # It is of no use for other latents.
    convert(folder, tmp_path / "other", vae=files["sd2"])
    assert (tmp_path / "other" / "NOTICE").is_file()
    assert not (tmp_path / "other" / "preview_vae").exists()


def test_what_one_file_does_not_hold_is_told(files, tmp_path, capsys):
    folder = tmp_path / "folder"
    convert(files["sd2"], folder)
    config = folder / "scheduler/scheduler_config.json"
    write(config, {**json.loads(config.read_text()), "timestep_spacing": "trailing"})
    assert cli.run(["convert", str(folder), "--out", str(tmp_path / "x.safetensors")]) == 0
    out, told = capsys.readouterr()
    assert out.strip().endswith("x.safetensors")
    assert "does not hold the scheduler's timestep_spacing" in told
    # Of a size that pictures may have, which the file says.
    unet = folder / "unet/config.json"
    write(unet, {**json.loads(unet.read_text()), "sample_size": 32})
    v = tmp_path / "v.safetensors"
    convert(folder, v, prediction_type="v_prediction")
    assert load_model(v).scheduler.prediction_type == "v_prediction"
    refused(lambda: convert(folder, tmp_path / "s.safetensors", prediction_type="sample"), "type")


@pytest.mark.parametrize("ending", ["ckpt", "PT", "bin"])
def test_other_files_of_weights_are_not_written(tmp_path, ending):
    refused(lambda: convert("embedded", tmp_path / f"x.{ending}"), "must end in .safetensors")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_unasked(files, tmp_path):
    folder, file = tmp_path / "folder", tmp_path / "x.safetensors"
    for out in (folder, file):
        convert(files["sd2"], out)
        refused(lambda out=out: convert(files["sd2"], out), "--overwrite")
    before = drawn(folder)
    small = tmp_path / "small.safetensors"
    convert(files["sd2"], small, dtype="float16")
    convert(small, folder, overwrite=True)
    convert(small, file, overwrite=True)
    assert drawn(folder) == drawn(file) != before
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine/diary.txt", "dear diary")
    refused(lambda: convert(small, tmp_path / "mine", overwrite=True), "no model")
    assert (tmp_path / "mine/diary.txt").read_text() == "dear diary"
    for out in (small, folder, folder / "inside", folder / "unet"):
        source = small if out == small else folder
        refused(lambda s=source, o=out: convert(s, o, overwrite=True), "what is read")
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"folder", "x.safetensors", "small.safetensors", "mine"}


def test_half_a_conversion_leaves_nothing(files, tmp_path):
    tensors = load_file(files["sd2"])
    last = sorted(tensors)[-1]
    tensors[last].view(-1)[0] = torch.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    for out in ("folder", "x.safetensors"):
        refused(lambda o=out: convert(tmp_path / "nan.safetensors", tmp_path / o), "NaN", last)
    huge = {**load_file(files["sd2"])}
    huge[last] = huge[last] * 1e30
    save_file(huge, tmp_path / "huge.safetensors")
    refused(
        lambda: convert(tmp_path / "huge.safetensors", tmp_path / "x", dtype="float16"), "Inf", last
    )
    refused(lambda: convert(files["sd2"], tmp_path / "x", dtype="int8"), "dtype")
    assert {p.name for p in tmp_path.iterdir()} == {"nan.safetensors", "huge.safetensors"}
