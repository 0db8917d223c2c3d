"""A family of models is one file: everything draws with the toy family's file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import safelight
from safelight import Request, SafelightError, families
from safelight.engine import Engine
from safelight.families import FAMILIES, Conditioning
from safelight.model import Model
from safelight.weights import inspect
from toy_family import Toy, toy_folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(families, "FAMILIES", [*FAMILIES, Toy()])
    return toy_folder(tmp_path / "toy")


@pytest.fixture
def model(folder: Path) -> Model:
    return safelight.load(folder, device="cpu", dtype="float32")


def test_a_toy_is_not_known_without_its_file(tmp_path: Path) -> None:
    with pytest.raises(SafelightError, match="'ToyPipeline' is not supported"):
        safelight.load(toy_folder(tmp_path / "toy"))


def test_a_toy_is_found_in_its_folder(folder: Path, model: Model) -> None:
    assert model.family.name == "toy"
    assert model.native_size == (64, 64)
    assert list(model.parts) == ["words", "transformer", "encoder"]
    assert repr(model) == "<safelight.Model toy: toy, 64x64, float32 on cpu>"
    assert inspect(folder)["components"].keys() == {"transformer", "encoder"}


def test_strict_as_any_other(folder: Path) -> None:
    (folder / "encoder/config.json").write_text('{"width": 13}')
    with pytest.raises(SafelightError, match=r"encoder .*\(128, 12\) in the file, \(128, 13\)"):
        safelight.load(folder)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "unipc"])
def test_a_toy_draws(model: Model, sampler: str) -> None:
    settings = {"seed": 1, "steps": 5, "sampler": sampler}
    cat = model.generate("a cat", **settings).images[0]
    assert cat.size == (64, 64)
    assert np.asarray(cat).std() > 5
    assert cat.tobytes() == model.generate("a cat", **settings).images[0].tobytes()
    others = (
        model.generate("three dogs in a row", **settings),
        model.generate("a cat", guidance_scale=1.0, **settings),
        model.generate("a cat", negative_prompt="dull", **settings),
    )
    assert all(other.images[0].tobytes() != cat.tobytes() for other in others)


def test_its_own_defaults_are_taken(model: Model) -> None:
    settings = model.generate("a cat", seed=1).settings
    assert (settings["sampler"], settings["steps"]) == ("euler", 4)


def test_a_toy_starts_from_a_picture(model: Model) -> None:
    blue = Image.new("RGB", (64, 64), "blue")
    red, _, back = np.asarray(
        model.generate("a cat", image=blue, strength=0.25, seed=1).images[0]
    ).mean((0, 1))
    assert back > red
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    found = np.asarray(model.generate("a cat", image=blue, mask=mask, seed=1).images[0])
    assert (found[:, 32:] == (0, 0, 255)).all()
    assert not (found[:, :32] == (0, 0, 255)).all()


def test_only_prompts_of_one_length_share_a_call(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[set[int]] = []
    call = Toy.call

    def noted(
        self: Toy, model: Model, x: list, t: list, asked: list[Conditioning], *more: object
    ) -> object:
        calls.append({c.tokens.shape[1] for c in asked if c.tokens is not None})
        return call(self, model, x, t, asked, *more)

    prompts = ["a cat", "a dog", "three dogs in a row", "a"]
    alone = [model.generate(prompt, seed=i).images[0] for i, prompt in enumerate(prompts)]
    monkeypatch.setattr(Toy, "call", noted)
    engine = Engine(model, exact=False, rows=8)
    for i, prompt in enumerate(prompts):
        engine.add(Request(prompt=prompt, seed=i), i)
    while engine.busy:
        for ticket in engine.step()[1]:
            assert ticket.image is not None
            assert safelight.picture.largest_difference(ticket.image, alone[ticket.tag]) <= 1
    assert len(calls) == 3 * 4  # "a cat" and "a dog" together
    assert all(len(lengths) == 1 for lengths in calls)


def test_what_can_share_a_call() -> None:
    def key(**other: object) -> tuple:
        return Conditioning(**{"tokens": torch.ones(2, 77, 8), **other}).call_key  # type: ignore[arg-type]

    plain, net = key(), (object(),)
    assert key(guidance=3.0, tokens=torch.zeros(1, 77, 8)) == plain
    assert key(tokens=torch.ones(2, 154, 8)) != plain
    assert key(pooled=torch.ones(2, 8)) != plain
    assert key(sizes=torch.ones(2, 6)) == key(sizes=torch.zeros(1, 6)) != plain
    assert key(extra=torch.ones(1, 5, 8, 8)) != plain
    assert key(control=net) == key(control=net) != plain


def test_the_prompts_own_part() -> None:
    both = Conditioning(torch.arange(2.0)[:, None, None], torch.arange(2.0)[:, None], guidance=3.0)
    alone = both.positive()
    assert (alone.evaluations, both.evaluations, Conditioning().evaluations) == (1, 2, 1)
    assert alone.tokens is not None
    assert alone.pooled is not None
    assert (alone.tokens.item(), alone.pooled.item()) == (1.0, 1.0)
