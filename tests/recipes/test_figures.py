"""The judge, and the figures made from its answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from things import HELD_OUT

import safelight
from recipes.embedded import figures, unconditional
from recipes.embedded.captions import SCENES
from recipes.embedded.colours import PAINTS, WHITE
from recipes.embedded.figures import (
    SEEDS,
    Asked,
    composed_of,
    different,
    edge_energy,
    frechet,
    invent,
    score,
)
from recipes.embedded.judge import (
    FIRST,
    GROUNDS,
    NOTHING,
    SECOND,
    WHOLE,
    Judge,
    Verdict,
    answers,
    answers_known,
    judge_of,
    places,
)
from recipes.embedded.scenes import Scene, Scenes, held_back
from recipes.embedded.stage import Stage
from recipes.embedded.unconditional import named
from safelight.errors import SafelightError
from safelight.train.plan import Plan
from safelight.words import split_words

NAMES = ["a red apple", "an owl", "scissors"]


def test_places_of_a_pair() -> None:
    weights = places(Scene("pair", ("a", "b"), "flat", where="to the left of"))
    assert weights.sum((1, 2)).allclose(torch.ones(3))
    assert weights[FIRST, :, 4:].sum() == 0
    assert weights[SECOND, :, :4].sum() == 0
    weights = places(Scene("pair", ("a", "b"), "flat", where="below"))
    assert weights[FIRST, :4].sum() == 0
    assert places(Scene("one", ("a",), "flat"))[FIRST].eq(1 / 64).all()


def test_the_judge_looks_where_it_is_asked_to() -> None:
    judge = Judge(2).eval()
    seen = torch.zeros(1, 256, 8, 8)
    seen[0, 0, 2, 1] = seen[0, 1, 5, 6] = 1  # what marks one thing on the left, one on the right
    judge.body = torch.nn.Sequential(Given(seen))
    judge.concept.load_state_dict({"weight": torch.eye(2, 256), "bias": torch.zeros(2)})
    where = places(Scene("pair", ("a", "b"), "flat", where="to the left of"))[None]
    plain = judge(torch.zeros(1, 3, 128, 128), where)[0][0]
    assert plain.allclose(torch.tensor([[1 / 64, 1 / 64], [1 / 32, 0], [0, 1 / 32]]))
    judge.attend.weight.data[0, 0] = 100
    close = judge(torch.zeros(1, 3, 128, 128), where)[0][0]
    assert close.allclose(torch.tensor([[1, 0], [1, 0], [0, 1 / 32]]))


class Given(torch.nn.Module):
    """Returns the given maps for all pictures."""

    def __init__(self, maps: torch.Tensor) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.maps


def test_what_the_judge_is_asked() -> None:
    number = {name: i for i, name in enumerate(NAMES)}
    one = Scene("coloured", ("an owl",), "flat", "pink", ("blue",))
    ground, blue = GROUNDS.index("pink"), PAINTS.index("blue")
    assert answers(one, number) == (1, NOTHING, NOTHING, ground, blue, 0)
    pair = Scene("pair", ("scissors", "an owl"), "flat", "snow", where="above")
    assert answers(pair, number) == (NOTHING, 2, 1, GROUNDS.index("snow"), NOTHING, 1)
    either = Scene("pair", ("scissors", "an owl"), "flat", where="next to")
    assert answers(either, number)[:3] == (NOTHING,) * 3
    several = Scene("several", ("scissors",), "flat", count=4)
    assert answers(several, number)[-1] == 3


def test_the_judge_learns_to_tell(
    stage: Stage, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.embedded.judge.POOL", 160)
    plan = Plan(steps=25, batch=16, learning_rate=2e-3, warmup=3, ema=0.8)
    judge = judge_of(stage, path, tmp_path, plan)
    pictures, wanted = stage.batch(40, np.random.default_rng(1), kind="one", ground=WHITE)
    asked = [Asked("one", scene) for scene in wanted]
    verdict = judge.look(pictures, wanted)
    found = score(asked, verdict, NAMES)
    assert found["thing, one"]["of"] == 40
    assert found["thing, one"]["right"] > 0.9
    # The judge is kept if only last bits of the drawings differ, and refused if the names do.
    monkeypatch.setattr(stage.scenes, "sha256", "another")
    again = judge_of(stage, path, tmp_path, plan).look(pictures, wanted)
    assert torch.equal(again.concepts, verdict.concepts)
    # One that lies beside the recipe serves every folder.
    monkeypatch.setattr("recipes.embedded.judge.KEPT", tmp_path / "judge.safetensors")
    elsewhere = judge_of(stage, path, tmp_path / "elsewhere").look(pictures, wanted)
    assert torch.equal(elsewhere.concepts, verdict.concepts)
    assert not (tmp_path / "elsewhere").exists()
    # Another plan goes on from it.
    brief = Plan(steps=1, batch=16, learning_rate=1e-6)
    further = judge_of(stage, path, tmp_path / "further", brief).look(pictures, wanted)
    assert score(asked, further, NAMES)["thing, one"]["right"] > 0.9
    weights = load_file(tmp_path / "judge.safetensors")
    del weights["attend.bias"]
    kept = tmp_path / "elsewhere" / "judge.safetensors"
    kept.parent.mkdir()
    save_file(weights, kept, {"answers": answers_known(NAMES)})
    with pytest.raises(SafelightError, match="of other layers: remove it"):
        judge_of(stage, path, kept.parent)
    names = dict(stage.scenes.names)
    names["a thing"] = names.pop(next(iter(names)))
    monkeypatch.setattr(stage.scenes, "names", names)
    with pytest.raises(SafelightError, match="trained on other things"):
        judge_of(stage, path, tmp_path, plan)


def test_prompts_of_all_groups(scenes: Scenes) -> None:
    asked = invent(scenes, None, HELD_OUT, share=0.1)
    assert len(asked) == 120
    again = invent(scenes, None, HELD_OUT, share=0.1)
    assert [a.scene.said for a in asked] == [a.scene.said for a in again]
    for a in asked:
        scene = a.scene
        held = scene.colour is not None and held_back(scene.colour, scene.concepts[0])
        assert held == (a.group == "coloured, held out")
        assert held_back(scene.style, scene.concepts[0]) == (a.group == "style, held out")
        said = scene.said.replace("grey", "gray").replace("violet", "purple")
        assert a.group != "background" or scene.ground in said
        assert (a.group == "unknown word") == (
            not set(HELD_OUT).isdisjoint(split_words(scene.said))
        )
    one, other = ([a.scene for a in asked if a.group == group] for group in ("one", "unknown word"))
    assert [s.concepts for s in one] == [s.concepts for s in other]
    # Without a word that training has never seen, there are no such prompts.
    assert not [a for a in invent(scenes, None, [], share=0.1) if a.group == "unknown word"]


def test_prompts_hold_what_a_model_was_taught(
    scenes: Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "TRIES", 20)
    known = frozenset(scenes.words() - {word for p in SCENES["snow"] for word in split_words(p)})
    asked = invent(scenes, known, [], share=0.1)
    assert asked
    assert all(known.issuperset(split_words(a.scene.said)) for a in asked)


def test_scores() -> None:
    scenes = [
        Asked("one", Scene("one", ("an owl",), "flat")),
        Asked("background", Scene("one", ("an owl",), "flat", "pink")),
        Asked("scene", Scene("one", ("an owl",), "flat", "snow")),
        Asked("coloured", Scene("coloured", ("scissors",), "flat", paints=("blue",))),
        Asked("several", Scene("several", ("scissors",), "flat", count=3)),
        Asked("pair", Scene("pair", ("scissors", "an owl"), "flat", where="above")),
        Asked("pair", Scene("pair", ("scissors", "an owl"), "flat", where="above")),
    ]
    concepts = torch.full((7, 3, 3), -9.0)
    for i, right in enumerate((1, 0, 1, 2, 2)):
        concepts[i, WHOLE, right] = 0.0
    concepts[5, FIRST, 2] = concepts[5, SECOND, 1] = 0.0
    concepts[6, FIRST, 1] = concepts[6, SECOND, 2] = 0.0
    verdict = Verdict(
        concepts,
        torch.tensor([0, GROUNDS.index("pink"), GROUNDS.index("rain"), 0, 0, 0, 0]),
        torch.tensor([0, 0, 0, PAINTS.index("blue"), 0, 0, 0]),
        torch.tensor([1, 1, 1, 1, 2, 2, 2]),
    )
    assert score(scenes, verdict, NAMES) == {
        "thing, one": {"right": 1.0, "of": 1},
        "thing, background": {"right": 0.0, "of": 1},
        "background": {"right": 1.0, "of": 1},
        "thing, scene": {"right": 1.0, "of": 1},
        "scene": {"right": 0.0, "of": 1},
        "thing, coloured": {"right": 1.0, "of": 1},
        "colour, coloured": {"right": 1.0, "of": 1},
        "thing, several": {"right": 1.0, "of": 1},
        "count": {"right": 0.0, "of": 1},
        "both of a pair": {"right": 0.5, "of": 2},
        "relation": {"right": 0.5, "of": 2},
    }


def test_frechet_distance_of_two_normal_clouds() -> None:
    """For normals with the same axes it is |Δmean|² + Σ (σ₁ − σ₂)²."""
    rng = np.random.default_rng(0)
    one = rng.normal(size=(200_000, 3)) * (1.0, 2.0, 3.0)
    other = rng.normal(size=(200_000, 3)) * (2.0, 2.0, 1.0) + (0.0, 1.0, 0.0)
    assert frechet(one, other) == pytest.approx(1 + 1 + 4, rel=0.02)
    assert frechet(one, one) == pytest.approx(0.0, abs=1e-6)


def test_pictures_that_differ_and_edges() -> None:
    gray = np.full((3, 64, 64, 3), 100, np.uint8)
    assert different(gray) == 1
    gray[1] += 15  # less than is visible by APART
    gray[2] += 40
    assert different(gray) == 2
    striped = np.zeros((1, 64, 64, 3), np.uint8)
    striped[:, :, ::2] = 255
    # Each pixel differs from its neighbour in the row by 2 of −1..1.
    assert edge_energy(striped) == pytest.approx(4.0)


def test_composed_pictures_of_a_prompt(stage: Stage) -> None:
    owls = composed_of(stage, "an owl", ground="snow", paint="red")
    assert owls.shape == (SEEDS, stage.size, stage.size, 3)
    assert len(np.unique(owls, axis=0)) == SEEDS
    assert owls[:, 0, 0].mean() > owls[:, 32, 32, 1:].mean()  # light behind, red in the middle


class Sure:
    """A judge that is sure of one concept where a picture is dark, and of none elsewhere."""

    def look(self, pictures: np.ndarray[Any, Any], scenes: list[Scene]) -> Verdict:
        concepts = torch.zeros(len(pictures), 3, len(NAMES))
        for i, picture in enumerate(pictures):
            concepts[i, WHOLE, picture[0, 0, 0] % len(NAMES)] = 9.0 if picture.mean() < 128 else 0.0
        nothing = torch.zeros(len(pictures))
        return Verdict(concepts.log_softmax(-1), nothing, nothing, nothing)


def test_pictures_that_a_judge_can_name() -> None:
    pictures = np.zeros((6, 8, 8, 3), np.uint8)
    pictures += np.array([0, 0, 1, 2, 200, 201], np.uint8)[:, None, None, None]
    # The third concept is not among those that were taught.
    found = named(cast(Judge, Sure()), pictures, [0, 1])
    assert found == {"named": 0.5, "names": 2}


def test_a_model_without_words_is_judged(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unconditional, "DRAWN", 5)
    monkeypatch.setattr(unconditional, "AT_ONCE", 2)
    monkeypatch.setitem(unconditional.DRAW_PIXELS_WITH, "steps", 2)
    model = safelight.load("embedded-unconditional", dtype="float32")
    judge, seen = Sure(), list[int]()
    look = judge.look
    monkeypatch.setattr(
        judge, "look", lambda some, *more: seen.append(len(some)) or look(some, *more)
    )
    path = unconditional.evaluate(model, cast(Judge, judge), stage, tmp_path / "out")
    found = json.loads(path.read_text())
    assert found["pictures"] == 5
    for of in ("drawn", "composed"):
        assert 0 <= found[of]["names"] <= len(NAMES)
    assert seen == [5, 5]
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.width > sheet.height > 0  # up to ten in a row


def test_nearest_finds_a_copy(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.embedded.scenes.LARGE_SHARE", (0.8, 0.8))
    rng = np.random.default_rng(0)
    drawn, wanted = stage.batch(3, rng, kind="one", concept="an apple", ground=WHITE)
    found = figures._nearest(drawn.numpy(), wanted, stage, tmp_path / "nearest.png")
    # Of one size; its place still varies, by 0.08 of a side. Another thing is 40 away or more.
    assert found["smallest"] < 20
    assert (tmp_path / "nearest.png").is_file()
    assert figures._nearest(drawn.numpy(), [], stage, tmp_path / "none.png") == {}
