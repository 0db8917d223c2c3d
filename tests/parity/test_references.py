"""Pictures edited by reference pictures, against diffusers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image

from safelight.batch.estimate import _cost
from safelight.engine import Engine
from safelight.engine.references import middle
from safelight.engine.requests import new_result, resolve_request
from safelight.errors import SafelightError
from safelight.explain.watch import watch
from safelight.families.flux2 import FLUX2
from safelight.picture import to_tensor
from safelight.request import Request
from safelight.weights import load_model
from tests.parity import test_flux, test_flux2
from tests.parity.flow_models import make_flux, make_klein, make_zimage
from tests.parity.test_pictures import NEGATIVE, PROMPT, Worst, draw, left_half, ours, theirs

KONTEXT = "FluxKontextPipeline"
PREFERRED = "diffusers.pipelines.flux.pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS"
SMALL = [(64, 112), (64, 64), (112, 64)]
"""Stands for the sizes that Kontext was trained to edit, of a million pixels each."""


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_klein(tmp_path_factory.mktemp("references") / "base", distilled=False)


@pytest.fixture(scope="module")
def kontext(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_flux(tmp_path_factory.mktemp("references") / "edits", guided=True)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": KONTEXT}))
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PREFERRED, SMALL)
    monkeypatch.setattr("safelight.families.flux._EDITED", tuple(SMALL))


def shown(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Return a picture of blurred noise."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


# --- FLUX.2 klein --------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[(80, 70)], [(96, 64), (70, 100)]])
def test_klein(worst: Worst, klein: Path, sizes: list[tuple[int, int]]) -> None:
    """One and two pictures, whose sides are no multiples; the first one's size is drawn."""
    pictures = [shown(size, seed) for seed, size in enumerate(sizes)]
    asked = {"prompt": PROMPT, "guidance_scale": 1.0}
    given = {**asked, "image": pictures, "num_inference_steps": 2}
    said = {**asked, "reference_images": pictures, "steps": 2, "seed": 7}
    test_flux2.compare(worst, klein, test_flux2.TEXT, given, **said)


def test_klein_with_guidance_at_another_size(worst: Worst, klein: Path) -> None:
    """The negative prompt sees the pictures, too."""
    image, asked = shown((64, 96)), {"prompt": PROMPT, "guidance_scale": 3.0, **test_flux2.SIZE}
    told = theirs(klein, test_flux2.TEXT).encode_prompt(NEGATIVE)[0]
    given = {**asked, "image": image, "num_inference_steps": 2, "negative_prompt_embeds": told}
    said = {**asked, "negative_prompt": NEGATIVE, "reference_images": image, "steps": 2, "seed": 7}
    test_flux2.compare(worst, klein, test_flux2.TEXT, given, **said)


def test_klein_paints_in_what_it_sees(worst: Worst, klein: Path) -> None:
    """diffusers' pipeline for inpainting always shows the picture, before the reference."""
    image, other = shown((64, 64)), shown((80, 64), 1)
    asked = {"prompt": PROMPT, "guidance_scale": 1.0, "image": image, "strength": 0.7}
    given = {**asked, "mask_image": left_half(), "image_reference": other}
    given["num_inference_steps"] = 4
    said = {**asked, "mask": left_half(), "reference_images": [image, other]}
    said |= {"steps": 4, "seed": 11}
    test_flux2.compare(worst, klein, test_flux2.INPAINT, given, **said)


@pytest.mark.parametrize("size", [(1300, 1111), (80, 640), (2500, 500), (1024, 1024), (100, 79)])
def test_a_picture_is_brought_to_the_same_pixels(size: tuple[int, int]) -> None:
    image, reads = shown(size), Flux2ImageProcessor(vae_scale_factor=16)
    wanted = reads._resize_if_exceeds_area(image)
    width, height = (side // 16 * 16 for side in wanted.size)
    expected = reads.preprocess(wanted, height=height, width=width, resize_mode="crop")
    assert FLUX2.reference_size(size) == (width, height)
    found = to_tensor(middle(image, *FLUX2.reference_sizes(size)))
    assert float((found - expected).abs().max()) < 1e-6


# --- FLUX.1 Kontext ------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("size", [(100, 50), (64, 72)])
def test_kontext(worst: Worst, kontext: Path, size: tuple[int, int]) -> None:
    """The picture is brought to the nearest proportions; another size is drawn than it has."""
    image, asked = shown(size), {"prompt": PROMPT, "guidance_scale": 2.5, **test_flux.SIZE}
    given = {**asked, "image": image, "num_inference_steps": 2, "max_area": 64 * 96}
    said = {**asked, "reference_images": image, "steps": 2, "seed": 7}
    test_flux.compare(worst, kontext, KONTEXT, given, **said)


def test_kontext_is_told_by_its_folder_or_its_name(kontext: Path) -> None:
    model = ours(kontext)
    assert model.family.name == "flux-kontext-custom"
    assert model.defaults["guidance_scale"] == 2.5
    assert model.family.index(model.configs)["_class_name"] == KONTEXT
    names = {"flux1-dev-Kontext_fp8.safetensors": KONTEXT, "flux1-dev.safetensors": None}
    for name, pipeline in names.items():
        assert model.family.named_index(name).get("_class_name") == pipeline
    index = {"_class_name": "FluxPipeline"}
    dev = model.family.variant(
        model.configs, index, {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    )
    assert dev.name == "flux-custom"
    request = Request(prompt="a cat", reference_images=shown((64, 64)), width=64, height=64)
    said = [w for w in dev.warnings(model, request.replace(steps=1)) if "Kontext" in w]
    assert said
    assert not [w for w in model.family.warnings(model, request.replace(steps=1)) if "Kontext" in w]


@pytest.mark.usefixtures("small")
def test_the_size_of_the_picture_is_drawn(klein: Path, kontext: Path) -> None:
    asked = Request(prompt="a cat", reference_images=shown((150, 70)), steps=1)
    for folder, size in ((klein, (144, 64)), (kontext, (112, 64))):
        resolved = resolve_request(ours(folder), asked)
        assert (resolved.width, resolved.height) == size, folder
        other = resolve_request(ours(folder), asked.replace(width=64))
        assert other.width == 64


# --- what they cost ------------------------------------------------------------------------------


def test_an_estimate_of_a_batch_counts_them(klein: Path, tmp_path: Path) -> None:
    """SQLite has the row's list of files as text. The first one's size is drawn."""
    files = [str(tmp_path / f"{i}.png") for i in (0, 1)]
    for file, size in zip(files, ((96, 64), (64, 80)), strict=True):
        shown(size).save(file)
    row: dict[str, Any] = {"steps": 3, "guidance_scale": 1.0}
    wanted = 3 * (96 * 64 + 96 * 64 + 64 * 80)
    assert _cost(ours(klein), {**row, "reference_images": files}) == wanted
    row["reference_images"] = json.dumps(files)
    assert _cost(ours(klein), row) == wanted
    twice = {**row, "hires_scale": 2.0, "hires_strength": 1.0}
    assert _cost(ours(klein), twice) == wanted + 3 * (192 * 128 + 96 * 64 + 64 * 80)


def test_bfloat16(klein: Path) -> None:
    asked = {"prompt": PROMPT, "width": 64, "height": 64, "steps": 2, "seed": 2}
    asked |= {"reference_images": shown((80, 64)), "guidance_scale": 1.0}
    wanted, _ = draw(ours(klein), **asked)
    found, _ = draw(load_model(str(klein), device="cpu", dtype="bfloat16"), **asked)
    assert np.linalg.norm(found - wanted) < 0.1 * np.linalg.norm(wanted)


def test_a_picture_is_encoded_once(klein: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = ours(klein), list[Any]()
    encode = model.vae.encode
    monkeypatch.setattr(model.vae, "encode", lambda pixels: seen.append(pixels) or encode(pixels))
    engine = Engine(model)
    asked = {"steps": 1, "width": 64, "height": 64, "guidance_scale": 1.0}
    one, other = shown((64, 64)), shown((64, 80), 1)
    engine.add(Request(prompt="a cat", reference_images=one, count=2, **asked))
    engine.add(Request(prompt="a dog", reference_images=[other, one], **asked))
    assert len(seen) == 2
    assert [ticket.size for ticket in engine.tickets] == [1.0] * 3


def test_pictures_share_a_call_where_their_references_have_one_shape(klein: Path) -> None:
    model, engine = ours(klein), Engine(ours(klein), exact=False, rows=8)
    asked = {"steps": 2, "width": 64, "height": 64, "seed": 5, "guidance_scale": 2.0}
    requests = [
        Request(prompt="a cat", reference_images=shown((64, 80)), **asked),
        Request(prompt="a dog", reference_images=shown((70, 80), 1), **asked),
        Request(prompt="a dog", reference_images=shown((80, 64), 1), **asked),
        Request(prompt="a dog", **asked),
    ]
    for request in requests:
        engine.add(request)
    tickets = [*engine.tickets]
    assert len({ticket.call_key for ticket in tickets}) == 3
    while engine.busy:
        engine.step()
    found = [np.asarray(ticket.image).astype(int) for ticket in tickets]
    assert np.abs(found[1] - found[2]).max() > 1
    for request, picture in zip(requests, found, strict=True):
        alone = np.asarray(model.generate(request).images[0])
        assert np.abs(alone - picture).max() <= 1


def test_attention_is_that_of_the_picture(klein: Path) -> None:
    """Maps have the picture's sides, though the network reads more tokens."""
    request = Request(
        prompt="a cat", reference_images=shown((64, 96)), steps=1, width=96, height=64
    )
    story = watch(ours(klein), request)
    assert [word.text for word in story.words] == ["a", "cat"]
    attention = story.moments[0].attention
    assert attention is not None
    assert attention.shape == (2, 4, 6)


# --- refusals ------------------------------------------------------------------------------------


def refusal(folder: Path, **settings: Any) -> str:
    model, request = ours(folder), Request(prompt="a cat", **settings)
    with pytest.raises(SafelightError) as caught:
        new_result(model, request, resolve_request(model, request))
    assert caught.value.field == "reference_images"
    return str(caught.value)


def test_what_cannot_be_read_is_refused(
    klein: Path, kontext: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, image = make_zimage(tmp_path / "z", shift=3.0), shown((64, 64))
    assert "give it as image" in refusal(other, reference_images=image)
    assert "put them side by side into one" in refusal(kontext, reference_images=[image] * 2)
    assert "60x80: sides must be at least 64" in refusal(klein, reference_images=shown((60, 80)))
    told = refusal(klein, reference_images=[image, shown((64, 600))])
    assert "64x600: one side may be at most 8 times the other" in told
    monkeypatch.setattr("safelight.families.flux2.Flux2.references", 1)
    assert "must be one picture for base, not 2" in refusal(klein, reference_images=[image] * 2)
