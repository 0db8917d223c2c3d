"""The text encoder learns to say what captions mean."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from recipes.embedded.judge import GROUNDS
from recipes.embedded.scenes import Scene, Scenes
from recipes.embedded.train import DRY
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


def test_it_is_asked_at_the_end_and_after_it() -> None:
    ids = torch.tensor([[7, 1, 9, 9, 9, 9], [7, 1, 2, 3, 4, 9]])
    seen = torch.stack([ends(ids, 9, Draw.of(0, step)) for step in range(50)])
    assert set(seen[:, 0, 0].tolist()) == {2}
    assert set(seen[:, 0, 1].tolist()) == {2, 3, 4, 5}
    assert set(seen[:, 1].flatten().tolist()) == {5}


def test_the_text_encoder_learns_what_is_meant(scenes: Scenes, path: Path, tmp_path: Path) -> None:
    text_config = replace(DRY.networks.text, hidden_size=32)
    corpus = [*scenes.captions_corpus(), *scenes.unknown]
    tokenizer = train_vocabulary(corpus, 900, tmp_path / "tokenizer", 48)
    torch.manual_seed(0)
    text = CLIPTextModel(replace(text_config, vocab_size=900))
    before = {name: weight.clone() for name, weight in text.state_dict().items()}
    plan = replace(DRY.text_plan, steps=120, batch=32, learning_rate=5e-3, warmup=10, ema=0.9)
    parts = scenes, path, tokenizer, 512, plan, tmp_path / "words", "cpu"
    told = teach(text, *parts)
    # Of three things, and of captions with words that mean nothing among them.
    assert told > 0.8
    assert any(not torch.equal(before[n], w) for n, w in text.state_dict().items())
    # Run again, it has nothing left to do and says the same.
    torch.manual_seed(0)
    again = CLIPTextModel(replace(text_config, vocab_size=900))
    assert teach(again, *parts) == told


def test_a_reader_that_knows_nothing_guesses(scenes: Scenes) -> None:
    torch.manual_seed(0)
    questions = Questions(scenes)
    reader = Reader(CLIPTextModel(DRY.networks.text), questions.sizes)
    rng = np.random.default_rng(0)
    shown = [scenes.invent(rng) for _ in range(64)]
    ids = torch.full((64, 48), 5)
    right = torch.tensor([questions.right(scene) for scene in shown])
    told = understood(reader, ids, right, 5)
    assert len(told) == len(questions.sizes)
    assert told[0] < 0.7
    where = torch.zeros(64, 1, dtype=torch.long)
    loss = reader.error(reader(ids, where).detach(), right)
    chance = sum(np.log(size) for size in questions.sizes)
    assert 0.8 * chance < float(loss) < 1.3 * chance
