"""The second pass at a larger size, "hires fix": it equals image to image of the enlarged first."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

import safelight
from safelight import SafelightError, cli
from safelight.batch import estimate
from safelight.batch.check import Rules
from safelight.batch.drawing import Drawer
from safelight.batch.rows import Columns
from safelight.batch.run import How
from safelight.cli.generate import _pixels
from safelight.compare import Axis, grid
from safelight.engine import Engine
from safelight.explain.page import page
from safelight.explain.watch import watch
from safelight.hires import MOST_STEPS, final_size, steps_to_take
from safelight.model import Model
from safelight.nets.tiny import AutoencoderTiny, TinyConfig
from safelight.pixels import resized
from safelight.recipe import parse_recipe_text, read_recipe, recipe_text
from safelight.request import Request
from safelight.server.costs import MAX_STEPS, cost, pixel_steps, steps_of
from safelight.server.names import Names
from safelight.server.settings import WorkerSettings
from safelight.server.sizes import enlarging_note, fit_to_model
from safelight.studio.recipes import recipe_settings
from safelight.upscaling import names as upscaling_names
from safelight.upscaling.upscaler import load_upscaler
from safelight.weights.find import find
from safelight.weights.plan import read_plan
from tests import upscalers_tiny
from tests.guiding import controlnet, edges
from weights_tiny import change, pixel_folder, text_folder, weights, write

FIRST: dict[str, Any] = {"width": 64, "height": 72, "steps": 4, "seed": 5}
SECOND: dict[str, Any] = {"hires_scale": 1.5, "hires_strength": 0.6, "hires_steps": 5}
STRENGTH = "Denoising strength"
HALF = f"{STRENGTH}: 0.5"
CAT: dict[str, Any] = {"prompt": "a cat", "sampler": "euler", **FIRST}
BATCH = [{"id": "once", **CAT}, {"id": "twice", **CAT, "hires_scale": 2}]
SIZE = (96, 112)  # 108 is no multiple of 8: the nearest, of two, is even


@pytest.fixture(scope="module")
def model() -> Model:
    return safelight.load(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_folder(tmp_path_factory.mktemp("models") / "tiny")


def composed(
    model: Model, prompt: str, first: dict[str, Any], size: tuple[int, int], **second: Any
) -> list[Image.Image]:
    """Return the pictures of two requests: text to image, and image to image of those enlarged."""
    drawn = model.generate(prompt, **first)
    changed = {"width": size[0], "height": size[1], "count": 1, **second}
    return [
        model.generate(
            prompt, **{**first, **changed, "seed": seed, "image": resized(image, size)}
        ).images[0]
        for seed, image in zip(drawn.seeds, drawn.images, strict=True)
    ]


def equal(ours: list[Image.Image], theirs: list[Image.Image]) -> bool:
    return [one.tobytes() for one in ours] == [one.tobytes() for one in theirs]


# --- it is a composition -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [
        {"sampler": "euler", "seed": 1},
        {"sampler": "euler_a", "seed": 2},
        {"sampler": "pndm"},
        {"sampler": "heun", "guidance_scale": 1.0},
        {"sampler": "dpmpp_2m_sde", "schedule": "karras"},
        {"sampler": "ddim", "eta": 0.5, "count": 2},
        {"sampler": "euler", "fast": 1},
        {"fast": 3, "steps": 6},
        {"sampler": "euler", "negative_prompt": "a dog", "text_end": 0.5, "cache_every": 2},
        # Which half of the steps reads which word depends on the steps that a pass takes.
        {"sampler": "euler", "prompt_syntax": "a1111", "prompt": "a [cat:dog:0.5] AND a car:0.5"},
    ],
    ids=str,
)
def test_it_equals_image_to_image_of_the_enlarged_picture(
    model: Model, asked: dict[str, Any]
) -> None:
    first = {**FIRST, **asked}
    prompt = first.pop("prompt", "a cat")
    made = model.generate(prompt, **first, **SECOND)
    assert made.images[0].size == SIZE
    assert equal(made.images, composed(model, prompt, first, SIZE, strength=0.6, steps=5))
    assert not equal(made.images, composed(model, prompt, first, SIZE, strength=0.8, steps=5))


def test_left_out_are_half_the_strength_and_as_many_steps(model: Model) -> None:
    first = {**FIRST, "sampler": "euler"}
    made = model.generate("a cat", hires_scale=2, **first)
    assert made.settings["steps"] == 4
    assert (made.settings["hires_strength"], made.settings["hires_steps"]) == (0.5, None)
    assert equal(made.images, composed(model, "a cat", first, (128, 144), strength=0.5, steps=4))


def test_without_a_scale_nothing_changes(model: Model) -> None:
    assert equal(
        model.generate("a cat", hires_scale=1, **FIRST).images,
        model.generate("a cat", **FIRST).images,
    )


def test_the_model_s_own_size_is_enlarged(tiny: Path) -> None:
    model = safelight.load(tiny, device="cpu", dtype="float32")
    change(tiny / "unet/config.json", "sample_size", 32)
    larger = safelight.load(tiny, device="cpu", dtype="float32")
    change(tiny / "unet/config.json", "sample_size", 8)
    assert (model.native_size, larger.native_size) == ((16, 16), (64, 64))
    made = larger.generate("apple", sampler="euler", steps=2, seed=1, hires_scale=1.25)
    assert made.images[0].size == (80, 80)
    assert (made.settings["width"], made.settings["height"]) == (64, 64)


def test_dynamic_prompts_and_loras(tiny: Path, tmp_path: Path) -> None:
    from tests.test_adapters import lora

    ink = str(lora(tmp_path / "ink.safetensors"))
    model = safelight.load(tiny, device="cpu", dtype="float32")
    first = {**FIRST, "sampler": "euler", "loras": [ink], "dynamic_prompts": True, "count": 3}
    prompt = "{apple|a|ap le}"
    made = model.generate(prompt, **first, **SECOND)
    assert equal(made.images, composed(model, prompt, first, SIZE, strength=0.6, steps=5))
    plain = {**first, "loras": []}
    assert not equal(made.images, composed(model, prompt, plain, SIZE, strength=0.6, steps=5))
    assert len(made.recipe(0)["loras"]) == 1


@pytest.mark.parametrize("given", [(64, 72), (300, 200)])
def test_a_control_image_guides_both_passes(tmp_path: Path, given: tuple[int, int]) -> None:
    """It is resized for each pass from what was given."""
    net = controlnet(tmp_path / "edges")
    model = safelight.load(device="cpu", dtype="float32", controlnet=net)
    first = {**FIRST, "sampler": "euler", "control_image": edges(given)}
    made = model.generate("a cat", **first, **SECOND)
    assert equal(made.images, composed(model, "a cat", first, SIZE, strength=0.6, steps=5))
    again = Request.from_dict(made.recipe()["settings"], control_image=edges(given))
    assert equal(model.generate(again).images, made.images)
    own = {name: value for name, value in first.items() if name not in ("width", "height")}
    drawn = model.generate("a cat", **own, hires_scale=1.25)
    assert drawn.images[0].size == {64: (80, 88), 300: (384, 248)}[given[0]]


def test_with_little_memory(tiny: Path) -> None:
    how: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16"}
    first, few = {**FIRST, "sampler": "euler"}, safelight.load(tiny, low_memory=True, **how)
    made = few.generate("apple", **first, **SECOND)
    assert equal(made.images, composed(few, "apple", first, SIZE, strength=0.6, steps=5))
    much = safelight.load(tiny, **how)
    assert equal(made.images, much.generate("apple", **first, **SECOND).images)


def test_rows_of_a_batch(model: Model) -> None:
    rows = [Rules(defaults={}).row(i, Columns(i, one)) for i, one in enumerate(BATCH, 1)]
    drawer = Drawer("embedded", How({}, exact=True), load=lambda name, **loading: model)
    for row, outcome in zip(rows, drawer.draw(rows), strict=True):
        assert outcome.error is None
        with Image.open(io.BytesIO(outcome.pictures[0])) as image:
            assert equal([image], model.generate(row.request()).images)


# --- the engine ----------------------------------------------------------------------------------


def test_steps_of_both_passes_are_counted_from_the_start(model: Model) -> None:
    run = model.stream("a cat", count=2, sampler="heun", **FIRST, **SECOND)
    seen = [(s.image_index, s.step, s.steps, s.preview().size) for s in run]
    # heun's last step is one evaluation.
    sizes = [(64, 72)] * 7 + [SIZE] * 5
    assert seen == [(i, n, 12, size) for i in (0, 1) for n, size in enumerate(sizes, 1)]
    assert all(run.result.timings[part] > 0 for part in ("text", "denoise", "decode"))


def test_pictures_with_and_without_share_calls_and_are_close(model: Model) -> None:
    asked = [
        Request(prompt="a cat", sampler="euler", **FIRST, **SECOND),
        Request(prompt="a dog", sampler="ddim", **{**FIRST, "seed": 6}),
        Request(prompt="a car", sampler="euler", **{**FIRST, "width": 96, "height": 112}),
        Request(prompt="a car", sampler="euler", count=2, **FIRST, hires_scale=2),
    ]
    alone = [image for one in asked for image in model.generate(one).images]
    for how in ({"rows": 16}, {"rows": 16, "background": True}, {"exact": True}):
        engine = Engine(model, **{"exact": False, **how})
        for i, one in enumerate(asked):
            engine.add(one, i)
        steps = sum(ticket.steps for ticket in engine.tickets)
        taken, together, made = 0, 0, {}
        while engine.busy:
            stepped, finished = engine.step()
            taken += len(stepped)
            together = max(together, len(stepped))
            made |= {(t.tag, t.index): t.image for t in finished}
        assert taken == steps
        assert (together > 2) is ("rows" in how)
        pictures = [made[key] for key in sorted(made)]
        for one, other in zip(pictures, alone, strict=True):
            far = np.abs(np.asarray(one, int) - np.asarray(other, int)).max()
            assert far <= (0 if "exact" in how else safelight.machine.COMPANY["float32"])
        engine.close()


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("taken", range(7))
def test_a_picture_is_dropped_at_any_moment(model: Model, background: bool, taken: int) -> None:
    engine = Engine(model, background=background)
    engine.add(Request(prompt="a cat", sampler="euler", **FIRST, **SECOND), "gone")
    for _ in range(taken):  # the fourth step ends the first pass
        engine.step()
    engine.drop("gone")
    assert not engine.tickets
    engine.add(Request(prompt="a dog", sampler="euler", **FIRST), "stays")
    finished = []
    while engine.busy:
        finished += engine.step()[1]
    assert [ticket.tag for ticket in finished] == ["stays"]
    engine.close()


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (SafelightError("encoders are out of order"), "out of order"),
        (RuntimeError("can't allocate memory"), "ask for a smaller picture"),
    ],
)
def test_an_error_between_the_passes_is_that_picture_s(
    model: Model, monkeypatch: pytest.MonkeyPatch, background: bool, error: Exception, told: str
) -> None:
    def fail(*given: Any) -> None:
        raise error

    engine = Engine(model, background=background)
    engine.add(Request(prompt="a cat", sampler="euler", **FIRST, **SECOND), "fails")
    engine.add(Request(prompt="a dog", sampler="euler", **FIRST), "stays")
    monkeypatch.setattr(type(model.family), "encode_picture", fail)
    ended = {}
    while engine.busy:
        ended |= {ticket.tag: ticket for ticket in engine.step()[1]}
    assert told in str(ended["fails"].error)
    assert ended["stays"].image is not None
    with pytest.raises(SafelightError, match=told):
        model.generate("a cat", sampler="euler", **FIRST, **SECOND)
    engine.close()


def test_a_decoder_that_fails_ends_the_picture(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any) -> None:
        raise SafelightError("decoders are out of order")

    monkeypatch.setattr(type(model.family), "decode_latents", fail)
    with pytest.raises(SafelightError, match="out of order"):
        model.generate("a cat", sampler="euler", **FIRST, **SECOND)


def test_the_shortest_picture_is_the_one_with_the_least_of_both_passes(model: Model) -> None:
    engine = Engine(model)
    engine.add(Request(prompt="a cat", sampler="euler", **FIRST, hires_scale=4), "long")
    engine.add(Request(prompt="a cat", sampler="euler", **FIRST, hires_scale=2), "short")
    engine.add(Request(prompt="a cat", sampler="euler", **{**FIRST, "steps": 5}), "once")
    work = {ticket.tag: ticket.work_left for ticket in engine.tickets}
    assert work["once"] < work["short"] <= work["long"]


# --- what excludes it ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"image": edges()}, "is for text to image: leave out image"),
        ({"image": edges(), "mask": edges().convert("L")}, "leave out image"),
        ({"unconditional": True}, "leave out unconditional"),
        ({"hires_scale": 0.5}, "hires_scale must be a number from 1 to 4, not 0.5"),
        ({"hires_scale": 4.5}, "hires_scale must be a number from 1 to 4"),
        ({"width": 1024, "hires_scale": 2.5}, "makes 2560 of 1024; sides must be at most 2048"),
        ({"width": 1000, "height": 64, "hires_scale": 4}, "at most 2.04 fits"),
        ({"hires_strength": 0.0}, "hires_strength must be a number above 0, up to 1"),
        ({"hires_steps": 0}, "hires_steps must be a whole number from 1 to 1000"),
    ],
)
def test_one_line_says_what_does_not_fit(asked: dict[str, Any], told: str) -> None:
    with pytest.raises(SafelightError) as caught:
        Request(**{"hires_scale": 2, **asked})
    assert told in str(caught.value)
    assert str(caught.value).isprintable()
    assert caught.value.field in ("hires_scale", "hires_strength", "hires_steps")


def test_settings_of_a_pass_that_is_not_drawn_are_told() -> None:
    asked = Request(hires_strength=0.6, hires_steps=3)
    assert asked.unused_settings() == [
        f"{name} does nothing without hires_scale: give one above 1 as well"
        for name in ("hires_strength", "hires_steps")
    ]
    assert Request(hires_scale=2, hires_strength=0.6).unused_settings() == []


def test_a_small_model_warns_at_a_size_that_it_ruins(model: Model) -> None:
    told = model.generate("a cat", sampler="euler", width=128, height=128, steps=2, hires_scale=3)
    assert any("its second pass, at 384x384, may spoil the picture" in w for w in told.warnings)
    told = model.generate("a cat", sampler="euler", width=128, height=128, steps=2, hires_scale=2)
    assert not any("second pass" in warning for warning in told.warnings)


def refused(folder: Path, told: str, **how: Any) -> None:
    """Check that a model, and a server that knows its headers alone, refuse a second pass."""
    model = safelight.load(folder, device="cpu", dtype="float32", **how)
    request = Request(prompt="a", steps=2, hires_scale=2, width=64, height=64)
    if model.family.fixed_size:
        request = Request(steps=2, hires_scale=2)
    with pytest.raises(SafelightError, match=told) as caught:
        Engine(model).add(request)
    assert caught.value.field == "hires_scale"
    names = Names(WorkerSettings(str(folder), url="", root="", **how))
    with pytest.raises(SafelightError, match=told):
        names.check(request)


def test_a_model_of_one_size(tmp_path: Path) -> None:
    refused(pixel_folder(tmp_path / "pixels"), "is not for pixels, which draws one size")


def test_an_inpainting_network(tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "painter")
    change(folder / "unet/config.json", "in_channels", 9)
    config = json.loads((folder / "unet/config.json").read_text())
    from safelight.nets.unet import UNet2DConditionModel, UNetConfig

    tensors = weights(UNet2DConditionModel, UNetConfig.from_dict(config))
    save_file(tensors, folder / "unet/diffusion_pytorch_model.safetensors")
    model = safelight.load(folder, device="cpu", dtype="float32")
    result = model.generate("a cat", width=64, height=64, hires_scale=2, steps=8, seed=1)
    assert result.images[0].size == (128, 128)


def test_a_tiny_autoencoder_without_an_encoder(tmp_path: Path) -> None:
    config = TinyConfig(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        has_encoder=False,
    )
    folder = text_folder(tmp_path / "tiny")
    write(
        tmp_path / "half/config.json",
        {
            "_class_name": "AutoencoderTiny",
            **{name: getattr(config, name) for name in TinyConfig.__dataclass_fields__},
        },
    )
    tensors = {n: t.contiguous() for n, t in AutoencoderTiny(config).state_dict().items()}
    save_file(tensors, tmp_path / "half/diffusion_pytorch_model.safetensors")
    model = safelight.load(folder, device="cpu", dtype="float32", vae=tmp_path / "half")
    with pytest.raises(SafelightError, match="the tiny autoencoder of tiny has none") as caught:
        Engine(model).add(Request(prompt="a", hires_scale=2, width=64, height=64))
    assert caught.value.field == "hires_scale"


def test_a_size_that_is_the_model_s_own_is_checked_before_the_first_pass(tiny: Path) -> None:
    model = safelight.load(tiny, device="cpu", dtype="float32")
    model.native_size = (1024, 1024)
    with pytest.raises(SafelightError, match="makes 3072x3072 of 1024x1024"):
        Engine(model).add(Request(prompt="a", hires_scale=3))


def test_a_second_pass_without_steps_is_told_before_the_first(model: Model) -> None:
    with pytest.raises(SafelightError, match=r"second pass: strength 0.3 leaves none of 2") as none:
        Engine(model).add(Request(prompt="a", hires_scale=2, hires_steps=2, hires_strength=0.3))
    assert none.value.field == "hires_strength"


# --- what it costs -------------------------------------------------------------------------------


def test_a_job_costs_both_passes() -> None:
    plan = read_plan(find("embedded"))
    once = Request(prompt="a", sampler="euler", width=128, height=128, steps=20)
    twice = once.replace(hires_scale=2, hires_strength=0.5, hires_steps=30)
    steps = steps_of(twice, plan)
    assert steps == 20
    assert pixel_steps(once, 20, (256, 256)) == 128 * 128 * 20
    assert pixel_steps(twice, 20, (256, 256)) == 128 * 128 * 20 + 256 * 256 * 15
    assert cost(twice, 20, (256, 256), plan) == 2 * (5 + 15)
    many = twice.replace(count=64, steps=50, hires_steps=100)
    with pytest.raises(SafelightError, match=rf"at most {MAX_STEPS}, not 6400"):
        steps_of(many, plan)
    with pytest.raises(SafelightError, match=r"second pass: strength 0.5 leaves none of 1") as none:
        steps_of(twice.replace(hires_steps=1), plan)
    assert none.value.field == "hires_strength"


def test_a_batch_estimates_both_passes(model: Model) -> None:
    once = {"steps": 10, "width": 64, "height": 64, "sampler": "euler"}
    first = estimate._cost(model, once)
    twice = estimate._cost(model, {**once, "hires_scale": 2.0, "hires_strength": 0.5})
    assert twice == first + first * 4 / 2
    assert {"hires_scale", "hires_strength", "hires_steps"} <= {*estimate.SHAPE}


@pytest.mark.parametrize(
    ("native", "asked", "drawn", "size"),
    [
        ((512, 512), {"width": 512, "height": 512}, (512, 512, 2.0), None),
        ((512, 512), {"width": 512, "height": 768}, (512, 768, 2.0), None),
        ((512, 512), {}, (None, None, 2.0), None),
        ((256, 256), {"width": 512, "height": 512}, (256, 256, 1.0), (1024, 1024)),
        ((256, 256), {}, (256, 256, 1.0), (512, 512)),
        ((256, 256), {"width": 128, "height": 128}, (128, 128, 2.0), None),
    ],
)
def test_small_models_are_enlarged_alone(
    native: tuple[int, int], asked: dict[str, int], drawn: tuple[Any, ...], size: Any
) -> None:
    request = Request(hires_scale=2.0, **asked)
    fitted, enlarged = fit_to_model(request, native)
    assert (fitted.width, fitted.height, fitted.hires_scale) == drawn
    assert enlarged == size
    notes = enlarging_note(request, fitted, enlarged, "m", native)
    assert ["in one pass" in note for note in notes] == [True] * (size is not None)


@pytest.mark.parametrize(
    ("asked", "drawn", "size"),
    [
        ({"width": 1032, "height": 1024, "hires_scale": 1.9}, (512, 512), (1960, 1944)),
        ({"width": 1536, "height": 1024, "hires_scale": 1.25}, (624, 416), (1920, 1280)),
        ({"width": 1024, "height": 1024, "hires_scale": 2.0}, (1024, 1024), None),
    ],
)
def test_a_first_pass_that_is_drawn_smaller_is_enlarged_to_the_asked_size(
    asked: dict[str, Any], drawn: tuple[int, int], size: Any
) -> None:
    request = Request(**asked)
    fitted, enlarged = fit_to_model(request, (512, 512))
    assert (fitted.width, fitted.height) == drawn
    assert fitted.hires_scale == request.hires_scale
    assert enlarged == size
    if size is not None:
        [note] = enlarging_note(request, fitted, enlarged, "m", (512, 512))
        first, second = "{}x{}".format(*drawn), "{}x{}".format(*final_size(fitted, (512, 512)))
        assert f"drawn at {first}, again at {second}, and enlarged to" in note


# --- what is written about it --------------------------------------------------------------------


def test_a_recipe_redraws_the_picture(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {**FIRST, "sampler": "euler_a", **SECOND}
    path = tmp_path / "large.png"
    model.generate("a cat", **asked).save(path)
    recipe = read_recipe(path)
    assert recipe["size"] == list(SIZE)
    assert "enlarged" not in recipe
    assert {name: recipe["settings"][name] for name in SECOND} == SECOND
    assert cli.run(["verify", str(path)]) == 0
    assert capsys.readouterr().out == "0\n"
    assert recipe_settings(path.read_bytes())["hires_scale"] == 1.5


def test_the_web_ui_s_text_names_it_and_is_read_again(model: Model, tmp_path: Path) -> None:
    asked = {**FIRST, "sampler": "euler_a", **SECOND}
    text = recipe_text(model.generate("a cat", **asked).recipe())
    pairs = parse_recipe_text(text)["parameters"]
    told = {name: pairs[name] for name in pairs if "ires" in name or "trength" in name}
    assert told == {
        "Denoising strength": "0.6",
        "Hires upscale": "1.5",
        "Hires steps": "3",  # of 5, at this strength
        "Hires upscaler": "Lanczos",
    }
    assert pairs["Size"] == "64x72"
    found = settings_in(text)
    assert {name: found[name] for name in SECOND} == SECOND
    assert (found["width"], found["height"], "strength" in found) == (64, 72, False)


def test_what_is_enlarged_alone_has_no_second_pass(model: Model) -> None:
    recipe = model.generate("a cat", sampler="euler", steps=1, width=64, height=64).recipe()
    text = recipe_text({**recipe, "enlarged": [128, 128]})
    assert "Hires resize: 128x128, Hires upscaler: Lanczos" in text
    assert "Hires upscale:" not in text
    assert "hires_scale" not in settings_in(text)
    image = {"image": edges((64, 64)), "strength": 0.7}
    recipe = model.generate("a cat", sampler="euler", steps=2, **image).recipe()
    found = settings_in(recipe_text({**recipe, "enlarged": [128, 128]}))
    assert found["strength"] == 0.7
    assert "hires_strength" not in found


def settings_in(text: str) -> dict[str, Any]:
    """Return the settings of a picture that has the web UI's text alone."""
    written = PngImagePlugin.PngInfo()
    written.add_text("parameters", text)
    Image.new("RGB", (8, 8)).save(out := io.BytesIO(), "PNG", pnginfo=written)
    return recipe_settings(out.getvalue())


@pytest.mark.parametrize(
    ("pairs", "padding"),
    [
        ("Inpaint area: Only masked, Masked area padding: 32", 32),
        ("Inpaint area: Only masked", 0),
        ("Inpaint area: Whole picture, Masked area padding: 32", None),
        ("Inpaint area: Whole picture", None),
        ("Masked area padding: 8", 8),
    ],
)
def test_another_program_s_area_around_a_mask(pairs: str, padding: int | None) -> None:
    text = f"a cat\nSteps: 20, Sampler: Euler, Masked content: latent nothing, {pairs}"
    found = settings_in(text)
    assert found.get("mask_padding") == padding
    assert found["mask_content"] == "nothing"
    assert not [name for name in found if name[0].isupper()]


@pytest.mark.parametrize(
    ("pairs", "second", "others"),
    [
        (f"{HALF}, Hires upscale: 2, Hires steps: 10", (2, 0.5, 20), set()),
        ("Denoising strength: 0.7, Hires upscale: 1.5", (1.5, 0.7, 29), set()),
        (f"{HALF}, Hires resize: 1024x1024", (2, 0.5, 40), set()),
        (f"{HALF}, Hires resize: 768x768, Hires upscaler: Lanczos", (1.5, 0.5, 40), set()),
        (f"{HALF}, Hires upscale: 2, Hires upscaler: Latent", (2, 0.5, 40), {"Hires upscaler"}),
        ("Hires upscale: 2, Hires prompt: a dog", (2, 0.75, 27), {"Hires prompt"}),
        (f"{HALF}, Hires resize: 1024x512", None, {STRENGTH, "Hires resize"}),
        ("Hires upscale: x", None, {"Hires upscale"}),
        (f"{STRENGTH}: 0, Hires upscale: 2", None, {STRENGTH, "Hires upscale"}),
        (f"{STRENGTH}: nan, Hires upscale: 2", None, {STRENGTH, "Hires upscale"}),
        (f"Hires upscale: 2, Hires steps: {'9' * 400}", None, {"Hires upscale", "Hires steps"}),
    ],
)
def test_another_program_s_text(pairs: str, second: Any, others: set[str]) -> None:
    found = settings_in(f"a cat\nSteps: 20, Sampler: Euler, Size: 512x512, {pairs}")
    names = ("hires_scale", "hires_strength", "hires_steps")
    assert tuple(found[n] for n in names if n in found) == (second or ())
    assert {name for name in found if name[0].isupper()} == others
    assert "strength" not in found


def test_the_web_ui_counts_the_steps_that_are_taken() -> None:
    for strength in (0.05, 0.29, 0.3, 0.5, 0.7, 0.75, 1.0):
        for steps in range(1, 151):
            found = steps_to_take(steps, strength)
            if found < MOST_STEPS:
                assert int(found * strength) == steps
            else:
                assert int(found * strength) <= steps
            assert found == 1 or int((found - 1) * strength) < steps
    Request(hires_scale=2, hires_steps=MOST_STEPS)
    with pytest.raises(SafelightError, match=f"from 1 to {MOST_STEPS}"):
        Request(hires_scale=2, hires_steps=MOST_STEPS + 1)


def test_sizes_are_rounded_to_what_is_allowed() -> None:
    asked = Request(width=512, height=768, hires_scale=1.1)
    assert final_size(asked, (64, 64)) == (560, 848)
    assert final_size(Request(hires_scale=1.5), (256, 128)) == (384, 192)
    # 2048 / 768 × 768 is a little more than 2048.
    assert final_size(Request(width=768, hires_scale=2048 / 768), (64, 64))[0] == 2048


# --- what looks at steps, and the command line ---------------------------------------------------


def test_explain_watches_both_passes(model: Model) -> None:
    request = Request(prompt="a cat", sampler="euler", **FIRST, **SECOND)
    steps = []
    story = watch(model, request, on_step=lambda step: steps.append((step.step, step.steps)))
    assert equal([story.picture], model.generate(request).images)
    assert steps == [(n, 7) for n in range(1, 8)]
    assert [(m.step, m.steps, m.clean.size) for m in story.moments] == [
        (n, 7, (64, 72) if n < 5 else SIZE) for n in range(1, 8)
    ]
    assert len(story.sigmas) == 8
    assert story.sigmas[3] < story.sigmas[4]  # the second pass begins with noise
    assert "evaluation" in page(story)


def test_a_grid_over_it(model: Model) -> None:
    taken = []
    made = grid(
        model,
        Request(prompt="a cat", sampler="euler", **FIRST),
        Axis.parse("hires_scale=1,2"),
        on_step=lambda done, of: taken.append((done, of)),
    )
    assert taken[-1] == (10, 10)
    assert [one.images[0].size for one in made.results[0]] == [(64, 72), (128, 144)]
    assert made.sheet().width > 0


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "large.png"
    asked = ["generate", "a cat", "--steps", "2", "-W", "64", "-H", "64", "--seed", "1"]
    options = ["--hires-scale", "2", "--hires-strength", "1", "--hires-steps", "2"]
    assert cli.run([*asked, *options, "--sampler", "euler", "--out", str(out)]) == 0
    with Image.open(out) as image:
        assert image.size == (128, 128)
    assert cli.run([*asked, "--hires-scale", "2", "--image", str(out)]) == 2
    assert "hires_scale is for text to image" in capsys.readouterr().err


def test_the_room_that_pictures_need_on_the_disk() -> None:
    assert _pixels(Request(width=64, height=72)) == 64 * 72
    assert _pixels(Request(hires_scale=1.5)) == 768 * 768
    photo, mask = Image.new("RGB", (3000, 2000)), Image.new("L", (3000, 2000), 255)
    part = Request(image=photo, mask=mask, mask_padding=4, width=64, height=64)
    assert _pixels(part) == 3000 * 2000


# --- another upscaler between the passes ---------------------------------------------------------


@pytest.fixture(scope="module")
def upscalers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with an upscaler."""
    root = tmp_path_factory.mktemp("upscalers")
    (root / "ESRGAN").mkdir()
    upscalers_tiny.saved(root / "ESRGAN" / "4x-Tiny.pth", upscalers_tiny.esrgan())
    return root


@pytest.fixture(scope="module")
def enlarging(upscalers: Path) -> Model:
    return safelight.load(device="cpu", dtype="float32", models_dir=upscalers)


NETWORK = {**FIRST, "sampler": "euler", **SECOND, "hires_upscaler": "4x-Tiny"}


def test_an_upscaler_enlarges_between_the_passes(
    enlarging: Model, upscalers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It equals image to image of what the upscaler makes of the first picture."""
    made = enlarging.generate("a cat", **NETWORK, count=2)
    network = load_upscaler("4x-Tiny", models_dir=upscalers, device="cpu")
    first = {**FIRST, "sampler": "euler", "count": 2}
    drawn = enlarging.generate("a cat", **first)
    again = {**first, "width": 96, "height": 112, "count": 1, "strength": 0.6, "steps": 5}
    theirs = [
        enlarging.generate(
            "a cat", **{**again, "seed": seed, "image": network.upscale(image, size=SIZE)}
        ).images[0]
        for seed, image in zip(drawn.seeds, drawn.images, strict=True)
    ]
    assert equal(made.images, theirs)
    assert not equal(made.images, enlarging.generate("a cat", **first, **SECOND).images)
    recipe = made.recipe()
    assert recipe["upscaler"] == network.used
    text = recipe_text(recipe)
    assert "Hires upscaler: 4x-Tiny" in text
    assert settings_in(text)["hires_upscaler"] == "4x-Tiny"

    made.save(tmp_path / "cat.png")
    path = str(tmp_path / "cat-1.png")
    assert cli.run(["verify", path, "--models-dir", str(upscalers)]) == 0
    file = upscalers / "ESRGAN" / "4x-Tiny.pth"
    assert cli.run(["verify", path, "--upscaler", str(file)]) == 0
    assert capsys.readouterr().out == "0\n0\n"
    assert cli.run(["verify", path]) == 2
    assert "upscaler 4x-Tiny of SHA-256" in capsys.readouterr().err


def test_a_path_is_recorded_as_a_name(model: Model, upscalers: Path) -> None:
    asked = {**NETWORK, "hires_upscaler": str(upscalers / "ESRGAN" / "4x-Tiny.pth")}
    made = model.generate("a cat", **asked)
    assert made.settings["hires_upscaler"] == "4x-Tiny"
    assert str(upscalers) not in json.dumps(made.recipe())


@pytest.mark.parametrize(("after", "last"), [(1, 2), (4, 4)])  # a picture has four steps
def test_an_upscaler_that_changes_meanwhile_is_refused(
    tmp_path: Path, after: int, last: int
) -> None:
    """A recipe names one file. after: the step after which there is another. last: the last one."""
    (tmp_path / "ESRGAN").mkdir()
    file = upscalers_tiny.saved(tmp_path / "ESRGAN" / "4x-Tiny.pth", upscalers_tiny.esrgan())
    model = safelight.load(device="cpu", dtype="float32", models_dir=tmp_path)
    asked = {**NETWORK, "steps": 2, "hires_steps": 2, "hires_strength": 1, "count": 2}
    run = model.stream("a cat", **asked)
    for _ in range(after):
        next(iter(run))
    upscalers_tiny.saved(file, upscalers_tiny.lively(upscalers_tiny.esrgan(), 8))
    for _ in range(last - after):
        next(iter(run))
    with pytest.raises(SafelightError, match="upscaler 4x-Tiny changed while pictures were drawn"):
        next(iter(run))


def test_each_tile_is_a_step_of_the_engine(enlarging: Model) -> None:
    """So others have their turn between two tiles, and a dropped picture makes no more of them."""
    engine = Engine(enlarging)
    size = {"width": 512, "height": 128, "steps": 1, "seed": 5, "sampler": "euler"}
    second = {"hires_scale": 1.5, "hires_steps": 2, "hires_upscaler": "4x-Tiny"}
    request = Request(prompt="a", **second, **size)
    engine.add(request, tag="ours")
    while not (engine.tickets and engine.tickets[0].later is None):
        engine.step()
    ticket, steps = engine.tickets[0], 0
    while ticket._tiles is not None:
        assert engine.step() == ([], [])
        steps += 1
    assert steps == 3  # two tiles, and what was made; loading was in the step that decoded
    engine.drop("ours")
    assert not engine.busy


def test_an_upscaler_that_is_not_there_is_refused_before_the_first_pass(
    enlarging: Model, upscalers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = Names(WorkerSettings("embedded", "", "", models_dir=str(upscalers)))
    file = upscalers / "ESRGAN" / "4x-Tiny.pth"
    request = Request(prompt="a", **{**NETWORK, "hires_upscaler": "none"})
    for check in (enlarging.generate, names.check):
        with pytest.raises(SafelightError, match="no upscaler 'none' in the models folder") as told:
            check(request)
        assert told.value.field == "hires_upscaler"
    # A client of the server names no path.
    with pytest.raises(SafelightError, match="no upscaler "):
        names.check(Request(prompt="a", **{**NETWORK, "hires_upscaler": str(file)}))
    names.check(Request(prompt="a", **NETWORK))
    names.check(Request(prompt="a", hires_upscaler="none"))  # nothing is enlarged
    monkeypatch.setattr(upscaling_names, "find_spec", lambda name: None)
    with pytest.raises(SafelightError, match=r"pip install 'safelight\[upscale\]'"):
        enlarging.generate("a", **NETWORK)
    with pytest.raises(SafelightError, match="hires_upscaler must be Lanczos, or an upscaler's"):
        Request(prompt="a", hires_upscaler="")


def test_without_a_second_pass_an_upscaler_gives_a_warning(enlarging: Model) -> None:
    made = enlarging.generate("a", **FIRST, hires_upscaler="4x-Tiny")
    assert "hires_upscaler does nothing without hires_scale: give one above 1 as well" in (
        made.warnings
    )
