"""The API of AUTOMATIC1111, as the client `webuiapi` and bare HTTP see it."""

import base64
import contextlib
import http.client
import io
import itertools
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import numpy
import pytest
import requests
import webuiapi
from fake import PATIENCE, FakeService, colour, encoded, running, until
from PIL import ExifTags, Image, PngImagePlugin
from safetensors.numpy import save_file
from sd_parsers import ParserManager

from safelight.picture import encode
from safelight.recipe import read_recipe
from safelight.request import Request
from safelight.result import Result
from safelight.server import bodies, caged
from safelight.server.apis.sdapi import _told
from safelight.server.apis.sdapi_bodies import Asked, ImageToImage
from safelight.server.decoder import Sent
from safelight.server.jobs import Job, ModelInfo, Picture
from safelight.server.names import Names
from safelight.server.settings import WorkerSettings
from safelight.weights.find import MODELS

pytestmark = pytest.mark.xdist_group("sdapi")  # one server for them all
SHA = "ab" * 32
NOT_BASE64 = "must be a PNG, JPEG or WebP picture in base64"


@pytest.fixture
def service(tmp_path):
    info = ModelInfo(name="tiny", sha256=SHA, kind="text", width=64, height=64, ready=True)
    return FakeService(tmp_path, info, 4)


@pytest.fixture(scope="module")
def server():
    """The real application on the loopback."""
    with running() as served:
        yield served


@pytest.fixture
def port(server, service):
    server.service = service
    yield server.port
    service.resume()


@pytest.fixture
def client(port):
    """Return a maker of clients: by address only, or with a name."""
    made = []

    def make(username=None):
        api = webuiapi.WebUIApi(port=port, username=username, password=username)
        made.append(api)
        return api

    yield make
    for api in made:
        api.session.close()


@pytest.fixture
def api(client):
    return client()


@pytest.fixture
def call(port):
    """Return a function for bare HTTP: call("txt2img", {...}) posts, call("progress") gets."""

    def call(path, body=None, **more):
        method = "GET" if body is None and not more else "POST"
        url = f"http://127.0.0.1:{port}/sdapi/v1/{path}"
        return requests.request(method, url, json=body, timeout=PATIENCE, **more)

    return call


@pytest.fixture
def line(port):
    """Return a connection for this test alone."""
    with contextlib.closing(
        http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    ) as line:
        yield line


@pytest.fixture
def later(service):
    """Return a function that runs calls in their own threads."""
    with ThreadPoolExecutor(4) as pool:
        yield pool.submit
        service.resume()  # else a test that fails would wait for its calls forever


def warnings_of(answer):
    return json.loads(answer.json()["info"])["warnings"]


def refused(answer, status=422):
    """Return the line of an error in that API's shape."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error", "detail", "body", "errors"}
    assert len(body["detail"].splitlines()) == 1
    assert len(body["detail"]) < 250
    assert "Traceback" not in answer.text
    return body["detail"]


def two_halves(mode="L", left: object = 0, right: object = 255):
    image = Image.new(mode, (64, 64), left)
    image.paste(right, (32, 0, 64, 64))
    return image


def test_the_module_is_free_of_torch():
    code = (
        "import sys; from safelight.server.apis import sdapi, sdapi_shapes as shapes;"
        "shapes.understand(shapes.TextToImage(), None);"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


class TestTextToImage:
    def test_pictures_come_with_their_recipe_and_are_told_of(self, api, service):
        result = api.txt2img(
            prompt="a red apple",
            negative_prompt="blurry, dark",
            seed=7,
            steps=12,
            cfg_scale=5.5,
            width=96,
            height=64,
            sampler_name="DPM++ 2M",
            scheduler="Karras",
            batch_size=2,
            n_iter=2,
        )
        assert [image.size for image in result.images] == [(96, 64)] * 4
        assert [image.getpixel((0, 0)) for image in result.images] == [
            colour(seed) for seed in (7, 8, 9, 10)
        ]
        info = result.info
        assert info["seed"] == 7
        assert info["all_seeds"] == [7, 8, 9, 10]
        assert info["prompt"] == "a red apple"
        assert info["all_prompts"] == ["a red apple"] * 4
        assert info["negative_prompt"] == "blurry, dark"
        assert (info["width"], info["height"]) == (96, 64)
        assert (info["steps"], info["cfg_scale"], info["batch_size"]) == (12, 5.5, 2)
        assert info["sampler_name"] == "DPM++ 2M"
        assert info["extra_generation_params"] == {"Schedule type": "Karras"}
        assert (info["sd_model_name"], info["sd_model_hash"]) == ("tiny", SHA[:10])
        assert info["clip_skip"] == 1
        assert info["warnings"] == []
        assert datetime.strptime(info["job_timestamp"], "%Y%m%d%H%M%S").year > 2000
        assert [image.text["parameters"] for image in result.images] == info["infotexts"]
        for i, image in enumerate(result.json["images"]):
            recipe = read_recipe(base64.b64decode(image, validate=True))
            assert recipe["settings"]["seed"] == 7 + i
        request = service.requests[0]
        assert (request.sampler, request.schedule, request.count) == ("dpmpp_2m", "karras", 4)

    def test_the_client_s_own_defaults(self, api, service):
        result = api.txt2img(prompt="a cat")
        request = service.requests[0]
        assert (request.sampler, request.steps, request.guidance_scale) == ("euler_a", 20, 7)
        assert (request.schedule, request.eta, request.strength) == (None, 0, None)
        assert (request.width, request.height) == (64, 64)
        assert result.image.size == (512, 512)
        note = "tiny draws 64x64: drawn at 64x64 and enlarged to 512x512"
        assert result.info["warnings"] == [note]

    @pytest.mark.parametrize(
        ("asked", "drawn"),
        [
            ((64, 64), (64, 64)),
            ((128, 128), (64, 64)),
            ((136, 128), (72, 64)),
            ((512, 512), (64, 64)),
            ((1024, 1024), (64, 64)),
            ((1024, 512), (128, 64)),
            ((512, 768), (64, 96)),
        ],
    )
    def test_sizes_that_the_model_cannot_draw_are_enlarged(self, api, service, asked, drawn):
        result = api.txt2img(prompt="a cat", width=asked[0], height=asked[1])
        assert (service.requests[0].width, service.requests[0].height) == drawn
        assert result.image.size == asked == (result.info["width"], result.info["height"])
        recipe = read_recipe(base64.b64decode(result.json["images"][0]))
        assert recipe["size"] == list(drawn)
        assert result.info["infotexts"] == [result.image.text["parameters"]]
        if drawn == asked:
            assert result.info["warnings"] == []
            assert "enlarged" not in recipe
        else:
            assert "enlarged to" in result.info["warnings"][0]
            assert recipe["enlarged"] == list(asked)
            assert f"Hires resize: {asked[0]}x{asked[1]}" in result.info["infotexts"][0]

    def test_a_size_of_four_times_a_small_model_s_pixels_is_enlarged(self, api, service):
        """So is what clients ask of the bundled model by default: 512x512 of one of 256x256."""
        service.info = service.info.model_copy(update={"width": 256, "height": 256})
        assert api.txt2img(prompt="a red apple").image.size == (512, 512)
        assert (service.requests[0].width, service.requests[0].height) == (256, 256)

    def test_an_empty_body_means_that_api_s_defaults_at_the_model_s_size(self, call, service):
        answer = call("txt2img", {})
        request = service.requests[0]
        assert (request.prompt, request.sampler, request.steps) == ("", "euler", 50)
        assert (request.guidance_scale, request.count) == (7, 1)
        assert (request.width, request.height) == (None, None)
        parameters = answer.json()["parameters"]
        assert (parameters["width"], parameters["height"]) == (64, 64)
        assert (parameters["seed"], parameters["steps"], parameters["n_iter"]) == (-1, 50, 1)

    def test_parameters_are_an_echo(self, call):
        sent = {"prompt": "x", "cfg_scale": 3, "do_not_save_grid": True, "script_args": [1, "a"]}
        parameters = call("txt2img", sent).json()["parameters"]
        assert {name: parameters[name] for name in sent} == sent

    def test_while_the_model_is_still_being_loaded(self, api, service):
        service.loading = True
        assert api.get_sd_models()[0]["title"] == "tiny"
        assert api.txt2img().info["sd_model_hash"] == SHA[:10]

    def test_null_is_the_default(self, call, service):
        sent = dict.fromkeys(("prompt", "steps", "cfg_scale", "width", "seed", "styles", "eta"))
        assert call("txt2img", sent).status_code == 200
        assert service.requests[0].steps == 50

    def test_prompts_are_read_as_there(self, api, call, service):
        info = api.txt2img(
            prompt="(a:1.2) BREAK b",
            override_settings={
                "CLIP_stop_at_last_layers": 2,
                "emphasis": "No norm",
                "sd_vae": "Automatic",
            },
        ).info
        asked = service.requests[0]
        assert (asked.prompt_syntax, asked.clip_skip, asked.emphasis) == ("a1111", 2, "no-norm")
        assert info["clip_skip"] == 2
        assert not any("override_settings" in warning for warning in info["warnings"])
        assert "Clip skip: 2" in info["infotexts"][0]
        assert "Emphasis: No norm" in info["infotexts"][0]
        for syntax in ("plain", "comfy"):
            assert call("txt2img", {"prompt_syntax": syntax}).status_code == 200
            assert service.requests[-1].prompt_syntax == syntax
        body = {"override_settings": {"emphasis": "Much"}}
        assert "emphasis must be" in refused(call("txt2img", body))

    def test_styles_are_asked_for(self, api, service):
        assert api.txt2img(styles=["anime"]).info["styles"] == ["anime"]
        assert service.requests[0].styles == ("anime",)

    def test_numbers_may_be_written_in_other_ways(self, call, service):
        """They may have a point or be text, also in the options, where null is the default."""
        options = {"CLIP_stop_at_last_layers": 2.0, "sdxl_crop_left": "8", "sdxl_crop_top": None}
        body = {"steps": "20", "width": 64.0, "seed": "5", "cfg_scale": "7.5"}
        assert call("txt2img", {**body, "override_settings": options}).status_code == 200
        asked = service.requests[0]
        assert (asked.steps, asked.width, asked.seed, asked.guidance_scale) == (20, 64, 5, 7.5)
        assert (asked.clip_skip, asked.crop_left, asked.crop_top) == (2, 8, 0)

    def test_sides_are_rounded_down(self, call, service):
        answer = call("txt2img", {"width": 100, "height": 71})
        assert (service.requests[0].width, service.requests[0].height) == (96, 64)
        assert (json.loads(answer.json()["info"])["width"], *warnings_of(answer)) == (
            96,
            "width: 96, the multiple of 8 below 100",
            "height: 64, the multiple of 8 below 71",
        )

    @pytest.mark.parametrize("seed", [-1, None])
    def test_a_seed_is_drawn(self, call, seed):
        infos = [json.loads(call("txt2img", {"seed": seed}).json()["info"]) for _ in range(3)]
        assert len({info["seed"] for info in infos}) == 3
        assert all(info["all_seeds"] == [info["seed"]] for info in infos)

    @pytest.mark.parametrize(
        ("body", "sampler", "schedule"),
        [
            ({"sampler_name": "Euler a"}, "euler_a", None),
            ({"sampler_name": "euler A"}, "euler_a", None),
            ({"sampler_name": "euler_a"}, "euler_a", None),
            ({"sampler_name": "dpmpp_2s"}, "dpmpp_2s", None),
            ({"sampler_name": None, "sampler_index": "LMS"}, "lms", None),
            ({"sampler_name": "DDIM", "sampler_index": "LMS"}, "ddim", None),
            ({"sampler_name": "DPM++ 2M SDE Karras"}, "dpmpp_2m_sde", "karras"),
            ({"sampler_name": "dpm2 a exponential"}, "dpm2_a", "exponential"),
            ({"sampler_name": "Heun", "scheduler": "Beta"}, "heun", "beta"),
            ({"sampler_name": "Heun", "scheduler": "EXPONENTIAL"}, "heun", "exponential"),
            ({"sampler_name": "Heun", "scheduler": "automatic"}, "heun", None),
            ({"sampler_name": "Heun", "scheduler": "Uniform"}, "heun", None),
            ({"sampler_name": "Heun", "scheduler": ""}, "heun", None),
            ({"sampler_name": "DPM++ 2M"}, "dpmpp_2m", "karras"),
            ({"sampler_name": "dpm2 A", "scheduler": "Automatic"}, "dpm2_a", "karras"),
            ({"sampler_index": "DPM++ 2M SDE"}, "dpmpp_2m_sde", "exponential"),
            ({"sampler_name": "DPM++ 2M", "scheduler": "Uniform"}, "dpmpp_2m", None),
            ({"sampler_name": "DPM++ 2M", "scheduler": "Beta"}, "dpmpp_2m", "beta"),
            ({"sampler_name": "DPM++ 2M Exponential"}, "dpmpp_2m", "exponential"),
            ({"sampler_name": "dpmpp_2m"}, "dpmpp_2m", None),
            ({"sampler_name": "DPMSolverMultistepScheduler"}, "dpmpp_2m", None),
        ],
    )
    def test_names_of_samplers_and_schedulers(self, call, service, body, sampler, schedule):
        assert call("txt2img", body).status_code == 200
        assert (service.requests[0].sampler, service.requests[0].schedule) == (sampler, schedule)

    def test_a_schedule_that_the_sampler_lacks_is_left_out_with_a_warning(self, call, service):
        answer = call("txt2img", {"sampler_name": "Euler a", "scheduler": "Karras"})
        assert service.requests[0].schedule is None
        assert "Euler a has no karras" in warnings_of(answer)[0]
        answer = call("txt2img", {"sampler_name": "LCM", "scheduler": "SGM Uniform"})
        assert (service.requests[1].schedule, service.requests[1].spacing) == (None, None)
        assert "LCM has no SGM Uniform" in warnings_of(answer)[0]

    @pytest.mark.parametrize(
        ("label", "spacing"),
        [
            ("normal", None),
            ("Uniform", None),
            ("SGM Uniform", "trailing"),
            ("sgm_uniform", "trailing"),
            ("Simple", "trailing"),
            ("DDIM", "leading"),
        ],
    )
    def test_schedulers_that_are_the_model_s_own_schedule(self, call, service, label, spacing):
        answer = call("txt2img", {"sampler_name": "DPM++ 2M", "scheduler": label})
        assert (service.requests[0].schedule, service.requests[0].spacing) == (None, spacing)
        assert warnings_of(answer) == []
        told = json.loads(answer.json()["info"])["extra_generation_params"]
        assert told == ({} if spacing is None else {"Spacing": spacing})

    def test_a_spacing_by_our_name_precedes_the_scheduler_s(self, call, service):
        body = {"sampler_name": "Euler", "scheduler": "Simple", "spacing": "linspace"}
        assert call("txt2img", body).status_code == 200
        assert service.requests[0].spacing == "linspace"

    @pytest.mark.parametrize("label", [None, "", "  ", "Automatic"])
    def test_without_a_scheduler_it_is_automatic(self, call, service, label):
        answer = call("txt2img", {"sampler_name": "DPM++ 2M", "scheduler": label})
        assert service.requests[0].schedule == "karras"
        assert warnings_of(answer) == []

    @pytest.mark.parametrize("label", ["KL Optimal", "turbo", "é" * 999])
    def test_a_scheduler_that_is_not_here_is_automatic_with_a_warning(self, call, service, label):
        answer = call("txt2img", {"sampler_name": "DPM++ 2M", "scheduler": label})
        assert service.requests[0].schedule == "karras"
        assert "is not here, Automatic is used" in warnings_of(answer)[0]
        assert len(warnings_of(answer)[0]) < 150

    def test_eta_is_for_samplers_that_have_it(self, call, service):
        ours = call("txt2img", {"sampler_name": "DDIM", "eta": 0.5})
        other = call("txt2img", {"sampler_name": "Euler a", "eta": 0.5})
        assert [request.eta for request in service.requests] == [0.5, 0]
        assert warnings_of(ours) == []
        assert warnings_of(other)[0].startswith("eta: ")

    @pytest.mark.parametrize(
        ("body", "word"),
        [
            ({"enable_hr": True}, "drawn in one pass"),
            ({"subseed_strength": 0.1}, "subseed_strength"),
            ({"seed_resize_from_w": 512}, "seed_resize_from"),
            ({"restore_faces": True}, "restore_faces"),
            ({"tiling": True}, "tiling"),
            ({"s_churn": 1}, "s_churn"),
            ({"s_noise": 1.1}, "s_noise"),
            ({"s_min_uncond": 1.1}, "s_min_uncond"),
            ({"refiner_checkpoint": "big"}, "refiner_checkpoint"),
            ({"infotext": "Steps: 3"}, "infotext"),
            ({"override_settings": {"sd_vae": "other.pt"}}, "--vae"),
            ({"alwayson_scripts": {"ControlNet": {"args": [1]}}}, "ControlNet"),
        ],
    )
    def test_what_is_not_done_is_said(self, call, body, word):
        (warning,) = warnings_of(call("txt2img", body))
        assert word in warning

    def test_a_large_picture_for_an_extension_is_not_in_the_way(self, call):
        unit = {"image": encoded(Image.effect_noise((1200, 1200), 90))}
        answer = call("txt2img", {"alwayson_scripts": {"ControlNet": {"args": [unit]}}})
        assert ["ControlNet" in warning for warning in warnings_of(answer)] == [True]
        scripts = answer.json()["parameters"]["alwayson_scripts"]
        assert scripts == {"ControlNet": {"args": [{"image": None}]}}

    def test_settings_without_a_field_there_have_their_own_names(self, call, service):
        assert call("txt2img", {"spacing": "trailing"}).status_code == 200
        assert service.requests[0].spacing == "trailing"
        assert "spacing must be" in refused(call("txt2img", {"spacing": "even"}))

    def test_what_the_model_draws_best_with_holds_where_the_body_says_nothing(self, call, service):
        service.best = {"sampler": "dpmpp_2m", "steps": 20, "guidance_scale": 4.0}
        assert call("txt2img", {}).json()["parameters"]["steps"] == 20
        assert call("txt2img", {"steps": 9, "scheduler": "karras"}).status_code == 200
        found = [(r.sampler, r.schedule, r.steps, r.guidance_scale) for r in service.requests]
        assert found == [("dpmpp_2m", None, 20, 4.0), ("dpmpp_2m", "karras", 9, 4.0)]
        # With its own sampler the model has its own schedule; with another, the sampler's default.
        for name in ("DPM++ 2M", "DPM2"):
            assert call("txt2img", {"sampler_name": name}).status_code == 200
        assert [request.schedule for request in service.requests[2:]] == [None, "karras"]
        assert call("txt2img", {"fast": 2}).status_code == 200
        assert service.requests[-1].schedule is None

    def test_what_was_drawn_with_is_told(self, call, service, monkeypatch):
        """This includes what a level of fast, or a worker, fills in once the job is there."""
        filled = {"sampler": "dpmpp_2m", "schedule": "karras", "steps": 10, "guidance_scale": 4.0}
        finished = service._finished

        def finish(job, request, index, size):
            return finished(job, request.replace(**filled, clip_skip=2), index, size)

        monkeypatch.setattr(service, "_finished", finish)
        answer = call("txt2img", {"fast": 3}).json()
        info = json.loads(answer["info"])
        assert (info["sampler_name"], info["steps"], info["cfg_scale"]) == ("DPM++ 2M", 10, 4.0)
        assert info["extra_generation_params"] == {"Schedule type": "Karras"}
        assert info["clip_skip"] == 2
        assert "Steps: 10, Sampler: DPM++ 2M, Schedule type: Karras" in info["infotexts"][0]
        assert (answer["parameters"]["steps"], answer["parameters"]["cfg_scale"]) == (10, 4.0)

    @pytest.mark.parametrize(
        "body",
        [
            {"override_settings": {"sd_model_checkpoint": f"tiny [{SHA[:10]}]"}},
            {"alwayson_scripts": {"ControlNet": {"args": []}}},
            {"denoising_strength": 0.7, "save_images": True, "eta": 1, "script_name": ""},
        ],
    )
    def test_what_changes_nothing_is_not_said(self, call, body):
        assert warnings_of(call("txt2img", body)) == []

    def test_the_job_s_own_warnings_are_passed_on(self, call):
        answer = call("txt2img", {"negative_prompt": "dark", "cfg_scale": 1})
        assert "negative_prompt does nothing" in warnings_of(answer)[0]

    def test_send_images_false(self, api):
        result = api.txt2img(seed=3, batch_size=2, send_images=False)
        assert result.images == []
        assert result.info["all_seeds"] == [3, 4]


class TestRefusals:
    def test_the_client_hears_of_a_sampler_that_is_not_there(self, api):
        with pytest.raises(RuntimeError) as caught:
            api.txt2img(sampler_name="DPM fast")
        status, text = caught.value.args
        assert status == 404
        assert json.loads(text)["detail"].startswith("Sampler not found")

    @pytest.mark.parametrize(
        ("body", "status", "word"),
        [
            ({"sampler_name": "Euler a Turbo"}, 404, "Sampler not found: 'Euler a Turbo'"),
            ({"sampler_name": "\ud800" * 999}, 404, "Sampler not found"),
            ({"script_name": "X/Y/Z plot"}, 422, "Script 'X/Y/Z plot' not found"),
            ({"cfg_scale": True}, 422, "cfg_scale"),
            ({"cfg_scale": "much"}, 422, "cfg_scale"),
            ({"cfg_scale": "inf"}, 422, "cfg_scale"),
            ({"steps": "20.5"}, 422, "steps"),
            ({"cfg_scale": float("nan")}, 422, "cfg_scale"),
            ({"cfg_scale": float("inf")}, 422, "cfg_scale"),
            ({"subseed_strength": float("nan")}, 422, "subseed_strength"),
            ({"cfg_scale": 1e308}, 422, "cfg_scale"),
            ({"cfg_scale": 10**400}, 422, "cfg_scale"),
            ({"cfg_scale": -1}, 422, "cfg_scale"),
            ({"cfg_scale": 101}, 422, "cfg_scale"),
            ({"steps": False}, 422, "steps"),
            ({"steps": 0}, 422, "steps"),
            ({"steps": 1001}, 422, "steps"),
            ({"steps": 1.5}, 422, "steps"),
            ({"steps": 1e308}, 422, "steps"),
            ({"width": 63}, 422, "width"),
            ({"width": 0}, 422, "width"),
            ({"height": 2056}, 422, "height"),
            ({"height": 10**12}, 422, "height"),
            ({"seed": -2}, 422, "seed"),
            ({"seed": 2**63}, 422, "seed"),
            ({"batch_size": 65}, 422, "batch_size"),
            ({"batch_size": 0}, 422, "batch_size"),
            ({"batch_size": -2, "n_iter": -2}, 422, "batch_size"),
            ({"batch_size": 8, "n_iter": 9}, 422, "batch_size times n_iter"),
            ({"prompt": 3}, 422, "prompt"),
            ({"prompt": "x" * 16385}, 422, "prompt"),
            ({"prompt": "\ud800"}, 422, "prompt"),
            ({"styles": "anime"}, 422, "styles"),
            ({"override_settings": []}, 422, "override_settings"),
            ({"sampler_name": "DDIM", "eta": 2}, 422, "eta"),
            ({"refiner_switch_at": 3}, 422, "refiner_switch_at must be"),
            ({"refiner_start": 3}, 422, "refiner_start must be"),
            (
                {"override_settings": {"CLIP_stop_at_last_layers": 0}},
                422,
                "CLIP_stop_at_last_layers must be",
            ),
        ],
    )
    def test_one_line_that_names_the_field(self, call, service, body, status, word):
        # requests refuses NaN, so the body is written here.
        headers = {"Content-Type": "application/json"}
        answer = call("txt2img", data=json.dumps(body), headers=headers)
        assert word in refused(answer, status)
        assert service.requests == []

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"prompt=x",
            b"{",
            b"[]",
            b"null",
            b'"x"',
            b"\xff\xfe{}",
            b'{"prompt": "\xff"}',
            b"[" * 4_000,
            b'{"script_args": ' + b"[" * 500 + b"]" * 500 + b"}",
            b'{"script_args": ["\\ud800"]}',
            b'{"\\ud800": 1}',
            b'{"seed": 1' + b"0" * 5000 + b"}",
        ],
    )
    def test_bodies_that_are_no_such_object(self, call, data):
        refused(call("txt2img", data=data, headers={"Content-Type": "application/json"}))

    @pytest.mark.parametrize("kind", ["text/json", "application/x-www-form-urlencoded", None])
    @pytest.mark.parametrize("path", ["txt2img", "options", "png-info"])
    def test_a_body_of_another_type(self, call, service, path, kind):
        line = refused(call(path, data='{"prompt": "a"}', headers={"Content-Type": kind}))
        assert line == "the body must be JSON: send content-type application/json"
        assert service.requests == []
        assert call("interrupt", data="{}", headers={"Content-Type": kind}).status_code == 200

    @pytest.mark.parametrize(
        "kind", ["Application/JSON", "application/json ; charset=utf-8", "application/problem+json"]
    )
    def test_any_spelling_of_json(self, call, service, kind):
        answer = call("txt2img", data='{"prompt": "a"}', headers={"Content-Type": kind})
        assert (answer.status_code, service.requests[0].prompt) == (200, "a")
        answer = call("txt2img", data="{}", headers={"Content-Type": "application/jsonp"})
        assert refused(answer) == "the body must be JSON: send content-type application/json"

    def test_numbers_that_json_lacks_do_not_come_back(self, call):
        headers = {"Content-Type": "application/json"}
        answer = call("txt2img", data='{"script_args": [NaN]}', headers=headers)
        assert answer.json()["parameters"]["script_args"] == [None]

    def test_a_full_queue(self, call, service):
        service.busy = True
        answer = call("txt2img", {})
        assert "the queue of 4 pictures is full" in refused(answer, 429)
        assert answer.headers["Retry-After"] == "7"

    def test_a_server_that_is_stopping(self, call, service):
        service.stopping = True
        assert "the server is stopping" in refused(call("txt2img", {}), 503)

    def test_a_job_that_fails(self, api, call, service):
        service.error = "the picture has values that are no numbers"
        assert refused(call("txt2img", {}), 500) == "the picture has values that are no numbers"
        with pytest.raises(RuntimeError, match="no numbers"):
            api.txt2img()

    def test_a_picture_that_is_gone_before_it_is_sent(self, call, service, monkeypatch):
        monkeypatch.setattr(service, "picture_bytes", lambda picture_id: None)
        assert refused(call("txt2img", {}), 500) == "picture 1 is no longer there"

    def test_a_body_that_is_announced_too_large_is_not_read(self, line):
        line.putrequest("POST", "/sdapi/v1/img2img")
        line.putheader("Content-Type", "application/json")
        line.putheader("Content-Length", str(2**26 + 1))
        line.endheaders()
        answer = line.getresponse()
        assert answer.status == 413
        assert "64 MiB" in json.loads(answer.read())["detail"]

    def test_a_body_that_turns_out_too_large(self, line, monkeypatch):
        monkeypatch.setattr(bodies, "MAX_BODY", 2000)
        for letters, status in ((1000, 200), (2000, 413)):
            body = json.dumps({"styles": ["x" * letters]}).encode()
            halves = iter((body[:1000], body[1000:]))
            headers = {"Content-Type": "application/json"}
            line.request("POST", "/sdapi/v1/txt2img", halves, headers, encode_chunked=True)
            answer = line.getresponse()
            assert answer.status == status
            answer.read()


class TestImageToImage:
    def test_a_picture_is_drawn_over(self, api, service):
        start = Image.new("RGB", (96, 64), "red")
        result = api.img2img(
            images=[start], prompt="an apple", denoising_strength=0.6, width=96, height=64, seed=5
        )
        request = service.requests[0]
        assert request.image.tobytes() == start.tobytes()
        assert (request.strength, request.mask) == (0.6, None)
        assert result.image.size == (96, 64)
        assert result.info["denoising_strength"] == 0.6
        assert result.info["warnings"] == []
        assert result.parameters["init_images"] is None

    @pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
    def test_plain_base64_or_a_data_uri(self, call, service, form):
        text = encoded(Image.new("RGB", (64, 64), "blue"), form)
        for sent in (text, f"data:image/{form.lower()};base64,{text}", text[:9] + "\n" + text[9:]):
            assert call("img2img", {"init_images": [sent]}).status_code == 200
        assert [request.strength for request in service.requests] == [0.75] * 3

    @pytest.mark.parametrize(
        ("size", "body", "expected"),
        [
            ((96, 72), {}, (96, 72)),
            ((99, 70), {}, (96, 72)),
            ((16, 32), {}, (64, 128)),
            ((8, 4000), {}, (64, 2048)),
            ((96, 72), {"width": 64}, (64, None)),
            ((96, 72), {"height": 64, "resize_mode": 1}, (None, 64)),
            ((96, 72), {"width": 64, "height": 80}, (64, 80)),
        ],
    )
    def test_the_size_is_the_picture_s_unless_it_is_asked_for(
        self, call, service, size, body, expected
    ):
        service.info = service.info.model_copy(update={"width": 512, "height": 512})
        body = {"init_images": [encoded(Image.new("RGB", size))], **body}
        answer = call("img2img", body)
        request = service.requests[0]
        assert (request.width, request.height) == expected
        drawn = tuple(answer.json()["parameters"][side] for side in ("width", "height"))
        assert drawn == tuple(side or 64 for side in expected)

    def test_a_large_picture_is_drawn_at_the_model_s_size(self, api, service):
        start = Image.new("RGB", (4096, 1024), "red")
        result = api.img2img(images=[start], width=2048, height=512, seed=9)
        assert (service.requests[0].width, service.requests[0].height) == (256, 64)
        assert result.image.size == (2048, 512)

    def test_without_a_size_too(self, call, service):
        answer = call("img2img", {"init_images": [encoded(Image.new("RGB", (4096, 1024)))]})
        assert (service.requests[0].width, service.requests[0].height) == (256, 64)
        parameters = answer.json()["parameters"]
        assert (parameters["width"], parameters["height"]) == (2048, 512)

    def test_white_of_the_mask_is_repainted(self, api):
        start, mask = Image.new("RGB", (64, 64), "red"), two_halves()
        sides = {"width": 64, "height": 64}
        result = api.img2img(images=[start], mask_image=mask, seed=9, **sides)
        assert result.image.getpixel((0, 0)) == (255, 0, 0)
        assert result.image.getpixel((63, 0)) == colour(9)
        result = api.img2img(
            images=[start], mask_image=mask, seed=9, inpainting_mask_invert=1, **sides
        )
        assert result.image.getpixel((0, 0)) == colour(9)
        assert result.image.getpixel((63, 0)) == (255, 0, 0)

    def test_a_mask_with_transparency_says_it_by_its_strokes(self, api):
        start = Image.new("RGB", (64, 64), "red")
        mask = two_halves("RGBA", (0, 0, 0, 0), (0, 0, 0, 255))
        result = api.img2img(images=[start], mask_image=mask, seed=9, width=64, height=64)
        assert result.image.getpixel((0, 0)) == (255, 0, 0)
        assert result.image.getpixel((63, 0)) == colour(9)

    def test_an_alpha_channel_that_hides_nothing_says_nothing(self, api):
        start = Image.new("RGB", (64, 64), "red")
        mask = two_halves().convert("RGBA")
        result = api.img2img(images=[start], mask_image=mask, seed=9, width=64, height=64)
        assert result.image.getpixel((0, 0)) == (255, 0, 0)

    def test_a_mask_of_another_size_is_fitted(self, api, service):
        service.info = service.info.model_copy(update={"width": 128, "height": 128})
        start = Image.new("RGB", (128, 128), "red")
        result = api.img2img(images=[start], mask_image=two_halves(), width=128, height=128)
        assert result.image.getpixel((60, 120)) == (255, 0, 0)
        assert result.image.getpixel((68, 120)) == colour(result.info["seed"])
        assert any(text.startswith("mask: resized") for text in result.info["warnings"])

    @pytest.mark.parametrize(
        ("body", "settings"),
        [
            ({}, (0, 4.0, "fill")),
            ({"denoising_strength": 1}, (0, 4.0, "original")),  # it begins with noise alone
            ({"inpaint_full_res_padding": 32, "mask_blur": 0}, (32, 0.0, "fill")),
            ({"inpaint_full_res": 0, "inpainting_fill": 1}, (None, 4.0, "original")),
            ({"inpaint_full_res": False, "inpainting_fill": 2}, (None, 4.0, "noise")),
            ({"inpaint_full_res": False, "inpainting_fill": 3}, (None, 4.0, "nothing")),
        ],
    )
    def test_how_a_mask_is_used(self, call, service, body, settings):
        picture = {"init_images": [encoded(two_halves("RGB", "red", "blue"))]}
        assert warnings_of(call("img2img", {**picture, **body})) == []
        assert service.requests[-1].mask_padding is None
        assert service.requests[-1].mask_blur == 0
        masked = {**picture, "mask": encoded(two_halves()), **body}
        assert warnings_of(call("img2img", masked)) == []
        asked = service.requests[-1]
        assert (asked.mask_padding, asked.mask_blur, asked.mask_content) == settings

    @pytest.mark.parametrize("name", ["mask_blur", "inpaint_full_res_padding"])
    def test_how_far_a_mask_reaches_is_not_below_nothing(self, call, name):
        picture = {"init_images": [encoded(two_halves())], "mask": encoded(two_halves())}
        assert name in refused(call("img2img", {**picture, name: -1}), 422)

    def test_the_part_around_a_mask_is_drawn_from_the_whole_picture(self, call, service):
        """The model draws 64x64, and the part is enlarged to its place, not to 128x128."""
        start = two_halves("RGB", "red", "blue").resize((300, 200), 0)
        mask = two_halves().resize((300, 200), 0)
        body = {"init_images": [encoded(start)], "mask": encoded(mask), "resize_mode": 1}
        for side in ({"width": 128, "height": 128}, {}):
            assert call("img2img", {**body, **side}).status_code == 200
            asked = service.requests[-1]
            assert asked.image.size == asked.mask.size == (300, 200)
            assert (asked.width, asked.height) == ((64, 64) if side else (None, None))

    def test_the_told_size_of_a_part_is_the_one_that_is_drawn(self):
        body = ImageToImage(init_images=["x"], mask="x")
        mask, image = Image.new("L", (300, 200), 255), Image.new("RGB", (300, 200))
        request = Request(image=image, mask=mask, mask_padding=0, width=64, height=72)
        told = [image], [1], request.to_dict() | {"steps": 1}, "tiny", "a" * 64, "cpu", "float32"
        recipe = Result(*told).recipe()
        made = Picture(id="p", index=0, seed=1, width=300, height=200, recipe=recipe)
        job = Job(id="j", status="succeeded", created_at=datetime.now(UTC), settings={})
        info = ModelInfo(name="tiny", width=64, height=64)
        found = json.loads(_told(body, Asked(request, None, [], {}), job, [made], info)["info"])
        assert (found["width"], found["height"]) == (64, 72)
        assert "Size: 64x72" in found["infotexts"][0]

    def test_other_things_that_are_not_done(self, call):
        body = {"init_images": [encoded(Image.new("RGB", (64, 64)))]}
        (noise,) = warnings_of(call("img2img", {**body, "initial_noise_multiplier": 1.1}))
        assert noise.startswith("initial_noise_multiplier")
        (latent,) = warnings_of(call("img2img", {**body, "resize_mode": 3}))
        assert latent.startswith("resize_mode 3")

    def test_resizing(self, call, service):
        """The picture is red on the left and blue on the right, and twice as wide as requested."""
        start = two_halves("RGB", "red", "blue").resize((256, 128), 0)
        mask = two_halves().resize((256, 128), 0)
        body = {"init_images": [encoded(start)], "mask": encoded(mask), "width": 128, "height": 128}
        body["inpaint_full_res"] = False
        for mode in (0, 1, 2):
            assert call("img2img", {**body, "resize_mode": mode}).status_code == 200
        whole, cropped, padded = [(r.image, r.mask) for r in service.requests]
        assert whole[0].size == whole[1].size == (256, 128)
        assert cropped[0].size == cropped[1].size == (128, 128)
        assert cropped[0].getpixel((2, 2)) == (255, 0, 0)
        assert cropped[1].getbbox() == (64, 0, 128, 128)
        assert padded[0].size == (128, 128)
        assert padded[0].getpixel((2, 2)) == (0, 0, 0)
        assert padded[0].getpixel((2, 64)) == (255, 0, 0)
        assert padded[1].getbbox() == (64, 32, 128, 96)

    def test_the_pictures_come_back_if_they_are_asked_for(self, call):
        sent = {"init_images": [encoded(two_halves())], "mask": encoded(two_halves())}
        kept = call("img2img", {**sent, "include_init_images": True}).json()["parameters"]
        assert {name: kept[name] for name in sent} == sent
        left = call("img2img", sent).json()["parameters"]
        assert {name: left[name] for name in sent} == dict.fromkeys(sent)

    @pytest.mark.parametrize(
        ("body", "status", "word"),
        [
            ({}, 404, "Init image not found"),
            ({"init_images": []}, 404, "Init image not found"),
            ({"init_images": "x"}, 422, "init_images"),
            ({"init_images": [3]}, 422, "init_images"),
            ({"init_images": ["http://localhost/a.png"]}, 422, "addresses are never fetched"),
            ({"init_images": ["HTTPS://localhost/a.png"]}, 422, "addresses are never fetched"),
            ({"init_images": ["file:///etc/passwd"]}, 422, "addresses are never fetched"),
            (
                {"init_images": ["!!!!"]},
                422,
                f"init_images {NOT_BASE64}",
            ),
            (
                {"init_images": ["abcde"]},
                422,
                f"init_images {NOT_BASE64}",
            ),
            (
                {"init_images": ["\u00e9"]},
                422,
                f"init_images {NOT_BASE64}",
            ),
            ({"init_images": ["data:image/png;base64"]}, 422, "picture of init_images"),
            ({"init_images": [base64.b64encode(b"<svg/>").decode()]}, 422, "PNG, JPEG or WebP"),
            (
                {"mask": "http://localhost/m.png"},
                422,
                f"mask {NOT_BASE64}",
            ),
            ({"mask": base64.b64encode(b"x").decode()}, 422, "the mask must be a PNG"),
            ({"denoising_strength": 0}, 422, "must be a number above 0, up to 1, not 0"),
            ({"denoising_strength": 1.1}, 422, "denoising_strength must be"),
            ({"resize_mode": 4}, 422, "resize_mode"),
            ({"width": 10**9, "height": 10**9, "resize_mode": 1}, 422, "width must be"),
            ({"script_name": "SD upscale"}, 422, "Script 'SD upscale' not found"),
        ],
    )
    def test_refusals(self, call, service, body, status, word):
        if body and "init_images" not in body:
            body = {"init_images": [encoded(Image.new("RGB", (64, 64)))], **body}
        assert word in refused(call("img2img", body), status)
        assert service.requests == []

    def test_two_pictures_are_one_too_many(self, api):
        with pytest.raises(RuntimeError, match="must hold one picture, not 2"):
            api.img2img(images=[Image.new("RGB", (64, 64))] * 2)

    @pytest.mark.parametrize("cut", [60, -200])
    def test_a_picture_that_is_cut_off(self, call, cut):
        noise = Image.effect_noise((64, 64), 90)
        data = base64.b64decode(encoded(noise))[:cut]
        body = {"init_images": [base64.b64encode(data).decode()]}
        assert "damaged" in refused(call("img2img", body))

    def test_a_strip_cannot_be_padded_to_a_square(self, call):
        body = {"init_images": [encoded(Image.new("L", (8, 8000)))], "width": 512, "height": 512}
        assert "too narrow" in refused(call("img2img", {**body, "resize_mode": 2}))


class TestProgress:
    def test_idle(self, api):
        api.util_wait_for_ready(check_interval=0)
        answer = api.get_progress()
        assert (answer["progress"], answer["eta_relative"]) == (0, 0)
        assert answer["current_image"] is None
        assert answer["state"]["job"] == ""
        assert answer["state"]["job_count"] == answer["state"]["sampling_steps"] == 0

    def test_while_a_job_runs(self, client, service, later):
        service.pause = 6
        waiting = later(client().txt2img, seed=1, batch_size=3)
        api = client()
        answer = until(
            lambda: (a := api.get_progress())["progress"] == 0.5 and a["current_image"] and a
        )
        assert 0 < answer["eta_relative"] < PATIENCE
        state = answer["state"]
        assert (state["job_no"], state["job_count"]) == (1, 3)
        assert (state["sampling_step"], state["sampling_steps"]) == (2, 4)
        assert state["job"]
        assert not state["interrupted"]
        assert not state["skipped"]
        preview = Image.open(io.BytesIO(base64.b64decode(answer["current_image"])))
        assert preview.getpixel((9, 9)) == colour(0)
        service.resume()
        assert len(waiting.result(PATIENCE).images) == 3
        assert api.get_progress()["progress"] == 0

    def test_previews_are_made_for_those_who_look(self, client, call, service, later):
        service.pause = 2
        waiting = later(client().txt2img)
        running = until(
            lambda: (a := call("progress?skip_current_image=true").json())["progress"] == 0.5 and a
        )
        assert running["current_image"] is None
        assert service.watched == []
        until(lambda: call("progress").json()["current_image"])
        assert service.watched == ["job0"]
        assert call("progress?skip_current_image=true").json()["current_image"] is None
        service.resume()
        waiting.result(PATIENCE)

    def test_it_is_about_the_caller_s_own_jobs(self, client, service, later):
        service.pause = 2
        waiting = later(client("ann").txt2img)
        until(lambda: client("ann").get_progress()["progress"] == 0.5)
        for other in (client(), client("bob")):
            assert other.get_progress()["progress"] == 0
            assert other.get_progress()["state"]["job_count"] == 0
        service.resume()
        waiting.result(PATIENCE)

    def test_it_is_about_the_oldest_of_them(self, client, service, later):
        service.pause = 2
        waiting = later(client().txt2img, batch_size=2)
        until(lambda: len(service.requests) == 1)
        second = later(client().txt2img)
        until(lambda: len(service.requests) == 2)
        api = client()
        until(lambda: api.get_progress()["progress"] == 0.25)
        assert api.get_progress()["state"]["job_count"] == 2
        service.resume()
        for call in (waiting, second):
            call.result(PATIENCE)

    def test_a_wrong_question(self, call):
        assert "skip_current_image" in refused(call("progress?skip_current_image=maybe"))


class TestInterrupt:
    def test_the_call_answers_with_what_is_finished(self, client, service, later):
        service.pause = 6
        waiting = later(client().txt2img, seed=1, batch_size=3)
        api = client()
        until(lambda: api.get_progress()["progress"] == 0.5)
        assert not api.get_progress()["state"]["interrupted"]
        assert api.interrupt() == {}
        result = waiting.result(PATIENCE)
        assert [image.getpixel((0, 0)) for image in result.images] == [colour(1)]
        assert result.info["all_seeds"] == [1]
        assert len(result.info["infotexts"]) == 1
        until(lambda: api.get_progress()["state"]["job_count"] == 0)

    @pytest.mark.parametrize(("how", "said"), [("interrupt", "interrupted"), ("skip", "skipped")])
    def test_progress_says_so(self, client, service, later, monkeypatch, how, said):
        """It does so from the request until the job has ended."""

        async def slow(job_id):
            wishes.append(job_id)

        wishes = []
        service.pause = 2
        monkeypatch.setattr(service, "cancel", slow)
        waiting = later(client().txt2img)
        api = client()
        until(lambda: api.get_progress()["progress"] == 0.5)
        getattr(api, how)()
        assert len(wishes) == 1
        state = api.get_progress()["state"]
        assert [name for name in ("interrupted", "skipped") if state[name]] == [said]
        service.resume()
        waiting.result(PATIENCE)

    def test_skip_leaves_a_batch_alone(self, client, service, later):
        service.pause = 2
        waiting = later(client().txt2img, batch_size=2)
        api = client()
        until(lambda: api.get_progress()["progress"] == 0.25)
        assert api.skip() == {}
        assert not api.get_progress()["state"]["skipped"]
        service.resume()
        assert len(waiting.result(PATIENCE).images) == 2

    def test_nothing_finished_is_an_answer_too(self, client, service, later):
        service.pause = 0
        waiting = later(client().txt2img, seed=4, width=96, height=64)
        until(lambda: service.requests)
        until(lambda: client().interrupt() == {} and service.cancelled)
        result = waiting.result(PATIENCE)
        assert result.images == []
        assert (result.info["seed"], result.info["all_seeds"]) == (4, [])
        assert (result.info["width"], result.info["height"]) == (96, 64)

    def test_other_callers_jobs_go_on(self, client, service, later):
        service.pause = 2
        ann, bob = (later(client(name).txt2img) for name in ("ann", "bob"))
        for name in ("ann", "bob"):
            until(lambda name=name: client(name).get_progress()["progress"] == 0.5)
        client().interrupt()
        client("ann").interrupt()
        assert ann.result(PATIENCE).images == []
        assert len(service.cancelled) == 1
        assert not bob.done()
        service.resume()
        assert len(bob.result(PATIENCE).images) == 1

    def test_with_nothing_to_interrupt(self, api):
        assert api.interrupt() == {}

    def test_a_client_that_leaves_takes_its_job_along(self, line, client, service):
        service.pause = 2
        line.request("POST", "/sdapi/v1/txt2img", "{}", {"Content-Type": "application/json"})
        until(lambda: client().get_progress()["progress"] == 0.5)
        assert service.cancelled == []
        line.close()
        until(lambda: service.cancelled)
        until(lambda: client().get_progress()["state"]["job_count"] == 0)


class TestLists:
    def test_every_sampler_that_is_listed_can_be_asked_for(self, api, service):
        samplers = api.get_samplers()
        assert {"Euler a", "DPM++ 2M", "PLMS", "DDIM"} <= {entry["name"] for entry in samplers}
        assert all(set(entry) == {"name", "aliases", "options"} for entry in samplers)
        own = {entry["name"]: entry["options"] for entry in samplers if entry["options"]}
        assert own == {
            **{name: {"scheduler": "karras"} for name in ("DPM2", "DPM2 a", "DPM++ 2M")},
            "DPM++ 2M SDE": {"scheduler": "exponential"},
        }
        aliases = itertools.chain.from_iterable(entry["aliases"] for entry in samplers)
        names = [*api.util_get_sampler_names(), *aliases]
        for name in names:
            api.txt2img(sampler_name=name, width=64, height=64)
        assert len(service.requests) == len(names) > len(samplers)

    def test_every_scheduler_that_is_listed_can_be_asked_for(self, api, service):
        names = ["automatic", "beta", "ddim", "exponential", "karras", "normal"]
        assert api.util_get_scheduler_names() == [*names, "sgm_uniform", "simple", "uniform"]
        for entry in api.get_schedulers():
            assert set(entry) == {
                "name",
                "label",
                "aliases",
                "default_rho",
                "need_inner_model",
            }
            api.txt2img(sampler_name="Heun", scheduler=entry["label"], width=64, height=64)
        assert {request.schedule for request in service.requests} == {
            None,
            "karras",
            "exponential",
            "beta",
        }
        assert {request.spacing for request in service.requests} == {None, "leading", "trailing"}

    def test_the_model(self, api):
        title = f"tiny [{SHA[:10]}]"
        assert api.get_sd_models() == [
            {
                "title": title,
                "model_name": "tiny",
                "hash": SHA[:10],
                "sha256": SHA,
                "filename": "tiny",
                "config": None,
            }
        ]
        assert api.util_get_model_names() == [title]
        assert api.util_get_current_model() == title
        assert api.get_options()["sd_checkpoint_hash"] == SHA

    def test_figures_name_the_whole_route(self, api, server):
        api.get_samplers()

        def routes() -> set[str]:
            figures = server.app.state.metrics._requests.collect()[0].samples
            return {sample.labels["route"] for sample in figures}

        until(lambda: "/sdapi/v1/samplers" in routes())  # counted after the answer is sent
        assert "/samplers" not in routes()

    @pytest.mark.parametrize(
        "name", ["tiny", "Tiny", f"tiny [{SHA[:10]}]", "tiny.safetensors", SHA, SHA[:10]]
    )
    def test_setting_the_model_that_is_served(self, api, name):
        assert api.set_options({"sd_model_checkpoint": name}) is None
        assert api.set_options({"sd_model_checkpoint": None, "samples_format": "jpg"}) is None

    def test_a_choice_that_is_gone_is_none(self, api, call, service):
        api.set_options({"sd_model_checkpoint": "tiny"})
        service.choices = dict.fromkeys(service.choices, "foo")
        assert warnings_of(call("txt2img", {})) == [
            "sd_model_checkpoint: the chosen model 'foo' is not here any more; the server's is used"
        ]
        assert api.get_options()["sd_model_checkpoint"] == f"tiny [{SHA[:10]}]"
        assert call("embeddings").status_code == 200
        named = {"override_settings": {"sd_model_checkpoint": "tiny"}}
        assert warnings_of(call("txt2img", named)) == []

    def test_the_client_s_way_to_set_it(self, api, monkeypatch):
        answers = []
        keep = api.session.post
        monkeypatch.setattr(
            api.session, "post", lambda **more: answers.append(keep(**more)) or answers[-1]
        )
        api.util_set_model("tinny")
        assert [answer.status_code for answer in answers] == [200]

    @pytest.mark.parametrize("name", ["sd_xl_base", "", 3, ["tiny"]])
    def test_another_model_is_refused(self, call, name):
        line = refused(call("options", {"sd_model_checkpoint": name}), 404)
        assert line.startswith("Model not found: no model ")
        assert line.endswith(("there are tiny", "did you mean 'tiny'?"))
        body = {"override_settings": {"sd_model_checkpoint": name}}
        if name:  # AUTOMATIC1111's clients send an empty name for none
            assert refused(call("txt2img", body), 404) == line

    def test_without_a_models_folder_pictures_are_enlarged_with_lanczos_alone(self, api):
        assert [one["name"] for one in api.get_upscalers()] == ["None", "Lanczos"]

    def test_what_is_not_here_is_an_empty_list(self, api):
        for get in (
            api.get_sd_vae,
            api.get_latent_upscale_modes,
            api.get_loras,
            api.get_hypernetworks,
            api.get_face_restorers,
            api.get_realesrgan_models,
            api.get_prompt_styles,
        ):
            assert get() == []
        assert api.get_scripts() == {"txt2img": [], "img2img": []}
        assert api.get_embeddings() == {"loaded": {}, "skipped": {}}
        assert set(api.get_memory()) == {"ram", "cuda"}
        assert api.get_cmd_flags() == {"api": True}
        assert api.refresh_checkpoints() is None

    def test_what_is_in_the_models_folder(self, api, call, service, tmp_path):
        def save(name, tensors, **metadata):
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            save_file({key: numpy.zeros(shape) for key, shape in tensors.items()}, path, metadata)

        save("loras/ink.safetensors", {"lora_unet_x.alpha": ()}, ss_output_name="The ink")
        config = MODELS / "embedded" / "text_encoder" / "config.json"
        width = json.loads(config.read_text())["hidden_size"]
        save("embeddings/moss.safetensors", {"emb_params": (3, width)})
        save("embeddings/other.safetensors", {"emb_params": (3, width + 1)})
        save("VAE/clear.safetensors", {"decoder.conv_in.weight": (1,)})
        styles = tmp_path / "styles.csv"
        styles.write_text("name,prompt,negative_prompt\nold,an old {prompt},new\n")
        service.names = Names(
            WorkerSettings("embedded", "", "", models_dir=str(tmp_path), styles_file=str(styles))
        )
        [lora] = call("loras").json()
        assert (lora["name"], lora["alias"], lora["path"]) == ("ink", "The ink", "ink.safetensors")
        assert lora["metadata"] == {"ss_output_name": "The ink"}
        found = api.get_embeddings()
        assert found["loaded"]["moss"]["vectors"] == 3
        assert list(found["skipped"]) == ["other"]
        vae = {"model_name": "clear.safetensors", "filename": "clear.safetensors"}
        assert api.get_sd_vae() == [vae]
        old = {"name": "old", "prompt": "an old {prompt}", "negative_prompt": "new"}
        assert api.get_prompt_styles() == [old]
        assert str(tmp_path) not in json.dumps([lora, found, vae])

    def test_the_rest(self, call):
        for path in ("script-info", "extensions"):
            assert call(path).json() == []
        for path in ("refresh-vae", "refresh-loras", "refresh-embeddings"):
            assert call(path, {}).json() is None


class TestPngInfo:
    def test_of_our_own_picture(self, api):
        drawn = api.txt2img(
            prompt="a red apple, ripe", negative_prompt="blurry", seed=5, width=96, height=64
        )
        result = api.png_info(drawn.image)
        assert result.info == drawn.info["infotexts"][0]
        parameters = result.parameters
        assert parameters["Prompt"] == "a red apple, ripe"
        assert parameters["Negative prompt"] == "blurry"
        assert (parameters["Steps"], parameters["Seed"]) == ("20", "5")
        assert (parameters["Size-1"], parameters["Size-2"]) == ("96", "64")
        assert parameters["Sampler"] == "Euler a"
        assert json.loads(result.json["items"]["safelight"])["settings"]["seed"] == 5
        other = ParserManager().parse(io.BytesIO(base64.b64decode(drawn.json["images"][0])))
        assert other.full_prompt == "a red apple, ripe"

    @pytest.mark.parametrize("form", ["JPEG", "WEBP"])
    def test_of_our_own_in_another_format(self, call, form):
        text = "a café ☕\nSteps: 3, Sampler: Euler, Seed: 5"
        data = encode(Image.new("RGB", (64, 64)), form, {"parameters": text})
        answer = call("png-info", {"image": base64.b64encode(data).decode()}).json()
        assert (answer["info"], answer["items"]) == (text, {})
        assert (answer["parameters"]["Prompt"], answer["parameters"]["Seed"]) == ("a café ☕", "5")

    @pytest.mark.parametrize(
        ("comment", "text"),
        [
            (b"UNICODE\0" + "a cat, é".encode("utf-16-le"), "a cat, é"),
            (b"ASCII\0\0\0a cat\0", "a cat"),
            (bytes(8) + "é".encode(), "é"),
            (b"a cat and a dog", "a cat and a dog"),
            (b"UNICODE\0\xd8", "\ufffd"),
            ("in letters", ""),
            (7, ""),
        ],
    )
    def test_comments_of_other_programs(self, comment, text):
        exif, buffer = Image.Exif(), io.BytesIO()
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
        Image.new("RGB", (64, 64)).save(buffer, "JPEG", exif=exif)
        found = caged.texts(Sent(buffer.getvalue()), "the picture")
        assert found == ({"parameters": text} if text else {})

    def test_of_another_program_s(self, call):
        text = 'a cat\nSteps: 3, Sampler: DPM fast, Lora: "a: b, c"'
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text("parameters", text)
        chunks.add_text("Software", "another")
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64)).save(buffer, "PNG", pnginfo=chunks)
        answer = call("png-info", {"image": base64.b64encode(buffer.getvalue()).decode()}).json()
        assert answer == {
            "info": text,
            "items": {"Software": "another"},
            "parameters": {
                "Prompt": "a cat",
                "Negative prompt": "",
                "Steps": "3",
                "Sampler": "DPM fast",
                "Lora": "a: b, c",
            },
        }

    @pytest.mark.parametrize("form", ["PNG", "JPEG"])
    def test_of_one_that_says_nothing(self, call, form):
        answer = call("png-info", {"image": encoded(Image.new("RGB", (64, 64)), form)})
        assert answer.json() == {"info": "", "items": {}, "parameters": {}}

    def test_of_one_that_is_cut_off(self, call):
        data = base64.b64decode(encoded(Image.effect_noise((64, 64), 90)))[:-200]
        body = {"image": base64.b64encode(data).decode()}
        assert "damaged or cut off" in refused(call("png-info", body))

    @pytest.mark.parametrize(
        ("body", "word"),
        [
            ({}, "image"),
            ({"image": None}, "image"),
            ({"image": 3}, "image"),
            ({"image": ""}, "the picture must be a PNG"),
            ({"image": "https://localhost/a.png"}, "addresses are never fetched"),
            ({"image": "!!!!"}, "not base64"),
            ({"image": base64.b64encode(b"GIF89a").decode()}, "PNG, JPEG or WebP"),
        ],
    )
    def test_refusals(self, call, body, word):
        assert word in refused(call("png-info", body))
