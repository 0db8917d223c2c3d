"""Pictures of SDXL against diffusers: its variants, its files, and what it is told."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from safelight.engine.capacity import probe
from safelight.errors import SafelightError
from safelight.explain.watch import watch
from safelight.families import sdxl
from safelight.fast import memory
from safelight.request import Request
from safelight.weights import budget, load, load_model
from tests.crossed import crossed
from tests.parity.sdxl_models import (
    REFINER,
    UNET,
    ZERO_SNR,
    make_folder,
    single_file,
    tiny_family,
)
from tests.parity.test_pictures import (
    LATENTS,
    NEGATIVE,
    PROMPT,
    Worst,
    compare,
    draw,
    left_half,
    ours,
    picture,
    scheduler,
    theirs,
)

SAMPLERS = ("euler", "euler_a", "ddim", "dpmpp_2m", "unipc", "heun")
XL = "StableDiffusionXLPipeline"
IMAGE = "StableDiffusionXLImg2ImgPipeline"
ASKED = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": 5.0}
SIZE = {"height": 64, "width": 64}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sdxl")
    return {
        "base": make_folder(root / "base", UNET),
        "v": make_folder(root / "v", UNET, ZERO_SNR),
        "encoded": make_folder(root / "encoded", UNET, zeros=False),
        "inpainting": make_folder(
            root / "inpainting",
            {**UNET, "in_channels": 9},
            pipeline="StableDiffusionXLInpaintPipeline",
        ),
        "refiner": make_folder(root / "refiner", REFINER, pipeline=IMAGE, zeros=False),
    }


def white() -> Image.Image:
    """Return a mask that repaints everything."""
    return Image.new("L", (64, 64), 255)


def check(
    worst: Worst, folder: Path, task: str, sampler: str, given: dict[str, Any], **settings: Any
) -> None:
    """Compare pictures of a sampler. given: keywords of diffusers' pipeline."""
    pipe = theirs(folder, task)
    pipe.scheduler, held = scheduler(pipe, sampler, None), pipe.scheduler
    try:
        compare(worst, ours(folder), pipe, given, sampler=sampler, seed=11, **settings)
    finally:
        pipe.scheduler = held


@pytest.mark.parametrize(("name", "sampler"), crossed(["base", "v"], list(SAMPLERS)))
def test_text_to_image(worst: Worst, models: dict[str, Path], name: str, sampler: str) -> None:
    given = {**ASKED, "num_inference_steps": 6, **SIZE}
    check(worst, models[name], XL, sampler, given, **ASKED, steps=6)


@pytest.mark.parametrize(("name", "sampler"), crossed(["base", "v"], list(SAMPLERS)))
def test_image_to_image(worst: Worst, models: dict[str, Path], name: str, sampler: str) -> None:
    asked = {**ASKED, "image": picture(), "strength": 0.6}
    given = {**asked, "num_inference_steps": 8}
    check(worst, models[name], IMAGE, sampler, given, **asked, steps=8)


@pytest.mark.parametrize(
    ("name", "sampler", "strength"),
    crossed(["base", "inpainting"], ["euler", "dpmpp_2m"], [0.6, 1.0]),
)
def test_inpainting(
    worst: Worst, models: dict[str, Path], name: str, sampler: str, strength: float
) -> None:
    asked = {**ASKED, "image": picture(), "strength": strength}
    given = {**asked, "mask_image": left_half(), "num_inference_steps": 8, **SIZE}
    task = "StableDiffusionXLInpaintPipeline"
    check(worst, models[name], task, sampler, given, **asked, mask=left_half(), steps=8)


@pytest.mark.parametrize("sampler", ["euler", "euler_a", "ddim"])
def test_an_inpainting_model_draws_from_words_alone(
    worst: Worst, models: dict[str, Path], sampler: str
) -> None:
    """As with a mask that is white everywhere, so that nothing of the picture counts."""
    asked = {**ASKED, "steps": 6, "seed": 11, "sampler": sampler}
    given = {**ASKED, "image": picture(), "mask_image": white(), "num_inference_steps": 6, **SIZE}
    task = "StableDiffusionXLInpaintPipeline"
    check(worst, models["inpainting"], task, sampler, {**given, "strength": 1.0}, **ASKED, steps=6)
    model = ours(models["inpainting"])
    drawn = model.generate(**asked).images[0]
    for image in (picture(), Image.new("RGB", (64, 64), "gray")):
        masked = model.generate(**asked, image=image, mask=white()).images[0]
        assert masked.tobytes() == drawn.tobytes()
    image = {"image": picture(), "strength": 0.6}
    changed = model.generate(**asked, **image).images[0]
    assert changed.tobytes() == model.generate(**asked, **image, mask=white()).images[0].tobytes()
    assert changed.tobytes() != drawn.tobytes()


def test_an_inpainting_model_without_a_mask_is_looked_inside(models: dict[str, Path]) -> None:
    model = ours(models["inpainting"])
    request = Request(**ASKED, steps=3, seed=5)
    drawn = model.generate(request).images[0]
    steps: list[Any] = []
    story = watch(model, request, steps.append)
    assert story.result.images[0].tobytes() == drawn.tobytes()
    assert [step.preview().size for step in steps] == [(64, 64)] * 3
    both = model.generate(request.replace(count=2)).images  # in one call of the network
    assert np.abs(np.asarray(both[0]).astype(int) - np.asarray(drawn)).max() <= 1
    assert probe(model, 2).shape == (2, 4, 8, 8)


@pytest.mark.parametrize("scores", [(6.0, 2.5), (9.0, 1.0)])
def test_refiner(worst: Worst, models: dict[str, Path], scores: tuple[float, float]) -> None:
    asked = {**ASKED, "image": picture(), "strength": 0.6}
    told = {"aesthetic_score": scores[0], "negative_aesthetic_score": scores[1]}
    given = {**asked, **told, "num_inference_steps": 8}
    check(worst, models["refiner"], IMAGE, "euler", given, **asked, **told, steps=8)


def test_sizes_that_differ_from_the_picture(worst: Worst, models: dict[str, Path]) -> None:
    given = {
        **ASKED,
        **SIZE,
        "num_inference_steps": 5,
        "original_size": (900, 1200),
        "crops_coords_top_left": (30, 70),
        "target_size": (512, 768),
    }
    told = {
        "original_height": 900,
        "original_width": 1200,
        "crop_top": 30,
        "crop_left": 70,
        "target_height": 512,
        "target_width": 768,
    }
    check(worst, models["base"], XL, "euler", given, **ASKED, **told, steps=5)
    plain = draw(ours(models["base"]), **ASKED, steps=5, seed=11)[0]
    assert (
        np.abs(plain - draw(ours(models["base"]), **ASKED, **told, steps=5, seed=11)[0]).max()
        > 0.01
    )


@pytest.mark.parametrize("k", [1, 2])
def test_clip_skip_leaves_the_negative_prompt_alone(
    worst: Worst, models: dict[str, Path], k: int
) -> None:
    given = {**ASKED, **SIZE, "num_inference_steps": 4, "clip_skip": k}
    check(worst, models["base"], XL, "euler", given, **ASKED, clip_skip=k + 1, steps=4)


@pytest.mark.parametrize(
    ("name", "rule", "negative"),
    [
        ("base", "model", None),
        ("base", "zeros", None),
        ("base", "encoded", ""),
        ("encoded", "model", None),
        ("encoded", "encoded", None),
    ],
)
def test_rules_for_an_empty_negative_prompt(
    worst: Worst, models: dict[str, Path], name: str, rule: Any, negative: str | None
) -> None:
    asked = {"prompt": PROMPT, "guidance_scale": 5.0}
    given = {**asked, **SIZE, "negative_prompt": negative, "num_inference_steps": 4}
    check(worst, models[name], XL, "euler", given, **asked, empty_negative=rule, steps=4)


def test_without_guidance(worst: Worst, models: dict[str, Path]) -> None:
    asked = {"prompt": PROMPT, "guidance_scale": 0.0}
    given = {**asked, **SIZE, "num_inference_steps": 2}
    check(worst, models["v"], XL, "euler_a", given, **asked, steps=2)


@pytest.mark.parametrize(("sampler", "share"), crossed(["euler", "ddim", "dpmpp_2m"], [0.5, 0.8]))
def test_the_refiner_takes_the_last_steps(
    worst: Worst, models: dict[str, Path], sampler: str, share: float
) -> None:
    """As diffusers' ensemble: the base ends where the refiner starts."""
    first, second = theirs(models["base"], XL), theirs(models["refiner"], IMAGE)
    held = first.scheduler, second.scheduler
    for pipe in (first, second):
        pipe.scheduler = scheduler(pipe, sampler, None)
    steps = {"num_inference_steps": 6, "generator": torch.Generator().manual_seed(5)}
    try:
        latents = first(**ASKED, **SIZE, **steps, denoising_end=share, output_type="latent").images
        expected = second(
            **ASKED, **steps, image=latents, denoising_start=share, output_type="latent"
        ).images
    finally:
        first.scheduler, second.scheduler = held
    both = load_model(
        str(models["base"]), device="cpu", dtype="float32", refiner=str(models["refiner"])
    )
    run = both.stream(Request(**ASKED, sampler=sampler, steps=6, seed=5, refiner_start=share))
    taken = list(run)
    assert len(taken) == 6
    last = taken[-1].clean.numpy()
    # The last step of these samplers lands on the clean estimate.
    error = np.linalg.norm(last - expected.numpy()) / np.linalg.norm(expected)
    worst["latents"] = max(worst["latents"], float(error))
    assert error <= LATENTS
    alone = ours(models["base"]).generate(**ASKED, sampler=sampler, steps=6, seed=5).images[0]
    assert np.asarray(alone).tolist() != np.asarray(run.result.images[0]).tolist()
    recipe = run.result.recipe()
    assert recipe["refiner"] == {"name": "refiner", "sha256": both.refiner.sha256}


def test_a_refiner_of_the_same_family_reads_by_its_own_text_encoders(
    models: dict[str, Path],
) -> None:
    """Base and refiner may share one family object, as two single files of one variant do."""
    model = ours(models["base"])
    text_encoder = copy.deepcopy(model.text_encoder)
    for parameter in text_encoder.parameters():
        parameter.data *= 1.5
    refiner = replace(model, parts={**model.parts, "text_encoder": text_encoder})
    other = replace(refiner, family=copy.copy(model.family))
    asked = {**ASKED, "steps": 4, "seed": 5, "sampler": "euler", "refiner_start": 0.5}
    one, two = (replace(model, refiner=r).generate(**asked).images[0] for r in (refiner, other))
    assert one.tobytes() == two.tobytes()


def test_the_refiner_is_asked_by_whole_steps(models: dict[str, Path]) -> None:
    both = load_model(
        str(models["base"]), device="cpu", dtype="float32", refiner=str(models["refiner"])
    )
    asked = {**ASKED, "steps": 10, "seed": 5}
    for settings in (
        {"sampler": "heun", "refiner_start": 0.5},
        {"sampler": "pndm", "refiner_start": 0.5},
        {"sampler": "euler", "image": picture(), "strength": 0.5},
        {"sampler": "euler", "refiner_start": 0.0},
        {"sampler": "euler", "prompt": "a [cat:dog:0.5]", "prompt_syntax": "a1111"},
    ):
        assert both.generate(Request(**{**asked, **settings})).images
    # A refiner that never takes over leaves the base model's picture.
    alone = ours(models["base"]).generate(Request(**asked)).images[0]
    never = both.generate(Request(**asked, refiner_start=1.0)).images[0]
    assert np.array_equal(np.asarray(alone), np.asarray(never))


def test_a_refiner_of_another_kind_is_refused(models: dict[str, Path]) -> None:
    with pytest.raises(SafelightError, match="both must be of SDXL"):
        load_model(str(models["base"]), device="cpu", refiner="embedded")
    with pytest.raises(SafelightError, match="both must be of SDXL"):
        load_model("embedded", device="cpu", refiner=str(models["refiner"]))
    with pytest.raises(SafelightError, match="refiner inpainting is an inpainting model") as caught:
        load_model(str(models["base"]), device="cpu", refiner=str(models["inpainting"]))
    assert caught.value.field == "refiner"


def test_base_and_refiner_must_fit_together(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, refiner = str(models["base"]), str(models["refiner"])
    held = [load_model(one, device="cpu", dtype="float32").weights_held for one in (base, refiner)]
    total = budget.PROGRAM + budget.MAPS * 64 * 64 * 8 * 4 + sum(held)
    monkeypatch.setattr(load, "TOLD_FROM", 0)
    monkeypatch.setattr(memory, "total", lambda: total)
    told: list[str] = []
    both = load_model(base, device="cpu", dtype="float32", refiner=refiner, on_plan=told.append)
    assert [one.weights_held for one in (both, both.refiner)] == held
    [line] = told
    assert f"{sum(held) / 1e9:.1f} GB of weights" in line
    monkeypatch.setattr(memory, "total", lambda: total - 1)
    with pytest.raises(SafelightError, match="base: with its refiner takes"):
        load_model(base, device="cpu", dtype="float32", refiner=refiner)
    assert load_model(base, device="cpu", dtype="float32").refiner is None


@pytest.fixture(scope="module")
def tiny(request: pytest.FixtureRequest) -> Any:
    """The tiny models' shapes are those of published variants."""
    patch = pytest.MonkeyPatch()
    names = ("sdxl", "sdxl-inpainting", "sdxl-refiner")
    patch.setattr(sdxl, "VARIANTS", tuple(map(tiny_family, names)))
    yield
    patch.undo()


@pytest.mark.parametrize(
    ("name", "family", "marks"),
    [
        ("base", "sdxl", ()),
        ("v", "sdxl", ("v_pred", "ztsnr")),
        ("inpainting", "sdxl-inpainting", ()),
        ("refiner", "sdxl-refiner", ()),
    ],
)
def test_a_single_file_is_read_as_diffusers_reads_it(
    models: dict[str, Path],
    tiny: None,
    tmp_path: Path,
    name: str,
    family: str,
    marks: tuple[str, ...],
) -> None:
    """The weights as diffusers converts them, and the folder's pictures but for rounding, which
    depends on where weights lie in memory."""
    folder = models[name]
    path = single_file(folder, tmp_path / "model.safetensors", tiny_family(family), *marks)
    found = load_model(str(path), device="cpu", dtype="float32", plain=True)
    assert found.family.name == family
    kind = IMAGE if name == "refiner" else XL
    expected = getattr(diffusers, kind).from_single_file(
        str(path), config=str(folder), local_files_only=True
    )
    for part in found.family.parts:
        wanted = {
            k if not part.startswith("text") or k.startswith("text_") else f"text_model.{k}": v
            for k, v in getattr(expected, part).state_dict().items()
            if "position_ids" not in k
        }
        state = found.parts[part].state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[k], wanted[k]) for k in state)
    asked: dict[str, Any] = {**ASKED, "steps": 3, "seed": 4}
    if name == "refiner":
        asked |= {"image": picture(), "strength": 0.6}
    elif name == "inpainting":
        asked |= {"image": picture(), "mask": left_half()}
    ones = found.generate(Request(**asked))
    others = load_model(str(folder), device="cpu", dtype="float32", plain=True).generate(
        Request(**asked)
    )
    apart = np.asarray(ones.images[0], int) - np.asarray(others.images[0], int)
    assert np.abs(apart).max() <= 1


def test_defaults_are_those_of_the_pipeline_and_the_scheduler(models: dict[str, Path]) -> None:
    model = ours(models["base"])
    assert model.defaults == {"sampler": "euler", "steps": 50, "guidance_scale": 5.0}
    assert model.generate("a cat", steps=1, seed=1).settings["sampler"] == "euler"
    assert model.family.name == "sdxl-custom"


def test_float16_keeps_the_autoencoder_in_float32(models: dict[str, Path]) -> None:
    model = load_model(str(models["base"]), device="cpu", dtype="float16", plain=True)
    dtypes = {part: model.parts[part].state_dict() for part in ("unet", "vae")}
    dtypes = {part: {t.dtype for t in state.values()} for part, state in dtypes.items()}
    assert dtypes == {"unet": {torch.float16}, "vae": {torch.float32}}
    assert model.generate("a cat", steps=1, seed=1).images
