import contextlib
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from safelight.errors import SafelightError
from safelight.picture import save_png
from safelight.recipe import (
    is_ip_adapter,
    parse_recipe_text,
    png_texts,
    read_recipe,
    recipe_text,
)
from safelight.studio.recipes import _guided


def recipe(**settings):
    return {
        "safelight": "0.1.0",
        "model": {"name": "embedded", "sha256": "0123456789abcdef" * 4},
        "device": "cpu",
        "dtype": "float32",
        "size": [64, 48],
        "settings": {
            "prompt": "a red apple",
            "negative_prompt": "",
            "steps": 20,
            "guidance_scale": 7.0,
            "seed": 5,
            "sampler": "euler_a",
            "schedule": None,
            "strength": None,
            "eta": 0.0,
            **settings,
        },
        "warnings": [],
    }


class TestText:
    def test_as_the_web_ui_writes_it(self):
        assert recipe_text(recipe()) == (
            "a red apple\n"
            "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 64x48, "
            "Model hash: 0123456789, Model: embedded, Version: Safelight 0.1.0"
        )

    def test_every_setting(self):
        made = recipe(
            negative_prompt="blurry",
            sampler="dpmpp_2m",
            schedule="karras",
            guidance_scale=7.5,
            strength=0.75,
            eta=0.5,
        )
        made["model"]["name"] = 'my, "best": model'
        assert recipe_text(made) == (
            "a red apple\nNegative prompt: blurry\n"
            "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 5, "
            'Size: 64x48, Model hash: 0123456789, Model: "my, \\"best\\": model", '
            "Denoising strength: 0.75, Eta: 0.5, Version: Safelight 0.1.0"
        )

    @given(
        prompt=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r")),
        model=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1),
    )
    def test_parse_reads_what_was_written(self, prompt, model):
        made = recipe(prompt=prompt.strip("\n").replace("Negative prompt: ", ""))
        made["model"]["name"] = model.strip() or "x"
        parsed = parse_recipe_text(recipe_text(made))
        assert parsed["prompt"] == made["settings"]["prompt"]
        assert parsed["negative_prompt"] == ""
        assert parsed["parameters"]["Model"] == made["model"]["name"]
        assert parsed["parameters"]["Seed"] == "5"

    @pytest.mark.parametrize(("content", "theirs"), [("noise", "latent noise"), ("fill", "fill")])
    def test_a_part_that_is_drawn(self, content, theirs):
        """Its size is the one that was drawn, as in the web UI, not that of the whole picture."""
        part = {"mask_padding": 32, "mask_content": content, "width": 512, "height": 384}
        made = {**recipe(**part, mask_sha256="a" * 64, strength=0.5), "size": [3000, 2000]}
        pairs = parse_recipe_text(recipe_text(made))["parameters"]
        assert pairs["Size"] == "512x384"
        assert pairs["Inpaint area"] == "Only masked"
        assert pairs["Masked area padding"] == "32"
        assert pairs["Masked content"] == theirs
        whole = {**made, "settings": {**made["settings"], "mask_padding": None}}
        pairs = parse_recipe_text(recipe_text(whole))["parameters"]
        assert pairs["Size"] == "3000x2000"
        assert "Inpaint area" not in pairs

    @pytest.mark.parametrize(
        ("module", "model", "theirs"),
        [
            ("ip-adapter-auto", "looks [0]", True),
            ("CLIP-ViT-H (IPAdapter)", "x", True),
            ("none", "ip_adapter_sd15 [0]", True),
            ("none", "None", False),
            ("canny", "control_v11p_sd15_canny [0]", False),
        ],
    )
    def test_what_a_unit_is(self, module, model, theirs):
        assert is_ip_adapter(module, model) == theirs
        found = _guided([f"Module: {module}, Model: {model}, Weight: 0.5"])
        assert found[f"{'ip_adapter' if theirs else 'control'}_scale"] == 0.5

    def test_parse_the_web_uis_own(self):
        parsed = parse_recipe_text(
            "a cat,\nsitting\nNegative prompt: dog,\nblurry\n"
            "Steps: 28, Sampler: DPM++ 2M, CFG scale: 5.5, Seed: 99, Size: 512x768, "
            'Lora hashes: "a: 1, b: 2", Version: v1.10.1'
        )
        assert parsed["prompt"] == "a cat,\nsitting"
        assert parsed["negative_prompt"] == "dog,\nblurry"
        assert parsed["parameters"]["Lora hashes"] == "a: 1, b: 2"
        assert parsed["parameters"]["Version"] == "v1.10.1"

    def test_values_in_json_stay_whole(self):
        hashes = '{"model": "abc", "lora:x": "y, z"}'
        resources = '[{"type": "lora", "weight": 0.7}, {"modelVersionId": 128713}]'
        parsed = parse_recipe_text(
            f"a cat\nSteps: 20, Hashes: {hashes}, Civitai resources: {resources}, "
            "Template: {a|b} cat, Other: [1] dog, Version: v1.9"
        )
        assert parsed["parameters"] == {
            "Steps": "20",
            "Hashes": hashes,
            "Civitai resources": resources,
            "Template": "{a|b} cat",  # what is no JSON ends at a comma
            "Other": "[1] dog",
            "Version": "v1.9",
        }

    @pytest.mark.parametrize("text", ["", "a cat", "a cat\nSeed: 1", "a\nb: c, d: e"])
    def test_what_is_no_recipe_is_refused(self, text):
        with pytest.raises(SafelightError, match="Steps"):
            parse_recipe_text(text)

    @settings(max_examples=300)
    @given(st.text(st.sampled_from('Steps: 1,"\\\nab'), max_size=60))
    def test_parse_any_text_or_refuse_it(self, text):
        with contextlib.suppress(SafelightError):
            assert "Steps" in parse_recipe_text(text)["parameters"]

    @pytest.mark.parametrize(
        "piece", ['a: "', "a: b,", '"', "a: ", '\\"', "a: [", ", ", '"a": {"b": 1, ', "a: [1, "]
    )
    def test_parse_is_linear(self, piece):
        def seconds(length):
            text = "Steps: 1, " + piece * (length // len(piece))
            start = time.process_time()
            parse_recipe_text(text)
            return time.process_time() - start

        # Eight times the text may take eight times as long; a square law takes 64 times.
        assert seconds(2**21) < 24 * max(seconds(2**18), 0.005)

    def test_other_programs_read_it(self, tmp_path):
        from sd_parsers import ParserManager

        made = recipe(prompt="a red apple, shiny", negative_prompt="blurry", schedule="karras")
        path = tmp_path / "a.png"
        save_png(Image.new("RGB", (64, 48)), path, png_texts(made))
        info = ParserManager().parse(path)
        assert info is not None
        assert info.prompts[0].value == "a red apple, shiny"
        assert info.negative_prompts[0].value == "blurry"
        sampler = info.samplers[0]
        assert sampler.name == "Euler a"
        assert sampler.parameters["seed"] == "5"
        assert sampler.parameters["steps"] == "20"
        assert info.models.pop().name == "embedded"


class TestFile:
    @pytest.mark.parametrize(
        "prompt",
        ["a red apple", "\u0444\u043e\u0442\u043e \u732b \U0001f34e é", "a\nb\tc", '"}{', ""],
    )
    def test_there_and_back(self, tmp_path, prompt):
        made = recipe(prompt=prompt)
        path = tmp_path / "a.png"
        save_png(Image.new("RGB", (64, 48)), path, png_texts(made))
        assert read_recipe(path) == made
        assert read_recipe(path.read_bytes()) == made
        with Image.open(path) as image:
            assert image.text["parameters"] == recipe_text(made)

    def write(self, path, **texts):
        info = PngImagePlugin.PngInfo()
        for key, text in texts.items():
            info.add_text(key, text)
        Image.new("RGB", (8, 8)).save(path, pnginfo=info)
        return path

    def test_ours_comes_first(self, tmp_path):
        made = recipe()
        path = self.write(tmp_path / "a.png", parameters="x\nSteps: 9", safelight=json.dumps(made))
        assert read_recipe(path) == made

    def test_the_web_uis_is_next(self, tmp_path):
        path = self.write(tmp_path / "a.png", parameters="a cat\nSteps: 9, Seed: 3")
        found = read_recipe(path)
        assert found["prompt"] == "a cat"
        assert found["parameters"] == {"Steps": "9", "Seed": "3"}
        assert "safelight" not in found

    def test_none(self, tmp_path):
        with pytest.raises(SafelightError, match="carries no recipe"):
            read_recipe(self.write(tmp_path / "a.png"))

    def test_jpeg(self, tmp_path):
        Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
        with pytest.raises(SafelightError, match="must be a PNG"):
            read_recipe(tmp_path / "a.jpg")

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            "[]",
            "null",
            "{}",
            "[" * 100_000,
            '{"settings": {}, "model": {}}',
            '{"safelight": "1", "settings": [], "model": {"name": "a", "sha256": "b"}}',
            '{"safelight": "1", "settings": {}, "model": {"name": 1, "sha256": "b"}}',
        ],
        ids=range(9),
    )
    def test_forged(self, tmp_path, text):
        with pytest.raises(SafelightError, match="Safelight did not write"):
            read_recipe(self.write(tmp_path / "a.png", safelight=text))

    def test_too_long(self, tmp_path):
        path = self.write(tmp_path / "a.png", safelight=" " * 300_000)
        with pytest.raises(SafelightError, match="256 KiB"):
            read_recipe(path)
