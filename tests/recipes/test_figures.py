"""The judge, and the figures that are made of what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from safelight.evaluate import figures
from safelight.evaluate.figures import Asked, frechet, invent, score
from safelight.evaluate.judge import FIRST, SECOND, WHOLE, Verdict, answers, places, train_judge
from safelight.train import cutouts
from safelight.train.captions import STYLES
from safelight.train.colours import COLOURS, PAINTS
from safelight.train.loop import Plan
from safelight.train.recipe import MIXED, Scene, Scenes, kept_back

NAMES = ["a red apple", "an owl", "a car"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    """A red disc, a yellow square and a blue triangle."""
    rows, pictures = [], []
    last = cutouts.SIDE - 1
    for name, colour in zip(NAMES, ("#d62828", "#fad832", "#285cd4"), strict=True):
        image = Image.new("RGBA", (cutouts.SIDE, cutouts.SIDE))
        pen = ImageDraw.Draw(image)
        if name == "a red apple":
            pen.ellipse((0, 0, last, last), fill=colour)
        elif name == "an owl":
            pen.rectangle((0, 0, last, last), fill=colour)
        else:
            pen.polygon([(0, last), (last, last), (last // 2, 0)], fill=colour)
        for style in STYLES:
            rows.append({"concept": name, "style": style})
            pictures.append(np.array(image))
    concepts = [{"code": str(i), "names": [name]} for i, name in enumerate(NAMES)]
    path = cutouts.save(tmp_path_factory.mktemp("data"), np.stack(pictures), rows, concepts)
    return Scenes(path, kinds=MIXED)


def test_places_of_a_pair() -> None:
    weights = places(Scene("pair", ("a", "b"), "flat", where="to the left of"))
    assert weights.sum((1, 2)).allclose(torch.ones(3))
    assert weights[FIRST, :, 4:].sum() == 0
    assert weights[SECOND, :, :4].sum() == 0
    weights = places(Scene("pair", ("a", "b"), "flat", where="below"))
    assert weights[FIRST, :4].sum() == 0
    assert places(Scene("one", ("a",), "flat"))[FIRST].eq(1 / 64).all()


def test_what_the_judge_is_asked() -> None:
    number = {name: i for i, name in enumerate(NAMES)}
    one = Scene("coloured", ("an owl",), "flat", "pink", colour="blue")
    assert answers(one, number) == (
        1,
        -100,
        -100,
        list(COLOURS).index("pink"),
        PAINTS.index("blue"),
        0,
    )
    pair = Scene("pair", ("a car", "an owl"), "flat", where="above")
    assert answers(pair, number) == (-100, 2, 1, 0, -100, 1)
    several = Scene("several", ("a car",), "flat", count=4)
    assert answers(several, number)[-1] == 3


def test_the_judge_learns_to_tell(scenes: Scenes, tmp_path: Path) -> None:
    plan = Plan(steps=60, batch=16, learning_rate=2e-3, warmup=5, ema=0.9)
    judge = train_judge(scenes, tmp_path, plan)
    asked = [Asked("one", scenes.invent(np.random.default_rng(i), "one")) for i in range(60)]
    wanted = [a.scene for a in asked]
    rng = np.random.default_rng(0)
    pictures = np.stack([scenes.compose(rng, scene) for scene in wanted])
    found = score(asked, judge.look(pictures, wanted), NAMES)
    assert found["concept, one"]["of"] == 60
    assert found["concept, one"]["right"] > 0.9


def test_prompts_of_all_groups(scenes: Scenes) -> None:
    asked = invent(scenes, share=0.1)
    assert len(asked) == 100
    again = invent(scenes, share=0.1)
    assert [a.scene.said for a in asked] == [a.scene.said for a in again]
    for a in asked:
        held = a.scene.colour is not None and kept_back(a.scene.colour, a.scene.concepts[0])
        assert held == (a.group == "coloured, held out")
        assert a.group != "background" or a.scene.background in a.scene.said


def test_scores() -> None:
    scenes = [
        Asked("one", Scene("one", ("an owl",), "flat")),
        Asked("background", Scene("one", ("an owl",), "flat", "pink")),
        Asked("coloured", Scene("coloured", ("a car",), "flat", colour="blue")),
        Asked("several", Scene("several", ("a car",), "flat", count=3)),
        Asked("pair", Scene("pair", ("a car", "an owl"), "flat", where="above")),
        Asked("pair", Scene("pair", ("a car", "an owl"), "flat", where="above")),
    ]
    concepts = torch.full((6, 3, 3), -9.0)
    for i, right in enumerate((1, 0, 2, 2)):
        concepts[i, WHOLE, right] = 0.0
    concepts[4, FIRST, 2] = concepts[4, SECOND, 1] = 0.0
    concepts[5, FIRST, 1] = concepts[5, SECOND, 2] = 0.0
    verdict = Verdict(
        concepts,
        torch.tensor([0, list(COLOURS).index("pink"), 0, 0, 0, 0]),
        torch.tensor([0, 0, PAINTS.index("blue"), 0, 0, 0]),
        torch.tensor([1, 1, 1, 2, 2, 2]),
    )
    assert score(scenes, verdict, NAMES) == {
        "concept, one": {"right": 1.0, "of": 1},
        "concept, background": {"right": 0.0, "of": 1},
        "background": {"right": 1.0, "of": 1},
        "colour": {"right": 1.0, "of": 1},
        "concept, coloured": {"right": 1.0, "of": 1},
        "concept, several": {"right": 1.0, "of": 1},
        "count": {"right": 0.0, "of": 1},
        "pair, both right": {"right": 0.5, "of": 2},
        "relation": {"right": 0.5, "of": 2},
    }


def test_frechet_distance_of_two_normal_clouds() -> None:
    """Of normals with the same axes it is |Δmean|² + Σ (σ₁ − σ₂)²."""
    rng = np.random.default_rng(0)
    one = rng.normal(size=(200_000, 3)) * (1.0, 2.0, 3.0)
    other = rng.normal(size=(200_000, 3)) * (2.0, 2.0, 1.0) + (0.0, 1.0, 0.0)
    assert frechet(one, other) == pytest.approx(1 + 1 + 4, rel=0.02)
    assert frechet(one, one) == pytest.approx(0.0, abs=1e-6)


def test_nearest_finds_a_copy(scenes: Scenes, tmp_path: Path) -> None:
    wanted = [scenes.invent(np.random.default_rng(i), "one", background="pink") for i in range(3)]
    fresh = Scenes.__new__(Scenes)
    fresh.__dict__ = {**scenes.__dict__, "steady": True}
    rng = np.random.default_rng(0)
    drawn = np.stack([fresh.compose(rng, scene) for scene in wanted])
    found = figures._nearest(drawn, wanted, scenes, tmp_path / "nearest.png")
    assert found["smallest"] < 5  # backgrounds vary a little
    assert (tmp_path / "nearest.png").is_file()
