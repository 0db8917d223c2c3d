import inspect
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import safelight
from safelight.adapters.asked import AskedLora
from safelight.errors import SafelightError
from safelight.picture import open_picture
from safelight.pixels import picture_sha256
from safelight.recipe import read_recipe
from safelight.request import Request
from safelight.request_ranges import MAX_SEED
from safelight.result import Result

LANCZOS = Image.Resampling.LANCZOS

PICTURE = Image.new("RGB", (64, 64), "red")
MASK = Image.new("L", (64, 64), 255)
NAN, INF = float("nan"), float("inf")


def refusal(**settings):
    with pytest.raises(SafelightError) as caught:
        Request(**settings)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) <= 250
    assert message.isprintable()
    return message


class TestDefaults:
    def test_are_those_of_stable_diffusion(self):
        request = Request(prompt="a red apple")
        assert request.guidance_scale == 7.5
        assert request.sampler == "pndm"
        assert request.count == 1
        assert request.eta == 0
        assert request.steps is request.width is request.height is request.strength is None
        assert request.unused_settings() == []

    def test_a_seed_is_drawn_and_recorded(self):
        seeds = {Request().seed for _ in range(8)} | {Request(seed=None).seed for _ in range(8)}
        assert len(seeds) == 16
        assert all(0 <= seed < 2**32 for seed in seeds)

    def test_it_is_frozen(self):
        with pytest.raises(ValueError, match="frozen"):
            Request().steps = 3


class TestReplace:
    def test_changes_a_copy(self):
        request = Request(prompt="a cat", seed=7, image=PICTURE, mask=MASK)
        changed = request.replace(steps=3, width=72)
        assert (changed.steps, changed.width, request.steps) == (3, 72, None)
        expected = {**request.to_dict(), "steps": 3, "width": 72}
        assert changed.to_dict() == expected

    def test_is_checked(self):
        with pytest.raises(SafelightError, match="steps must be"):
            Request().replace(steps=0)


class TestLimits:
    @pytest.mark.parametrize(
        ("name", "good", "bad"),
        [
            ("width", [64, 72, 2048], [0, 8, 56, 63, 65, 100, 2049, 2056, -64]),
            ("height", [64, 72, 2048], [0, 8, 56, 63, 65, 100, 2049, 2056, -64]),
            ("steps", [1, 1000], [0, 1001, -1]),
            ("count", [1, 64], [0, 65, -1, None]),
            ("seed", [0, MAX_SEED], [-1, MAX_SEED + 1]),
            ("guidance_scale", [0, 1, 100.0], [-0.001, 100.001, None, -INF]),
            ("strength", [0.001, 1, 1.0], [0, 0.0, 1.001, -1]),
            ("eta", [0, 1, 0.5], [-0.001, 1.001, None]),
            ("schedule", [None, "karras", "exponential", "beta"], ["", "Karras", "linear"]),
            ("spacing", [None, "leading", "linspace", "trailing"], ["", "Leading", "even"]),
            ("sampler", ["pndm", "euler_a"], ["", "Euler b", None]),
            ("unconditional", [True, False], [0, 1, None, "true"]),
            (
                "prompt",
                ["", "é" * 8192, "\n\t\U0001f34e"],
                ["é" * 8193, "a\0b", "\ud800", None, b"a"],
            ),
            ("negative_prompt", ["", "x" * 16384], ["x" * 16385, "\0", "\udfff", ["a"]]),
        ],
    )
    def test_of_each_setting(self, name, good, bad):
        for value in good:
            assert getattr(Request(**{name: value}), name) == value
        for value in bad:
            assert name in refusal(**{name: value})

    @pytest.mark.parametrize(
        "name", ["width", "height", "steps", "count", "seed", "guidance_scale", "strength", "eta"]
    )
    @pytest.mark.parametrize(
        "value",
        [NAN, INF, 1e308, -(10**400), 10**5000, True, False, "20", b"20", [20], {}, 1j, 64.5 + NAN],
        ids=range(13),
    )
    def test_what_is_no_number_in_range(self, name, value):
        assert refusal(**{name: value}).startswith(f"{name} must be a ")

    def test_a_fraction_is_no_whole_number(self):
        assert refusal(steps=20.0) == (
            "steps must be a whole number from 1 to 1000 "
            "(left out: the model's own, else the sampler's), not 20.0"
        )

    def test_numpys_numbers_are_numbers(self):
        request = Request(
            width=np.int64(64), seed=np.uint64(7), guidance_scale=np.float32(3), eta=np.float64(1)
        )
        assert (request.width, request.seed, request.guidance_scale) == (64, 7, 3.0)
        assert type(request.seed) is int
        json.loads(request.to_json())
        assert "steps" in refusal(steps=np.float64(3))
        assert "steps" in refusal(steps=np.bool_(True))

    @pytest.mark.parametrize(
        ("text", "read"),
        [
            ("ink", ("ink", 1.0, 1.0)),
            (" ink:0.5 ", ("ink", 0.5, 0.5)),
            ("ink:-1:.25", ("ink", -1.0, 0.25)),
            ("C:/a b/ink.safetensors:2", ("C:/a b/ink.safetensors", 2.0, 2.0)),
            ("ink:strong", ("ink:strong", 1.0, 1.0)),
        ],
    )
    def test_a_lora_with_its_weights(self, text, read):
        one = AskedLora.parse(text)
        assert (one.name, one.weight, one.text_weight) == read
        assert AskedLora.parse(str(one)) == one
        assert Request(loras=[text]).loras == (text,)

    @pytest.mark.parametrize("text", ["", ":1", "ink:nan", "ink:inf", "ink:1:1000", "a\0b", "a\nb"])
    def test_what_is_no_lora(self, text):
        with pytest.raises(SafelightError, match=r"^loras must ") as raised:
            Request(loras=[text])
        assert raised.value.field == "loras"

    def test_the_nearest_sampler_is_named(self):
        assert "dpmpp_2m" in refusal(sampler="dpmp_2m")
        assert "euler" in refusal(sampler="eulr")

    def test_the_nearest_setting_is_named(self):
        assert refusal(step=3) == "there is no setting 'step': did you mean steps?"

    def test_seeds_of_all_pictures_have_room(self):
        assert Request(seed=MAX_SEED - 2, count=3).count == 3
        assert str(MAX_SEED - 2) in refusal(seed=MAX_SEED - 1, count=3)

    @settings(max_examples=300)
    @given(
        st.dictionaries(
            st.sampled_from(sorted(Request.model_fields)) | st.text(max_size=5),
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats()
            | st.text()
            | st.binary()
            | st.lists(st.integers(), max_size=2),
            max_size=4,
        )
    )
    def test_anything_is_a_request_or_one_line(self, given):
        try:
            request = Request(**given)
        except SafelightError as error:
            message = str(error)
        else:
            message = "none"
            assert Request.from_json(request.to_json()) == request
        assert message
        assert message.isprintable()


class TestPictures:
    def test_any_mode_becomes_rgb_and_a_mask_black_and_white(self):
        mask = Image.new("LA", (64, 64), (200, 255))
        request = Request(image=Image.new("RGBA", (64, 64), (0, 0, 0, 0)), mask=mask)
        assert request.image is not None
        assert request.mask is not None
        assert (request.image.mode, request.image.getpixel((0, 0))) == ("RGB", (255, 255, 255))
        assert (request.mask.mode, request.mask.getextrema()) == ("L", (255, 255))

    def test_the_request_has_its_own_copy(self):
        picture = PICTURE.copy()
        request = Request(image=picture)
        picture.putpixel((0, 0), (1, 2, 3))
        assert request.image is not None
        assert request.image.getpixel((0, 0)) == (255, 0, 0)

    @pytest.mark.parametrize("mode", ["I", "F"])
    def test_what_does_not_say_what_white_is(self, mode):
        assert f"image has PIL's mode {mode}" in refusal(image=Image.new(mode, (64, 64)))
        message = refusal(image=PICTURE, mask=Image.new(mode, (64, 64)))
        assert message.startswith(f"mask has PIL's mode {mode}")

    def test_mask_without_picture(self):
        assert refusal(mask=MASK) == "mask needs a picture to repaint: give image as well"

    def test_mask_of_another_size(self):
        message = refusal(image=PICTURE, mask=Image.new("L", (64, 72)))
        assert message == "mask must have the picture's size, 64x64, not 64x72"

    @pytest.mark.parametrize("value", ["cat.png", b"\x89PNG", 3, np.zeros((64, 64, 3), np.uint8)])
    def test_what_is_no_picture(self, value):
        assert "image must be a PIL picture" in refusal(image=value)

    def test_a_picture_that_does_not_decode(self, tmp_path):
        path = tmp_path / "cut.png"
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:1000])
        with Image.open(path) as picture:
            assert "image cannot be decoded" in refusal(image=picture)

    @pytest.mark.parametrize(
        ("name", "value"),
        [("prompt", "a cat"), ("negative_prompt", "a"), ("image", PICTURE)],
    )
    def test_unconditional_takes_none_of_these(self, name, value):
        message = refusal(unconditional=True, **{name: value})
        assert message.startswith(f"{name} cannot be used with unconditional")
        assert Request(**{name: value})


class TestIdle:
    @pytest.mark.parametrize(
        ("given", "named"),
        [
            ({"negative_prompt": "dog", "guidance_scale": 1}, "negative_prompt"),
            ({"strength": 0.5}, "strength"),
            ({"unconditional": True, "guidance_scale": 3}, "guidance_scale"),
            ({"sampler": "euler", "eta": 0.5}, "eta"),
            ({"image": PICTURE, "mask": Image.new("L", (64, 64))}, "mask"),
        ],
    )
    def test_a_setting_without_effect_is_named(self, given, named):
        (warning,) = Request(**given).unused_settings()
        assert warning.startswith(named)

    @pytest.mark.parametrize(
        "given",
        [
            {"negative_prompt": "dog", "guidance_scale": 1.01},
            {"strength": 0.5, "image": PICTURE, "mask": MASK},
            {"unconditional": True},
            {"sampler": "ddim", "eta": 0.5},
            {
                "prompt": "a cat AND a dog",
                "prompt_syntax": "a1111",
                "negative_prompt": "a bird",
                "guidance_scale": 1,
            },
        ],
    )
    def test_others_are_not(self, given):
        assert Request(**given).unused_settings() == []


class TestJson:
    def test_there_and_back(self):
        request = Request(prompt="猫 \U0001f34e", steps=3, seed=7, guidance_scale=2, width=64)
        assert Request.from_json(request.to_json()) == request
        assert json.loads(request.to_json())["guidance_scale"] == 2.0

    def test_pictures_are_named_by_digest_alone(self):
        request = Request(image=PICTURE, mask=MASK)
        settings = json.loads(request.to_json())
        assert settings["image_sha256"] == picture_sha256(PICTURE)
        assert settings["mask_sha256"] == picture_sha256(MASK)
        assert not {"image", "mask"} & set(settings)
        again = Request.from_dict(settings, image=PICTURE, mask=MASK)
        assert again.to_dict() == settings

    def test_the_same_pictures_are_needed_again(self):
        settings = Request(image=PICTURE).to_dict()
        digest = settings["image_sha256"]
        with pytest.raises(SafelightError, match=f"image is needed again: .* {digest}"):
            Request.from_dict(settings)
        with pytest.raises(SafelightError, match=f"image must be the one of SHA-256 {digest}"):
            Request.from_dict(settings, image=Image.new("RGB", (64, 64)))
        with pytest.raises(SafelightError, match="mask was not part of this request"):
            Request.from_dict(settings, image=PICTURE, mask=MASK)

    def test_fitted_pictures_are_named_as_they_were_given(self):
        start, mask = Image.effect_noise((100, 80), 60).convert("RGB"), Image.new("L", (100, 80))
        mask.paste(255, (0, 0, 50, 80))
        request = Request(image=start, mask=mask, width=64)
        fitted = request.fitted()
        assert fitted.image.size == fitted.mask.size == (64, 64)  # 51 high is less than may be
        assert fitted.image.tobytes() == start.resize((64, 64), LANCZOS).tobytes()
        assert set(fitted.mask.tobytes()) == {0, 255}
        assert fitted.to_dict() == request.to_dict()
        assert fitted.replace(seed=3).to_dict() == request.replace(seed=3).to_dict()
        again = Request.from_dict(
            request.to_dict(), image=fitted.image, mask=fitted.mask, fitted=True
        )
        assert again.to_dict() == request.to_dict()
        assert again.fitted().image is fitted.image
        assert fitted.fitted().image is fitted.image
        for one in ("image", "mask"):  # the digest of the other, which stays, is its original's
            other = {"image": "mask", "mask": "image"}[one]
            replaced = fitted.replace(**{one: getattr(fitted, other)}).to_dict()
            assert replaced[f"{other}_sha256"] == request.to_dict()[f"{other}_sha256"]
            assert replaced[f"{one}_sha256"] != request.to_dict()[f"{one}_sha256"]

    def test_one_of_picture_and_mask_is_replaced(self):
        request = Request(image=Image.new("RGB", (64, 64)), mask=Image.new("L", (64, 64)))
        white = Image.new("L", (64, 64), 255)
        for one in (request, request.replace(mask=None)):
            assert one.replace(mask=white).mask.getextrema() == (255, 255)
            assert one.replace(mask=white).image.size == (64, 64)
        for wrong in ({"mask": Image.new("L", (32, 64))}, {"image": Image.new("RGB", (32, 64))}):
            with pytest.raises(SafelightError, match="mask must have the picture's size"):
                request.replace(**wrong)
        with pytest.raises(SafelightError, match="needs a picture"):
            request.replace(image=None)

    def test_sides_are_brought_to_the_nearest_multiple_of_eight(self):
        pictures = {"image": Image.new("RGB", (500, 333)), "mask": Image.new("L", (500, 333))}
        request = Request(**pictures)
        fitted = request.fitted()
        assert fitted.image.size == fitted.mask.size == (496, 336)
        assert fitted.to_dict() == request.to_dict()
        assert fitted.fitted() is fitted

    def test_fitted_of_what_needs_no_other_size(self):
        request = Request(image=PICTURE)
        assert request.fitted() is request
        assert Request().fitted().image is None
        with pytest.raises(SafelightError, match="ask for width 592 and height 440"):
            Request(image=Image.new("RGB", (4000, 3000))).fitted()
        with pytest.raises(SafelightError, match="ask for width 360 and height 720"):
            Request(image=Image.new("RGB", (50, 100))).fitted()
        settings = request.to_dict()
        with pytest.raises(SafelightError, match="image is needed again"):
            Request.from_dict(settings, fitted=True)
        with pytest.raises(SafelightError, match="mask was not part of this request"):
            Request.from_dict(settings, image=PICTURE, mask=MASK, fitted=True)

    @pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, b"\xff", '{"a": 1}'])
    def test_what_is_no_request(self, text):
        with pytest.raises(SafelightError):
            Request.from_json(text)


def result(count=2):
    request = Request(prompt="a red apple", seed=5, count=count, steps=3)
    return Result(
        images=[Image.new("RGB", (64, 64), (i, 0, 0)) for i in range(count)],
        seeds=[5 + i for i in range(count)],
        settings=request.to_dict(),
        model="embedded",
        sha256="ab" * 32,
        device="cpu",
        dtype="float32",
        warnings=["a warning"],
        timings={"denoise": 1.5},
    )


class TestResult:
    def test_every_picture_carries_its_own_recipe(self, tmp_path):
        made = result()
        paths = made.save(tmp_path / "a.png")
        assert paths == made.paths == [tmp_path / "a-1.png", tmp_path / "a-2.png"]
        for i, path in enumerate(paths):
            recipe = read_recipe(path)
            assert recipe["settings"] == {**made.settings, "seed": 5 + i, "count": 1}
            assert recipe["model"] == {"name": "embedded", "sha256": "ab" * 32}
            assert recipe["warnings"] == ["a warning"]
            assert Request.from_dict(recipe["settings"]).seed == 5 + i
            assert open_picture(path).getpixel((0, 0)) == (i, 0, 0)

    def test_none_is_written_if_one_exists(self, tmp_path):
        (tmp_path / "a-2.png").touch()
        with pytest.raises(SafelightError, match="exists"):
            result().save(tmp_path / "a.png")
        assert [path.name for path in tmp_path.iterdir()] == ["a-2.png"]

    def test_json(self, tmp_path):
        made = result()
        made.save(tmp_path)
        told = json.loads(made.to_json())
        assert told["paths"] == [str(tmp_path / f"safelight-{seed}.png") for seed in (5, 6)]
        assert told["seeds"] == [5, 6]
        assert told["settings"]["steps"] == 3
        assert told["timings"] == {"denoise": 1.5}
        assert told["warnings"] == ["a warning"]


class TestPackage:
    def test_exported_names(self):
        assert safelight.__all__ == sorted(
            ["Model", "Request", "Result", "SafelightError", "__version__", "load", "load_upscaler"]
        )
        for name in safelight.__all__:
            assert getattr(safelight, name) is not None
        assert set(safelight.__all__) <= set(dir(safelight))
        assert safelight.Request is Request
        assert safelight.SafelightError is SafelightError
        assert next(iter(inspect.signature(safelight.load).parameters)) == "name"

    def test_an_unknown_name_is_an_attribute_error(self):
        with pytest.raises(AttributeError, match="no attribute 'lod'"):
            safelight.lod  # noqa: B018

    def test_a_request_needs_no_torch(self):
        code = (
            "import sys, safelight;"
            "safelight.Request(prompt='a', sampler='euler').unused_settings();"
            "print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (done.stdout, done.stderr) == ("[]\n", "")
