"""Watching a picture's steps, and the page about them."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken

import safelight
from safelight import Request, SafelightError, cli
from safelight.explain import texts
from safelight.explain.attention import (
    recorded,
    telling_layers,
    word_maps,
)
from safelight.explain.forward import forward
from safelight.explain.page import _mask, page
from safelight.explain.watch import Story, fit_colours, in_colours, watch
from safelight.model import Model
from safelight.nets.layers import Attention
from safelight.nets.unet import UNet2DConditionModel, UNetConfig
from safelight.prompt.chunks import chunks_of
from safelight.prompt.dialects import read
from safelight.prompt.places import words_of, words_of_chunks
from safelight.prompt.reading import Piece, Syntax
from safelight.prompt.show import describe, lines
from safelight.prompt.tokenizer import Tokenizer

PAIR = Request(
    prompt="a cat above a pizza", seed=1, steps=6, sampler="dpmpp_2m", guidance_scale=4.0
)
SMALL = PAIR.replace(width=64, height=64)
SCRIPT = "<script>alert(1)</script></script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def model() -> Model:
    return safelight.load(device="cpu")


@cache
def loaded_in(dtype: str) -> Model:
    return safelight.load(device="cpu", dtype=dtype)


@pytest.fixture(scope="module")
def story(model: Model) -> Story:
    return watch(model, PAIR)


def photo() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(values)


class TestWatch:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"guidance_scale": 1.0, "sampler": "heun"},
            {"sampler": "euler_a", "negative_prompt": "a dog"},
            {"image": photo(), "strength": 0.7},
            {"image": photo(), "mask": Image.new("L", (64, 64), 255)},
        ],
        ids=["plain", "unguided", "noisy", "from a picture", "painted over"],
    )
    def test_the_picture_is_that_of_generate(self, dtype: str, settings: dict[str, Any]) -> None:
        loaded = loaded_in(dtype)
        request = SMALL.replace(steps=3, **settings)
        # Watch first: this must not change the next picture either.
        watched, drawn = watch(loaded, request).result, loaded.generate(request)
        assert watched.images[0].tobytes() == drawn.images[0].tobytes()
        assert watched.recipe() == drawn.recipe()

    def test_what_is_seen(self, story: Story) -> None:
        assert [moment.step for moment in story.moments] == [1, 2, 3, 4, 5, 6]
        assert story.sigmas[:-1] == [moment.sigma for moment in story.moments]
        assert story.sigmas == sorted(story.sigmas, reverse=True)
        assert story.shape == (8, 16, 16)
        for moment in story.moments:
            assert moment.noisy.size == moment.clean.size == (256, 256)
            assert moment.latents is not None
            assert moment.latents.size == (16, 16)
            assert moment.unguided is not None
            assert moment.attention is not None
            assert moment.attention.shape == (5, 8, 8)
        assert story.moments[-1].clean.tobytes() == story.picture.tobytes()

    def test_what_latents_cover_beyond_the_picture_is_not_seen(self, model: Model) -> None:
        steps: list[Image.Image] = []
        odd = PAIR.replace(width=72, height=88, steps=2, guidance_start=0.0)
        story = watch(model, odd, lambda step: steps.append(step.preview()))
        seen = [(m.noisy, m.clean, m.unguided, m.guidance) for m in story.moments]
        shown = [*steps, *(one.picture for one in story.forward), *(p for m in seen for p in m)]
        assert {picture.size for picture in shown if picture is not None} == {(72, 88)}
        assert None not in shown
        assert story.shown == (72 / 80, 88 / 96)
        assert story.moments[-1].clean.tobytes() == story.picture.tobytes()
        # An attention map lies over the picture: here only its left half is seen.
        uri = _mask(torch.tensor([[0.0, 1.0, 0.0, 0.0]]), (0.5, 1.0))
        mask = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).getchannel("A")
        left, right = (mask.getpixel((x, 0)) for x in (0, mask.width - 1))
        assert left < 64 < 128 < right

    def test_guidance_is_half_the_difference_on_gray(self, story: Story) -> None:
        moment, first = story.moments[2], story.moments[0]
        assert first.guidance is not None
        assert {*np.asarray(first.guidance).flatten()} == {128}  # a step that is not guided
        assert moment.guidance is not None
        clean, unguided = (np.asarray(p).astype(int) for p in (moment.clean, moment.unguided))
        expected = 128 + (clean - unguided) / 2
        assert np.abs(np.asarray(moment.guidance) - expected).max() <= 1
        assert np.abs(clean - unguided).max() > 20

    def test_without_guidance_there_is_none(self, model: Model) -> None:
        moment = watch(model, SMALL.replace(steps=1, guidance_scale=1.0)).moments[0]
        assert moment.guidance is None
        assert moment.attention is not None

    def test_without_words(self) -> None:
        pixels = safelight.load("embedded-unconditional", device="cpu")
        request = Request(unconditional=True, sampler="ddim", steps=3, seed=1)
        story = watch(pixels, request)
        assert story.picture.tobytes() == pixels.generate(request).images[0].tobytes()
        assert (story.words, story.colours) == ([], None)
        assert all(m.latents is m.unguided is m.attention is None for m in story.moments)
        assert "Attention to each word" not in page(story)

    def test_an_empty_prompt(self, model: Model) -> None:
        story = watch(model, SMALL.replace(prompt="", steps=1))
        assert story.words == []
        assert "A picture without a prompt" in page(story)

    def test_many_steps_are_thinned(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("safelight.explain.watch.MAX_MOMENTS", 8)
        steps: list[int] = []
        request = SMALL.replace(steps=12, guidance_scale=1.0, sampler="euler")
        story = watch(model, request, on_step=lambda step: steps.append(step.step))
        assert steps == list(range(1, 13))
        seen = [moment.step for moment in story.moments]
        assert len(seen) == len(set(seen)) == 8
        assert (seen[0], seen[-1]) == (1, 12)

    def test_one_picture(self, model: Model) -> None:
        with pytest.raises(SafelightError, match="count must be 1"):
            watch(model, PAIR.replace(count=2))


class TestAttention:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_sums_to_one_over_the_tokens(self, dtype: str) -> None:
        """This holds for the fast layers (float32, bfloat16) and the plain ones (float16)."""
        loaded = loaded_in(dtype)
        layers = telling_layers(unet_of(loaded))
        with recorded(layers) as weights:
            loaded.generate(SMALL.replace(steps=2, guidance_start=0))
        assert len(weights) == 2 * len(layers) == 2
        for one in weights:
            assert one.shape == (2, 4, 4, 48)  # guided, heads, 2×2, tokens
            assert one.dtype == torch.float32
            assert torch.allclose(one.sum(-1), torch.ones(2, 4, 4), atol=1e-5)

    def test_it_is_what_the_layer_computes(self) -> None:
        torch.manual_seed(0)
        layer = Attention(32, 4, context=24)
        x, context = torch.randn(1, 9, 32), torch.randn(1, 5, 24)
        with recorded([layer]) as weights:
            answer = layer(x, context)
        values = layer.to_v(context).unflatten(-1, (4, -1)).transpose(1, 2)
        again = layer.to_out[0]((weights[0] @ values).transpose(1, 2).flatten(2))
        assert torch.allclose(answer, again, atol=1e-6)

    def test_nothing_is_left_of_it(self, model: Model) -> None:
        layers = telling_layers(unet_of(model))

        def fail() -> None:
            with recorded(layers):
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert not any(layer._forward_pre_hooks for layer in layers)

    def test_things_light_up_where_they_were_asked_for(self, story: Story) -> None:
        maps = torch.stack([m.attention for m in story.moments if m.attention is not None])
        cat, pizza = (maps[:, i].mean(0) for i in (1, 4))
        assert cat[:4].sum() > 0.65 * cat.sum()
        assert pizza[4:].sum() > 0.65 * pizza.sum()

    def test_words_are_put_together_from_tokens(self, model: Model) -> None:
        assert model.tokenizer is not None
        words = words_of(model.tokenizer.with_words(None), "A Cat,  above\na zeppelin!")
        assert [word.text for word in words] == ["a", "cat", ",", "above", "a", "zeppelin", "!"]
        assert words[0].tokens == [1]
        assert all(a.tokens[-1] + 1 == b.tokens[0] for a, b in pairwise(words))
        assert len(words[5].tokens) > 1

    @pytest.mark.parametrize("syntax", ["plain", "a1111"])
    def test_words_are_in_their_own_letters(self, model: Model, syntax: Syntax) -> None:
        tokenizer = model.tokenizer.with_words(None)
        chunks = chunks_of(tokenizer, ((Piece("Ελλάδα 🐱 café"),),), syntax)
        assert [word.text for word in words_of_chunks(tokenizer, chunks)] == [
            "ελλάδα",
            "🐱",
            "café",
        ]

    def test_an_added_token_is_a_word_of_its_own(self, model: Model, tmp_path: Path) -> None:
        model.tokenizer.save(tmp_path)
        vocab = json.loads((tmp_path / "vocab.json").read_text())
        table = (tmp_path / "merges.txt").read_text().splitlines()[1:]
        merges = [(left, right) for left, right in map(str.split, table)]
        added = {len(vocab): AddedToken("<sks>"), len(vocab) + 1: AddedToken("дом")}
        tokenizer = Tokenizer(vocab, merges, max_length=32, added=added)
        words = words_of(tokenizer, "a <sks> cat, дом cat<sks>")
        assert [word.text for word in words] == ["a", "<sks>", "cat", ",", "дом", "cat", "<sks>"]
        shown = describe(read("a <sks> cat", "plain", steps=4), tokenizer, "plain")
        assert lines(shown)[-1].strip() == "a <sks> cat"

    @pytest.mark.parametrize("syntax", ["plain", "a1111", "comfy"])
    def test_a_textual_inversion_is_one_word(self, model: Model, tmp_path: Path, syntax) -> None:
        width = model.text_encoder.config.hidden_size
        save_file({"emb_params": torch.randn(4, width) * 0.05}, tmp_path / "my-ink.safetensors")
        name = "embedding:my-ink" if syntax == "comfy" else "my-ink"
        asked = Request(
            prompt=f"a {name} apple",
            prompt_syntax=syntax,
            embeddings=(str(tmp_path / "my-ink.safetensors"),),
            steps=1,
            sampler="euler",
            seed=1,
            width=64,
            height=64,
        )
        words = watch(model, asked).words
        assert [(word.text, word.tokens) for word in words] == [
            ("a", [1]),
            ("my-ink", [2, 3, 4, 5]),
            ("apple", [6]),
        ]

    @pytest.mark.parametrize(
        "text", ["", "...", "it's 1985", "Ελλάδα café 猫", "a" * 500, "a " * 99]
    )
    def test_words_cover_the_prompt_up_to_its_cut(self, model: Model, text: str) -> None:
        assert model.tokenizer is not None
        room = model.tokenizer.max_length - 2
        words = words_of(model.tokenizer, text)
        covered = [i for word in words for i in word.tokens]
        count = min(model.tokenizer.encode(text).count, room)
        assert covered == list(range(1, 1 + count))

    def test_maps_of_odd_sides(self, model: Model) -> None:
        """Latents of 9×14 have maps of 5×7."""
        assert model.tokenizer is not None
        weights = [torch.rand(1, 2, 35, 32).softmax(-1)]
        maps = word_maps(weights, words_of(model.tokenizer, "a cat"), (9, 14))
        assert maps is not None
        assert maps.shape == (2, 5, 7)
        assert torch.allclose(maps[1, 2, 3], weights[0][0, :, 2 * 7 + 3, 2].mean())

    def test_layers_of_other_networks(self) -> None:
        down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
        sizes = {"block_out_channels": (32, 32), "cross_attention_dim": 8, "norm_num_groups": 8}
        with torch.device("meta"):
            one = UNet2DConditionModel(
                UNetConfig(down_block_types=down, up_block_types=up, **sizes)
            )
            none = UNet2DConditionModel(
                UNetConfig(down_block_types=down, up_block_types=up[1:] * 2, **sizes)
            )
        deepest: Any = one.up_blocks[0]
        assert telling_layers(one) == [deepest.attentions[-1].transformer_blocks[0].attn2]
        assert telling_layers(none) == []


class TestColours:
    def test_a_linear_decoder_is_found(self) -> None:
        truth = torch.tensor([[0.3, -0.1, 0.1], [0.1, 0.2, -0.3], [0.0, 0.1, -0.1]])
        latents = [
            torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1)
        ]
        pictures = [in_colours(one, truth) for one in latents]
        assert torch.allclose(fit_colours(latents, pictures), truth, atol=5e-3)


class TestForward:
    def test_noise_grows(self, story: Story) -> None:
        sigmas = [noised.sigma for noised in story.forward]
        assert sigmas == sorted(sigmas)
        assert story.forward[0].picture.tobytes() == story.picture.tobytes()

    def test_the_same_seed_is_the_same_noise(self, model: Model) -> None:
        latents = torch.zeros(1, 8, 8, 8)
        one, two, other = (forward(model, latents, seed)[-1].picture for seed in (1, 1, 2))
        assert one.tobytes() == two.tobytes() != other.tobytes()


class Reader(HTMLParser):
    """Reads a page as a browser does, as far as it matters: elements, attributes, text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def tags(self) -> list[str]:
        return [tag for tag, _ in self.elements]


class TestPage:
    def test_it_is_small(self, story: Story) -> None:
        html = page(story)
        assert len(html.encode()) < 1.5 * 2**20

    def test_it_fetches_nothing(self, story: Story) -> None:
        html = page(story)
        read = Reader(html)
        for tag, attributes in read.elements:
            assert tag not in {"link", "iframe", "object", "embed", "base", "form"}
            for name in ("src", "href", "action", "srcset"):
                value = attributes.get(name) or "data:"
                assert value.startswith(("data:image/", "data:", "#")), value
        assert "://" not in html
        assert "@import" not in html
        policy = dict(read.elements)["meta"]
        assert (policy["content"] or "").startswith("default-src 'none'; img-src data:;")

    def test_no_prompt_adds_a_tag_or_a_script(self, model: Model, story: Story) -> None:
        hostile = SMALL.replace(prompt=SCRIPT, negative_prompt=SCRIPT + "'\" $title &amp;")
        read, plain = Reader(page(watch(model, hostile))), Reader(page(story))
        assert read.tags().count("script") == plain.tags().count("script") == 2
        assert set(read.tags()) == set(plain.tags())
        assert not any("onerror" in attributes for _, attributes in read.elements)
        assert SCRIPT in read.text
        assert "$title" in read.text

    def test_the_data_is_whole(self, story: Story) -> None:
        data = re.search(r'id="story">(.*?)</script>', page(story))
        assert data is not None
        told = json.loads(data[1])
        assert set(told["views"]) == {"noisy", "latents", "clean", "guidance", "unguided"}
        assert all(len(view) == 6 for view in told["views"].values())
        assert [moment["step"] for moment in told["moments"]] == list("123456")
        assert all(len(moment["masks"]) == 5 for moment in told["moments"])

    def test_every_text_is_there(self, story: Story) -> None:
        shown = Reader(page(story)).text
        parts = [text for name, text in texts.PARTS.items() if name != "transformer"]
        for text in (*parts, *texts.SETTINGS.values(), *texts.VIEWS.values()):
            assert text.title in shown
            assert text.body in shown
        assert texts.FORWARD["unet"] in shown
        assert texts.PARTS["transformer"].title not in shown
        known = {*Request.model_fields, "size"}
        assert set(texts.SETTINGS) <= known

    def test_texts_and_axes_need_no_torch(self) -> None:
        """The server shows the texts and reads the axes, and never imports PyTorch."""
        code = (
            "import sys, safelight.compare, safelight.explain.texts; print('torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout == "False\n"

    def test_from_a_picture(self, model: Model) -> None:
        html = page(watch(model, SMALL.replace(image=photo(), strength=0.5)))
        assert html.count("<small>the start</small>") == 2  # beside the seed and the strength
        assert "no picture" not in html


class TestCommand:
    def test_explain(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "explain.html"
        arguments = ["explain", "a cat", "--steps", "2", "--seed", "1", "--out", str(path)]
        arguments += ["--width", "64", "--height", "64"]
        assert cli.run(arguments) == 0
        assert capsys.readouterr().out == f"{path}\n"
        assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
        assert cli.run(arguments) == 2
        assert "exists" in capsys.readouterr().err
        assert cli.run([*arguments, "--overwrite"]) == 0

    def test_unconditional(self, tmp_path: Path) -> None:
        path = tmp_path / "explain.html"
        steps = ["--sampler", "ddim", "--steps", "2"]
        assert cli.run(["explain", "--unconditional", *steps, "--out", str(path)]) == 0
        assert path.is_file()

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            ([], "PROMPT is missing"),
            (["a cat", "--out", "a.png"], "name.html"),
            (["a cat", "--steps", "0"], "1 to 1000"),
        ],
    )
    def test_refuses(
        self,
        arguments: list[str],
        named: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert cli.run(["explain", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert named in error
        assert list(tmp_path.iterdir()) == []


def unet_of(model: Model) -> UNet2DConditionModel:
    assert isinstance(model.unet, UNet2DConditionModel)
    return model.unet
