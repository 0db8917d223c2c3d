"""Textual inversions against diffusers, in each layout of their files."""

import base64
import json

import diffusers
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

import safelight
from safelight.picture import largest_difference
from tests.parity.sdxl_models import REFINER, UNET, make_folder

VECTORS = torch.randn(3, 32, generator=torch.Generator().manual_seed(5)) * 0.3


def as_json(value):
    if isinstance(value, torch.Tensor):
        return {"TORCHTENSOR": value.tolist()}
    return {key: as_json(one) for key, one in value.items()} if isinstance(value, dict) else value


def save_png(content, path):
    texts = PngImagePlugin.PngInfo()
    texts.add_text("sd-ti-embedding", base64.b64encode(json.dumps(as_json(content)).encode()))
    Image.new("RGB", (16, 16)).save(path, pnginfo=texts)


def layouts(vectors):
    """Yield each layout: the file's name, how it is written, and the token that diffusers finds in
    it.

    Where diffusers cannot read a file, it is given the vectors themselves.
    """
    a1111 = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": vectors},
        "name": "<ink>",
        "step": 100,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }
    return {
        "diffusers": ("ink.safetensors", save_file, {"<ink>": vectors}),
        "diffusers-one": ("ink.safetensors", save_file, {"<ink>": vectors[0]}),
        "diffusers-bin": ("ink.bin", torch.save, {"<ink>": vectors}),
        "a1111": ("ink.pt", torch.save, a1111),
        "emb_params": ("ink-9.safetensors", save_file, {"emb_params": vectors}),
        "list": ("ink-9.pt", torch.save, [{"<ink>": vectors[:1]}, {"<ink>": vectors[1:]}]),
        "clip_l": ("ink-9.safetensors", save_file, {"clip_l": vectors}),
        "png": ("ink.png", save_png, a1111),
    }


@pytest.fixture(scope="module")
def model(folders):
    return safelight.load(folders["sd1"], device="cpu", dtype="float32")


@pytest.mark.parametrize("layout", layouts(VECTORS))
def test_pictures_are_those_of_diffusers(model, folders, layout, tmp_path):
    name, save, content = layouts(VECTORS)[layout]
    save(content, tmp_path / name)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folders["sd1"])
    pipe.set_progress_bar_config(disable=True)
    if layout in ("diffusers", "diffusers-one", "diffusers-bin", "a1111"):
        pipe.load_textual_inversion(str(tmp_path), weight_name=name)
        token = "<ink>"
    else:
        token = "<ink>" if layout == "png" else "ink-9"
        pipe.load_textual_inversion(VECTORS, token=token)
    prompt = f"a cat in {token}, a dog of {token} {token}"
    embeddings = [str(tmp_path / name)]
    mine = model.generate(
        prompt, embeddings=embeddings, sampler="ddim", steps=2, seed=3, negative_prompt=token
    )
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    wanted = pipe(
        prompt,
        negative_prompt=token,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    assert largest_difference(mine.images[0], wanted) <= 2
    assert mine.warnings == []
    without = model.generate(prompt, sampler="ddim", steps=2, seed=3, negative_prompt=token)
    assert largest_difference(mine.images[0], without.images[0]) > 2


def test_both_text_encoders_of_sdxl(tmp_path):
    folder = make_folder(tmp_path / "model", UNET)
    large = torch.randn(3, 24, generator=torch.Generator().manual_seed(6))
    small = torch.randn(3, 16, generator=torch.Generator().manual_seed(7))
    save_file({"clip_l": small, "clip_g": large}, tmp_path / "ink-9.safetensors")
    model = safelight.load(folder, device="cpu", dtype="float32")
    prompt, settings = "a cat in ink-9, a dog", {"sampler": "euler", "steps": 2, "seed": 3}
    settings |= {"negative_prompt": "grey ink-9", "guidance_scale": 5.0}
    mine = model.generate(prompt, embeddings=[str(tmp_path / "ink-9.safetensors")], **settings)
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    for vectors, part in ((small, ""), (large, "_2")):
        parts = {name: getattr(pipe, name + part) for name in ("text_encoder", "tokenizer")}
        pipe.load_textual_inversion(vectors, token="ink-9", **parts)
    # By its config, transformers takes the token of the largest id for the end of the text.
    pipe.text_encoder_2.config.eos_token_id = 49407
    pipe.text_encoder_2.text_model.eos_token_id = 49407
    wanted = pipe(
        prompt,
        negative_prompt="grey ink-9",
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    assert largest_difference(mine.images[0], wanted) <= 2
    assert largest_difference(mine.images[0], model.generate(prompt, **settings).images[0]) > 2
    save_file({"x": small}, tmp_path / "small.safetensors")
    with pytest.raises(safelight.SafelightError, match="this model reads 16 and 24"):
        model.generate(prompt, embeddings=[str(tmp_path / "small.safetensors")])


def test_a_refiner_reads_the_same_embeddings(tmp_path):
    base = make_folder(tmp_path / "base", UNET)
    pipeline = "StableDiffusionXLImg2ImgPipeline"
    refiner = make_folder(tmp_path / "refiner", REFINER, pipeline=pipeline, zeros=False)
    draw = torch.Generator().manual_seed(8)
    vectors = {"clip_l": torch.randn(2, 16, generator=draw), "clip_g": torch.randn(2, 24)}
    save_file(vectors, tmp_path / "ink-9.safetensors")
    models = [
        safelight.load(base, refiner=one, device="cpu", dtype="float32") for one in (refiner, None)
    ]
    settings = {"embeddings": [str(tmp_path / "ink-9.safetensors")], "steps": 4, "seed": 3}
    refined, plain = (
        model.generate("a embedding:ink-9 cat", prompt_syntax="comfy", **settings).images[0]
        for model in models
    )
    assert largest_difference(refined, plain) > 2
    states = models[0].refiner.embeddings.model(
        models[0].embeddings.choose(safelight.Request(prompt="ink-9", **settings))
    )
    assert states.parts["tokenizer_2"].learned[0].name == "ink-9"
