"""IP-Adapters against diffusers: the same checkpoint, adapter, image encoder, picture and settings.

All kinds, guided and not, both families, all tasks; the image encoder and its pixels against
transformers; and what is refused.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from safelight import SafelightError
from safelight.engine import Engine, job
from safelight.engine.ip_adapter import seen_pixels
from safelight.engine.requests import create_job, resolve_request
from safelight.model import Model
from safelight.nets.ip_adapter import IPAdapter, IPAdapterConfig
from safelight.request import Request
from safelight.weights import load_model
from safelight.weights.find import find, find_ip_adapter
from safelight.weights.image_encoders import image_encoder
from safelight.weights.plan import read_plan
from tests.parity.sdxl_models import UNET, make_folder

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


def tensors(kind: str, model: Path, **shape: Any) -> dict[str, torch.Tensor]:
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
        save_file(tensors(kind, folders["sd1"]), found / f"sd1-{kind}.safetensors")
    xl = make_folder(found / "xl", UNET)
    for kind in ("base", "plus"):
        save_file(tensors(kind, xl), found / f"xl-{kind}.safetensors")
    return found


@pytest.fixture(scope="module")
def models(root: Path, folders: dict[str, Path]) -> dict[str, Path]:
    return {**folders, "xl": root / "xl"}


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
    model = load_model(models["sd1"], device="cpu", dtype="float32", ip_adapter=adapter)
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
    model = load_model(models["xl"], device="cpu", dtype="float32", ip_adapter=adapter)
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
    model = load_model(models["sd1"], device="cpu", dtype="float32", ip_adapter=adapter)
    pipe = theirs("StableDiffusionImg2ImgPipeline", models["sd1"], adapter, 1.0)
    compare(worst, model, pipe, {**told, "image": start, "strength": 0.6}, **asked)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    given = {**told, "image": start, "mask_image": mask, "strength": 0.6}
    model = load_model(models["inpainting"], device="cpu", dtype="float32", ip_adapter=adapter)
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
