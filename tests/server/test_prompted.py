"""Jobs with an ip_adapter_image, on a server whose model has an IP-Adapter."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from inside import Inside
from PIL import Image
from serving import wait_for

from safelight import cli
from safelight.picture import largest_difference, open_picture
from safelight.recipe import read_recipe
from tests.guiding import as_base64, controlnet, edges, ip_adapter

QUICK = {"prompt": "a cat", "steps": 3, "sampler": "euler", "seed": 5}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ip_adapter(tmp_path_factory.mktemp("prompted") / "looks.safetensors")


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return controlnet(tmp_path_factory.mktemp("guided") / "edges")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, adapter: Path, net: Path) -> Iterator[Inside]:
    folder = tmp_path_factory.mktemp("prompted-server")
    beside: dict[str, Any] = {"ip_adapter": str(adapter), "controlnet": str(net)}
    with Inside(folder, exact=True, dtype="float32", **beside) as running:
        yield running


def drawn(server: Inside, **settings: Any) -> bytes:
    """Return the PNG of a quick job that succeeds."""
    return server.drawn(**{**QUICK, **settings})


def test_a_job_has_a_picture_as_its_prompt(server: Inside, adapter: Path, tmp_path: Path) -> None:
    """It is the command line's picture, and its recipe names what draws it again."""
    given = edges((200, 120))
    prompted = drawn(server, ip_adapter_image=as_base64(given), ip_adapter_scale=0.5)
    recipe = read_recipe(prompted)
    assert recipe["size"] == [256, 256]  # not the picture's
    assert [recipe[kind]["name"] for kind in ("ip_adapter", "image_encoder")] == [
        "looks",
        "image_encoder",
    ]
    assert recipe["settings"]["ip_adapter_scale"] == 0.5
    plain = drawn(server)
    assert "ip_adapter" not in read_recipe(plain)
    assert prompted != plain
    (tmp_path / "prompted.png").write_bytes(prompted)
    given.save(tmp_path / "edges.png")
    beside = ["--ip-adapter", str(adapter), "--ip-adapter-image", str(tmp_path / "edges.png")]
    assert cli.run(["verify", str(tmp_path / "prompted.png"), *beside]) == 0


def test_nothing_of_it_is_left(server: Inside) -> None:
    job_id = server.submit(**QUICK, ip_adapter_image=as_base64(edges()))
    wait_for(lambda: server.ask("GET", f"/api/jobs/{job_id}").json()["status"] == "succeeded")
    inputs = server.data / "inputs"
    assert [one.name for one in inputs.glob(f"{job_id}*")] == [f"{job_id}-ip_adapter_image.png"]
    assert server.ask("DELETE", f"/api/jobs/{job_id}").status in (200, 204)
    assert not [*inputs.glob(f"{job_id}*")]


def test_a_model_without_an_ip_adapter_refuses_at_once(server: Inside) -> None:
    asked = {**QUICK, "ip_adapter_image": as_base64(edges()), "model": "embedded-fast"}
    answer = server.ask("POST", "/api/jobs", asked)
    assert answer.status == 422
    assert answer.json()["field"] == "ip_adapter_image"
    assert b"needs an IP-Adapter" in answer.body
    answer = server.ask("POST", "/api/jobs", {**QUICK, "ip_adapter_image": "AAAA"})
    assert answer.status == 422
    assert answer.json()["field"] == "ip_adapter_image"


def test_pictures_share_calls_where_they_have_such_prompts(
    server: Inside, tmp_path: Path, adapter: Path
) -> None:
    """Other pictures, other scales and none are drawn beside each other as each alone."""
    how: dict[str, Any] = {"ip_adapter": str(adapter), "dtype": "float32"}
    asked = [
        {"ip_adapter_image": as_base64(edges())},
        {"ip_adapter_image": as_base64(edges((64, 200))), "ip_adapter_scale": 0.4},
        {},
    ]
    with Inside(tmp_path / "data", **how) as together:
        ids = [together.submit(**{**QUICK, **one}) for one in asked]

        def pictures() -> list[Any]:
            return [together.ask("GET", f"/api/jobs/{one}").json()["pictures"] for one in ids]

        wait_for(lambda: all(pictures()))
        found = [together.hub.picture_bytes(one[0]["id"]) for one in pictures()]
    assert len({*found}) == 3
    for one, png in zip(asked, found, strict=True):
        assert png is not None
        pair = (open_picture(data) for data in (png, drawn(server, **one)))
        assert largest_difference(*pair) <= 2


def unit(**fields: Any) -> dict[str, Any]:
    """Return a unit of the web UI's ControlNet extension for an IP-Adapter."""
    return {
        "image": as_base64(edges((256, 256))),
        "module": "ip-adapter_clip_sd15",
        "model": "looks [0123abcd]",
        "weight": 0.5,
        **fields,
    }


def body(*units: dict[str, Any]) -> dict[str, Any]:
    asked = {**QUICK, "width": 128, "height": 128, "sampler_name": "Euler", "cfg_scale": 1}
    return {**asked, "alwayson_scripts": {"ControlNet": {"args": [*units]}}}


def test_a_unit_of_automatic1111s_extension(server: Inside) -> None:
    """One of each kind counts; each has its own settings."""
    guiding = {"image": as_base64(edges((128, 128))), "module": "none", "guidance_end": 0.7}
    for units in ([unit()], [guiding, unit(guidance_end=0.6)], [unit(), guiding]):
        answer = server.ask("POST", "/sdapi/v1/txt2img", body(*units))
        assert answer.status == 200, answer.body
        png = base64.b64decode(answer.json()["images"][0])
        recipe = read_recipe(png)
        assert recipe["size"] == [128, 128]
        assert recipe["ip_adapter"]["name"] == "looks"
        assert ("controlnet" in recipe) == (len(units) == 2)
        assert recipe["settings"]["ip_adapter_scale"] == 0.5
        assert not [w for w in json.loads(answer.json()["info"])["warnings"] if "control" in w]
    assert recipe["settings"]["control_end"] == 0.7
    told = png.decode("latin-1")
    assert "ControlNet 0" in told
    assert "ControlNet 1" in told
    start = {"init_images": [as_base64(edges((128, 128)))], "denoising_strength": 0.7}
    answer = server.ask("POST", "/sdapi/v1/img2img", {**body(unit(image="")), **start})
    settings = read_recipe(base64.b64decode(answer.json()["images"][0]))["settings"]
    assert settings["image_sha256"] == settings["ip_adapter_image_sha256"]


@pytest.mark.parametrize("model", ["looks", "Looks [0123abcd]"])
def test_a_unit_is_told_by_the_name_of_the_adapter(server: Inside, model: str) -> None:
    """The name that /controlnet/model_list has; the module may be none."""
    guiding = {"image": as_base64(edges((128, 128))), "module": "none", "model": "edges"}
    for units in ([unit(module="none", model=model)], [guiding, unit(module="", model=model)]):
        answer = server.ask("POST", "/sdapi/v1/txt2img", body(*units))
        assert answer.status == 200, answer.body
        recipe = read_recipe(base64.b64decode(answer.json()["images"][0]))
        assert recipe["ip_adapter"]["name"] == "looks"
        assert ("controlnet" in recipe) == (len(units) == 2)


def test_a_unit_that_asks_for_what_is_not_here(server: Inside) -> None:
    for fields, told in (
        ({"model": "ip-adapter_sd15"}, b"there is no model 'ip-adapter_sd15', only 'looks'"),
        ({"weight": "much"}, b"controlnet: weight must be a number from 0 to 10, not 'much'"),
        ({"guidance_start": 0.9, "guidance_end": 0.1}, b"guidance_end must be at least guidance_s"),
    ):
        answer = server.ask("POST", "/sdapi/v1/txt2img", body(unit(**fields)))
        assert answer.status == 422, fields
        assert told in answer.body, answer.body
    asked = {**body(unit()), "override_settings": {"sd_model_checkpoint": "embedded-fast"}}
    answer = server.ask("POST", "/sdapi/v1/txt2img", asked)
    assert b"needs a server with --ip-adapter" in answer.body
    answer = server.ask("POST", "/sdapi/v1/txt2img", body(unit(image="")))
    assert b"the unit of an IP-Adapter has no picture" in answer.body
    asked = {**body(), "ip_adapter_image": as_base64(edges())}
    answer = server.ask("POST", "/sdapi/v1/txt2img", asked)
    assert b"ip_adapter_image: here it is the image of a unit" in answer.body
    names = server.ask("GET", "/controlnet/model_list").json()["model_list"]
    assert names == ["edges", "looks"]
    modules = server.ask("GET", "/controlnet/module_list").json()["module_list"]
    assert modules == ["none", "ip-adapter-auto"]
    assert server.ask("GET", "/controlnet/settings").json() == {"control_net_unit_count": 2}


def test_the_command_line(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (90, 60), "teal").save(tmp_path / "teal.png")
    out = tmp_path / "out.png"
    beside = ["--ip-adapter-image", str(tmp_path / "teal.png"), "--ip-adapter", str(adapter)]
    draw = ["generate", "a cat", "--steps", "1", "--sampler", "euler", "--out", str(out)]
    assert cli.run([*draw, *beside]) == 0
    assert read_recipe(out)["ip_adapter"]["name"] == "looks"
    assert "Module: ip-adapter-auto, Model: looks" in out.read_bytes().decode("latin-1")
    capsys.readouterr()
    assert cli.run([*draw[:-1], str(tmp_path / "2.png"), *beside[:2]]) == cli.BAD_INPUT
    assert "--ip-adapter-image needs an IP-Adapter" in capsys.readouterr().err
    assert cli.run([*draw[:-1], str(tmp_path / "3.png"), *beside[2:]]) == 0
    assert "--ip-adapter does nothing without --ip-adapter-image" in capsys.readouterr().err
    assert cli.run(["inspect", str(adapter)]) == cli.BAD_INPUT
    assert "an IP-Adapter, not a whole model" in capsys.readouterr().err
