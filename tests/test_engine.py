"""Requests to pictures, on the models that ship."""

import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import copy, deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import safelight
from safelight import SafelightError
from safelight.engine import job
from safelight.engine.requests import (
    _draws_size,
    _without_effect,
    create_job,
    new_result,
    resolve_request,
)
from safelight.families import sdxl
from safelight.model import Lock, Model
from safelight.request import Request
from safelight.sampling import Level, clean_estimate

FEW = {"steps": 3, "sampler": "euler"}
SMALL: dict[str, Any] = {**FEW, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def model() -> Model:
    return safelight.load(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def pixels() -> Model:
    return safelight.load("embedded-unconditional", device="cpu", dtype="float32")


def photo(width: int = 64, height: int = 64) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def spot(width: int = 64, height: int = 64) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, (20, 20, 40, 44))
    return mask


def test_a_model_prints_as_one_line(model: Model) -> None:
    assert str(model) == "<safelight.Model embedded: custom, 256x256, float32 on cpu>"


def test_the_family_was_a_text_for_one_version(model: Model) -> None:
    assert str(model.family) == "custom"
    with pytest.warns(DeprecationWarning, match="compare its name"):
        assert model.family == "custom"


def test_same_request_same_bytes(model: Model) -> None:
    one, two = (model.generate("a cat", seed=1, **SMALL).images[0] for _ in range(2))
    assert one.tobytes() == two.tobytes()
    assert one.tobytes() != model.generate("a cat", seed=2, **SMALL).images[0].tobytes()
    assert one.tobytes() != model.generate("a dog", seed=1, **SMALL).images[0].tobytes()


def test_picture_i_of_several_is_that_of_seed_plus_i(model: Model) -> None:
    settings = {**SMALL, "sampler": "euler_a"}
    several = model.generate("a cat", seed=5, count=3, **settings)
    assert several.seeds == [5, 6, 7]
    for seed, image in zip(several.seeds, several.images, strict=True):
        alone = model.generate("a cat", seed=seed, **settings).images[0]
        assert image.tobytes() == alone.tobytes()


def test_threads_share_a_model(model: Model) -> None:
    """No thread draws another's prompt, or packs weights that another is packing."""
    prompts = ["a red apple", "a blue car", "a green frog", "a black cat"]
    settings = {**SMALL, "negative_prompt": "a dog", "seed": 5}

    def draw(one: Model, prompt: str) -> bytes:
        return one.generate(prompt, **settings).images[0].tobytes()

    fresh = safelight.load(device="cpu", dtype="float32")
    with ThreadPoolExecutor(len(prompts)) as threads:
        drawn = list(threads.map(partial(draw, fresh), prompts))
    assert drawn == [draw(model, prompt) for prompt in prompts]


def test_a_model_that_was_loaded_can_be_copied_and_pickled(model: Model) -> None:
    fresh = safelight.load(device="cpu", dtype="float32")
    for copied in (deepcopy(fresh), pickle.loads(pickle.dumps(fresh))):
        assert copied.lock is not fresh.lock
        with copied.lock, copied.lock:
            pass
    assert copy(fresh).lock is fresh.lock  # both use the same networks


@pytest.mark.parametrize("at", [("__enter__", "return"), ("__exit__", "call")])
def test_an_interrupt_leaves_no_lock_held(at: tuple[str, str]) -> None:
    """Ctrl-C can come at any place in a Python function, and not within a C function."""

    def interrupt(frame: FrameType, event: str, _: object) -> Any:
        if (frame.f_code.co_name, event) == at:
            raise KeyboardInterrupt
        return interrupt

    lock, tracing = Lock(), sys.gettrace()
    sys.settrace(interrupt)
    try:
        with lock:
            pass
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(tracing)
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(lock._lock.acquire, blocking=False).result()


def test_a_step_that_is_looked_at_holds_up_no_thread(model: Model) -> None:
    waiting = iter(model.stream("a cat", seed=1, **SMALL))
    next(waiting)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(model.generate, "a dog", seed=1, **SMALL).result(60)


def test_jobs_of_all_kinds_advance_together(model: Model) -> None:
    """Samplers, steps, tasks and guidance may differ; each state is as if alone."""
    requests = [
        Request(prompt="a cat", seed=1, sampler="euler_a", steps=6, width=64, height=64),
        Request(
            prompt="a dog",
            seed=2,
            sampler="dpmpp_2m",
            steps=4,
            guidance_scale=1.0,
            width=64,
            height=64,
        ),
        Request(prompt="a cat", seed=3, sampler="pndm", steps=5, image=photo(), strength=0.9),
        Request(prompt="a dog", seed=4, sampler="heun", steps=3, image=photo(), mask=spot()),
    ]

    def admit() -> list[job.Job]:
        jobs = []
        for request in requests:
            resolved = resolve_request(model, request)
            conditioning = model.family.encode(model, resolved)
            jobs.append(create_job(model, resolved, conditioning, resolved.seed))
        return jobs

    with torch.inference_mode():
        together, alone = admit(), admit()
        while live := [j for j in together if not j.done]:
            job.advance(model, live)
        for lone in alone:
            while not lone.done:
                job.advance(model, [lone])
        for a, b in zip(together, alone, strict=True):
            assert torch.allclose(a.state, b.state, rtol=1e-3, atol=1e-3)
            assert torch.equal(a.generator.get_state(), b.generator.get_state())


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "pndm"])
def test_outside_the_mask_nothing_changes(model: Model, sampler: str) -> None:
    original, mask = photo(), spot()
    result = model.generate("a dog", image=original, mask=mask, seed=1, sampler=sampler, steps=4)
    keep = np.asarray(mask) == 0
    made, given = np.asarray(result.images[0]), np.asarray(original)
    assert (made[keep] == given[keep]).all()
    assert (made[~keep] != given[~keep]).any()


def test_strength_says_how_much_changes(model: Model) -> None:
    original = model.generate("a cat", seed=1, sampler="dpmpp_2m", steps=8).images[0]

    # At a guidance scale of 7.5 the small model redraws any input: its one step at strength 0.1
    # moves 7.5 times as far from the cat as the prompt alone would.
    settings = {"seed": 3, "sampler": "dpmpp_2m", "steps": 10, "guidance_scale": 2.0}

    def moved(strength: float) -> float:
        made = model.generate("a dog", image=original, strength=strength, **settings)
        difference = np.asarray(made.images[0], float) - np.asarray(original, float)
        return float(np.abs(difference).mean())

    assert moved(0.1) < moved(0.5) < moved(1.0)


def test_guidance_one_asks_the_network_once(model: Model, monkeypatch) -> None:
    rows = []
    forward = model.unet.forward

    def counted(x, timestep, context, *rest):
        assert len(x) == 1
        rows.append(len(context))
        return forward(x, timestep, context, *rest)

    monkeypatch.setattr(model.unet, "forward", counted)
    model.generate("a cat", guidance_scale=1.0, seed=1, **SMALL)
    model.generate("a cat", guidance_scale=7.5, guidance_start=0, seed=1, **SMALL)
    assert rows == [1, 1, 1, 2, 2, 2]


def test_stream_yields_every_step_with_a_preview(model: Model) -> None:
    run = model.stream("a cat", seed=1, count=2, **SMALL)
    seen = [(s.image_index, s.step, s.steps, s.preview().size) for s in run]
    assert seen == [(i, s, 3, (64, 64)) for i in range(2) for s in (1, 2, 3)]
    assert len(run.result.images) == 2
    assert set(run.result.timings) == {"text", "denoise", "decode", "total"}


def test_a_run_takes_each_step_once(model: Model, tmp_path: Path) -> None:
    run = model.stream("a cat", seed=1, count=2, **SMALL)
    taken = 0
    for taken, _ in enumerate(run, 1):
        if taken == 4:  # the first of the second picture
            break
    assert [path.name for path in run.made.save(tmp_path / "cat.png")] == ["cat-1.png"]
    assert len(run.result.images) == 2
    assert list(run) == []
    assert len(run.result.images) == 2


def test_a_run_that_failed_has_no_result(model: Model) -> None:
    run = model.stream("a cat", clip_skip=48)
    with pytest.raises(SafelightError, match="clip_skip"):
        list(run)
    with pytest.raises(SafelightError, match="ended with an error"):
        _ = run.result


def test_the_last_preview_is_the_picture(model: Model) -> None:
    """It is equal to the byte if no tiny autoencoder decodes the previews."""
    own = {name: part for name, part in model.parts.items() if name != "preview_vae"}
    run = replace(model, parts=own).stream("a cat", seed=1, **SMALL)
    last = [step.preview() for step in run][-1]
    assert last.tobytes() == run.result.images[0].tobytes()


def test_a_mask_that_the_model_does_not_see(model: Model) -> None:
    """Of each latent's 16×16 pixels, the first one counts."""
    image = photo(256, 248)  # the latents reach beyond it
    for box, seen in (
        ((97, 97, 111, 111), False),
        ((97, 97, 113, 113), True),
        ((240, 240, 241, 248), True),
    ):
        mask = Image.new("L", image.size)
        mask.paste(255, box)
        request = Request(prompt="a cat", image=image, mask=mask, **FEW)
        resolved = resolve_request(model, request)
        told = [w for w in new_result(model, request, resolved).warnings if w.startswith("mask")]
        known = create_job(model, resolved, model.family.encode(model, resolved), 1).known
        assert known is not None
        assert bool(known.mask.any()) == seen == (not told)


def test_previews_are_as_large_as_the_picture(model: Model) -> None:
    """The latents reach beyond it; also with the tiny autoencoder of previews."""
    own = {name: part for name, part in model.parts.items() if name != "preview_vae"}
    for one in (model, replace(model, parts=own)):
        run = one.stream("a cat", width=72, height=88, seed=1, **FEW)
        previews = [step.preview() for step in run]
        assert {preview.size for preview in previews} == {run.result.images[0].size} == {(72, 88)}
    assert previews[-1].tobytes() == run.result.images[0].tobytes()


def test_unconditional(pixels: Model) -> None:
    result = pixels.generate(unconditional=True, sampler="ddim", steps=3, seed=1, count=2)
    assert [image.size for image in result.images] == [pixels.native_size] * 2
    assert result.images[0].tobytes() != result.images[1].tobytes()


def test_nan_is_an_error_and_never_a_black_picture(model: Model, monkeypatch) -> None:
    def broken(x, timestep, context, *_):
        return x.new_full((len(context), *x.shape[1:]), float("nan"))

    monkeypatch.setattr(model.unet, "forward", broken)
    with pytest.raises(SafelightError, match="NaN at step 1 of 3"):
        model.generate("a cat", seed=1, **FEW)


def test_a_photo_that_is_too_large_is_told_the_model_s_own_size(model: Model) -> None:
    with pytest.raises(SafelightError, match="ask for width 296 and height 224"):
        resolve_request(model, Request(prompt="a cat", image=photo(2800, 2100)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompt": "a cat " * 40}, "prompt was cut at 48 tokens"),
        ({"prompt": "a zeppelin"}, "never taught: zeppelin"),
        ({"prompt": "a cat", "width": 96}, "trained on 256x256"),
        (
            {"prompt": "a cat", "negative_prompt": "a dog", "guidance_scale": 1.0},
            "negative_prompt does nothing",
        ),
        (
            {"prompt": "a cat", "image": photo(100, 83)},
            "image was resized to 96x80: sides are multiples of 8",
        ),
        ({"prompt": "a cat", "strength": 0.5}, "strength does nothing"),
        ({"prompt": "a cat", "cache_branch": 2}, "cache_branch does nothing without cache_every"),
        (
            {"prompt": "a cat", "guidance_scale": 1.0, "guidance_start": 0.4},
            "guidance_start does nothing at guidance_scale 1",
        ),
    ],
)
def test_what_a_person_should_know_is_a_warning(model: Model, settings, said: str) -> None:
    result = model.generate(seed=1, **FEW, **settings)
    assert any(said in warning for warning in result.warnings), result.warnings


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance_scale": 1.0},
        {"guidance_scale": 1.0, "guidance_start": 0.25},  # the model's own, as a recipe has it
        {"guidance_scale": 1.0, "fast": 3, "guidance_start": 0.3},  # as a server fills it in
        {"cache_branch": 1, "cache_every": 2},
    ],
)
def test_a_plain_request_has_no_warnings(model: Model, settings) -> None:
    request = Request(prompt="a red apple on a blue background", seed=1, **{**FEW, **settings})
    assert new_result(model, request, resolve_request(model, request)).warnings == []


XL_SIZES = (  # of SDXL's training, either way round
    *((704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152), (896, 1152)),
    *((896, 1088), (960, 1088), (960, 1024), (1024, 1024), (704, 1472), (640, 1536), (640, 1600)),
    *((576, 1664), (576, 1728), (512, 2048), (512, 1856)),
)


def test_sdxl_draws_the_sizes_that_it_was_trained_on() -> None:
    for family in sdxl.VARIANTS:
        model: Any = SimpleNamespace(family=family, native_size=(1024, 1024))
        for one, other in XL_SIZES:
            assert _draws_size(model, one, other)
            assert _draws_size(model, other, one)
        for size in ((512, 512), (768, 768), (1536, 1024), (1536, 1536)):
            assert not _draws_size(model, *size)


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_what_a_network_with_guidance_as_an_input_does_not_read_is_a_warning(
    model: Model, monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    monkeypatch.setattr(model.unet, "config", replace(model.unet.config, time_cond_proj_dim=32))
    given = {"negative_prompt": "a dog", "guidance_start": 0.25, "guidance_end": 0.5}
    request = Request(prompt="a cat", guidance_scale=scale, **{**FEW, **given})
    asked = {**given, "guidance_start": 0.3}
    found = []
    for one in (request, request.replace(**asked)):
        found.append(new_result(model, one, resolve_request(model, one)).warnings)
    told = [f"{name} does nothing with embedded: leave it out" for name in given]
    assert found == [[told[0], told[2]], told]  # 0.25 is the model's own


def test_a_refiner_reads_what_a_network_with_guidance_as_an_input_does_not(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    refiner = SimpleNamespace(family=model.family, configs={"unet": model.unet.config})
    monkeypatch.setattr(model.unet, "config", replace(model.unet.config, time_cond_proj_dim=32))
    monkeypatch.setattr(model, "refiner", refiner)
    request = Request(prompt="a cat", negative_prompt="a dog", guidance_end=0.5, **FEW)
    resolved = resolve_request(model, request)
    assert _without_effect(model, request, resolved) == []
    assert len(_without_effect(model, request, resolved.replace(refiner_start=1))) == 2


@pytest.mark.parametrize(("image", "count"), [(photo(100, 83), 1), (photo(96, 80), 0)])
def test_a_server_warns_of_another_size_too(model: Model, image: Image.Image, count: int) -> None:
    """It stores the picture at the size to draw."""
    kept = Request(prompt="a cat", image=image, **FEW).fitted()
    request = Request.from_dict(kept.to_dict(), image=kept.image, fitted=True)
    found = new_result(model, request, resolve_request(model, request)).warnings
    assert len([said for said in found if "was resized to 96x80" in said]) == count


@pytest.mark.parametrize(("name", "value"), [("guidance_scale", 3.0), ("clip_skip", 2)])
def test_what_pixel_models_do_not_read_is_a_warning(pixels: Model, name: str, value) -> None:
    request = Request(**{name: value})
    [warning] = new_result(pixels, request, resolve_request(pixels, request)).warnings
    assert warning == f"{name} does nothing with embedded-unconditional: leave it out"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"unconditional": True}, "draws from words"),
        ({"prompt": "a cat", "image": photo(100, 32)}, "ask for width 456 and height 144"),
        ({"prompt": "a cat", "sampler": "ddim", "schedule": "karras"}, "karras"),
    ],
)
def test_what_cannot_be_is_refused(model: Model, settings, said: str) -> None:
    with pytest.raises(SafelightError, match=said):
        model.generate(seed=1, steps=3, **settings)


def test_pixel_models_take_no_words(pixels: Model) -> None:
    with pytest.raises(SafelightError, match="from noise alone"):
        pixels.generate("a cat", seed=1)
    with pytest.raises(SafelightError, match="leave out width"):
        pixels.generate(unconditional=True, width=64, seed=1)


def test_a_picture_of_another_size_is_fitted(model: Model) -> None:
    result = model.generate(
        "a cat", image=photo(100, 80), mask=spot(100, 80), width=64, height=64, seed=1, **FEW
    )
    assert result.images[0].size == (64, 64)
    # The recipe names the pictures that were given, not what they were resized to.
    again = Request.from_dict(result.settings, image=photo(100, 80), mask=spot(100, 80))
    assert model.generate(again).images[0].tobytes() == result.images[0].tobytes()


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        ({"width": 128}, (128, 64)),
        ({"height": 128}, (256, 128)),
        ({"height": 2048}, (2048, 2048)),
        ({"width": 64, "height": 72}, (64, 72)),
    ],
)
def test_one_side_decides_the_other(
    model: Model, asked: dict[str, int], size: tuple[int, int]
) -> None:
    resolved = resolve_request(
        model, Request(prompt="a cat", image=photo(200, 100), seed=1, **asked)
    )
    assert (resolved.width, resolved.height) == size
    assert resolved.image is not None
    assert resolved.image.size == size


def test_latents_may_reach_beyond_a_picture(model: Model) -> None:
    """A latent of `embedded` is 16 pixels wide; a picture may end within one."""
    assert model.family.factor(model) == 16
    inside, whole = (model.generate("a cat", seed=1, **FEW, width=w, height=h).images[0]
                     for w, h in ((72, 88), (80, 96)))  # fmt: skip
    assert inside.size == (72, 88)
    assert inside.tobytes() == whole.crop((0, 0, 72, 88)).tobytes()

    start, mask = photo(72, 88), spot(72, 88)
    for asked in ({"strength": 0.5}, {"mask": mask, "strength": 0.5}, {"mask": mask}):
        drawn = model.generate("a cat", image=start, seed=1, **FEW, **asked).images[0]
        assert drawn.size == (72, 88)
        if "mask" in asked:
            kept = np.asarray(mask) == 0
            assert (np.asarray(drawn)[kept] == np.asarray(start)[kept]).all()


def test_history_is_only_as_long_as_the_rows_look_back(model: Model) -> None:
    resolved = resolve_request(model, Request(prompt="a cat", sampler="pndm", steps=10, seed=1))
    with torch.inference_mode():
        made = create_job(model, resolved, model.family.encode(model, resolved), 1)
        longest = 0
        while not made.done:
            job.advance(model, [made])
            longest = max(longest, len(made.past_cleans), len(made.past_states))
    assert longest <= 4
    assert not made.past_cleans
    assert not made.past_states


def test_v_prediction_and_epsilon_agree(model: Model) -> None:
    """The same network output read as noise or as velocity gives estimates that differ; each
    inverts its own definition."""
    clean, noise, sigma = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2), 3.0
    alpha = 1 / (1 + sigma**2) ** 0.5
    state = clean + sigma * noise
    velocity = alpha * noise - alpha * sigma * clean
    level = Level.exploding(sigma)
    for output, kind in ((noise, "epsilon"), (velocity, "v_prediction"), (clean, "sample")):
        assert torch.allclose(clean_estimate(state, level, output, kind), clean, atol=1e-5)


def test_nine_channels_keep_outside_too(model: Model) -> None:
    """A job keeps its original, whichever network paints it."""
    resolved = resolve_request(
        model, Request(prompt="a cat", image=photo(), mask=spot(), seed=1, **FEW)
    )
    with torch.inference_mode():
        made = create_job(model, resolved, model.family.encode(model, resolved), 1)
        made = replace(made, known=None)
        while not made.done:
            job.advance(model, [made])
        keep = np.asarray(spot()) == 0
        found = np.asarray(job.finish(model, made))
    assert (found[keep] == np.asarray(photo())[keep]).all()
