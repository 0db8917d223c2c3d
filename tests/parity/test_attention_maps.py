"""Maps of attention in transformers of flow matching, against the scores inside diffusers."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline
from torch import Tensor

import safelight
from safelight.explain import texts
from safelight.explain.attention import recorded_jointly, word_maps
from safelight.explain.page import page
from safelight.explain.watch import watch
from safelight.families.flow import FlowFamily, Rows
from safelight.model import Model
from safelight.prompt.reading import Word
from safelight.request import Request
from tests.parity.flow_models import (
    make_flux,
    make_klein,
    make_qwen_image,
    make_sd3,
    make_zimage,
)

PROMPT = "a red apple on a table"
WORDS = ["a", "red", "apple", "on", "a", "table"]
NAMES = ("sd3", "sd3-alone", "sd3.5", "flux", "z-image", "klein", "qwen")
HEIGHT, WIDTH = SIDES = 6, 10
"""The sides of the latents: 15 tokens, which Z-Image fills up to 32; in FLUX.2, 60 tokens."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("maps")
    return {
        "sd3": make_sd3(root / "sd3"),
        "sd3-alone": make_sd3(root / "sd3-alone", t5=False),
        "sd3.5": make_sd3(
            root / "sd3.5", qk_norm="rms_norm", dual_attention_layers=(0, 1), num_layers=3
        ),
        "flux": make_flux(root / "flux", guided=True),
        "z-image": make_zimage(root / "z-image", shift=6.0),
        "klein": make_klein(root / "klein", distilled=False),
        "qwen": make_qwen_image(root / "qwen"),
    }


@pytest.fixture(params=NAMES)
def name(request: Any) -> str:
    return request.param


@cache
def loaded(folder: Path, plain: bool = True) -> Model:
    return safelight.load(folder, device="cpu", dtype="float32", plain=plain)


@contextmanager
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Yield a list that fills with the softmax of each call of PyTorch's attention."""
    found: list[Tensor] = []
    real = F.scaled_dot_product_attention

    def look(query: Tensor, key: Tensor, value: Tensor, *args: Any, **more: Any) -> Tensor:
        found.append(torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, dim=-1))
        return real(query, key, value, *args, **more)

    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", look)
        yield found


def theirs(
    name: str, folder: Path, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tensor], slice, slice]:
    """Return the softmax of the calls in which picture and text read each other, the places of the
    picture's tokens, and those of the text's.
    """
    picture, length = HEIGHT * WIDTH // (1 if name == "klein" else 4), rows.tokens.shape[1]
    first = slice(length, length + picture), slice(0, length)
    with torch.no_grad(), products(monkeypatch) as found:
        if name == "z-image":
            net: Any = diffusers.ZImageTransformer2DModel.from_pretrained(folder / "transformer")
            net([rows.x[0][:, None]], (1000 - rows.timestep) / 1000, [rows.tokens[0]])
            # One layer refines the picture, and one the text.
            return found[2:], slice(0, picture), slice(32, 32 + -(-length // 32) * 32)
        if name == "flux":
            net = diffusers.FluxTransformer2DModel.from_pretrained(folder / "transformer")
            ids = torch.zeros(HEIGHT // 2, WIDTH // 2, 3)
            ids[..., 1] = torch.arange(HEIGHT // 2)[:, None]
            ids[..., 2] = torch.arange(WIDTH // 2)
            net(
                F.pixel_unshuffle(rows.x, 2).flatten(2).transpose(1, 2),
                encoder_hidden_states=rows.tokens,
                pooled_projections=rows.pooled,
                timestep=rows.timestep / 1000,
                img_ids=ids.flatten(0, 1),
                txt_ids=torch.zeros(length, 3),
                guidance=rows.guidance,
            )
            return found, *first
        if name == "klein":
            net = diffusers.Flux2Transformer2DModel.from_pretrained(folder / "transformer")
            net(
                rows.x.flatten(2).transpose(1, 2),
                rows.tokens,
                rows.timestep / 1000,
                Flux2KleinPipeline._prepare_latent_ids(rows.x),
                Flux2KleinPipeline._prepare_text_ids(rows.tokens),
            )
            return found, *first
        if name == "qwen":
            net = diffusers.QwenImageTransformer2DModel.from_pretrained(folder / "transformer")
            net(
                F.pixel_unshuffle(rows.x, 2).flatten(2).transpose(1, 2),
                rows.tokens,
                timestep=rows.timestep / 1000,
                img_shapes=[[(1, HEIGHT // 2, WIDTH // 2)]],
            )
            return found, *first
        net = diffusers.SD3Transformer2DModel.from_pretrained(folder / "transformer")
        net(rows.x, rows.tokens, rows.pooled, rows.timestep)
    joint = [one for one in found if one.shape[-1] == picture + length]
    assert (len(joint) < len(found)) == (name == "sd3.5")  # the picture's own attention
    # diffusers has the picture first.
    return joint, slice(0, picture), slice(picture, picture + length)


def test_weights_are_those_inside_diffusers(
    name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(folders[name])
    family: Any = model.family
    with torch.inference_mode():
        read = family.encode_text(model, PROMPT)
        torch.manual_seed(1)
        rows = Rows(
            torch.randn(1, model.network.config.in_channels if name == "klein" else 16, *SIDES),
            torch.tensor([600.0]),
            read.tokens,
            read.pooled,
            torch.tensor([3.0]),
            list(read.lengths or ()),
        )
        products, picture = list(family.products(model)), HEIGHT * WIDTH // family.patch**2
        with ExitStack() as stack:
            each, [mean] = (
                [
                    stack.enter_context(recorded_jointly(some, picture, family.places))
                    for some in which
                ]
                for which in ([[one] for one in products], [products])
            )
            family.velocity(model, rows)
            assert mean == []  # there is one sum of all layers
    found, at, text = theirs(name, folders[name], rows, monkeypatch)
    assert len(each) == len(found) > 1
    layers = [other[0, :, at, text].mean(0) for other in found]
    for mine, expected in zip([*each, mean], [*layers, torch.stack(layers).mean(0)], strict=True):
        assert [one.shape for one in mine] == [(1, 1, *expected.shape)]
        torch.testing.assert_close(mine[0][0, 0], expected, atol=1e-5, rtol=1e-4)


def test_words_stand_where_their_tokens_are(name: str, folders: dict[str, Path]) -> None:
    model = loaded(folders[name])
    family: Any = model.family
    words: list[Word] = family.words(model, PROMPT)
    assert [word.text for word in words] == WORDS
    places = [place for word in words for place in word.tokens]
    assert len(set(places)) == len(places)
    names = names_of_tokens(name, model)
    for word in words:
        said = "".join(names[place] for place in word.tokens)
        for mark in ("▁", "Ġ", "</w>"):
            said = said.replace(mark, "")
        assert said in (word.text, word.text * 2)  # by CLIP and by T5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a red apple, on a table", ["a", "red", "apple,", "on", "a", "table"]),
        ("it's  An apple!? (red)", ["it's", "An", "apple!?", "(red)"]),
    ],
)
def test_clip_counts_where_marks_follow_words(
    folders: dict[str, Path], text: str, words: list[str]
) -> None:
    """CLIP's words end before a mark, and T5's do not."""
    model = loaded(folders["sd3"])
    family: Any = model.family
    found: list[Word] = family.words(model, text)
    assert [word.text for word in found] == words
    length = model.parts["tokenizer"].max_length
    for word in found:
        assert min(word.tokens) < length <= max(word.tokens)
    places = [place for word in found for place in word.tokens]
    assert len(set(places)) == len(places)
    clip = model.parts["tokenizer"].encode(text).count
    assert sum(place < length for place in places) == clip


def names_of_tokens(name: str, model: Model) -> list[str]:
    """Return the names of the tokens whose states the network reads of the prompt."""
    family: Any = model.family
    found: list[str] = []
    if name.startswith("sd3"):
        clip = model.parts["tokenizer"]
        found = [clip.name(number) for number in clip.encode(PROMPT).ids]
    if name == "sd3-alone":
        return found
    reader = family.reader(model.parts)
    said = f"{reader.before}{PROMPT}{reader.after}"
    ids = reader.tokenizer.encode(said, reader.most, pad=False).ids
    ids = ids[reader.dropped :]
    return found + [reader.tokenizer._backend.id_to_token(number) for number in ids]


@pytest.mark.parametrize("plain", [True, False])
def test_a_story_has_maps(name: str, folders: dict[str, Path], plain: bool) -> None:
    model = loaded(folders[name], plain)
    asked = Request(prompt=PROMPT, steps=2, width=96, height=64, seed=1, guidance_scale=2.0)
    story = watch(model, asked)
    assert isinstance(model.family, FlowFamily)
    assert [word.text for word in story.words] == WORDS
    for moment in story.moments:
        assert moment.attention is not None
        sides = (side // model.family.patch for side in story.shape[1:])
        assert moment.attention.shape == (6, *sides)
        assert (moment.attention > 0).all()
        assert (moment.attention.sum(0) < 1).all()
    [picture] = model.generate(asked).images
    assert story.picture.tobytes() == picture.tobytes()
    shown = page(story)
    assert escape(texts.ATTENTION["transformer"]) in shown
    assert escape(texts.ATTENTION["unet"]) not in shown


def test_a_map_is_light_where_a_word_is_used() -> None:
    weights = torch.zeros(1, 1, 4, 5)  # 2×2 places
    weights[0, 0, 3, 2] = 0.5
    weights[0, 0, 0, 4] = 0.25
    maps = word_maps([weights], [Word("one", [2, 4]), Word("two", [1])], (4, 4))
    assert maps is not None
    assert maps.tolist() == [[[0.25, 0.0], [0.0, 0.5]], [[0.0, 0.0], [0.0, 0.0]]]


@pytest.mark.parametrize("text", ["", "  ", "apple " * 700, "an apple,\non  a table!", "ÄÖ é"])
def test_words_of_odd_texts(name: str, folders: dict[str, Path], text: str) -> None:
    model = loaded(folders[name])
    family: Any = model.family
    read = family.encode_text(model, text)
    count = read.lengths[0] if read.lengths else read.tokens.shape[1]
    for word in family.words(model, text):
        assert word.text.strip() == word.text != ""
        assert all(0 <= place < count for place in word.tokens)


def test_a_prompt_in_another_syntax_is_read_without_its_marks(folders: dict[str, Path]) -> None:
    asked = Request(
        prompt="a (red:1.3) apple", prompt_syntax="a1111", steps=1, width=64, height=64, seed=1
    )
    story = watch(loaded(folders["flux"]), asked)
    assert [word.text for word in story.words] == ["a", "red", "apple"]
