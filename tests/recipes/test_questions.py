"""The text encoder learns to say what captions mean, and what their things look like."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes.embedded.captions import STYLES
from recipes.embedded.judge import GROUNDS
from recipes.embedded.looks import PARTS, Looks, cut
from recipes.embedded.principal import Principal
from recipes.embedded.scenes import Scene, Scenes, held_back
from recipes.embedded.sizes import DRY
from recipes.embedded.stage import Stage
from recipes.embedded.words import Questions, Reader, ends, teach, understood
from safelight.nets.clip import CLIPTextModel
from safelight.train.loop import Draw
from safelight.train.tokens import train_vocabulary


def answered(scenes: Scenes, scene: Scene) -> list[object]:
    questions = Questions(scenes)
    right = questions.right(scene)
    assert len(right) == len(questions.sizes)
    return [some[i] for some, i in zip(questions.answers, right, strict=True)]


def test_the_right_answers(scenes: Scenes) -> None:
    one = Scene("sized", ("an owl",), "flat", ground="snow", size="huge")
    assert answered(scenes, one) == [
        "an owl", None, None, None, "snow", 1, None, "big", "flat",
    ]  # fmt: skip
    pair = Scene("pair", ("an owl", "scissors"), "3d", "red", paints=("green", None), where="above")
    assert answered(scenes, pair) == [
        "an owl", "scissors", "green", None, "red", 1, "above", None, "3d",
    ]  # fmt: skip
    some = Scene("several", ("an owl",), "cartoon", count=3)
    assert answered(scenes, some)[5] == 3
    # Each scene that is invented has answers, and all grounds are among them.
    rng = np.random.default_rng(0)
    for _ in range(300):
        answered(scenes, scenes.invent(rng))
    assert Questions(scenes).answers[4] == list(GROUNDS)


@pytest.fixture(scope="module")
def looks(scenes: Scenes) -> Looks:
    torch.manual_seed(0)
    stage = Stage(scenes, "cpu", 32, variants=1)
    pictures, _ = stage.batch(16, np.random.default_rng(0))
    return Looks(stage, Principal.of([pictures], 8))


def test_looks_are_those_of_each_thing_style_and_colour(scenes: Scenes, looks: Looks) -> None:
    pair = Scene("pair", ("an owl", "scissors"), "3d", "red", paints=("green", None), where="above")
    rows = looks.rows(pair)
    assert len(rows) == 2 * len(STYLES)
    assert looks.rows(Scene("one", ("an owl",), "3d"))[len(STYLES) :] == [-1] * len(STYLES)
    for i, (concept, paint) in enumerate(zip(pair.concepts, pair.paints, strict=True)):
        for j, style in enumerate(STYLES):
            held_out = held_back(style, concept) or (paint and held_back(paint, concept))
            fit = paint is None or paint in scenes.paints(concept, style)
            assert (rows[len(STYLES) * i + j] >= 0) == (fit and not held_out)
    there = [row for row in rows if row >= 0]
    assert len(set(there)) == len(there)
    assert float(looks.parts.mean()) == pytest.approx(0, abs=1e-4)
    assert float(looks.parts.std()) == pytest.approx(1, abs=1e-3)


def test_what_is_told_is_compared_with_the_looks(scenes: Scenes, looks: Looks) -> None:
    shown = [Scene("one", ("an owl",), "flat"), Scene("pair", ("scissors", "an owl"), "flat")]
    shown = [replace(one, paints=(None,) * len(one.concepts)) for one in shown]
    rows = torch.tensor([looks.rows(scene) for scene in shown])
    right = looks.parts[rows.clamp(min=0)].transpose(1, 2).flatten(2)
    assert right.shape == (2, PARTS, looks.numbers)
    assert float(looks.unexplained(right, rows)) == 0
    # Rows of −1, things that do not exist, do not count.
    other = torch.where((rows < 0)[:, None, :, None], 7.0, right.unflatten(2, (rows.shape[1], -1)))
    assert float(looks.unexplained(other.flatten(2), rows)) == 0
    nothing = float(looks.unexplained(torch.zeros_like(right), rows))
    assert nothing == pytest.approx(float(looks.parts[rows[rows >= 0]].square().mean()), rel=1e-4)


def test_parts_are_squares_of_the_picture() -> None:
    latents = torch.arange(64.0).view(1, 1, 8, 8)
    parts = cut(latents)
    assert parts.shape == (1, PARTS, 4)
    assert parts[0, 1].tolist() == [2, 3, 10, 11]
    assert parts[0, 4].tolist() == [16, 17, 24, 25]


def test_it_is_asked_at_the_end_and_after_it() -> None:
    """It is not asked at the last states, which tell the looks."""
    ids = torch.full((2, 6 + PARTS), 9)
    ids[0, :2] = ids[1, :5] = 7
    seen = torch.stack([ends(ids, 9, Draw.of(0, step)) for step in range(50)])
    assert set(seen[:, 0, 0].tolist()) == {2}
    assert set(seen[:, 0, 1].tolist()) == {2, 3, 4, 5}
    assert set(seen[:, 1].flatten().tolist()) == {5}


def test_the_text_encoder_learns_what_is_meant(
    scenes: Scenes, path: Path, looks: Looks, tmp_path: Path
) -> None:
    text_config = replace(DRY.networks.text, hidden_size=32)
    corpus = [*scenes.captions_corpus(), *scenes.unknown]
    tokenizer = train_vocabulary(corpus, 900, tmp_path / "tokenizer", 48)
    torch.manual_seed(0)
    text = CLIPTextModel(replace(text_config, vocab_size=900))
    before = {name: weight.clone() for name, weight in text.state_dict().items()}
    plan = replace(DRY.text_plan, steps=240, batch=32, learning_rate=5e-3, warmup=10, ema=0.9)
    parts = scenes, path, tokenizer, looks, 512, plan, tmp_path / "words", "cpu"
    told, explained = teach(text, *parts)
    # Of three things, and of captions with words that mean nothing among them.
    assert told > 0.8
    assert explained > 0.3
    assert any(not torch.equal(before[n], w) for n, w in text.state_dict().items())
    # Run again, it has nothing left to do and says the same.
    torch.manual_seed(0)
    again = CLIPTextModel(replace(text_config, vocab_size=900))
    assert teach(again, *parts) == (told, explained)


def test_a_reader_that_knows_nothing_guesses(scenes: Scenes) -> None:
    torch.manual_seed(0)
    questions = Questions(scenes)
    reader = Reader(CLIPTextModel(DRY.networks.text), questions.sizes, 3)
    rng = np.random.default_rng(0)
    shown = [scenes.invent(rng) for _ in range(64)]
    ids = torch.full((64, 48), 5)
    right = torch.tensor([questions.right(scene) for scene in shown])
    told, _ = understood(reader, ids, right, 5)
    assert len(told) == len(questions.sizes)
    assert told[0] < 0.7
    where = torch.zeros(64, 1, dtype=torch.long)
    loss = reader.error(reader(ids, where)[0].detach(), right)
    chance = sum(np.log(size) for size in questions.sizes)
    assert 0.8 * chance < float(loss) < 1.3 * chance
