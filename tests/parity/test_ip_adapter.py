"""IP-Adapters against diffusers: the same checkpoint, adapter, image encoder, picture and settings.

All kinds, guided and not, both families, all tasks; the image encoder and its pixels against
transformers; and what is refused.
"""

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file

from safelight import SafelightError
from safelight.engine import Engine, job
from safelight.engine.ip_adapter import PicturePrompt, seen_pixels
from safelight.engine.requests import create_job, resolve_request
from safelight.families.sd import VARIANTS as SD_VARIANTS
from safelight.families.sdxl import VARIANTS as SDXL_VARIANTS
from safelight.model import Model
from safelight.nets.ip_adapter import IPAdapter, IPAdapterConfig
from safelight.nets.unet_config import UNetConfig
from safelight.request import Request
from safelight.weights import load_model
from safelight.weights.find import Source, find
from safelight.weights.image_encoders import image_encoder as read_image_encoder
from safelight.weights.image_encoders import widths
from safelight.weights.ip_adapters import with_image_prompts
from safelight.weights.library import Library
from safelight.weights.plan import Plan, read_plan
from tests.parity.flow_models import make_sd3
from tests.parity.sdxl_models import REFINER, UNET, make_folder
from tests.parity.test_controlnet import controlnet

LATENTS, PIXELS = 1e-4, 2
TEXTS = {"prompt": "a red apple on a table", "negative_prompt": "a dog"}
SIDE = 56
ENCODER = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 14,
    "hidden_act": "gelu",
    "projection_dim": 40,
}


def picture(width: int = 64, height: int = 64, seed: int = 1) -> Image.Image:
    """Return smooth random colours: noise alone would hide small differences."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoder(folder: Path, **config: Any) -> Path:
    """Write a random image encoder, whose states tell pictures apart."""
    torch.manual_seed(3)
    net = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**{**ENCODER, **config})
    )
    with torch.no_grad():
        for weight in net.parameters():
            torch.nn.init.normal_(weight, std=0.2)
    net.save_pretrained(folder)
    return folder


def tensors_of(kind: str, model: Path, **shape: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a random adapter for a model's UNet, by the names of published files.

    diffusers builds resamplers of four layers, with heads of 64 numbers.
    """
    unet = read_plan(find(model)).configs["unet"]
    config = {
        "kind": kind,
        "image_dim": ENCODER["projection_dim" if kind == "base" else "hidden_size"],
        "cross_attention_dim": unet.cross_attention_dim,
        "num_tokens": 4 if kind == "base" else 6,
        "widths": list(unet.cross_attentions),
        "hidden_size": 24,
        "heads_size": 128,
        "intermediate_size": 96,
        "num_heads": 2,
        "num_hidden_layers": 4,
        **shape,
    }
    torch.manual_seed(4)
    net = IPAdapter(IPAdapterConfig.from_dict(config))
    with torch.no_grad():
        for name, weight in net.named_parameters():
            torch.nn.init.normal_(weight, std=0.5 if "ip_adapter" in name else 0.2)
    return {name: tensor.contiguous() for name, tensor in net.state_dict().items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> Path:
    """A folder of adapters, with an image encoder beside them, as it is published."""
    found = tmp_path_factory.mktemp("adapters") / "models"
    encoder(found / "image_encoder")
    for kind in ("base", "plus", "full"):
        save_file(tensors_of(kind, folders["sd1"]), found / f"sd1-{kind}.safetensors")
    xl = make_folder(found / "xl", UNET)
    for kind in ("base", "plus"):
        save_file(tensors_of(kind, xl), found / f"xl-{kind}.safetensors")
    return found


@pytest.fixture(scope="module")
def models(root: Path, folders: dict[str, Path]) -> dict[str, Path]:
    return {**folders, "xl": root / "xl"}


@cache
def shared(folder: Path, adapter: Path) -> Model:
    """Return a model for tests that do not change it."""
    return load_model(folder, device="cpu", dtype="float32", ip_adapter=adapter)


@cache
def theirs(task: str, folder: Path, adapter: Path, scale: float, **parts: Any) -> Any:
    """Return a pipeline of diffusers with an adapter and its encoder."""
    read = transformers.CLIPVisionModelWithProjection.from_pretrained(
        adapter.parent / "image_encoder"
    )
    # diffusers' own default, with transformers' code for Pillow, as torchvision resizes otherwise.
    pixels = transformers.CLIPImageProcessor(size=SIDE, crop_size=SIDE)
    pipe = getattr(diffusers, task).from_pretrained(
        folder, image_encoder=read, feature_extractor=pixels, **parts
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.load_ip_adapter(
        str(adapter.parent), subfolder="", weight_name=adapter.name, image_encoder_folder=None
    )
    pipe.set_ip_adapter_scale(scale)
    return pipe


def compare(
    worst: dict[str, float], model: Model, pipe: Any, given: dict[str, Any], **settings: Any
) -> np.ndarray:
    """Compare our picture with that of a pipeline of diffusers, and return ours."""
    steps: list[Any] = []

    def stepped(_pipe: Any, _step: int, _time: Any, made: dict[str, Any]) -> dict[str, Any]:
        steps.append(made["latents"])
        return {}

    shown = pipe(
        **TEXTS,
        **given,
        guidance_scale=settings["guidance_scale"],
        num_inference_steps=6,
        generator=torch.Generator().manual_seed(7),
        callback_on_step_end=stepped,
    ).images[0]
    asked = resolve_request(model, Request(**TEXTS, sampler="ddim", steps=6, seed=7, **settings))
    with torch.inference_mode():
        made = create_job(model, asked, model.family.encode(model, asked), 7)
        while not made.done:
            job.advance(model, [made])
        latents = job.final_latents(made)
        ours = np.asarray(job.decode(model, latents)).astype(int)
    expected = steps[-1].numpy()
    error = float(np.linalg.norm(latents.numpy() - expected) / np.linalg.norm(expected))
    pixels = float(np.abs(ours - np.asarray(shown).astype(int)).max())
    worst["latents"], worst["pixels"] = max(worst["latents"], error), max(worst["pixels"], pixels)
    assert error <= LATENTS
    assert pixels <= PIXELS
    return ours


@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize("kind", ["base", "plus", "full"])
def test_stable_diffusion(
    worst: dict[str, float], models: dict[str, Path], root: Path, kind: str, guidance: float
) -> None:
    adapter = root / f"sd1-{kind}.safetensors"
    model = shared(models["sd1"], adapter)
    pipe = theirs("StableDiffusionPipeline", models["sd1"], adapter, 0.7)
    given = picture(80, 64)
    size = {"width": 64, "height": 64, "guidance_scale": guidance}
    with_it = compare(
        worst,
        model,
        pipe,
        {"ip_adapter_image": given},
        ip_adapter_image=given,
        ip_adapter_scale=0.7,
        **size,
    )
    assert not np.array_equal(with_it, drawn(model, steps=6, guidance_scale=guidance))


@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize("kind", ["base", "plus"])
def test_sdxl(
    worst: dict[str, float], models: dict[str, Path], root: Path, kind: str, guidance: float
) -> None:
    adapter = root / f"xl-{kind}.safetensors"
    model = shared(models["xl"], adapter)
    pipe = theirs("StableDiffusionXLPipeline", models["xl"], adapter, 1.0)
    compare(
        worst,
        model,
        pipe,
        {"ip_adapter_image": picture()},
        ip_adapter_image=picture(),
        guidance_scale=guidance,
    )


def test_image_to_image_and_inpainting(
    worst: dict[str, float], models: dict[str, Path], root: Path
) -> None:
    adapter = root / "sd1-plus.safetensors"
    start, told = picture(seed=2), {"ip_adapter_image": picture()}
    asked = {**told, "image": start, "strength": 0.6, "guidance_scale": 5.0}
    model = shared(models["sd1"], adapter)
    pipe = theirs("StableDiffusionImg2ImgPipeline", models["sd1"], adapter, 1.0)
    compare(worst, model, pipe, {**told, "image": start, "strength": 0.6}, **asked)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    given = {**told, "image": start, "mask_image": mask, "strength": 0.6}
    model = shared(models["inpainting"], adapter)
    pipe = theirs("StableDiffusionInpaintPipeline", models["inpainting"], adapter, 1.0)
    compare(worst, model, pipe, given, **asked, mask=mask)


# --- the image encoder ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(300, 224), (97, 251), (224, 224), (50, 41)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_pixels_are_those_of_transformers(size: tuple[int, int], mode: str) -> None:
    noisy = np.random.default_rng(5).integers(0, 256, (*size[::-1], 3), np.uint8)
    given = Image.fromarray(noisy).convert(mode)
    expected = transformers.CLIPImageProcessor()(given, return_tensors="pt").pixel_values
    torch.testing.assert_close(seen_pixels(given, 224), expected, rtol=0, atol=2e-6)


def test_a_strip_takes_no_endless_memory() -> None:
    """Only its middle is seen, and only what lies around that is resized."""
    strip = picture(64 * 400, 64)
    expected = transformers.CLIPImageProcessor()(strip, return_tensors="pt").pixel_values
    torch.testing.assert_close(seen_pixels(strip, 224), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("plain", [True, False])
def test_the_encoder_is_that_of_transformers(
    models: dict[str, Path], root: Path, tmp_path: Path, act: str, plain: bool
) -> None:
    folder = encoder(tmp_path / "encoder", hidden_act=act)
    model = load_model(
        models["sd1"],
        device="cpu",
        dtype="float32",
        plain=plain,
        ip_adapter=root / "sd1-base.safetensors",
        image_encoder=folder,
    )
    reference = transformers.CLIPVisionModelWithProjection.from_pretrained(folder)
    pixels = seen_pixels(picture(), SIDE)
    with torch.inference_mode():
        expected = reference(pixels, output_hidden_states=True)
        ours = model.image_encoder(pixels), model.image_encoder.states(pixels)
    torch.testing.assert_close(ours[0], expected.image_embeds, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[1], expected.hidden_states[-2], rtol=1e-4, atol=1e-4)


# --- without diffusers' pipelines -----------------------------------------------------------------


def drawn(model: Model, **settings: Any) -> np.ndarray:
    """Return the pixels of a picture of 64 by 64."""
    asked = {"sampler": "ddim", "steps": 4, "seed": 7, "width": 64, "height": 64, **settings}
    return np.asarray(model.generate(**{**TEXTS, **asked}).images[0]).astype(int)


def test_with_a_controlnet(
    worst: dict[str, float], models: dict[str, Path], root: Path, tmp_path: Path
) -> None:
    """The ControlNet reads the text alone."""
    net = controlnet(tmp_path / "net", models["sd1"])
    adapter = root / "sd1-plus.safetensors"
    model = load_model(
        models["sd1"], device="cpu", dtype="float32", ip_adapter=adapter, controlnet=net
    )
    network = diffusers.ControlNetModel.from_pretrained(net)
    task = "StableDiffusionControlNetPipeline"
    pipe = theirs(task, models["sd1"], adapter, 0.8, controlnet=network)
    compare(
        worst,
        model,
        pipe,
        {"ip_adapter_image": picture(), "image": picture(seed=2)},
        ip_adapter_image=picture(),
        ip_adapter_scale=0.8,
        control_image=picture(seed=2),
        guidance_scale=5.0,
    )


@pytest.mark.parametrize("kind", ["base", "plus", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_fast_layers_give_the_same(
    models: dict[str, Path], root: Path, kind: str, dtype: str
) -> None:
    adapter = root / f"sd1-{kind}.safetensors"
    how: dict[str, Any] = {"device": "cpu", "dtype": dtype, "ip_adapter": adapter}
    asked = {"ip_adapter_image": picture(), "guidance_scale": 5.0}
    plain = drawn(load_model(models["sd1"], plain=True, **how), **asked)
    for low_memory in (False, True):
        fast = drawn(load_model(models["sd1"], low_memory=low_memory, **how), **asked)
        assert np.abs(fast - plain).max() <= (1 if dtype == "float32" else 40)
        assert np.abs(fast - plain).mean() <= (0.1 if dtype == "float32" else 4)


def test_without_a_picture_it_draws_as_without_an_adapter(
    models: dict[str, Path], root: Path
) -> None:
    adapter = root / "sd1-plus.safetensors"
    model = shared(models["sd1"], adapter)
    alone = load_model(models["sd1"], device="cpu", dtype="float32")
    expected = drawn(alone)
    assert np.array_equal(drawn(model), expected)
    asked = {"ip_adapter_image": picture(), "ip_adapter_scale": 0.0}
    assert np.array_equal(drawn(model, **asked), expected)
    assert {*model.unet.state_dict()} == {*alone.unet.state_dict()}


def test_part_of_the_steps(models: dict[str, Path], root: Path) -> None:
    adapter = root / "sd1-base.safetensors"
    model = shared(models["sd1"], adapter)
    whole, none = drawn(model, ip_adapter_image=picture(), steps=8), drawn(model, steps=8)
    found = [
        drawn(model, ip_adapter_image=picture(), steps=8, **{f"ip_adapter_{name}": share})
        for name, share in (("start", 0.5), ("end", 0.5))
    ]
    for one in found:
        assert not np.array_equal(one, whole)
        assert not np.array_equal(one, none)
    asked: dict[str, Any] = {"steps": 2, "sampler": "ddim", "ip_adapter_image": picture()}
    result = model.generate("a dog", **asked, ip_adapter_end=0.4)
    assert any("ip_adapter_image counts at no step" in one for one in result.warnings)
    result = model.generate("a dog", steps=1, ip_adapter_scale=0.5)
    assert any("ip_adapter_scale does nothing without" in one for one in result.warnings)


def test_the_fast_modes_reuse(models: dict[str, Path], root: Path) -> None:
    """Kept attention is computed anew where the picture stops counting."""
    adapter = root / "sd1-plus.safetensors"
    model = shared(models["sd1"], adapter)
    asked = {"ip_adapter_image": picture(), "steps": 8, "guidance_scale": 5.0}
    whole, without = drawn(model, **asked), drawn(model, steps=8, guidance_scale=5.0)
    for cuts in ({"cache_every": 2, "cache_branch": 2}, {"text_end": 0.7}, {"guidance_end": 0.8}):
        fast = drawn(model, **asked, **cuts)
        assert 0 < np.abs(fast - whole).mean() < np.abs(without - whole).mean(), cuts
    ended = {**asked, "ip_adapter_end": 0.5}
    kept, whole = drawn(model, **ended, text_end=0.4), drawn(model, **ended)
    assert np.abs(kept - whole).mean() < np.abs(without - whole).mean()


def test_composed_prompts_read_it_beside_each_part(models: dict[str, Path], root: Path) -> None:
    adapter = root / "sd1-base.safetensors"
    model = shared(models["sd1"], adapter)
    asked = {"prompt_syntax": "a1111", "guidance_scale": 5.0, "ip_adapter_image": picture()}
    one, two = (drawn(model, prompt=text, **asked) for text in ("a dog", "a dog AND a dog :0"))
    assert np.abs(one - two).max() <= 1


def test_with_a_lora(models: dict[str, Path], root: Path, tmp_path: Path) -> None:
    """A LoRA's copy of the UNet knows the places of its cross-attentions."""
    adapter = root / "sd1-base.safetensors"
    model = loaded(models, adapter)
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
    torch.manual_seed(0)
    tensors = {"A": torch.randn(2, 32), "B": torch.randn(32, 2)}
    file = tmp_path / "one.safetensors"
    save_file({f"unet.{layer}.lora_{x}.weight": t for x, t in tensors.items()}, file)
    told = {"ip_adapter_image": picture()}
    expected, changed = drawn(model, **told), drawn(model, **told, loras=[f"{file}:1"])
    assert not np.array_equal(changed, expected)
    assert np.array_equal(drawn(model, **told, loras=[f"{file}:0"]), expected)
    assert np.array_equal(drawn(model, **told), expected)


def test_a_refiner_reads_no_picture(models: dict[str, Path], root: Path, tmp_path: Path) -> None:
    refiner = make_folder(tmp_path / "refiner", REFINER)
    model = loaded(models, root / "xl-base.safetensors", "xl", refiner=refiner)
    assert model.refiner is not None
    seen: dict[str, list[bool]] = {"base": [], "refiner": []}
    for name, net in (("base", model.unet), ("refiner", model.refiner.unet)):
        net.register_forward_pre_hook(
            lambda _, given, calls=seen[name]: calls.append(given[8] is not None)
        )
    drawn(model, ip_adapter_image=picture(), steps=8, refiner_start=0.5, guidance_scale=5.0)
    assert seen == {"base": [True] * 4, "refiner": [False] * 4}


def test_pictures_of_one_call_have_rows_of_their_own(models: dict[str, Path], root: Path) -> None:
    adapter = root / "sd1-plus.safetensors"
    model = shared(models["sd1"], adapter)
    usual: dict[str, Any] = {
        **TEXTS,
        "sampler": "ddim",
        "steps": 4,
        "seed": 7,
        "width": 64,
        "height": 64,
    }
    asked: list[dict[str, Any]] = [
        {"ip_adapter_image": picture(), "guidance_scale": 5.0},
        {"ip_adapter_image": picture(seed=3), "ip_adapter_scale": 0.3, "guidance_scale": 5.0},
        {"ip_adapter_image": picture(seed=3), "guidance_scale": 1.0},
        {"guidance_scale": 5.0},
    ]
    engine, calls = Engine(model, exact=False, rows=16), list[int]()
    hook = model.unet.register_forward_pre_hook(lambda _, given: calls.append(len(given[2])))
    for one in asked:
        engine.add(Request(**usual, **one))
    images: dict[int, Image.Image] = {}
    tickets = [*engine.tickets]
    while engine.busy:
        for ticket in engine.step()[1]:
            assert ticket.image is not None
            images[tickets.index(ticket)] = ticket.image
    hook.remove()
    assert calls.count(5) == 4  # of the three pictures with a prompt, at each step
    for place, one in enumerate(asked):
        expected = drawn(model, **one)
        assert np.abs(np.asarray(images[place]).astype(int) - expected).max() <= 1


def test_a_picture_is_encoded_once(models: dict[str, Path], root: Path) -> None:
    adapter = root / "sd1-plus.safetensors"
    model = loaded(models, adapter)
    calls = list[int]()
    model.image_encoder.vision_model.register_forward_hook(lambda *_: calls.append(1))
    engine = Engine(model)
    for scale in (1.0, 0.5):
        engine.add(
            Request(prompt="a dog", steps=1, ip_adapter_image=picture(), ip_adapter_scale=scale)
        )
    assert len(calls) == 2  # the picture, and the negative prompt's zeros
    engine.add(Request(prompt="a dog", steps=1, ip_adapter_image=picture(seed=2)))
    assert len(calls) == 3


def test_pictures_of_a_request_share_what_they_read(
    models: dict[str, Path], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full-face adapter's keys and values take megabytes, and there may be 64 pictures."""
    model = loaded(models, root / "sd1-full.safetensors")
    engine = Engine(model)
    asked: dict[str, Any] = {**TEXTS, "seed": 1, "steps": 3, "guidance_scale": 5.0}
    engine.add(Request(**asked, count=3, guidance_end=0.5, ip_adapter_image=picture()))
    prompted = [ticket.job.prompted for ticket in engine.tickets]
    read = {one.read for one in prompted if one is not None}
    assert len(prompted) == 3
    assert len(read) == 1
    [rows] = read
    assert len(rows) == 2
    for one in prompted:
        assert one is not None
        for evaluations in (1, 2):
            mine = one.rows(evaluations)
            assert len(mine) == evaluations
            last = mine.pairs[0][0].untyped_storage().data_ptr()
            assert last == rows.pairs[0][0].untyped_storage().data_ptr()
    monkeypatch.delattr(PicturePrompt, "rows")  # whose turn it is needs none of them
    for ticket in engine.tickets:
        assert ticket.rows == 2
        assert ticket.work_left == len(ticket.table.rows) * 2 * ticket.size


# --- files ----------------------------------------------------------------------------------------


def test_the_places_of_published_adapters() -> None:
    """Those of Stable Diffusion 1.5 have the numbers 1 to 31, those of SDXL 1 to 139."""
    sd, xl = (
        UNetConfig.from_dict(variants[0].configs["unet"]).cross_attentions
        for variants in (SD_VARIANTS, SDXL_VARIANTS)
    )
    up = (*[1280] * 3, *[640] * 3, *[320] * 3)
    assert sd == (320, 320, 640, 640, 1280, 1280, *up, 1280)
    assert xl == (*[640] * 4, *[1280] * 20, *[1280] * 30, *[640] * 6, *[1280] * 10)


def test_a_file_of_torch_save(models: dict[str, Path], root: Path, tmp_path: Path) -> None:
    tables: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in load_file(root / "sd1-base.safetensors").items():
        table, _, name = key.partition(".")
        tables[table][name] = tensor
    torch.save(tables, tmp_path / "one.bin")
    expected = drawn(loaded(models, root / "sd1-base.safetensors"), ip_adapter_image=picture())
    found = loaded(models, tmp_path / "one.bin", image_encoder=root / "image_encoder")
    assert np.array_equal(drawn(found, ip_adapter_image=picture()), expected)
    assert found.image_prompts["ip_adapter"]["name"] == "one"


def loaded(models: dict[str, Path], adapter: Any, model: str = "sd1", **how: Any) -> Model:
    return load_model(models[model], device="cpu", dtype="float32", ip_adapter=adapter, **how)


def test_the_image_encoder_is_found(
    models: dict[str, Path], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the file, in the other folder as it is published, in the model's, by its width."""
    published = tmp_path / "published"
    for folder in ("models", "sdxl_models"):
        (published / folder).mkdir(parents=True)
    encoder(published / "models" / "image_encoder", projection_dim=64)  # another adapter's
    encoder(published / "sdxl_models" / "image_encoder")
    file = published / "models" / "one.safetensors"
    shutil.copy(root / "sd1-base.safetensors", file)
    found = read_ip_adapter(models["sd1"], file).additions["image_encoder"]
    assert found.source.path == published / "sdxl_models" / "image_encoder"
    shutil.rmtree(published / "sdxl_models")
    with pytest.raises(SafelightError, match="needs an image encoder with an embedding of 40 num"):
        read_ip_adapter(models["sd1"], file)
    whole = shutil.copytree(models["sd1"], tmp_path / "whole")
    encoder(whole / "image_encoder")
    found = read_ip_adapter(whole, file).additions["image_encoder"]
    assert found.source.path == whole / "image_encoder"
    # By paths from where one is: a name alone, and one above.
    encoder(published / "sdxl_models" / "image_encoder")
    (file.parent / "sub").mkdir()
    for place, name in ((file.parent, file.name), (file.parent / "sub", "../one.safetensors")):
        monkeypatch.chdir(place)
        found = read_ip_adapter(models["sd1"], name).additions["image_encoder"]
        assert found.source.path.samefile(published / "sdxl_models" / "image_encoder")
    (file.parent / "sub").rmdir()
    library = tmp_path / "library"
    encoder(library / "clip_vision" / "mine")
    (library / "ControlNet").mkdir()
    shutil.copy(file, library / "ControlNet" / "face.safetensors")
    monkeypatch.setenv("SAFELIGHT_MODELS", str(library))
    found = read_ip_adapter(models["sd1"], "face").additions
    assert {use: one.source.name for use, one in found.items()} == {
        "ip_adapter": "face",
        "image_encoder": "mine",
    }
    named = read_ip_adapter(models["sd1"], "face", "mine").additions
    assert named["image_encoder"].source == found["image_encoder"].source
    shutil.copytree(file.parent, library / "ipadapter")
    kinds = {entry.name: entry.kind for entry in Library(library).entries()}
    assert kinds == {
        "face": "ip_adapter",
        "one": "ip_adapter",
        "mine": "image_encoder",
        "image_encoder": "image_encoder",
    }


def read_ip_adapter(model: Path, adapter: Any, image_encoder: Any = None) -> Plan:
    """Return the plan of a model with an adapter."""
    plan = read_plan(find(model))
    return with_image_prompts(plan, adapter, image_encoder, None, download=False)


def test_a_file_of_a_repository(
    models: dict[str, Path], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is taken from the hub's cache, with the image encoder in the same snapshot."""
    cache = tmp_path / "hub"
    repo, commit = cache / "models--h94--IP-Adapter", "0" * 40
    snapshot = repo / "snapshots" / commit / "models"
    shutil.copytree(root / "image_encoder", snapshot / "image_encoder")
    shutil.copy(root / "sd1-base.safetensors", snapshot / "small.safetensors")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    name = "h94/IP-Adapter/models/small.safetensors"
    found = read_ip_adapter(models["sd1"], name).additions
    assert found["ip_adapter"].source.name == name
    assert found["image_encoder"].source.path == snapshot / "image_encoder"
    for name, told in (
        ("h94/IP-Adapter", "may be a repository of many IP-Adapters: give the place of a file"),
        ("h94/IP-Adapter/models/more.safetensors", "to get it: safelight download h94/IP-Ad"),
        ("ip/models/more.pth", "is not in the hub cache"),
        ("nothing", "no ip adapter 'nothing'"),
    ):
        with pytest.raises(SafelightError, match=told):
            read_ip_adapter(models["sd1"], name)


@pytest.mark.parametrize("names", ["transformers", "openclip", "clip"])
def test_a_single_file_of_an_image_encoder(
    models: dict[str, Path], tmp_path: Path, names: str
) -> None:
    """Its config follows from its shapes, which are those of a published encoder."""
    config = {"hidden_size": 768, "num_attention_heads": 12, "hidden_act": "quick_gelu"}
    folder = encoder(tmp_path / "folder", **config, num_hidden_layers=2, intermediate_size=64)
    tensors = load_file(folder / "model.safetensors")
    whole = read_image_encoder(Source("one", folder))
    if names == "openclip":
        tensors = open_clip(tensors)
    if names == "clip":
        tensors["text_model.final_layer_norm.weight"] = torch.zeros(4)
        tensors["logit_scale"] = torch.zeros(1)
    file = tmp_path / "one.safetensors"
    save_file(tensors, file)
    single = read_image_encoder(Source("one", file))
    assert single.config == whole.config
    assert widths(Source("one", file)) == widths(Source("one", folder)) == (768, 40)
    adapter = tmp_path / "adapter.safetensors"
    save_file(tensors_of("base", models["sd1"]), adapter)
    expected, found = (
        drawn(loaded(models, adapter, image_encoder=one), ip_adapter_image=picture())
        for one in (folder, file)
    )
    assert np.array_equal(found, expected)


def open_clip(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of an image encoder by OpenCLIP's names."""
    found = {
        "visual.class_embedding": tensors["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": tensors["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": tensors["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": tensors["visual_projection.weight"].t().contiguous(),
        "token_embedding.weight": torch.zeros(4, 4),
    }
    for x in ("weight", "bias"):
        found[f"visual.ln_pre.{x}"] = tensors[f"vision_model.pre_layrnorm.{x}"]
        found[f"visual.ln_post.{x}"] = tensors[f"vision_model.post_layernorm.{x}"]
        for i in range(2):
            ours, theirs = f"vision_model.encoder.layers.{i}", f"visual.transformer.resblocks.{i}"
            thirds = [tensors[f"{ours}.self_attn.{q}_proj.{x}"] for q in "qkv"]
            found[f"{theirs}.attn.in_proj_{x}"] = torch.cat(thirds)
            for a, b in (
                ("self_attn.out_proj", "attn.out_proj"),
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):
                found[f"{theirs}.{b}.{x}"] = tensors[f"{ours}.{a}.{x}"]
    return found


def test_the_folder_of_a_whole_clip(models: dict[str, Path], root: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = {k: v for k, v in ENCODER.items() if k != "projection_dim"}
    text = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=40)
    transformers.CLIPModel(config).save_pretrained(tmp_path / "clip")
    model = loaded(models, root / "sd1-base.safetensors", image_encoder=tmp_path / "clip")
    reference = transformers.CLIPModel.from_pretrained(tmp_path / "clip")
    pixels = seen_pixels(picture(), SIDE)
    with torch.inference_mode():
        expected = (
            reference.vision_model(pixels).pooler_output @ reference.visual_projection.weight.T
        )
        torch.testing.assert_close(model.image_encoder(pixels), expected, rtol=1e-4, atol=1e-5)


def test_what_is_refused(models: dict[str, Path], root: Path, tmp_path: Path) -> None:
    def refused(tensors: Any, model: str = "sd1", **how: Any) -> str:
        path = tensors if isinstance(tensors, Path) else tmp_path / "one.safetensors"
        if not isinstance(tensors, Path):
            save_file(tensors, path)
        with pytest.raises(SafelightError) as found:
            loaded(models, path, model, **how)
        assert "\n" not in str(found.value)
        return str(found.value)

    base, plus = (load_file(root / f"sd1-{kind}.safetensors") for kind in ("base", "plus"))
    numbers, scalar = torch.zeros(4, 4), torch.zeros(())
    proj = {f"image_proj.{name}.weight": numbers.clone() for name in ("norm", "proj.0")}
    read = {name: one for name, one in base.items() if name.startswith("ip_adapter")}
    for more in (
        proj,
        {"image_proj.perceiver_resampler.proj_in.weight": numbers},
        {"ip_adapter.0.to_q_lora.down.weight": numbers},
    ):
        told = refused({**read, **more})
        assert "an IP-Adapter FaceID, which reads InsightFace's embeddings" in told
    assert "this is no IP-Adapter" in refused({"something.weight": numbers})
    assert "keys that we do not know: more" in refused({**base, "more": numbers})
    assert "image_proj.latents is missing" in refused(
        {key: one for key, one in plus.items() if key != "image_proj.latents"}
    )
    assert "image_proj.norm.bias" in refused(
        {key: one for key, one in base.items() if key != "image_proj.norm.bias"},
        image_encoder=root / "image_encoder",
    )
    assert "number 3 differs" in refused(
        {key: one for key, one in base.items() if not key.startswith("ip_adapter.5.")}
    )
    for number in (1, 5):
        assert "does not fit" in refused({**base, f"ip_adapter.{number}.to_k_ip.weight": scalar})
    xl = root / "xl-base.safetensors"
    assert "for text states of 40 numbers does not fit" in refused(xl)
    assert "give the file of an IP-Adapter that lies in it" in refused(root)
    assert "takes no IP-Adapter" in refused(root / "sd1-base.safetensors", "pixels")
    wrong = encoder(tmp_path / "wrong", projection_dim=64, hidden_size=64)
    for kind in ("base", "plus"):
        told = refused(root / f"sd1-{kind}.safetensors", image_encoder=wrong)
        assert "this one's have 64" in told
    for name, why in ((models["sd1"] / "unet", "is no image encoder"), (xl, "is no image encoder")):
        assert why in refused(root / "sd1-base.safetensors", image_encoder=name)
    flow = make_sd3(tmp_path / "sd3", t5=False)
    with pytest.raises(SafelightError, match="which takes no IP-Adapter yet"):
        load_model(flow, device="cpu", ip_adapter=root / "sd1-base.safetensors")


def test_files_in_other_places_are_named(models: dict[str, Path], root: Path) -> None:
    """An adapter, or its encoder, given as something else."""
    file = root / "sd1-base.safetensors"
    how: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
    with pytest.raises(SafelightError, match="an IP-Adapter, not a whole model: give it with --ip"):
        load_model(file, **how)
    with pytest.raises(SafelightError, match="an image encoder of an IP-Adapter, not a whole"):
        load_model(root / "image_encoder" / "model.safetensors", **how)
    with pytest.raises(SafelightError, match="this is an IP-Adapter: give it with --ip-adapter"):
        load_model(models["sd1"], controlnet=file, **how)
    with pytest.raises(SafelightError, match="an IP-Adapter, which is no LoRA"):
        load_model(models["sd1"], **how).generate("a dog", steps=1, loras=[str(file)])
    with pytest.raises(SafelightError, match="ip_adapter_image needs an IP-Adapter"):
        load_model(models["sd1"], **how).generate("a dog", steps=1, ip_adapter_image=picture())
    model = load_model(models["sd1"], image_encoder=root / "image_encoder", **how)
    assert "image_encoder does nothing without ip_adapter: leave it out" in model.warnings


def test_the_settings_are_checked() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"ip_adapter_start": 0.8, "ip_adapter_end": 0.2}, "ip_adapter_end must be at least ip"),
        ({"ip_adapter_scale": -1.0}, "ip_adapter_scale must be a number from 0 to 10"),
        ({"ip_adapter_image": Image.new("F", (8, 8))}, "ip_adapter_image has PIL's mode F"),
    ]
    for settings, told in cases:
        with pytest.raises(SafelightError, match=told):
            Request(**settings)
    asked = Request(ip_adapter_image=picture(100, 50), image=picture(200, 100), width=64)
    assert asked.fitted().image is not None
    assert asked.fitted().pictures["ip_adapter_image"].size == (100, 50)
    assert "ip_adapter_image_sha256" in asked.to_dict()
