"""Jobs with reference pictures, on a server whose model edits."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from inside import Inside
from PIL import Image
from serving import wait_for

from safelight import cli
from safelight.batch.check import Rules
from safelight.batch.rows import Columns
from safelight.errors import SafelightError
from safelight.families import family_of_folder
from safelight.families.references import size_to_draw
from safelight.hires import check_model, of_second_pass
from safelight.picture import open_picture
from safelight.recipe import read_recipe
from safelight.request import Request
from safelight.request_pictures import by_setting, inputs_in, setting_of
from safelight.sampling import SchedulerConfig
from safelight.server.apis.openai_shapes import ApiError, check_files, edit_request
from safelight.server.apis.sdapi_bodies import ImageToImage, Sent
from safelight.server.apis.sdapi_shapes import understand
from safelight.server.backup import _names
from safelight.server.costs import cost, pixel_steps
from safelight.server.sizes import fit_to_model
from safelight.studio import entries
from safelight.studio.suits import Suits
from tests.guiding import as_base64, edges
from tests.parity.flow_models import make_klein

QUICK = {"prompt": "a cat", "steps": 1, "seed": 5, "width": 64, "height": 64}
TWO = (edges((80, 64)), edges((64, 96)))
KLEIN, KONTEXT = ({"_class_name": f"{kind}Pipeline"} for kind in ("Flux2Klein", "FluxKontext"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_klein(tmp_path_factory.mktemp("referring") / "klein", distilled=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Inside]:
    folder = tmp_path_factory.mktemp("referring-server")
    with Inside(folder, model=str(model), exact=True, dtype="float32") as running:
        yield running


def test_a_job_refers_to_pictures(
    server: Inside, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is the command line's picture; its inputs are stored, and go with the job."""
    asked = {**QUICK, "reference_images": [as_base64(one) for one in TWO]}
    job_id = server.submit(**asked)
    wait_for(lambda: server.ask("GET", f"/api/jobs/{job_id}").json()["status"] == "succeeded")
    job = server.ask("GET", f"/api/jobs/{job_id}").json()
    assert inputs_in(job["settings"]) == ["reference_images", "reference_images_2"]
    inputs = server.data / "inputs"
    names = [f"{job_id}-reference_images{i}.png" for i in ("", "_2")]
    assert sorted(one.name for one in inputs.glob(f"{job_id}*")) == names
    kept = {name for _, name in _names(server.data / "jobs.sqlite3")}
    assert {f"inputs/{name}" for name in names} <= kept
    png = server.hub.picture_bytes(job["pictures"][0]["id"])
    assert png is not None
    assert png != server.drawn(**QUICK)
    (tmp_path / "drawn.png").write_bytes(png)
    for i, one in enumerate(TWO):
        one.save(tmp_path / f"{i}.png")
    given = [f"--reference={tmp_path / f'{i}.png'}" for i in (0, 1)]
    verify = ["verify", str(tmp_path / "drawn.png"), "--model", str(model)]
    assert cli.run([*verify, *given]) == 0
    assert cli.run([*verify, *reversed(given)]) == cli.BAD_INPUT
    assert "reference_images must be the one of SHA-256" in capsys.readouterr().err
    assert cli.run([*verify, given[0]]) == cli.BAD_INPUT
    told = capsys.readouterr().err
    assert "reference_images_2 is needed again" in told
    assert told.rstrip().endswith(": give it with --reference")
    options = ["--model", str(model), "--dtype", "float32", "--steps=1", "--seed=5", "-W64", "-H64"]
    out = tmp_path / "again.png"
    assert cli.run(["generate", "a cat", *options, *given, "--out", str(out)]) == 0
    assert open_picture(out).tobytes() == open_picture(png).tobytes()
    assert server.ask("DELETE", f"/api/jobs/{job_id}").status in (200, 204)
    assert not [*inputs.glob(f"{job_id}*")]


def test_what_cannot_be_referred_to_is_refused_at_once(server: Inside) -> None:
    image = as_base64(TWO[0])
    for given, told in (
        ({"reference_images": [image] * 11}, b"must be a list of at most 10 pictures, not 11"),
        ({"reference_images": 5}, b"must be a PNG, JPEG or WebP picture in base64"),
        ({"reference_images": ["AAAA"]}, b"reference_images"),
        ({"reference_images": [as_base64(edges((64, 32)))]}, b"sides must be at least 64"),
        ({"reference_images": [image], "model": "embedded-fast"}, b"give it as image"),
    ):
        answer = server.ask("POST", "/api/jobs", {**QUICK, **given})
        assert answer.status == 422, given
        assert answer.json()["field"] == "reference_images"
        assert told in answer.body


def sent_as_form(server: Inside, pictures: list[Image.Image], **fields: str) -> Any:
    """Return the answer of OpenAI's route for edits."""
    parts = [("prompt", None, b"a dog"), ("steps", None, b"1"), ("size", None, b"64x64")]
    parts += [(name, None, value.encode()) for name, value in fields.items()]
    parts += [("image[]", "a.png", base64.b64decode(as_base64(one))) for one in pictures]
    body = b""
    for name, file, data in parts:
        named = f'; filename="{file}"' if file else ""
        head = f'--edge\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'
        body += head.encode() + data + b"\r\n"
    content = {"content-type": "multipart/form-data; boundary=edge"}
    return server.ask("POST", "/v1/images/edits", body + b"--edge--\r\n", **content)


def test_edits_of_openai(server: Inside) -> None:
    for pictures, fields, images in (
        ([TWO[0]], {}, [1, 0]),
        ([*TWO], {}, [2, 0]),
        ([*TWO], {"strength": "0.5"}, [1, 1]),
    ):
        answer = sent_as_form(server, pictures, **fields)
        assert answer.status == 200, answer.body
        settings = read_recipe(base64.b64decode(answer.json()["data"][0]["b64_json"]))["settings"]
        found = [setting_of(name) for name in inputs_in(settings)]
        assert [found.count(name) for name in ("reference_images", "image")] == images
    for size in ((32, 32), (8, 100)):
        answer = sent_as_form(server, [edges(size)])
        told = answer.json()["error"]
        assert (answer.status, told["param"]) == (400, "image")
        assert told["message"].startswith("image has a picture of {}x{}: sides".format(*size))
    answer = sent_as_form(server, [*TWO], model="embedded-fast")
    assert b"image must be one picture, not several: embedded-fast reads no" in answer.body


def test_edits_with_a_mask_and_of_other_families() -> None:
    klein = family_of_folder({"_class_name": "Flux2KleinPipeline"}, "a model")
    sd = family_of_folder({"_class_name": "StableDiffusionPipeline"}, "a model")
    asked, alpha = {"prompt": "a cat"}, Image.new("L", (80, 64), 0)
    request = edit_request(asked, TWO, alpha, separate=True, family=klein)
    assert (request.image, request.reference_images) == (TWO[0], TWO[1:])
    assert request.mask is not None
    request = edit_request(asked, [edges((1300, 1100))], None, separate=False, family=klein)
    assert (request.image, request.width, request.height) == (None, 1104, 928)
    assert edit_request(asked, TWO[:1], None, separate=False, family=sd).image == TWO[0]
    assert edit_request(asked, TWO, None, separate=False).reference_images == TWO
    kontext = cast(Any, SimpleNamespace(references=1))
    check_files({"image": [[b""]] * 2, "mask": [[b""]]}, kontext, "kontext")
    with pytest.raises(ApiError, match="at most 1 with a mask, for kontext"):
        check_files({"image": [[b""]] * 2}, kontext, "kontext")


def test_automatic1111(server: Inside) -> None:
    asked = {**QUICK, "sampler_name": "Euler", "reference_images": [as_base64(TWO[0])]}
    start = {"init_images": [as_base64(TWO[1])], "denoising_strength": 0.7}
    for route, more in (("txt2img", {}), ("img2img", start)):
        answer = server.ask("POST", f"/sdapi/v1/{route}", {**asked, **more})
        assert answer.status == 200, answer.body
        assert answer.json()["parameters"]["reference_images"] is None
        settings = read_recipe(base64.b64decode(answer.json()["images"][0]))["settings"]
        assert inputs_in(settings) == [*(["image"] if more else []), "reference_images"]
    both = {"prompt": "a", "steps": 1, "enable_hr": True, "hr_scale": 2.5, "sampler_name": "Euler"}
    both |= {"reference_images": [as_base64(TWO[0])], "denoising_strength": 0.5}
    answer = server.ask("POST", "/sdapi/v1/txt2img", both)  # of the picture's size
    assert answer.status == 200, answer.body
    with Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0]))) as drawn:
        assert drawn.size == (200, 160)


def planned(index: dict[str, str]) -> Any:
    """Return what stands for the plan of a model that edits."""
    shape = SimpleNamespace(num_layers=1, num_single_layers=1, guidance_embeds=True)
    family = family_of_folder(index, "a model")
    if index == KONTEXT:
        told = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
        family = family.variant({"transformer": shape}, KONTEXT, told)
    return SimpleNamespace(
        family=family, name="edits", notes={}, configs={}, native_size=(1024, 1024)
    )


def test_the_picture_to_start_from_is_the_one_that_kontext_edits() -> None:
    plan = planned(KONTEXT)
    body = ImageToImage(prompt="a dog", denoising_strength=0.4, init_images=["x"])
    asked = understand(body, plan, Sent(TWO[0]))
    assert (asked.request.image, asked.request.strength) == (None, None)
    assert asked.request.reference_images == TWO[:1]
    assert "denoising_strength: edits edits as the prompt says, without it" in asked.warnings
    painted = understand(body, plan, Sent(TWO[0], Image.new("L", TWO[0].size, 255)))
    assert painted.request.image == TWO[0]
    assert painted.request.reference_images == ()


def test_what_it_costs() -> None:
    """Reference pictures are read at each step, and at most a million pixels of each."""
    one = Request(prompt="a", width=64, height=64, guidance_scale=1)
    several = one.replace(reference_images=[edges((2048, 1024)), edges((64, 64))])
    plain, more = (pixel_steps(asked, 4, (64, 64)) for asked in (one, several))
    assert more == plain + 4 * (1024**2 + 64 * 64)
    assert cost(several, 4, (64, 64)) == more // 64**2
    # Kontext reads each picture at a size of its own.
    shown = Request(prompt="a", width=64, height=64, reference_images=edges((300, 300)))
    assert pixel_steps(shown, 4, (1024, 1024), planned(KONTEXT)) == 4 * (64**2 + 1024**2)


def test_the_second_pass_is_of_the_size_of_the_picture() -> None:
    klein, kontext, native = planned(KLEIN), planned(KONTEXT), (1024, 1024)
    asked = Request(prompt="a", reference_images=edges((64, 64)), hires_scale=3.0, steps=4)
    check_model(klein, asked)  # of the model's own size it would be too large
    second = klein.family.steps_taken(of_second_pass(asked))
    drawn = 4 * 2 * 64**2 + second * (192**2 + 64**2)
    assert pixel_steps(asked, 4, native, klein) == drawn
    assert fit_to_model(asked, native, klein) == (asked, None)
    with pytest.raises(SafelightError, match="3 makes 3072x3072"):
        fit_to_model(asked, native)
    wide = Request(prompt="a", reference_images=edges((3000, 1000)), hires_scale=1.5)
    with pytest.raises(SafelightError, match="5 makes 2352x1008 of 1568x672"):
        check_model(kontext, wide)
    narrow = Request(prompt="a", reference_images=edges((8, 100)))
    assert size_to_draw(klein, narrow) is None  # klein refuses it


def test_rows_of_a_batch_refer_to_files(tmp_path: Path) -> None:
    for i, one in enumerate(TWO):
        one.save(tmp_path / f"{i}.png")
    rules = Rules(folder=tmp_path)
    names = ["0.png", "1.png"]
    typed = rules.row(1, Columns(1, {"prompt": "a", "reference_images": names}, typed=True))
    text = rules.row(
        1, Columns(1, {"prompt": "a", "reference_images": "0.png, 1.png"}, typed=False)
    )
    other = rules.row(1, Columns(1, {"prompt": "a", "reference_images": names[::-1]}, typed=True))
    assert typed.request().reference_images == TWO
    assert text.request().reference_images == TWO
    assert typed.digest == text.digest != other.digest
    alone = rules.row(1, Columns(1, {"prompt": "a", "reference_images": "0.png"}, typed=True))
    assert alone.request().reference_images == TWO[:1]
    for given, told in ((5, "the path of a picture"), (["2.png"], "there is no file '2.png'")):
        with pytest.raises(SafelightError, match=told):
            rules.row(1, Columns(1, {"prompt": "a", "reference_images": given}, typed=True))


def test_pictures_that_are_too_large_together() -> None:
    with pytest.raises(SafelightError, match="may have 64 million pixels together"):
        Request(prompt="a", reference_images=[Image.new("L", (6000, 6000))] * 2)


def test_the_form_shows_them_for_models_that_edit() -> None:
    klein = family_of_folder({"_class_name": "Flux2KleinPipeline"}, "a model")
    sd = family_of_folder({"_class_name": "StableDiffusionPipeline"}, "a model")
    dev = family_of_folder({"_class_name": "FluxPipeline"}, "a model")
    for family, edits in ((klein, True), (sd, False), (dev, False)):
        plan = cast(Any, SimpleNamespace(family=family, notes={}, scheduler=SchedulerConfig()))
        suits = Suits(reads=family.reads(), plan=plan)
        assert suits.edits is edits
        recipe = {"reference_images_sha256": "0" * 64}
        _, told = entries.shown(recipe, Suits(reads=family.reads(), plan=plan))
        assert told == (
            [] if edits else ["this model edits no pictures: those of the recipe are left out"]
        )


def test_a_recipe_of_anything_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for digests in (5, "x", [None], {"a": 1}):
        with pytest.raises(SafelightError, match="reference_images is needed again"):
            Request.from_dict({"prompt": "a", "reference_images_sha256": digests})


def test_a_stored_picture_that_is_lost_is_told() -> None:
    settings = Request(prompt="a", reference_images=TWO).to_dict()
    assert inputs_in(settings) == ["reference_images", "reference_images_2"]
    left = by_setting({"reference_images": None, "reference_images_2": TWO[1]})
    with pytest.raises(SafelightError, match="reference_images_2 is needed again"):
        Request.from_dict(settings, fitted=True, **left)
