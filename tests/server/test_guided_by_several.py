"""Jobs with several control images, on a server whose model has two ControlNets."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from inside import Inside
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from safelight import SafelightError, cli
from safelight.controls import blank, is_blank
from safelight.recipe import read_recipe
from safelight.request import Request
from safelight.server.apis.sdapi_bodies import TextToImage
from safelight.server.apis.sdapi_control import check_room, guiding_units
from safelight.studio import entries
from safelight.studio.form import Form
from safelight.studio.nets import arranged, lost, named, recorded
from safelight.studio.recipes import controlnets_in, recipe_settings
from safelight.studio.suits import Suits
from tests.guiding import as_base64, controlnet, edges

QUICK = {"prompt": "a cat", "steps": 2, "sampler": "euler", "seed": 5}
SQUARE = edges()
BAR = Image.new("RGB", (128, 128))
BAR.paste("white", (60, 0, 68, 128))
BOTH = [as_base64(SQUARE), as_base64(BAR)]


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("several")
    return [str(controlnet(folder / name, seed)) for name, seed in (("edges", 3), ("depth", 4))]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, nets: list[str]) -> Iterator[Inside]:
    folder = tmp_path_factory.mktemp("several-server")
    with Inside(folder, controlnet=nets, exact=True, dtype="float32") as running:
        yield running


def test_a_job_is_guided_by_both(server: Inside, nets: list[str], tmp_path: Path) -> None:
    """Its inputs are kept and removed with it, and verify draws it again."""
    job_id = server.submit(**QUICK, control_image=BOTH, control_scale=[0.5, 0.8], control_end=0.5)
    assert server.finished(job_id)["status"] == "succeeded"
    png = server.picture(job_id)
    recipe = read_recipe(png)
    assert [one["name"] for one in recipe["controlnet"]] == ["edges", "depth"]
    assert recipe["settings"]["control_scale"] == [0.5, 0.8]
    assert recipe["settings"]["control_end"] == 0.5
    inputs = server.data / "inputs"
    names = {f"{job_id}-control_image.png", f"{job_id}-control_image_2.png"}
    assert {one.name for one in inputs.glob(f"{job_id}*")} == names
    (tmp_path / "made.png").write_bytes(png)
    SQUARE.save(tmp_path / "square.png")
    BAR.save(tmp_path / "bar.png")
    given = [str(tmp_path / "square.png"), str(tmp_path / "bar.png")]
    verify = ["verify", str(tmp_path / "made.png")]
    for picture, net in zip(given, nets, strict=True):
        verify += ["--control-image", picture, "--controlnet", net]
    assert cli.run(verify) == 0
    assert server.ask("DELETE", f"/api/jobs/{job_id}").status in (200, 204)
    assert not [*inputs.glob(f"{job_id}*")]


def test_verify_names_what_is_wrong(
    server: Inside, nets: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "made.png").write_bytes(server.drawn(**QUICK, control_image=BOTH))
    SQUARE.save(tmp_path / "square.png")
    BAR.save(tmp_path / "bar.png")
    pictures = [f"--control-image={tmp_path / name}.png" for name in ("square", "bar")]
    verify = ["verify", str(tmp_path / "made.png")]
    assert cli.run([*verify, *pictures[:1], "--controlnet", nets[0]]) == cli.BAD_INPUT
    told = capsys.readouterr().err
    assert "control_image_2 is needed again" in told
    assert told.rstrip().endswith(": give it with --control-image")
    assert cli.run([*verify, *pictures, "--controlnet", nets[0]]) == cli.BAD_INPUT
    assert "not 1 of them: give those that made the picture" in capsys.readouterr().err
    swapped = [f"--controlnet={net}" for net in reversed(nets)]
    assert cli.run([*verify, *pictures, *swapped]) == cli.BAD_INPUT
    assert "controlnet must be edges of SHA-256" in capsys.readouterr().err


def test_a_job_has_a_picture_for_each(server: Inside) -> None:
    for sent, told in (
        (BOTH[0], b"control_image must be 2 pictures for embedded"),
        (BOTH[:1] * 3, b"control_image must be 2 pictures for embedded"),
        (BOTH[:1] * 5, b"control_image must be 1 to 4 pictures, not 5"),
        ([], b"control_image must be 1 to 4 pictures, not 0"),
        ([BOTH[0], "AAAA"], b"control_image"),
        ([BOTH[0], 3], b"control_image must be a PNG"),
    ):
        answer = server.ask("POST", "/api/jobs", {**QUICK, "control_image": sent})
        assert answer.status == 422, answer.body
        assert told in answer.body
        assert answer.json()["field"] == "control_image"
    answer = server.ask("POST", "/api/jobs", {**QUICK, "image": BOTH})
    assert b"image must be a PNG, JPEG or WebP picture in base64" in answer.body
    asked = {**QUICK, "control_image": BOTH, "control_scale": [0.5, 0.5, 0.5]}
    answer = server.ask("POST", "/api/jobs", asked)
    assert b"control_scale has 3 values, and control_image is 2 pictures" in answer.body


def test_a_key_of_idempotency_is_for_all_pictures(server: Inside) -> None:
    key = {"idempotency-key": "both pictures"}
    asked = {**QUICK, "control_image": BOTH}
    first = server.ask("POST", "/api/jobs", asked, **key)
    again = server.ask("POST", "/api/jobs", asked, **key)
    assert again.json()["id"] == first.json()["id"]
    other = server.ask("POST", "/api/jobs", {**asked, "control_image": BOTH[:1] * 2}, **key)
    assert other.status == 422, other.body


def units(*given: dict[str, Any]) -> dict[str, Any]:
    """Return a body of AUTOMATIC1111's API with units of ControlNet."""
    made = [{"image": as_base64(edges((256, 256))), "module": "none", **one} for one in given]
    body = {**QUICK, "width": 128, "height": 128, "sampler_name": "Euler", "cfg_scale": 1}
    return {**body, "alwayson_scripts": {"controlnet": {"args": made}}}


def test_units_of_automatic1111s_extension(server: Inside) -> None:
    """Each guides through the ControlNet that it names; one that none names is off."""
    for given, scales, ends in (
        (({"weight": 0.5}, {"weight": 0.7, "guidance_end": 0.5}), [0.5, 0.7], [1, 0.5]),
        (({"weight": 0.5, "model": "depth"}, {"weight": 0.7}), [0.7, 0.5], 1),
        (({"weight": 0.5, "model": "Depth [0123abcd]"},), [0, 0.5], 1),
    ):
        answer = server.ask("POST", "/sdapi/v1/txt2img", units(*given))
        assert answer.status == 200, answer.body
        found = answer.json()
        assert not [one for one in json.loads(found["info"])["warnings"] if "control" in one]
        settings = read_recipe(base64.b64decode(found["images"][0]))["settings"]
        assert settings["control_scale"] == scales
        assert settings["control_end"] in (ends, [ends, ends])
        assert settings["control_image_2_sha256"]
        # A ControlNet that no unit is for has a blank picture, which verify does not ask for.
        assert is_blank(settings["control_image_sha256"]) is (len(given) == 1)
    listed = server.ask("GET", "/controlnet/model_list").json()["model_list"]
    assert listed == ["edges", "depth"]
    assert server.ask("GET", "/controlnet/settings").json() == {"control_net_unit_count": 2}


def test_units_that_ask_for_more_than_is_here() -> None:
    there = ["edges", "depth"]
    three = TextToImage(**units({}, {"model": "depth"}, {}))
    found, warnings = guiding_units(three, there)
    assert [one.place for one in found] == [0, 1]
    assert warnings == ["controlnet: 2 of 3 units guide, one for each ControlNet here"]
    _, warnings = guiding_units(TextToImage(**units({}, {"image": None})), there)
    assert warnings == ["alwayson_scripts: ControlNet has a unit without a picture"]
    start = Request(image=Image.new("RGB", (5000, 5000)), mask_padding=0)
    start = start.with_pictures(start.image, Image.new("L", (5000, 5000)))
    check_room(found, start, (64, 64))
    with pytest.raises(SafelightError, match="3 units at 5000x5000 have more than 64 million"):
        check_room([*found, found[0]], start, (64, 64))
    with pytest.raises(SafelightError, match="no model 'pose', only 'edges', 'depth'"):
        guiding_units(TextToImage(**units({}, {"model": "pose"})), there)
    with pytest.raises(SafelightError, match="weight must be a number, not a list"):
        guiding_units(TextToImage(**units({"weight": [0.5, 0.5]})), there)


def test_the_command_line(
    nets: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SQUARE.save(tmp_path / "square.png")
    BAR.save(tmp_path / "bar.png")
    out = tmp_path / "out.png"
    given = [f"--controlnet={net}" for net in nets]
    pictures = [f"--control-image={tmp_path / name}.png" for name in ("square", "bar")]
    draw = ["generate", "a cat", "--steps", "1", "--sampler", "euler", "--out", str(out)]
    scales = ["--control-scale=0.5", "--control-scale", "0.8", "--control-end=0.9"]
    assert cli.run([*draw, *given, *pictures, *scales]) == 0
    settings = read_recipe(out)["settings"]
    assert (settings["control_scale"], settings["control_end"]) == ([0.5, 0.8], 0.9)
    capsys.readouterr()
    assert cli.run([*draw, "--overwrite", *given, *pictures[:1]]) == cli.BAD_INPUT
    told = "--control-image must be given once for each --controlnet, 2 times, not 1"
    assert told in capsys.readouterr().err
    file = tmp_path / "rows.csv"
    file.write_text('prompt,control_image,control_scale\na cat,"square.png,bar.png","0.5,0.8"\n')
    batch = ["batch", str(file), "--out", str(tmp_path / "made"), "--steps=1", *given]
    assert cli.run(batch) == 0
    (made,) = (tmp_path / "made" / "pictures").glob("*.png")
    assert read_recipe(made)["settings"]["control_scale"] == [0.5, 0.8]


def test_the_form_has_an_editor_for_each(server: Inside) -> None:
    import gradio as gr

    suits = Suits.of(server.hub.names, None, {})
    assert (suits.controlnets, suits.guides) == (("edges", "depth"), 2)

    async def made() -> Form:  # without a loop Gradio makes one and leaves it open
        with gr.Blocks():
            return Form(suits)

    form = asyncio.run(made())
    assert [one.elem_id for one in form.controls] == ["control", "control-2"]
    assert form.editors == 4
    recipe = Request(
        prompt="a cat", control_image=[SQUARE, BAR], control_scale=[0.5, 0.8], seed=1
    ).to_dict()
    values, told = entries.shown(recipe, suits)
    assert not told
    assert "0.5, 0.8" in values
    first, second = ((SQUARE, None), []), ((BAR, None), [])
    again = entries.request(*values, None, None, 1, first, 1, second, 1, None, 1, suits=suits)
    assert again.control_scale == (0.5, 0.8)
    assert [one.getpixel((64, 4)) for one in again.control_image] == [(0, 0, 0), (255,) * 3]  # type: ignore[union-attr]
    # Without a picture a ControlNet is off.
    again = entries.request(*values, None, None, 1, None, 1, second, 1, None, 1, suits=suits)
    assert again.control_scale == (0, 0.8)
    assert again.pictures["control_image"].size == (8, 8)
    # An emptied field is the default.
    values[values.index("0.5, 0.8")] = " "
    again = entries.request(*values, None, None, 1, None, 1, second, 1, None, 1, suits=suits)
    assert again.control_scale == (0, 1)
    alone = Suits(reads=suits.reads, controlnets=("edges",))
    assert entries.shown(recipe, alone)[1] == [
        "with this model the page takes 1 control image, not 2"
    ]
    # Of a model elsewhere it is not known how many it has.
    values, _ = entries.shown({}, Suits())
    again = entries.request(*values, None, None, 1, first, 1, second, 1, None, 1, suits=Suits())
    assert len(again.pictures) == 2


def test_the_form_is_filled_by_the_names_of_controlnets() -> None:
    here = Suits(controlnets=("edges", "depth, v2"))
    both = Request(control_image=[SQUARE, BAR], control_scale=[0.5, 0.8], control_end=0.9).to_dict()
    stored: dict[str, Any] = {"control_image": SQUARE, "control_image_2": BAR}
    found, pictures, told = arranged(both, stored, ["Depth, v2", "edges"], here)
    assert (found["control_scale"], found["control_end"], told) == ([0.8, 0.5], 0.9, [])
    assert pictures == {"control_image": BAR, "control_image_2": SQUARE}
    one = Request(control_image=SQUARE, control_scale=0.5).to_dict()
    alone: dict[str, Any] = {"control_image": SQUARE}
    found, pictures, told = arranged(one, alone, ["depth, v2"], here)
    assert (found["control_scale"], pictures, told) == (0.5, {"control_image_2": SQUARE}, [])
    assert lost(found, pictures, here) == []
    assert lost(found, {}, here) == ["the control image of depth, v2 is not stored: add it below"]
    _, pictures, told = arranged(one, alone, ["pose"], here)
    assert (pictures, told) == (alone, ["the ControlNet pose, for which edges is used"])
    # The picture that stands in for one of a ControlNet that was off is not shown.
    off = Request(control_image=[blank(), BAR], control_scale=[0, 1]).to_dict()
    found, pictures, _ = arranged(off, stored, ["edges", "depth, v2"], here)
    assert (found["control_scale"], pictures) == ([0, 1], {"control_image_2": BAR})
    # Files come from strangers.
    for names in ([], ["edges"], ["edges"] * 9):
        assert arranged(both, stored, names, here) == (both, stored, [])
    assert recorded({"controlnet": [3, {"name": 4}]}) == ["", "4"]


def test_the_web_uis_text_is_read_again(server: Inside) -> None:
    png = server.drawn(**QUICK, control_image=BOTH, control_scale=[0.5, 0.8])
    assert controlnets_in(png) == controlnets_in(_with_parameters_alone(png)) == ["edges", "depth"]
    assert named(["Model: x [01], Weight: 1", "Model: None", "Module: ip-adapter"]) == ["x", ""]
    found = recipe_settings(_with_parameters_alone(png))
    assert found["control_scale"] == [0.5, 0.8]
    assert {"control_image_sha256", "control_image_2_sha256"} <= found.keys()


def _with_parameters_alone(png: bytes) -> bytes:
    """Return a PNG that has the text `parameters` and no recipe of ours."""
    with Image.open(io.BytesIO(png)) as image:
        told = PngInfo()
        told.add_text("parameters", image.text["parameters"])  # type: ignore[attr-defined]
        image.save(out := io.BytesIO(), "PNG", pnginfo=told)
    return out.getvalue()
