import asyncio
import base64
import http.client
import io
import json
import logging
import socket
import subprocess
import sys
import time

import openai
import pytest
from fake import FakeService, running, until
from PIL import ExifTags, Image
from sd_parsers import ParserManager

from safelight.errors import SafelightError
from safelight.recipe import read_recipe
from safelight.request import Request
from safelight.server import streams
from safelight.server.apis.openai_shapes import refused
from safelight.server.jobs import ModelInfo, Status

pytestmark = pytest.mark.xdist_group("openai")  # one server for them all
STEPS = 8
SMALL = ModelInfo(name="tiny", width=64, height=64, ready=True)


@pytest.fixture(scope="module")
def server():
    """The real application on the loopback."""
    with running() as served:
        yield served


@pytest.fixture
def service(server, tmp_path, caplog):
    server.service = FakeService(tmp_path, ModelInfo(name="acme/photo", ready=True), STEPS)
    yield server.service
    server.service.resume()
    # Answers are checked by the tests; here, that no error of ours passed the routes.
    assert [r for r in caplog.get_records("call") if r.levelno >= logging.ERROR] == []


@pytest.fixture(scope="module")
def base(server):
    return f"http://127.0.0.1:{server.port}"


@pytest.fixture(scope="module")
def connected(base):
    """Return a shared client: making one takes longer than most tests."""
    with openai.OpenAI(base_url=f"{base}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
def client(service, connected):
    return connected


@pytest.fixture
def post(server, service):
    """Send bytes that no client would send; return the status and the parsed body."""

    def send(path, body, kind="application/json"):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        try:
            connection.request("POST", path, body, {"Content-Type": kind})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    return send


def form(**fields):
    parts = "".join(
        f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields.items()
    )
    return f"{parts}--x--\r\n".encode(), "multipart/form-data; boundary=x"


def pixels(b64):
    image = Image.open(io.BytesIO(base64.b64decode(b64)))
    image.load()
    return image


def file(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return f"picture.{format.lower()}", buffer.getvalue()


def plain(size=(64, 64), mode="RGB"):
    return Image.new(mode, size, "orange")


def with_hole(box, size=(64, 64), alpha=0):
    """Return a picture that is opaque but for a box of this alpha."""
    image = plain(size, "RGBA")
    image.paste((9, 9, 9, alpha), box)
    return image


PLAIN, HOLE = file(plain()), file(with_hole((0, 0, 16, 64)))


class TestGenerate:
    def test_pictures(self, client, service):
        service.info = ModelInfo(name="acme/photo", width=512, height=512, ready=True)
        before = int(time.time())
        answer = client.images.generate(prompt="a red apple", n=2, size="128x72")
        asked = service.requests[0]
        assert (asked.prompt, asked.count, asked.width, asked.height) == ("a red apple", 2, 128, 72)
        assert service.clients == ["openai"]
        assert before <= answer.created <= time.time() + 1
        assert (answer.size, answer.output_format) == ("128x72", "png")
        assert (answer.quality, answer.background) == ("high", "opaque")
        assert answer.usage.total_tokens == answer.usage.input_tokens_details.text_tokens == 0
        assert len(answer.data) == 2
        for i, image in enumerate(answer.data):
            assert image.url is None
            stored = service.files[f"job0-picture{i}"].read_bytes()
            assert base64.b64decode(image.b64_json) == stored
            assert read_recipe(stored)["settings"]["seed"] == asked.seed + i
        assert not service.was_cancelled.is_set()

    def test_urls(self, client, base):
        answer = client.images.generate(prompt="a", n=2, response_format="url")
        urls = [f"{base}/api/pictures/job0-picture{i}" for i in range(2)]
        assert [image.url for image in answer.data] == urls
        assert [image.b64_json for image in answer.data] == [None, None]

    def test_programs_made_for_dall_e_get_an_address_too(self, client, service, base):
        url = f"{base}/api/pictures/job0-picture0"
        made = client.images.generate(prompt="a", model="dall-e-3").data[0]
        assert made.url == url
        assert base64.b64decode(made.b64_json) == service.files["job0-picture0"].read_bytes()
        edited = client.images.edit(image=PLAIN, prompt="a", model="dall-e-2").data[0]
        assert (edited.url, bool(edited.b64_json)) == (url.replace("job0", "job1"), True)

    @pytest.mark.parametrize(
        ("asked", "has_url", "has_picture"),
        [
            ({"model": "dall-e-3", "response_format": "b64_json"}, False, True),
            ({"model": "dall-e-3", "response_format": "url"}, True, False),
            ({"model": "dall-e-3", "output_format": "jpeg"}, False, True),
            ({"model": "gpt-image-1"}, False, True),
        ],
    )
    def test_nobody_else_gets_both(self, client, asked, has_url, has_picture):
        made = client.images.generate(prompt="a", **asked).data[0]
        assert (made.url is not None, made.b64_json is not None) == (has_url, has_picture)

    @pytest.mark.parametrize("size", [{}, {"size": "auto"}, {"size": None}])
    def test_a_size_left_out_is_the_models_own(self, client, service, size):
        assert client.images.generate(prompt="a", **size).size == "64x64"
        assert (service.requests[0].width, service.requests[0].height) == (None, None)

    @pytest.mark.parametrize("form", ["png", "jpeg"])
    def test_a_size_that_the_model_cannot_draw_is_enlarged(self, client, service, form):
        service.info = SMALL
        answer = client.images.generate(prompt="a", size="1024x1024", output_format=form)
        assert (service.requests[0].width, service.requests[0].height) == (64, 64)
        assert pixels(answer.data[0].b64_json).size == (1024, 1024)
        assert answer.size == "1024x1024"
        note = "tiny draws 64x64: drawn at 64x64 and enlarged to 1024x1024"
        assert answer.warnings == [note]

    def test_four_times_the_pixels_of_a_small_model_is_enlarged(self, client, service):
        service.info = ModelInfo(name="embedded", width=256, height=256, ready=True)
        answer = client.images.generate(prompt="a", size="512x512")
        assert (service.requests[0].width, service.requests[0].height) == (256, 256)
        assert pixels(answer.data[0].b64_json).size == (512, 512)

    def test_the_address_of_one_says_its_size(self, client, service, base):
        service.info = SMALL
        answer = client.images.generate(prompt="a", size="1024x512", response_format="url")
        assert answer.data[0].url == f"{base}/api/pictures/job0-picture0?width=1024&height=512"

    def test_a_picture_to_edit_too(self, client, service):
        service.info = SMALL
        answer = client.images.edit(image=file(plain((512, 512))), prompt="a")
        assert (service.requests[0].width, service.requests[0].height) == (64, 64)
        assert pixels(answer.data[0].b64_json).size == (512, 512)

    def test_what_has_no_effect(self, client, service):
        idle = {"quality": "hd", "background": "transparent", "style": "vivid", "user": "me"}
        client.images.generate(prompt="a", **idle, moderation="low", safety_identifier="x")
        assert service.requests[0].replace(seed=0) == Request(prompt="a", seed=0)

    def test_names_of_other_programs_for_a_sampler(self, client, service):
        client.images.generate(prompt="a", extra_body={"sampler": "DPM++ 2M Karras"})
        assert (service.requests[0].sampler, service.requests[0].schedule) == ("dpmpp_2m", "karras")

    def test_settings_of_our_own(self, client, service):
        ours = {
            "negative_prompt": "blur",
            "seed": 5,
            "steps": 9,
            "guidance_scale": 3,
            "sampler": "euler_a",
            "schedule": "karras",
            "spacing": "trailing",
            "eta": 0.5,
            "strength": 0.25,
        }
        client.images.generate(prompt="a", extra_body=ours)
        assert service.requests == [Request(prompt="a", **ours)]

    @pytest.mark.parametrize("format", ["jpeg", "webp"])
    def test_other_formats_carry_the_recipe(self, client, format):
        answer = client.images.generate(prompt="a café ☕", output_format=format)
        assert answer.output_format == format
        image = pixels(answer.data[0].b64_json)
        assert (image.format, image.size) == (format.upper(), (64, 64))
        assert image.getexif().endian == ">"
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
        assert comment.startswith(b"UNICODE\0")
        assert comment[8:].decode("utf-16-be").startswith("a café ☕\nSteps: 8, Sampler: PLMS")

    def test_another_program_reads_the_recipe(self, client):
        answer = client.images.generate(prompt="a café ☕", output_format="jpeg")
        jpeg = base64.b64decode(answer.data[0].b64_json)
        found = ParserManager().parse(io.BytesIO(jpeg))
        assert [prompt.value for prompt in found.prompts] == ["a café ☕"]

    def test_a_recipe_that_jpeg_cannot_hold_is_left_out(self, client):
        long = {"negative_prompt": "b" * 16384}
        answer = client.images.generate(prompt="a" * 16384, output_format="jpeg", extra_body=long)
        assert pixels(answer.data[0].b64_json).format == "JPEG"

    @pytest.mark.parametrize("format", ["jpeg", "webp"])
    def test_compression(self, client, service, format):
        service.paint = Image.effect_noise((64, 64), 90).convert("RGB")
        seed = {"seed": 1}  # it is in the recipe, and its length varies
        answers = (
            client.images.generate(
                prompt="a", output_format=format, output_compression=level, extra_body=seed
            )
            for level in (10, 100, None)
        )
        short, long, default = (len(answer.data[0].b64_json) for answer in answers)
        assert short < long == default

    def test_warnings_of_the_job_are_told(self, client, service):
        service.warnings = ["prompt was cut"]
        assert client.images.generate(prompt="a").warnings == ["prompt was cut"]


class TestEdit:
    def test_mask(self, client, service):
        mask = with_hole((0, 0, 16, 64))
        mask.putpixel((40, 40), (0, 0, 0, 1))
        answer = client.images.edit(image=PLAIN, mask=file(mask), prompt="a hat", n=2, size="auto")
        asked = service.requests[0]
        assert (asked.prompt, asked.count, asked.strength) == ("a hat", 2, None)
        assert asked.mask.getbbox() == (0, 0, 16, 64)
        assert asked.mask.crop((0, 0, 16, 64)).getextrema() == (255, 255)
        assert asked.image.getpixel((3, 3)) == (255, 165, 0)
        assert len(answer.data) == 2
        assert answer.size == "64x64"

    @pytest.mark.parametrize("mode", ["LA", "P"])
    def test_masks_of_other_modes(self, client, service, mode):
        mask = with_hole((8, 8, 24, 32))
        if mode == "P":
            mask = mask.quantize(8)
            assert mask.mode == "P"
        client.images.edit(image=PLAIN, mask=file(mask.convert(mode)), prompt="a")
        assert service.requests[0].mask.getbbox() == (8, 8, 24, 32)

    def test_own_transparency_is_the_mask(self, client, service):
        client.images.edit(image=file(with_hole((8, 0, 24, 32))), prompt="a")
        assert service.requests[0].mask.getbbox() == (8, 0, 24, 32)

    def test_the_mask_goes_before_own_transparency(self, client, service):
        client.images.edit(
            image=file(with_hole((8, 0, 24, 32))),
            mask=file(with_hole((40, 40, 64, 64))),
            prompt="a",
        )
        assert service.requests[0].mask.getbbox() == (40, 40, 64, 64)

    def test_own_transparency_of_a_picture_on_its_side(self, client, service):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6  # to be turned a quarter clockwise
        image = with_hole((0, 0, 16, 16), size=(64, 96))
        client.images.edit(image=file(image, exif=exif), prompt="a")
        assert service.requests[0].image.size == (96, 64)
        assert service.requests[0].mask.getbbox() == (80, 0, 96, 16)

    @pytest.mark.parametrize(
        "image", [plain(), plain(mode="RGBA"), with_hole((0, 0, 9, 9), alpha=1)]
    )
    def test_without_transparency_all_is_repainted(self, client, service, image):
        client.images.edit(image=file(image), prompt="a")
        assert service.requests[0].mask is None

    @pytest.mark.parametrize(
        ("size", "near"),
        [
            ((72, 64), (72, 64)),
            ((70, 67), (72, 64)),
            ((2100, 70), (2048, 72)),
            ((3000, 2000), (2048, 1368)),
            ((60, 30), (128, 64)),
            ((8, 8), (64, 64)),
            ((2000, 10), (2048, 64)),
        ],
    )
    def test_any_size_is_brought_to_one_that_is_allowed(self, client, service, size, near):
        service.info = ModelInfo(name="tiny", width=2048, height=2048, ready=True)
        client.images.edit(image=file(plain(size)), prompt="a")
        assert (service.requests[0].width, service.requests[0].height) == near

    def test_a_size_that_is_asked_for(self, client, service):
        service.info = ModelInfo(name="tiny", width=256, height=256, ready=True)
        client.images.edit(image=file(plain((70, 70))), prompt="a", size="256x128")
        assert (service.requests[0].width, service.requests[0].height) == (256, 128)

    def test_settings_of_our_own(self, client, service):
        ours = {"seed": 7, "strength": 0.25, "guidance_scale": 3.5, "sampler": "ddim"}
        client.images.edit(image=[PLAIN], prompt="a", extra_body=ours)
        asked = service.requests[0]
        assert {name: getattr(asked, name) for name in ours} == ours

    def test_a_list_of_texts_is_a_field_that_is_repeated(self, client, service):
        given = {"loras": ["ink:0.5", "film,old"]}
        client.images.edit(image=PLAIN, prompt="a", extra_body=given)
        client.images.generate(prompt="a", extra_body=given)
        assert [asked.loras for asked in service.requests] == [("ink:0.5", "film,old")] * 2

    @pytest.mark.parametrize("format", ["JPEG", "WEBP"])
    def test_kinds_of_pictures(self, client, service, format):
        client.images.edit(image=file(plain(), format), prompt="a")
        assert service.requests[0].image.size == (64, 64)

    @pytest.mark.parametrize(
        ("pictures", "param", "message"),
        [
            ({"image": [PLAIN, PLAIN]}, "image", "one picture"),
            ({"image": PLAIN, "mask": PLAIN}, "mask", "alpha"),
            ({"image": PLAIN, "mask": file(with_hole((0, 0, 8, 8), (72, 64)))}, "mask", "size"),
            ({"image": PLAIN, "mask": ("m.png", HOLE[1][:60])}, "mask", "damaged"),
            ({"image": ("a.png", b"GIF89a")}, "image", "PNG, JPEG or WebP"),
            ({"image": PLAIN, "markup": PLAIN}, None, "markup"),
        ],
    )
    def test_pictures_that_are_refused(self, client, service, pictures, param, message):
        with pytest.raises(openai.BadRequestError, match=message) as raised:
            client.images.edit(prompt="a", **pictures)
        assert (raised.value.type, raised.value.param) == ("invalid_request_error", param)
        assert service.requests == []

    @pytest.mark.parametrize("name", ["image", "image[]", "mask"])
    @pytest.mark.parametrize("text", ["http://127.0.0.1:1/a.png", "data:image/png;base64," * 99999])
    def test_addresses_are_not_fetched(self, post, name, text):
        status, body = post("/v1/images/edits", *form(prompt="a", **{name: text}))
        assert status == (400 if len(text) < 100 else 413)
        assert "must be uploaded" in body["error"]["message"]

    def test_a_body_of_json(self, post):
        body = json.dumps({"prompt": "a", "image": "http://127.0.0.1:1/a.png"})
        status, body = post("/v1/images/edits", body)
        assert status == 400
        assert "multipart/form-data" in body["error"]["message"]

    @pytest.mark.parametrize(
        ("fields", "param", "message"),
        [
            ({"prompt": "a"}, "image", "is needed"),
            ({}, "prompt", "is needed"),
            ({"prompt": ""}, "prompt", "is needed"),
            ({"prompt": "a", "n": "two"}, "n", "from 1 to 10"),
            ({"prompt": "a", "n": "11"}, "n", "from 1 to 10"),
            ({"prompt": "a", "hires": "1"}, "hires", "no setting 'hires'"),
        ],
    )
    def test_fields_that_are_refused(self, post, fields, param, message):
        status, body = post("/v1/images/edits", *form(**fields))
        assert (status, body["error"]["param"]) == (400, param)
        assert message in body["error"]["message"]

    def test_nan_in_a_form(self, client):
        with pytest.raises(openai.BadRequestError) as raised:
            client.images.edit(image=PLAIN, prompt="a", extra_body={"guidance_scale": "nan"})
        assert raised.value.param == "guidance_scale"

    def test_a_field_that_is_there_twice(self, post):
        body, kind = form(prompt="a")
        status, body = post("/v1/images/edits", body.replace(b"--x--\r\n", b"") + body, kind)
        assert status == 400
        assert "'prompt' is there more than once" in body["error"]["message"]

    def test_a_form_that_is_broken(self, post):
        status, body = post("/v1/images/edits", b"--y\r\n", "multipart/form-data; boundary=x")
        assert (status, body["error"]["type"]) == (400, "invalid_request_error")

    def test_a_body_that_is_too_long(self, client, service):
        with pytest.raises(openai.APIStatusError, match="64 MiB") as raised:
            client.images.edit(image=("a.png", bytes(64 * 2**20)), prompt="a")
        assert raised.value.status_code == 413
        assert raised.value.type == "invalid_request_error"


class TestStream:
    @pytest.mark.parametrize(("wanted", "steps"), [(3, [2, 4, 6]), (1, [4]), (0, []), (None, [])])
    def test_partial_images(self, client, service, wanted, steps):
        with client.images.generate(
            prompt="a", size="96x64", stream=True, partial_images=wanted
        ) as stream:
            *partial, last = stream
        assert [event.type for event in partial] == ["image_generation.partial_image"] * len(steps)
        assert [event.partial_image_index for event in partial] == list(range(len(steps)))
        assert [pixels(event.b64_json).getpixel((0, 0))[0] for event in partial] == steps
        assert last.type == "image_generation.completed"
        assert service.watched == ["job0"] * bool(wanted)  # each costs the worker a decode
        assert base64.b64decode(last.b64_json) == service.files["job0-picture0"].read_bytes()
        assert last.usage.total_tokens == 0
        for event in (*partial, last):
            assert (event.size, event.output_format) == ("96x64", "png")
            assert (event.quality, event.background) == ("high", "opaque")
            assert abs(event.created_at - time.time()) < 60
        assert not service.was_cancelled.is_set()

    @pytest.mark.parametrize("size", ["1024x512", "auto"])
    @pytest.mark.parametrize("format", ["png", "jpeg"])
    def test_a_preview_has_the_size_of_the_picture(self, client, service, size, format):
        service.info = ModelInfo(name="tiny", width=128, height=128, ready=True)
        asked = {"prompt": "a", "size": size, "output_format": format}
        service.pause = 4  # its previews are of 64x64
        with client.images.generate(**asked, stream=True, partial_images=1) as stream:
            partial = next(stream)
            service.resume()
        wanted = (1024, 512) if size != "auto" else (128, 128)
        assert partial.type == "image_generation.partial_image"
        assert pixels(partial.b64_json).size == wanted
        assert partial.size == "{}x{}".format(*wanted)

    def test_a_preview_of_a_second_pass_has_the_size_of_the_picture(self, client, service):
        service.info = ModelInfo(name="tiny", width=512, height=512, ready=True)
        asked = {"prompt": "a", "size": "64x72", "extra_body": {"hires_scale": 1.5}}
        service.pause = 4
        with client.images.generate(**asked, stream=True, partial_images=1) as stream:
            partial = next(stream)
            service.resume()
        assert pixels(partial.b64_json).size == (96, 112)
        assert partial.size == "96x112"

    def test_previews_that_come_late_are_not_made_up_for(self, client, service):
        service.first_preview = 5
        with client.images.generate(prompt="a", stream=True, partial_images=3) as stream:
            *partial, _ = stream
        assert [pixels(event.b64_json).getpixel((0, 0))[0] for event in partial] == [5, 6]

    def test_lines(self, server, service):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        body = json.dumps({"prompt": "a", "stream": True, "partial_images": 1})
        connection.request("POST", "/v1/images/generations", body)
        answer = connection.getresponse()
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        events = [event.split("\n") for event in answer.read().decode().split("\n\n")]
        connection.close()
        assert events.pop() == [""]
        names = [f"image_generation.{name}" for name in ("partial_image", "completed")]
        assert [event for event, _ in events] == [f"event: {name}" for name in names]
        assert [json.loads(data.removeprefix("data: "))["type"] for _, data in events] == names

    def test_a_sign_of_life_while_nothing_comes(self, server, service, monkeypatch):
        monkeypatch.setattr(streams, "KEEP_ALIVE", 0.01)
        service.pause = 0
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        body = json.dumps({"prompt": "a", "model": "dall-e-3", "stream": True})
        connection.request("POST", "/v1/images/generations", body)
        answer = connection.getresponse()
        assert answer.headers["X-Accel-Buffering"] == "no"
        assert answer.headers["Cache-Control"] == "no-store"
        assert [answer.readline() for _ in range(4)] == [b": still here\n", b"\n"] * 2
        service.resume()
        *alive, told, end = answer.read().decode().split("\n\n")
        connection.close()
        assert set(alive) <= {": still here"}
        assert told.startswith("event: image_generation.completed\n")
        assert end == ""

    def test_edit(self, client):
        with client.images.edit(
            image=PLAIN, prompt="a", stream=True, partial_images=1, output_format="jpeg"
        ) as stream:
            partial, last = stream
        assert (partial.type, last.type) == ("image_edit.partial_image", "image_edit.completed")
        for event in (partial, last):
            assert event.output_format == "jpeg"
            assert pixels(event.b64_json).format == "JPEG"

    def test_each_picture_has_an_end(self, client, service):
        with client.images.generate(prompt="a", n=2, stream=True) as stream:
            sent = [base64.b64decode(event.b64_json) for event in stream]
        assert sent == [service.files[f"job0-picture{i}"].read_bytes() for i in range(2)]

    def test_a_job_done_before_anybody_listens(self, client, service):
        service.eager = True
        with client.images.generate(prompt="a", stream=True, partial_images=2) as stream:
            assert [event.type for event in stream] == ["image_generation.completed"]

    def test_a_job_that_fails(self, client, service):
        service.error = "the picture has values that are no numbers"
        with client.images.generate(prompt="a", stream=True, partial_images=1) as stream:
            assert next(stream).type == "image_generation.partial_image"
            with pytest.raises(openai.APIError, match="no numbers") as raised:
                next(stream)
        assert raised.value.type == "server_error"

    def test_errors_before_it_begins_are_plain_answers(self, client):
        with pytest.raises(openai.BadRequestError):
            client.images.generate(prompt="a", size="65x64", stream=True)


class TestErrors:
    def test_a_count_is_called_n(self):
        error = SafelightError("count must be at most 3, as many as may wait, not 4", field="count")
        told = refused(error).body["error"]
        assert (told["param"], told["message"][:15]) == ("n", "n must be at mo")
        told = refused(SafelightError("width must be a multiple of 8", field="width")).body["error"]
        assert (told["param"], told["message"][:13]) == ("size", "width must be")

    def test_settings_are_checked_by_request(self, client):
        with pytest.raises(openai.BadRequestError, match="multiple of 8") as raised:
            client.images.generate(prompt="a", size="1000x1001")
        assert (raised.value.type, raised.value.param) == ("invalid_request_error", "size")
        assert raised.value.code is None

    @pytest.mark.parametrize(
        ("settings", "param"),
        [
            ({}, "prompt"),
            ({"prompt": ""}, "prompt"),
            ({"prompt": None}, "prompt"),
            ({"prompt": 7}, "prompt"),
            ({"prompt": "é" * 8193}, "prompt"),
            ({"prompt": "a\0"}, "prompt"),
            ({"prompt": "\ud800"}, "prompt"),
            ({"n": 0}, "n"),
            ({"n": 11}, "n"),
            ({"n": True}, "n"),
            ({"n": "2"}, "n"),
            ({"n": float("nan")}, "n"),
            ({"size": "64"}, "size"),
            ({"size": "64x"}, "size"),
            ({"size": "-64x64"}, "size"),
            ({"size": "64x64\n"}, "size"),
            ({"size": 64}, "size"),
            ({"size": "99999x64"}, "size"),
            ({"response_format": "gif"}, "response_format"),
            ({"response_format": "url", "stream": True}, "response_format"),
            ({"response_format": "url", "output_format": "webp"}, "output_format"),
            ({"output_format": "gif"}, "output_format"),
            ({"output_compression": 101}, "output_compression"),
            ({"output_compression": -1}, "output_compression"),
            ({"partial_images": 4}, "partial_images"),
            ({"stream": 1}, "stream"),
            ({"seed": -1}, "seed"),
            ({"seed": True}, "seed"),
            ({"steps": 1.5}, "steps"),
            ({"steps": 0}, "steps"),
            ({"guidance_scale": True}, "guidance_scale"),
            ({"guidance_scale": float("nan")}, "guidance_scale"),
            ({"eta": float("inf")}, "eta"),
            ({"sampler": "prompt"}, "sampler"),
            ({"schedule": "linear"}, "schedule"),
            ({"hires": 1}, "hires"),
            ({"width": 64}, "width"),
            ({"mask": None}, "mask"),
        ],
    )
    def test_values_that_are_refused(self, post, service, settings, param):
        body = json.dumps({"prompt": "a", **settings} if settings else {})
        status, body = post("/v1/images/generations", body)
        error = body["error"]
        assert (status, error["type"]) == (400, "invalid_request_error")
        assert error["param"] == param
        assert "\n" not in error["message"]
        assert set(error) == {"message", "type", "param", "code"}
        assert service.requests == []

    @pytest.mark.parametrize("body", [b"", b"prompt=a", b"[]", b'"a"', b"\xff", b"[" * 9999])
    def test_bodies_that_are_no_json_object(self, post, body):
        status, answer = post("/v1/images/generations", body)
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
        assert "JSON object" in answer["error"]["message"]

    def test_an_unknown_field_is_named(self, client):
        with pytest.raises(openai.BadRequestError, match="no setting 'hires'") as raised:
            client.images.generate(prompt="a", extra_body={"hires": True})
        assert (raised.value.param, raised.value.code) == ("hires", "unknown_parameter")

    def test_json_that_is_too_long(self, post):
        status, body = post("/v1/images/generations", b" " * (2**20 + 1))
        assert (status, body["error"]["type"]) == (413, "invalid_request_error")

    def test_another_model(self, client, service):
        with pytest.raises(
            openai.NotFoundError, match="'flux' on this server; there are acme/photo"
        ) as raised:
            client.images.generate(prompt="a", model="flux")
        assert (raised.value.code, raised.value.param) == ("model_not_found", "model")
        assert service.requests == []

    @pytest.mark.parametrize("name", ["embedded", "embedded-fast", "acme"])
    def test_no_other_model_of_ours_is_drawn_with_in_its_place(self, client, service, name):
        with pytest.raises(openai.NotFoundError, match="there are acme/photo"):
            client.images.generate(prompt="a", model=name)
        assert service.requests == []

    def test_another_model_to_edit_with(self, client, service):
        with pytest.raises(openai.NotFoundError):
            client.images.edit(image=PLAIN, prompt="a", model="flux")
        assert service.requests == []

    def test_a_full_queue(self, client, service):
        service.busy = True
        with pytest.raises(openai.RateLimitError, match="queue of 4") as raised:
            client.images.generate(prompt="a")
        assert raised.value.response.headers["Retry-After"] == "7"
        assert raised.value.code == "rate_limit_exceeded"

    def test_a_job_that_fails(self, client, service):
        service.error = "the picture has values that are no numbers"
        with pytest.raises(openai.InternalServerError, match="no numbers") as raised:
            client.with_options(max_retries=2).images.generate(prompt="a")
        assert raised.value.type == "server_error"
        assert len(service.requests) == 1  # drawn once, not once more for every retry

    def test_a_job_that_somebody_else_cancels(self, client, service):
        service.wait = service.cancel
        with pytest.raises(openai.InternalServerError, match="the job was cancelled"):
            client.images.generate(prompt="a")

    def test_a_picture_that_is_gone(self, client, service):
        service.picture_bytes = lambda picture_id: None
        with pytest.raises(openai.InternalServerError, match="deleted"):
            client.images.generate(prompt="a")


class TestDisconnect:
    def test_while_waiting(self, service, base):
        service.pause = 3

        async def leave():
            async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="any") as client:
                asking = asyncio.create_task(client.images.generate(prompt="a"))
                assert await asyncio.to_thread(service.submitted.wait, 30)
                assert not service.was_cancelled.is_set()
                asking.cancel()
                await asyncio.wait([asking])

        asyncio.run(leave())
        assert service.was_cancelled.wait(30)
        assert service.jobs["job0"].status is Status.CANCELLED

    def test_from_a_silent_stream(self, client, service):
        service.pause = 0
        with client.images.generate(prompt="a", stream=True):
            assert not service.was_cancelled.is_set()
        assert service.was_cancelled.wait(30)

    def test_in_the_middle_of_a_stream(self, client, service):
        service.pause = 5
        with client.images.generate(prompt="a", stream=True, partial_images=1) as stream:
            next(stream)
            assert not service.was_cancelled.is_set()
        assert service.was_cancelled.wait(30)

    def test_from_a_stream_that_is_not_read(self, client, service):
        # More than fits into the buffers in between: the server is still sending.
        service.paint = Image.effect_noise((1024, 1024), 90).convert("RGB")
        service.first_preview = service.pause = 4
        with client.images.generate(prompt="a", size="2048x2048", stream=True, partial_images=1):
            assert service.held.wait(30)
            assert not service.was_cancelled.is_set()
        assert service.was_cancelled.wait(30)

    def test_while_sending(self, server, service, caplog):
        caplog.set_level(logging.INFO, "safelight.http")
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            head = b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99"
            connection.sendall(head + b'\r\n\r\n{"prompt"')
        # Logged when the request is over; an error, which the fixture looks for, comes before.
        until(lambda: any(r.name == "safelight.http" for r in caplog.records))
        assert service.requests == []


class TestModels:
    def test_list(self, client):
        listed = client.models.list().data
        assert [(model.id, model.object) for model in listed] == [("acme/photo", "model")]

    def test_retrieve(self, client):
        assert client.models.retrieve("acme/photo").owned_by == "safelight"

    def test_another(self, client):
        with pytest.raises(openai.NotFoundError) as raised:
            client.models.retrieve("dall-e-3")
        assert raised.value.code == "model_not_found"

    @pytest.mark.parametrize(
        "name",
        ["acme/photo", "dall-e-3", "gpt-image-1", "chatgpt-image-latest", None],
    )
    def test_names_that_mean_it(self, client, service, name):
        client.images.generate(prompt="a", model=name)
        assert len(service.requests) == 1


def test_the_description_has_the_bodies(server):
    paths = server.app.openapi()["paths"]
    bodies = {
        path: next(iter(paths[path]["post"]["requestBody"]["content"].items()))
        for path in ("/v1/images/generations", "/v1/images/edits")
    }
    kind, content = bodies["/v1/images/generations"]
    assert kind == "application/json"
    assert content["schema"]["required"] == ["prompt"]
    assert "image" not in content["schema"]["properties"]
    kind, content = bodies["/v1/images/edits"]
    assert kind == "multipart/form-data"
    assert content["schema"]["required"] == ["prompt", "image"]
    assert {"image", "mask", "n"} <= content["schema"]["properties"].keys()


def test_importing_it_does_not_import_torch():
    code = "import sys, safelight.server.apis.openai; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
