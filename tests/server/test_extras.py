"""AUTOMATIC1111's tab "Extras": pictures enlarged by the worker, beside what it draws."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from inside import Answer, Inside
from PIL import Image, ImageChops
from serving import wait_for

from safelight.picture import encode, largest_difference
from safelight.recipe import png_texts, read_recipe, read_texts
from safelight.result import Result
from safelight.server import enlargements
from safelight.server.apis import sdapi_extras
from safelight.server.upscaling import Wanted
from safelight.upscaling import names
from safelight.upscaling.upscaler import Upscaler, load_upscaler
from tests import upscalers_tiny as tiny

PICTURE = tiny.picture(40, 24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    (root / "ESRGAN").mkdir()
    tiny.saved(root / "ESRGAN" / "RealESRGAN_x2plus.pth", tiny.compact())
    tiny.saved(root / "ESRGAN" / "4x-Tiny.pth", tiny.esrgan())
    return root


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[Inside]:
    place = tmp_path_factory.mktemp("extras")
    with Inside(place, exact=True, dtype="float32", models_dir=str(folder)) as running:
        yield running


def upscaler(folder: Path, name: str) -> Upscaler:
    return load_upscaler(name, models_dir=folder, device="cpu")


def as_base64(picture: Image.Image, texts: dict[str, str] | None = None) -> str:
    return base64.b64encode(encode(picture, "PNG", texts or {})).decode()


def asked(server: Inside, **body: Any) -> Answer:
    body = {"image": as_base64(PICTURE), **body}
    return server.ask("POST", "/sdapi/v1/extra-single-image", body)


def enlarged(server: Inside, **body: Any) -> tuple[Image.Image, bytes]:
    answer = asked(server, **body)
    assert answer.status == 200, answer.body
    png = base64.b64decode(answer.json()["image"])
    return Image.open(io.BytesIO(png)).convert("RGB"), png


def test_the_upscalers_of_the_models_folder_are_listed(
    server: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listed() -> list[tuple[str, float]]:
        found = server.ask("GET", "/sdapi/v1/upscalers").json()
        return [(one["name"], one["scale"]) for one in found]

    plain = [("None", 4), ("Lanczos", 4)]
    assert listed() == [*plain, ("4x-Tiny", 4), ("RealESRGAN_x2plus", 2)]
    monkeypatch.setattr(names, "find_spec", lambda name: None)
    assert listed() == plain


def test_a_picture_is_enlarged(server: Inside, folder: Path) -> None:
    """What the worker makes equals what Python makes, and files of calls do not stay."""
    four = upscaler(folder, "4x-Tiny")
    for body, size in [({"upscaling_resize": 4}, (160, 96)), ({}, (80, 48))]:
        made, png = enlarged(server, upscaler_1="4x-Tiny", **body)
        assert made.tobytes() == four.upscale(PICTURE, size=size).tobytes()
        text = Image.open(io.BytesIO(png)).info["postprocessing"]
        assert text.endswith("Postprocess upscaler: 4x-Tiny")
    # The web UI's own name, a width and height with and without cropping.
    two = upscaler(folder, "RealESRGAN_x2plus")
    size = {"resize_mode": 1, "upscaling_resize_w": 60, "upscaling_resize_h": 60}
    made, _ = enlarged(server, upscaler_1="R-ESRGAN 2x+", **size, upscaling_crop=False)
    whole = two.upscale(PICTURE, size=(100, 60))
    assert made.tobytes() == whole.tobytes()
    made, _ = enlarged(server, upscaler_1="R-ESRGAN 2x+", **size)
    assert made.tobytes() == whole.crop((20, 0, 80, 60)).tobytes()
    assert not [*(server.data / "upscaling").iterdir()]


def test_two_upscalers_are_mixed(server: Inside, folder: Path) -> None:
    both = {"upscaler_1": "4x-Tiny", "upscaler_2": "Lanczos", "extras_upscaler_2_visibility": 0.25}
    made, _ = enlarged(server, **both)
    first = upscaler(folder, "4x-Tiny").upscale(PICTURE, 2)
    second = PICTURE.resize((80, 48), Image.Resampling.LANCZOS)
    assert largest_difference(made, Image.blend(first, second, 0.25)) == 0


def test_without_a_network_the_server_does_it(server: Inside) -> None:
    assert enlarged(server)[0].tobytes() == PICTURE.tobytes()
    made = enlarged(server, upscaler_1="Lanczos", upscaling_resize=1.5)[0]
    assert made.tobytes() == PICTURE.resize((60, 36), Image.Resampling.LANCZOS).tobytes()


def with_recipe() -> str:
    settings = {
        "prompt": "a cat", "negative_prompt": "", "sampler": "euler", "steps": 3, "seed": 5,
        "guidance_scale": 7.5, "schedule": None,
    }  # fmt: skip
    result = Result([PICTURE], [5], settings, "tiny", "ab" * 32, "cpu", "float32")
    return as_base64(PICTURE, png_texts(result.recipe()))


def test_a_recipe_is_kept(server: Inside) -> None:
    _, png = enlarged(server, image=with_recipe(), upscaler_1="4x-Tiny")
    recipe = read_recipe(png)
    assert recipe["settings"]["prompt"] == "a cat"
    assert [one["name"] for one in recipe["upscaled"]] == ["4x-Tiny"]
    assert recipe["upscaled"][0]["size"] == [80, 48]
    assert "Postprocess upscale by: 2" in read_texts(png)["parameters"]
    spoilt = {"safelight": '{"safelight": "1", "settings": {}, "model": {}}'}
    answer = asked(server, image=as_base64(PICTURE, spoilt), upscaler_1="Lanczos")
    (warning,) = answer.json()["warnings"]
    assert warning.startswith("the picture's recipe was left out: ")
    assert warning in answer.json()["html_info"].replace("&#x27;", "'")


def test_a_recipe_that_verify_could_not_repeat_is_left_out(server: Inside) -> None:
    image = with_recipe()
    size = {"resize_mode": 1, "upscaling_resize_w": 60, "upscaling_resize_h": 60}
    for crop, kept in ((True, {"parameters"}), (False, {"parameters", "safelight"})):
        body = {"image": image, "upscaler_1": "Lanczos", "upscaling_crop": crop, **size}
        assert set(read_texts(enlarged(server, **body)[1])) == kept


def test_the_pixels_of_a_call_are_bounded_before_any_work(
    server: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdapi_extras, "MAX_PIXELS", 2 * 80 * 48)
    monkeypatch.setattr(Upscaler, "call", None)  # none is called
    for upscaler_1 in ("4x-Tiny", "Lanczos"):
        body = {"imageList": [{"data": as_base64(PICTURE)}] * 3, "upscaler_1": upscaler_1}
        answer = server.ask("POST", "/sdapi/v1/extra-batch-images", body)
        assert answer.status == 422
        assert "million pixels once they are enlarged, all together" in answer.json()["detail"]
    body["imageList"].pop()
    assert server.ask("POST", "/sdapi/v1/extra-batch-images", body).status == 200


def test_the_scale_of_a_name() -> None:
    told = {
        "4x-UltraSharp": 4, "4xNomos8kSC": 4, "2xLexicaRRDBNet_Sharp": 2, "1xDeJPG_OmniSR": 1,
        "2xNomosUni_span_multijpg": 2, "2x_AniScale": 2, "RealESRGAN_x2plus": 2, "HAT-L_SRx4": 4,
        "8x_NMKD-Superscale_150000_G": 8, "SwinIR_4x": 4, "realesr-general-x4v3": 4, "other": 4,
        "001_classicalSR_DIV2K_s48w8_SwinIR-M_x2": 2,
    }  # fmt: skip
    assert {name: sdapi_extras.scale_of(name) for name in told} == told


def test_several_pictures_in_a_call(server: Inside, folder: Path) -> None:
    other = ImageChops.invert(PICTURE)
    sent = [{"data": as_base64(one), "name": "x.png"} for one in (PICTURE, other)]
    body = {"imageList": sent, "upscaler_1": "4x-Tiny", "gfpgan_visibility": 1}
    answer = server.ask("POST", "/sdapi/v1/extra-batch-images", body)
    assert answer.status == 200, answer.body
    assert answer.json()["html_info"] == "<p>gfpgan_visibility: faces are not restored</p>"
    four = upscaler(folder, "4x-Tiny")
    for text, one in zip(answer.json()["images"], (PICTURE, other), strict=True):
        made = Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")
        assert made.tobytes() == four.upscale(one, 2).tobytes()


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"upscaler_1": "nothing"}, "no upscaler 'nothing' in the models folder"),
        ({"upscaler_1": "../ESRGAN/4x-Tiny.pth"}, "no upscaler '../ESRGAN/4x-Tiny.pth'"),
        ({"upscaler_1": "/etc/passwd"}, "no upscaler '/etc/passwd'"),
        ({"upscaling_resize": 9}, "upscaling_resize: "),
        ({"upscaler_1": "4x-Tiny", "resize_mode": 1, "upscaling_resize_w": 70000}, "70000x512"),
        ({"upscaler_1": "Lanczos", "resize_mode": 1, "upscaling_resize_w": 4}, "4x512"),
        ({"image": "x"}, "image must be a PNG"),
        ({"imageList": []}, "imageList: "),
    ],
)
def test_bad_input_is_refused_in_a_line(server: Inside, body: dict[str, Any], why: str) -> None:
    if "imageList" in body:
        answer = server.ask("POST", "/sdapi/v1/extra-batch-images", body)
    else:
        answer = asked(server, **body)
    assert answer.status in (404, 422)
    assert why in answer.json()["detail"]


def test_without_the_library_a_line_says_how_to_get_it(
    server: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "find_spec", lambda name: None)
    answer = asked(server, upscaler_1="4x-Tiny")
    assert answer.status == 422
    assert answer.json()["detail"].endswith("pip install 'safelight[upscale]'")


def test_a_queue_that_is_full_says_when_to_try_again(
    server: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enlargements, "MAX_WAITING", 0)
    answer = asked(server, upscaler_1="4x-Tiny")
    assert (answer.status, answer.headers["retry-after"]) == (429, "30")


# --- hires fix -----------------------------------------------------------------------------------


def test_an_upscaler_enlarges_between_two_passes(server: Inside, folder: Path) -> None:
    """The job equals image to image of what Python's upscaler makes of the first picture."""
    body = {"prompt": "a cat", "steps": 2, "seed": 5, "sampler_name": "Euler", "width": 64}
    body |= {"height": 64, "enable_hr": True, "hr_scale": 1.5, "hr_second_pass_steps": 2}
    body |= {"denoising_strength": 0.5, "hr_upscaler": "4x-Tiny"}
    answer = server.ask("POST", "/sdapi/v1/txt2img", body)
    assert answer.status == 200, answer.body
    png = base64.b64decode(answer.json()["images"][0])
    told = read_recipe(png)["settings"].items()
    first = {key: value for key, value in told if value is not None and "hires" not in key}
    drawn = Image.open(io.BytesIO(server.drawn(**first))).convert("RGB")
    large = upscaler(folder, "4x-Tiny").upscale(drawn, size=(96, 96))
    again = {**first, "width": 96, "height": 96, "steps": 4, "strength": 0.5}
    theirs = Image.open(io.BytesIO(server.drawn(**again, image=as_base64(large))))
    assert Image.open(io.BytesIO(png)).convert("RGB").tobytes() == theirs.convert("RGB").tobytes()
    assert read_recipe(png)["upscaler"] == upscaler(folder, "4x-Tiny").used
    info = json.loads(answer.json()["info"])
    assert info["extra_generation_params"]["Hires upscaler"] == "4x-Tiny"
    assert info["warnings"] == [w for w in info["warnings"] if "hr_upscaler" not in w]
    # One that is not here gives a warning, as before there were any.
    body |= {"hr_upscaler": "R-ESRGAN 4x+"}
    answer = server.ask("POST", "/sdapi/v1/txt2img", body)
    (warning,) = [w for w in json.loads(answer.json()["info"])["warnings"] if "hr_upscaler" in w]
    assert warning.startswith("hr_upscaler: enlarged with Lanczos: no upscaler 'RealESRGAN_x4plus'")
    assert answer.json()["parameters"]["hr_upscaler"] == "R-ESRGAN 4x+"


def test_a_job_names_no_file_of_the_server(server: Inside, folder: Path) -> None:
    file = str(folder / "ESRGAN" / "4x-Tiny.pth")
    for name, why in [(file, "no upscaler "), ("other", "no upscaler 'other'")]:
        body = {"prompt": "a", "hires_scale": 1.5, "hires_upscaler": name}
        answer = server.ask("POST", "/api/jobs", body)
        assert answer.status == 422
        assert answer.json()["field"] == "hires_upscaler"
        assert answer.json()["detail"].startswith(why)


# --- beside other work ---------------------------------------------------------------------------


class Held:
    """Keeps networks from answering until told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began, self.go_on, self.calls = threading.Event(), threading.Event(), 0
        call = Upscaler.call

        def held(upscaler: Upscaler, picture: Any) -> Any:
            self.calls += 1
            self.began.set()
            while not self.go_on.wait(0.1):
                server_is_well()
            return call(upscaler, picture)

        monkeypatch.setattr(Upscaler, "call", held)


def server_is_well() -> None:
    from safelight.progress import get_on

    get_on()


def begun(server: Inside, body: dict[str, Any], receive: Any = None) -> Any:
    return asyncio.run_coroutine_threadsafe(
        server.asked("POST", "/sdapi/v1/extra-single-image", body), server._loop
    )


def test_others_draw_meanwhile(server: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    coming = begun(server, {"image": as_base64(PICTURE), "upscaler_1": "4x-Tiny"})
    try:
        assert held.began.wait(30)
        server.drawn(prompt="a cat", steps=1, width=64, height=64)
        assert not coming.done()
    finally:
        held.go_on.set()
    assert coming.result(60).status == 200


def test_a_picture_is_in_no_memory_of_the_server_while_the_worker_enlarges_it(
    server: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    kept: list[weakref.ref[Image.Image]] = []
    begin = enlargements.Enlargements.begin

    def noted(self: Any, picture: Image.Image, *rest: Any) -> Any:
        kept.append(weakref.ref(picture))
        return begin(self, picture, *rest)

    monkeypatch.setattr(enlargements.Enlargements, "begin", noted)
    coming = begun(server, {"image": as_base64(PICTURE), "upscaler_1": "4x-Tiny"})
    try:
        assert held.began.wait(30)
        wait_for(lambda: not kept[0]())
    finally:
        held.go_on.set()
    assert coming.result(60).status == 200


def test_files_of_a_caller_who_left_during_the_last_step_do_not_stay(
    server: Inside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = server.data / "upscaling" / "gone"
    folder.mkdir(parents=True)
    server.hub.enlargements.answer("gone", [], None, None)
    assert not folder.exists()
    assert server.worker is not None
    PICTURE.save(tmp_path / "in.png")
    work = server.worker._upscaling._steps("gone", tmp_path, Wanted((80, 48), (("Lanczos", 1.0),)))
    next(work)
    shutil.rmtree(tmp_path)
    assert next(work, None) is None
    assert not tmp_path.exists()


def test_a_caller_who_leaves_stops_the_work(
    server: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    large = as_base64(tiny.picture(700, 300))  # three tiles
    coming = begun(server, {"image": large, "upscaler_1": "RealESRGAN_x2plus"})
    assert held.began.wait(30)
    coming.cancel()
    wait_for(lambda: not server.hub.enlargements._waiting)
    assert server.worker is not None
    upscaling = server.worker._upscaling
    wait_for(lambda: upscaling._stopped)
    held.go_on.set()
    wait_for(lambda: not upscaling.busy)
    assert held.calls == 1
    assert not [*(server.data / "upscaling").iterdir()]


def test_a_worker_that_ends_is_told(server: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    coming = begun(server, {"image": as_base64(PICTURE), "upscaler_1": "4x-Tiny"})
    assert held.began.wait(30)
    monkeypatch.setattr(server.hub.supervisor, "restarts", 1)
    answer = coming.result(60)
    held.go_on.set()
    assert answer.status == 503
    assert "the worker ended while it enlarged a picture" in answer.json()["detail"]


def test_a_fault_ends_only_its_own_call(server: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(Upscaler, "call", broken)
        answer = asked(server, upscaler_1="4x-Tiny")
        assert answer.status == 500
        assert "this upscaler met a fault of Safelight" in answer.json()["detail"]
    assert asked(server, upscaler_1="4x-Tiny").status == 200
