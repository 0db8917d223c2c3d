"""Jobs with a second pass, "hires fix", through Safelight's, OpenAI's and AUTOMATIC1111's API."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from inside import Inside
from PIL import Image
from serving import wait_for

import safelight
from safelight import SafelightError, cli
from safelight.engine import Engine
from safelight.families.latent import LatentFamily
from safelight.pixels import resized
from safelight.recipe import read_recipe
from safelight.request import Request
from safelight.server.apis.sdapi_bodies import ImageToImage, TextToImage
from safelight.server.apis.sdapi_control import guided, guiding_units
from safelight.server.apis.sdapi_shapes import fitted, understand
from safelight.studio import entries
from safelight.studio.form import Form
from safelight.studio.recipes import recipe_settings
from safelight.studio.suits import Suits
from safelight.weights.find import find
from safelight.weights.plan import Plan, read_plan
from tests.guiding import as_base64, controlnet, edges

FIRST: dict[str, Any] = {"prompt": "a cat", "steps": 3, "sampler": "euler", "seed": 5}
SMALL = {"width": 64, "height": 64}
SECOND = {"hires_scale": 1.5, "hires_strength": 0.5, "hires_steps": 4}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    folder = tmp_path_factory.mktemp("hires-server")
    net = controlnet(tmp_path_factory.mktemp("hires") / "edges")
    with Inside(folder, exact=True, dtype="float32", controlnet=str(net)) as running:
        yield running


@pytest.fixture(scope="module")
def plan() -> Plan:
    return read_plan(find("embedded"))


def drawn(server: Inside, **settings: Any) -> tuple[Any, bytes]:
    """Return a job that succeeds, and the PNG of its first picture."""
    job_id = server.submit(**{**FIRST, **SMALL, **settings})
    job = server.finished(job_id)
    assert job["status"] == "succeeded", job
    return job, server.picture(job_id)


def opened(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png)).convert("RGB")


# --- Safelight's API -----------------------------------------------------------------------------


def test_a_job_draws_both_passes(server: Inside, tmp_path: Path) -> None:
    """It equals two jobs, the second from the enlarged picture of the first."""
    job, png = drawn(server, **SECOND)
    assert job["progress"] == {"step": 5, "steps": 5}
    first = resized(opened(drawn(server)[1]), (96, 96))
    size = {"width": 96, "height": 96, "steps": 4, "strength": 0.5}
    again = drawn(server, **size, image=as_base64(first))[1]
    assert opened(png).tobytes() == opened(again).tobytes()
    recipe = read_recipe(png)
    assert recipe["size"] == [96, 96]
    assert {name: recipe["settings"][name] for name in SECOND} == SECOND
    (tmp_path / "large.png").write_bytes(png)
    assert cli.run(["verify", str(tmp_path / "large.png")]) == 0
    assert not [*(server.data / "inputs").glob(f"{job['id']}*")]


def test_several_pictures_with_a_control_image(server: Inside) -> None:
    asked = {"control_image": as_base64(edges((120, 80))), "count": 2}
    job, png = drawn(server, **asked, **SECOND)
    assert job["progress"]["steps"] == 10
    image = resized(opened(drawn(server, **asked)[1]), (96, 96))
    size = {"width": 96, "height": 96, "steps": 4, "strength": 0.5, "count": 1}
    other = drawn(server, **{**asked, **size}, image=as_base64(image))[1]
    assert opened(png).tobytes() == opened(other).tobytes()


def test_previews_have_the_size_of_their_pass(server: Inside) -> None:
    sizes: list[tuple[int, int]] = []

    async def watch(job_id: str) -> None:
        async for event in server.hub.events(job_id):
            if event.preview:
                sizes.append(opened(base64.b64decode(event.preview)).size)

    job_id = server.submit(**{**FIRST, **SECOND, "steps": 30, "hires_steps": 60})
    server.within(watch(job_id))
    assert sizes  # of what there was time for
    assert set(sizes) <= {(256, 256), (384, 384)}
    assert server.job(job_id)["status"] == "succeeded"


def test_a_job_is_cancelled_between_its_passes(
    server: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, here, on = LatentFamily.encode_picture, threading.Event(), threading.Event()

    def held(*given: Any) -> Any:
        here.set()
        assert on.wait(60)
        return encode(*given)

    monkeypatch.setattr(LatentFamily, "encode_picture", held)
    job_id = server.submit(**FIRST, **SMALL, **SECOND)
    try:
        assert here.wait(60)
        progress = server.job(job_id)["progress"]
        assert (progress["step"], progress["steps"]) == (3, 5)
        assert server.ask("DELETE", f"/api/jobs/{job_id}").json()["status"] == "cancelled"
    finally:
        on.set()
    monkeypatch.undo()
    assert drawn(server)[0]["status"] == "succeeded"
    assert server.worker is not None
    engine = server.worker._models.get("embedded")
    assert engine is not None
    wait_for(lambda: not engine.engine.busy)
    assert server.job(job_id)["pictures"] == []


def test_an_error_in_the_second_pass_fails_the_job(
    server: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any) -> None:
        raise SafelightError("encoders are out of order")

    monkeypatch.setattr(LatentFamily, "encode_picture", fail)
    job = server.finished(server.submit(**FIRST, **SMALL, **SECOND))
    assert (job["status"], job["error"]) == ("failed", "encoders are out of order")


@pytest.mark.parametrize(
    ("asked", "field", "told"),
    [
        ({"image": as_base64(edges())}, "hires_scale", "text to image"),
        ({"width": 1024, "hires_scale": 3}, "hires_scale", "sides must be at most 2048"),
        ({"hires_scale": 3, "model": "embedded-unconditional"}, "hires_scale", "draws one size"),
        ({"hires_steps": 1}, "hires_strength", "second pass: strength 0.5 leaves none"),
        ({"steps": 1000, "count": 4}, "steps", "steps × count must be at most 4000"),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_once(
    tmp_path: Path, asked: dict[str, Any], field: str, told: str
) -> None:
    with Inside(tmp_path, draws=False) as server:
        if "model" in asked:
            asked = {"steps": 5, "sampler": "ddim", **asked}
        else:
            asked = {**FIRST, **SECOND, **asked}
        answer = server.ask("POST", "/api/jobs", asked)
        assert answer.status == 422
        assert answer.json()["field"] == field
        assert told in answer.body.decode()


# --- the other APIs ------------------------------------------------------------------------------


def txt2img(server: Inside, **body: Any) -> tuple[Image.Image, dict[str, Any], dict[str, Any]]:
    """Return the picture, the recipe and the info of a call."""
    answer = server.ask("POST", "/sdapi/v1/txt2img", body)
    assert answer.status == 200, answer.body
    png = base64.b64decode(answer.json()["images"][0])
    return opened(png), read_recipe(png), json.loads(answer.json()["info"])


def test_enable_hr_draws_a_second_pass(server: Inside) -> None:
    asked = {"prompt": "a cat", "steps": 3, "sampler_name": "Euler", "seed": 5, **SMALL}
    hires = {"enable_hr": True, "denoising_strength": 0.5, "hr_scale": 1.5}
    image, recipe, info = txt2img(server, **asked, **hires, hr_upscaler="Lanczos")
    assert image.size == (96, 96)
    # The web UI's second pass takes as many steps as its first.
    assert recipe["settings"]["hires_steps"] == 6
    assert (info["width"], info["height"], info["denoising_strength"]) == (64, 64, 0.5)
    told = {"Hires upscale": 1.5, "Hires steps": 3, "Hires upscaler": "Lanczos"}
    assert info["extra_generation_params"].items() >= told.items()
    assert "Size: 64x64" in info["infotexts"][0]
    assert "Denoising strength: 0.5, Hires upscale: 1.5, Hires steps: 3" in info["infotexts"][0]
    assert not any("hr_" in warning for warning in info["warnings"])
    fewer = txt2img(server, **asked, **hires, hr_second_pass_steps=2)[1]
    assert fewer["settings"]["hires_steps"] == 4


def test_a_size_that_the_small_model_ruins_is_enlarged_alone(server: Inside) -> None:
    asked = {"prompt": "a cat", "steps": 2, "sampler_name": "Euler", "width": 512, "height": 512}
    image, recipe, info = txt2img(server, **asked, enable_hr=True)
    assert image.size == (1024, 1024)
    assert recipe["settings"]["hires_scale"] == 1
    assert recipe["enlarged"] == [1024, 1024]
    assert [warning for warning in info["warnings"] if "in one pass" in warning] == [
        "embedded draws 256x256: drawn in one pass at 256x256 and enlarged to 1024x1024"
    ]
    assert "Hires upscale:" not in info["infotexts"][0]


def test_openai_s_api_takes_it_by_our_names(server: Inside) -> None:
    asked = {"prompt": "a cat", "size": "64x64", "steps": 2, "sampler": "euler", "hires_scale": 2}
    answer = server.ask("POST", "/v1/images/generations", asked)
    assert answer.status == 200, answer.body
    png = base64.b64decode(answer.json()["data"][0]["b64_json"])
    assert opened(png).size == (128, 128)


def hires(plan: Plan | None, **body: Any) -> tuple[tuple[Any, ...], list[str]]:
    """Return scale, strength and steps of the second pass that a body means, and warnings."""
    given = {"enable_hr": True, "sampler_name": "Euler", "steps": 20, **body}
    asked = understand(TextToImage(**given), plan)
    request = asked.request
    return (request.hires_scale, request.hires_strength, request.hires_steps), asked.warnings


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ({}, (2, 0.75, 27)),
        ({"hr_scale": 1.5, "denoising_strength": 0.5}, (1.5, 0.5, 40)),
        ({"hr_second_pass_steps": 10, "denoising_strength": 0.4}, (2, 0.4, 25)),
        ({"enable_hr": False, "hr_scale": 3}, (1, 0.5, None)),
        ({"width": 512, "height": 512, "hr_resize_x": 768, "hr_resize_y": 768}, (1.5, 0.75, 27)),
        ({"width": 512, "height": 768, "hr_resize_x": 768}, (1.5, 0.75, 27)),
        ({"hr_resize_y": 512}, (2, 0.75, 27)),
        ({"hr_upscaler": "Lanczos", "hr_sampler_name": "Use same sampler"}, (2, 0.75, 27)),
        ({"hr_sampler_name": "Euler", "hr_scheduler": "automatic"}, (2, 0.75, 27)),
        ({"prompt": "a", "hr_prompt": "a", "hr_negative_prompt": "", "hr_cfg": 7}, (2, 0.75, 27)),
        ({"hr_checkpoint_name": "Use same checkpoint", "hr_scale": "2"}, (2, 0.75, 27)),
    ],
    ids=str,
)
def test_what_a_body_means(plan: Plan, body: dict[str, Any], wanted: tuple[Any, ...]) -> None:
    assert hires(plan, **body) == (wanted, [])


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"hr_upscaler": "Latent"}, "hr_upscaler: enlarged with Lanczos"),
        ({"hr_upscaler": "None"}, "hr_upscaler: enlarged with Lanczos"),
        ({"hr_upscaler": "Latent (nearest)"}, "hr_upscaler: enlarged with Lanczos"),
        ({"hr_sampler_name": "DPM++ 2M"}, "hr_sampler_name: the second pass has the sampler of"),
        ({"hr_sampler_name": "Magic"}, "hr_sampler_name: the second pass has the sampler of"),
        ({"hr_scheduler": "Karras"}, "hr_scheduler: the second pass has the scheduler of"),
        ({"hr_prompt": "a dog"}, "hr_prompt: the second pass has the prompt of"),
        ({"hr_negative_prompt": "x"}, "hr_negative_prompt: the second pass has the negative"),
        ({"hr_cfg": 4}, "hr_cfg: the second pass has the cfg_scale of"),
        ({"hr_checkpoint_name": "other"}, "hr_checkpoint_name: the second pass has the model of"),
        ({"hr_scale": 1}, "enable_hr: drawn in one pass, as hr_scale is 1"),
        (
            {"hr_resize_x": 256},
            "enable_hr: drawn in one pass, as hr_resize_x and hr_resize_y are the size of the",
        ),
        (
            {**SMALL, "denoising_strength": 0.01},
            "denoising_strength: second pass: of 1000 steps, the most, 0.01 leaves 10, not 20",
        ),
        (
            {"width": 512, "height": 512, "hr_resize_x": 768, "hr_resize_y": 1024},
            "hr_resize: 1024x1024 in place of 768x1024, in the picture's proportions",
        ),
    ],
)
def test_what_is_drawn_otherwise_is_said(plan: Plan, body: dict[str, Any], told: str) -> None:
    _, (warning,) = hires(plan, **body)
    assert warning.startswith(told)
    assert hires(plan, **body, enable_hr=False)[1] == []  # nobody asked for it


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"hr_scale": 5}, "hires_scale must be a number from 1 to 4"),
        (
            {"width": 512, "height": 256, "hr_resize_x": 256},
            "hr_resize_x must be from 512, the width of the first pass, to 2048, not 256",
        ),
        (
            {"width": 64, "height": 64, "hr_resize_x": 64, "hr_resize_y": 257},
            "hr_resize_y must be from 64, the height of the first pass, to 256, not 257",
        ),
        ({"width": 1024, "height": 64, "hr_scale": 4}, "sides must be at most 2048"),
        (
            {"width": 1024, "height": 64, "hr_resize_x": 4096},
            "hr_resize_x must be from 1024, the width of the first pass, to 2048, not 4096",
        ),
        ({**SMALL, "denoising_strength": 0}, "hires_strength must be a number above 0"),
        ({"denoising_strength": 2}, "hires_strength must be a number above 0"),
    ],
)
def test_what_is_out_of_range(plan: Plan, body: dict[str, Any], told: str) -> None:
    with pytest.raises(SafelightError, match=told):
        hires(plan, **body)


def test_a_small_model_that_enlarges_alone_refuses_nothing_of_a_second_pass(plan: Plan) -> None:
    asked: dict[str, Any] = {"enable_hr": True, "sampler_name": "Euler", "steps": 20}
    for more, size in (
        ({"hr_resize_x": 1080, "hr_resize_y": 1080}, (1080, 1080)),  # more than 4 times 256
        ({"denoising_strength": 0}, (512, 512)),
        ({"denoising_strength": 0.01}, (512, 512)),
    ):
        found = fitted(understand(TextToImage(**asked, **more), plan), "embedded", (256, 256))
        assert (found.request.width, found.request.height) == (256, 256)
        assert (found.request.hires_scale, found.size) == (1, size)
        [told] = found.warnings
        assert told.endswith("and enlarged to {}x{}".format(*size))
    with pytest.raises(SafelightError, match="hr_resize_x must be from 64, the width"):
        understand(TextToImage(**asked, **SMALL, hr_resize_x=264), None)  # nobody knows the model


def test_a_model_that_only_workers_have() -> None:
    body = {"enable_hr": True, "hr_resize_x": 1024}
    asked = understand(TextToImage(**body), None)
    # The worker knows the model's steps and size.
    assert (asked.request.hires_scale, asked.request.hires_steps) == (2, None)
    assert asked.warnings == ["hr_resize: needs width and height here; hr_scale is used"]
    assert fitted(asked, "far", (512, 512)).request.hires_scale == 2


def test_a_level_of_fast_has_its_own_steps(plan: Plan) -> None:
    asked = understand(TextToImage(enable_hr=True, denoising_strength=0.5, fast=3), plan)
    assert asked.request.steps is None
    assert asked.request.hires_steps == 2 * 10


def test_a_unit_guides_the_second_pass_at_its_size(plan: Plan) -> None:
    given = {"controlnet": {"args": [{"image": as_base64(edges()), "resize_mode": 0}]}}
    body = TextToImage(enable_hr=True, steps=4, alwayson_scripts=given, **SMALL)
    (unit,), _ = guiding_units(body, ["edges"])
    asked = fitted(understand(body, plan), "embedded", (256, 256))
    given = [(unit, unit.fitted(asked.request, edges((300, 300)), (256, 256)))]
    request = guided(given, asked.request, (256, 256), 1)
    assert request.pictures["control_image"].size == (128, 128)
    assert (request.width, request.height) == (64, 64)


def test_image_to_image_has_none(plan: Plan) -> None:
    asked = understand(ImageToImage(enable_hr=True, hires_scale=2), plan)
    assert asked.request.hires_scale == 1


# --- the page ------------------------------------------------------------------------------------


def test_the_form_has_its_fields() -> None:
    import gradio as gr

    suits = Suits()

    async def made() -> Form:  # without a loop Gradio makes one and leaves it open
        with gr.Blocks():
            return Form(suits)

    form = asyncio.run(made())
    fields = {field.elem_id: field for field in form.fields if field.elem_id}
    assert (fields["hires_scale"].value, fields["hires_strength"].value) == (1, 0.5)
    assert fields["hires_steps"].placeholder == "as steps"
    assert len(form.looks(suits)) == len(form.adapted)
    one_size = Suits(fixed_size=True, uses_prompt=False)
    again = form.adapted.index(form.second_pass)
    assert form.looks(one_size)[again] == {"visible": False}
    assert form.looks(suits)[again] == {"visible": True}


def test_a_recipe_fills_the_form_and_draws_again(server: Inside) -> None:
    _, png = drawn(server, **SECOND)
    values, told = entries.shown(recipe_settings(png), Suits())
    assert told == []
    again = entries.request(*values, (), None, 1, None, 1, None, 1, suits=Suits())
    model = safelight.load(device="cpu", dtype="float32")
    assert model.generate(again.replace(seed=5)).images[0].tobytes() == opened(png).tobytes()
    # A model of one size has no second pass.
    one_size = Suits(fixed_size=True)
    assert entries.request(*values, (), None, 1, None, 1, None, 1, suits=one_size).hires_scale == 1


def test_a_picture_in_the_form_excludes_it() -> None:
    values, _ = entries.shown(Request(prompt="a", hires_scale=2).to_dict(), Suits())
    editor = (edges(), None), []
    with pytest.raises(SafelightError, match="leave out image, or hires_scale"):
        entries.request(*values, (), editor, 1, None, 1, None, 1, suits=Suits())


def test_an_engine_in_the_background_decodes_between_the_passes() -> None:
    """A picture without a second pass steps meanwhile."""
    model = safelight.load(device="cpu", dtype="float32")
    engine = Engine(model, exact=False, rows=16, background=True)
    engine.add(Request(**FIRST, **SMALL, **SECOND), "twice")
    engine.add(Request(**{**FIRST, **SMALL, "steps": 40, "seed": 6}), "once")
    seen = []
    while engine.busy:
        stepped, finished = engine.step()
        seen += [ticket.tag for ticket in stepped]
        seen += [f"{ticket.tag} ends" for ticket in finished]
    assert seen.count("twice") == 5
    assert seen.count("once") == 40
    assert seen.index("twice ends") < seen.index("once ends")
    engine.close()
