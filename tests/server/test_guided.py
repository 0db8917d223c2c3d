"""Jobs with a control_image, on a server whose model has a ControlNet."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from inside import Inside
from PIL import Image
from serving import wait_for

from safelight import cli
from safelight.recipe import read_recipe
from safelight.request import Request
from safelight.server.apis.sdapi_bodies import ImageToImage, TextToImage
from safelight.server.apis.sdapi_control import Unit, guided, guiding_units
from safelight.server.jobs import Job, ModelInfo, Status
from tests.guiding import as_base64, controlnet, edges

QUICK = {"prompt": "a cat", "steps": 3, "sampler": "euler", "seed": 5}


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return controlnet(tmp_path_factory.mktemp("guided") / "edges")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, net: Path) -> Iterator[Inside]:
    folder = tmp_path_factory.mktemp("guided-server")
    with Inside(folder, controlnet=str(net), exact=True, dtype="float32") as running:
        yield running


def drawn(server: Inside, **settings: Any) -> bytes:
    """Return the PNG of a quick job that succeeds."""
    return server.drawn(**{**QUICK, **settings})


def test_a_job_is_guided(server: Inside, net: Path, tmp_path: Path) -> None:
    """The picture has the control image's size, and its recipe names what draws it again."""
    given = edges((256, 128))
    guided = drawn(server, control_image=as_base64(given), control_scale=0.5)
    plain = drawn(server, width=256, height=128)
    recipe = read_recipe(guided)
    assert recipe["size"] == [256, 128]
    assert recipe["controlnet"]["name"] == "edges"
    assert recipe["settings"]["control_scale"] == 0.5
    assert "controlnet" not in read_recipe(plain)
    assert guided != plain
    (tmp_path / "guided.png").write_bytes(guided)
    given.save(tmp_path / "edges.png")
    arguments = ["--control-image", str(tmp_path / "edges.png"), "--controlnet", str(net)]
    assert cli.run(["verify", str(tmp_path / "guided.png"), *arguments]) == 0


def test_nothing_of_it_is_left(server: Inside) -> None:
    job_id = server.submit(**QUICK, control_image=as_base64(edges()), image=as_base64(edges()))
    wait_for(lambda: server.ask("GET", f"/api/jobs/{job_id}").json()["status"] == "succeeded")
    inputs = server.data / "inputs"
    assert {one.name for one in inputs.glob(f"{job_id}*")} == {
        f"{job_id}-image.png",
        f"{job_id}-control_image.png",
    }
    assert server.ask("DELETE", f"/api/jobs/{job_id}").status in (200, 204)
    assert not [*inputs.glob(f"{job_id}*")]


def test_a_model_without_a_controlnet_refuses_at_once(server: Inside) -> None:
    asked = {**QUICK, "control_image": as_base64(edges()), "model": "embedded-fast"}
    answer = server.ask("POST", "/api/jobs", asked)
    assert answer.status == 422
    assert answer.json()["field"] == "control_image"
    assert b"needs a ControlNet" in answer.body
    small = {**QUICK, "control_image": as_base64(edges((8, 8)))}
    answer = server.ask("POST", "/api/jobs", small)
    assert answer.status == 422
    assert answer.json()["field"] == "control_image"
    answer = server.ask("POST", "/api/jobs", {**QUICK, "control_image": "AAAA"})
    assert answer.status == 422
    assert answer.json()["field"] == "control_image"


def test_a_model_that_only_workers_have_is_drawn_without_it(
    server: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = server.hub.catalogue
    info = ModelInfo(name="far", width=64, height=64, ready=True)
    monkeypatch.setattr(catalogue, "_elsewhere", ["far"])
    monkeypatch.setattr(catalogue, "_others", {"far": info})
    monkeypatch.setattr(server.hub, "wait", ended)  # no worker here has it
    asked = {**QUICK, "override_settings": {"sd_model_checkpoint": "far"}}
    assert server.ask("POST", "/sdapi/v1/txt2img", asked).status == 200
    assert server.hub.names.refiner("far") is None


async def ended(job_id: str) -> Job:
    now = datetime.now(UTC)
    more: dict[str, Any] = {"status": Status.CANCELLED, "created_at": now, "settings": {}}
    return Job(id=job_id, **more)


def test_the_command_line(net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edges((64, 64)).save(tmp_path / "edges.png")
    out = tmp_path / "out.png"
    guided = ["--control-image", str(tmp_path / "edges.png"), "--controlnet", str(net)]
    draw = ["generate", "a cat", "--steps", "1", "--sampler", "euler", "--out", str(out)]
    assert cli.run([*draw, *guided]) == 0
    assert read_recipe(out)["size"] == [64, 64]
    assert "ControlNet 0" in out.read_bytes().decode("latin-1")
    capsys.readouterr()
    assert cli.run([*draw[:-1], str(tmp_path / "2.png"), *guided[:2]]) == cli.BAD_INPUT
    assert "control-image needs a ControlNet" in capsys.readouterr().err
    assert cli.run([*draw[:-1], str(tmp_path / "3.png"), *guided[2:]]) == 0
    assert "--controlnet does nothing without --control-image" in capsys.readouterr().err


def test_apis_that_have_no_field_for_it_say_so(server: Inside) -> None:
    body = {"prompt": "a cat", "steps": 1, "control_image": as_base64(edges())}
    answer = server.ask("POST", "/sdapi/v1/txt2img", body)
    assert answer.status == 200
    assert b"control_image: here it is the image of a unit" in answer.body
    answer = server.ask("POST", "/v1/images/generations", body)
    assert answer.status == 400
    assert b"there is no setting 'control_image'" in answer.body
    assert "control_image" not in answer.json()["error"]["message"].partition("known:")[2]


def unit(**fields: Any) -> dict[str, Any]:
    """Return a body of AUTOMATIC1111's API with one unit of ControlNet."""
    made = {"image": as_base64(edges((256, 256))), "module": "none", "weight": 0.5, **fields}
    body = {**QUICK, "width": 128, "height": 128, "sampler_name": "Euler", "cfg_scale": 1}
    return {**body, "alwayson_scripts": {"ControlNet": {"args": [made]}}}


def test_a_unit_of_automatic1111s_extension(server: Inside) -> None:
    """Its picture, weight and bounds guide; the size is the body's."""
    asked = unit(model="Edges [0123abcd]", guidance_end=0.7)
    answer = server.ask("POST", "/sdapi/v1/txt2img", asked)
    assert answer.status == 200, answer.body
    found = answer.json()
    assert not [one for one in json.loads(found["info"])["warnings"] if "control" in one]
    recipe = read_recipe(base64.b64decode(found["images"][0]))
    assert recipe["size"] == [128, 128]
    assert recipe["controlnet"]["name"] == "edges"
    assert [recipe["settings"][f"control_{n}"] for n in ("scale", "start", "end")] == [0.5, 0, 0.7]
    start = {"init_images": [as_base64(edges((128, 128)))], "denoising_strength": 0.7}
    for changed in (unit(), unit(image="")):
        answer = server.ask("POST", "/sdapi/v1/img2img", {**changed, **start})
        settings = read_recipe(base64.b64decode(answer.json()["images"][0]))["settings"]
        assert {"image_sha256", "control_image_sha256"} <= settings.keys()
    assert settings["image_sha256"] == settings["control_image_sha256"]


def test_a_unit_that_asks_for_what_is_not_here(server: Inside) -> None:
    for fields, told in (
        ({"module": "canny"}, b"there is no preprocessor 'canny' here"),
        ({"model": "depth"}, b"there is no model 'depth', only 'edges'"),
        ({"weight": "much"}, b"controlnet: weight must be a number from 0 to 10, not 'much'"),
        ({"guidance_start": 0.9, "guidance_end": 0.1}, b"guidance_end must be at least guidance_s"),
        ({"resize_mode": []}, b"controlnet: resize_mode must be 0 or"),
        ({"resize_mode": "Envelope"}, b"not 'Envelope'"),
        ({"image": as_base64(Image.new("L", (4000, 8))), "resize_mode": 2}, b"is too narrow"),
        ({"image": "AAAA"}, b"controlnet"),
    ):
        answer = server.ask("POST", "/sdapi/v1/txt2img", unit(**fields))
        assert answer.status == 422, fields
        assert told in answer.body, answer.body
    answer = server.ask("POST", "/sdapi/v1/txt2img", unit(enabled=False))
    assert "controlnet" not in read_recipe(base64.b64decode(answer.json()["images"][0]))
    asked = {**unit(), "override_settings": {"sd_model_checkpoint": "embedded-fast"}}
    answer = server.ask("POST", "/sdapi/v1/txt2img", asked)
    assert b"ControlNet needs a server with --controlnet" in answer.body
    assert server.ask("GET", "/controlnet/model_list").json() == {"model_list": ["edges"]}
    assert server.ask("GET", "/controlnet/module_list").json()["module_list"] == ["none"]


def guided_by(found: Unit, request: Request, picture: Image.Image | None) -> Any:
    """Return a request that one unit guides, with a model of one ControlNet."""
    fitted = found.fitted(request, picture, (64, 64))
    return guided([(found, fitted)], request, (64, 64), 1)


MODES = {
    (0, 0, 128, 128): (None, 1, "1", "Crop and Resize", "Scale to Fit (Inner Fit)"),
    (32, 0, 96, 128): (0, 3, "Just Resize"),
    (32, 32, 96, 96): (2, "Resize and Fill", "Outer Fit (Shrink to Fit)"),
}
"""The extension's modes, by where the white middle of a wide picture is then."""


@pytest.mark.parametrize(("where", "modes"), MODES.items())
def test_the_extension_s_modes(where: tuple[int, ...], modes: tuple[object, ...]) -> None:
    wide = Image.new("RGB", (256, 128))
    wide.paste("white", (64, 0, 192, 128))
    for mode in modes:
        (found,), _ = guiding_units(TextToImage(**unit(resize_mode=mode, weight="0.8")), ["edges"])
        request = guided_by(found, Request(width=128, height=128), wide)
        assert request.control_image is not None
        assert request.control_scale == 0.8
        white = request.control_image.convert("1", dither=Image.Dither.NONE)
        assert white.getbbox() == where, mode


def test_a_unit_beside_a_picture_to_start_from() -> None:
    """It has the drawn size if one side is asked for, and may leave its picture out."""
    start = edges((128, 256))
    for given in (edges((64, 64)), None):
        sent = "" if given is None else as_base64(given)
        body = ImageToImage(**unit(image=sent), init_images=[as_base64(start)])
        (found,), warnings = guiding_units(body, ["edges"])
        assert not warnings
        request = guided_by(found, Request(image=start, width=64), given)
        assert request.control_image is not None
        assert request.control_image.size == (64, 128)
    assert request.control_image.tobytes() == start.resize((64, 128), 1).tobytes()
    found, warnings = guiding_units(TextToImage(**unit(image="")), ["edges"])
    assert not found
    assert warnings == ["alwayson_scripts: ControlNet has a unit without a picture"]


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_a_unit_beside_a_part_that_is_drawn(mode: int) -> None:
    """It lies over the whole picture, from which the part around the mask is taken."""
    start, mask = edges((150, 100)), Image.new("L", (150, 100))
    mask.paste(255, (5, 45, 15, 55))
    asked = Request(image=start, mask=mask, mask_padding=0, width=64, height=64)
    body = ImageToImage(**unit(resize_mode=mode), init_images=[as_base64(start)])
    (found,), _ = guiding_units(body, ["edges"])
    request = guided_by(found, asked, start)
    assert request.control_image is not None
    assert request.control_image.tobytes() == start.tobytes()
    large, spot = Image.new("RGB", (3000, 2000)), Image.new("L", (3000, 2000))
    asked = Request(image=large, mask=spot, mask_padding=0)
    assert guided_by(found, asked, start).control_image.size == large.size


def test_a_large_picture_of_a_unit(server: Inside) -> None:
    """A decoder's process reads a body of megabytes, and leaves out pictures that nobody reads."""
    noise = Image.effect_noise((1600, 1600), 90)
    answer = server.ask("POST", "/sdapi/v1/txt2img", unit(image={"image": as_base64(noise)}))
    assert answer.status == 200, answer.body[:300]
    recipe = read_recipe(base64.b64decode(answer.json()["images"][0]))
    assert recipe["settings"]["control_image_sha256"]
    (shown,) = answer.json()["parameters"]["alwayson_scripts"]["ControlNet"]["args"]
    assert shown["image"] is None
