"""The models that ship: they are small enough, and draw what prompts say."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

import safelight
from safelight.model import Model
from safelight.words import split_words

MODELS = Path(safelight.__file__).parent / "models"
MIB = 2**20


@pytest.mark.parametrize(
    ("name", "most"), [("embedded", 32), ("embedded-fast", 32), ("embedded-unconditional", 4)]
)
def test_size(name: str, most: int) -> None:
    files = [path for path in (MODELS / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= most * MIB


@pytest.fixture(scope="module")
def model() -> Model:
    return safelight.load(device="cpu", dtype="float32")


def draw(model: Model, prompt: str) -> np.ndarray:
    """Return the mean of four pictures, as float [64, 64, 3]: one seed may be unlucky."""
    result = model.generate(prompt, seed=1, count=2, steps=8, sampler="dpmpp_2m")
    assert result.warnings == []
    small = [image.reduce(image.width // 64) for image in result.images]
    return np.mean([np.asarray(image, float) for image in small], axis=0)


def test_a_red_apple_is_red_on_white(model: Model) -> None:
    picture = draw(model, "a red apple")
    red, green, blue = picture[24:44, 22:42].mean(axis=(0, 1))
    assert red > green + 60
    assert red > blue + 60
    assert picture[:3].mean() > 240


@pytest.mark.parametrize(("colour", "channel"), [("blue", 2), ("red", 0), ("green", 1)])
def test_the_background_has_the_colour_that_was_asked_for(
    model: Model, colour: str, channel: int
) -> None:
    corners = draw(model, f"a rocket on a {colour} background")[:4, :4].mean(axis=(0, 1))
    assert corners.argmax() == channel
    assert corners[channel] - np.delete(corners, channel).max() > 50


def test_words_change_the_picture(model: Model) -> None:
    """A banana is yellow, a frog green, a bomb coal-black, in the middle of the picture."""
    banana, frog, bomb = (
        draw(model, f"a {thing}")[16:48, 16:48].mean(axis=(0, 1))
        for thing in ("banana", "frog", "bomb")
    )
    assert min(banana[0], banana[1]) > banana[2] + 30
    assert frog[1] > frog[0]
    assert bomb.mean() < min(banana.mean(), frog.mean())


def test_in_four_steps_it_is_the_thing_that_was_asked_for() -> None:
    fast = safelight.load("embedded-fast", device="cpu", dtype="float32")
    seen = {}
    for thing in ("a red apple", "a frog", "a rocket on a blue background"):
        drawn = fast.generate(thing, seed=2)
        assert drawn.warnings == []
        assert drawn.settings["steps"] == 4
        seen[thing] = np.asarray(drawn.images[0].resize((64, 64)), float)
    apple, frog, rocket = seen.values()
    assert middle(apple).argmax() == 0
    assert middle(frog).argmax() == 1
    assert rocket[:4, :4].mean(axis=(0, 1)).argmax() == 2


def test_a_preview_shows_what_the_picture_will_be(model: Model) -> None:
    run = model.stream("a red apple", seed=1)
    *_, early, _, last = (step.preview() for step in run)
    picture = np.asarray(run.result.images[0], dtype=float)
    other = model.generate("a banana", seed=1).images[0]
    far = np.abs(np.asarray(other) - picture).mean()
    assert all(np.abs(np.asarray(p) - picture).mean() < far / 2 for p in (early, last))


def test_without_words(model: Model) -> None:
    pixels = safelight.load("embedded-unconditional", device="cpu", dtype="float32")
    result = pixels.generate(unconditional=True, sampler="ddim", steps=20, seed=1, count=4)
    pictures = np.stack([np.asarray(image, float) for image in result.images])
    # An object in the middle of white: the rim is bright, the middle is not.
    rim = np.concatenate([pictures[:, 0].ravel(), pictures[:, :, 0].ravel()])
    assert rim.mean() > 200
    assert pictures[:, 8:24, 8:24].mean() < rim.mean() - 30


def test_in_bfloat16_the_pictures_are_the_same_but_for_rounding(model: Model) -> None:
    low = safelight.load(device="cpu", dtype="bfloat16")
    errors = []
    for prompt in ("a red apple", "a rocket on a blue background"):
        settings = {"seed": 1, "steps": 8, "sampler": "dpmpp_2m"}
        pictures = [m.generate(prompt, **settings).images[0] for m in (model, low)]
        exact, rounded = (np.asarray(picture, float) for picture in pictures)
        errors.append(((exact - rounded) ** 2).mean())
    psnr = 10 * np.log10(255**2 / np.mean(errors))
    assert psnr >= 40


def test_the_model_card_names_the_weights() -> None:
    card = (Path(__file__).parent.parent / "docs" / "model-card.md").read_text()
    files = sorted(MODELS.rglob("*.safetensors"))
    assert len(files) == 10
    for path in files:
        row = (
            f"| `{path.relative_to(MODELS)}` | `{hashlib.sha256(path.read_bytes()).hexdigest()}` |"
        )
        assert row in card


def test_the_vocabulary_page_has_what_the_model_knows(model: Model) -> None:
    page = (Path(__file__).parent.parent / "docs" / "vocabulary.md").read_text()
    things, _, rest = page.partition("## The 458 things")[2].partition("## Other names")
    named = [thing for block in things.split(".") for thing in block.split(",") if thing.strip()]
    assert len(named) == 458
    assert model.words is not None
    assert model.words.issuperset(split_words(things))
    names = rest[rest.index(":") : rest.index("## Colours")]
    assert model.words.issuperset(split_words(names))


def middle(picture: np.ndarray) -> np.ndarray:
    return picture[20:44, 20:44].mean(axis=(0, 1))


def test_a_thing_takes_another_colour(model: Model) -> None:
    cat, blue = middle(draw(model, "a cat")), middle(draw(model, "a blue cat"))
    assert cat[0] > cat[2] + 60
    assert blue[2] > blue[0] + 60


def test_two_things_stand_where_they_are_told_to(model: Model) -> None:
    """A banana is yellow, a frog green."""
    for prompt, first in (
        ("a banana to the left of a frog", np.s_[:, :32]),
        ("a frog to the right of a banana", np.s_[:, :32]),
    ):
        picture = draw(model, prompt)
        other = np.s_[:, 32:]
        banana, frog = ((255 - picture[half]).reshape(-1, 3).sum(axis=0) for half in (first, other))
        # Of pixels that are not white: a banana's lack only blue, a frog's lack red as well.
        assert banana[0] / banana[2] < frog[0] / frog[2]


def test_counts(model: Model) -> None:
    """Four things fill the corners of a square, two fill its sides."""
    ink = [255 - draw(model, f"{n} strawberries").mean(axis=2) for n in ("two", "four")]
    corners = [i[8:24, 8:24].mean() + i[40:56, 8:24].mean() for i in ink]
    assert corners[1] > corners[0]
    assert ink[0][26:38, 8:24].mean() > ink[1][26:38, 8:24].mean()
