"""The fast mode in requests and in the engine; its arithmetic: tests/parity/test_fast_mode.py."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import safelight
from safelight.engine import Engine, shortcuts
from safelight.engine.requests import resolve_request
from safelight.errors import SafelightError
from safelight.model import Model
from safelight.request import Request


@cache
def embedded() -> Model:
    return safelight.load("embedded", dtype="float32")


APPLE: dict[str, Any] = {"prompt": "a red apple", "seed": 4, "width": 64, "height": 64}
CUTS: list[dict[str, Any]] = [
    {"guidance_start": 0},
    {},
    {"cache_every": 3},
    {"cache_every": 3, "cache_branch": 2},
    {"cache_every": 2, "guidance_start": 0.2, "guidance_end": 0.7},
    {"text_end": 0.5},
    {"cache_every": 2, "guidance_end": 0.5, "text_end": 0.5},
    {"fast": 3, "steps": 6, "text_end": 0.5},
]


def drawn(exact: bool) -> list[Any]:
    """Return pictures of all cuts, drawn by one engine."""
    engine, made = Engine(embedded(), exact=exact, rows=16), dict[int, Image.Image]()
    with torch.inference_mode():
        for i, cuts in enumerate(CUTS):
            engine.add(Request(**APPLE, **{"steps": 6, **cuts}, count=2), i)
        while engine.busy:
            for ticket in engine.step()[1]:
                assert ticket.image is not None
                made[2 * ticket.tag + ticket.index] = ticket.image
    return [np.asarray(made[i]).astype(int) for i in range(2 * len(CUTS))]


@pytest.fixture(scope="module")
def alone() -> list[Any]:
    return drawn(exact=True)


def test_company_changes_nothing(alone: list[Any]) -> None:
    """One engine draws pictures that take a step in full and others that do not."""
    for mine, in_company in zip(alone, drawn(exact=False), strict=True):
        assert np.abs(mine - in_company).max() <= 1


def test_each_cut_makes_another_picture(alone: list[Any]) -> None:
    firsts = alone[::2]
    for i, one in enumerate(firsts):
        assert not any(np.array_equal(one, other) for other in firsts[:i])


def test_off_is_the_picture_without(alone: list[Any]) -> None:
    off = {
        "fast": 0,
        "cache_every": 1,
        "cache_branch": 0,
        "guidance_start": 0.0,
        "guidance_end": 1.0,
        "text_end": 1.0,
    }
    image = embedded().generate(**APPLE, steps=6, **off).images[0]
    assert np.array_equal(np.asarray(image), alone[0])


def test_a_full_step_is_the_last_one() -> None:
    kept = shortcuts.Kept(shortcuts.Shortcuts(cache_every=3))
    kept.model, kept.evaluations, kept.deep = 1, 2, torch.zeros(1)
    taken = [kept.plan(row, 10, 1, 2, None).taken for row in range(10)]
    assert [row for row in range(10) if not taken[row]] == [0, 3, 6, 9]
    assert not kept.plan(4, 10, 2, 2, None).taken  # left by another model
    assert not kept.plan(4, 10, 1, 1, None).taken  # had a row for the negative prompt


@pytest.mark.parametrize("cuts", [{}, {"cache_every": 2}, {"guidance_end": 0.6}])
def test_a_schedule_goes_on_after_text_end(cuts: dict[str, Any]) -> None:
    """The first step of a stage computes attention to its text, whatever was kept before."""
    asked = {"prompt_syntax": "a1111", "steps": 8, "seed": 4, "width": 64, "height": 64}
    one, changes = (
        embedded().generate(prompt, **asked, **cuts, text_end=0.25).images[0].tobytes()
        for prompt in ("a red apple", "[a red apple:a blue car:0.5]")
    )
    assert one != changes
    kept = shortcuts.Kept(shortcuts.Shortcuts(text_end=0.25))
    kept.model, kept.told, kept.words = 1, 2, (torch.zeros(1), None)
    assert kept.plan(4, 8, 1, 2, kept.words).told
    assert not kept.plan(4, 8, 1, 2, (torch.zeros(1), None)).told


@pytest.mark.parametrize("prompt", ["a red apple AND a blue car", "a red apple :2"])
def test_a_composed_prompt_without_guidance_is_at_guidance_one(prompt: str) -> None:
    asked = {"prompt_syntax": "a1111", "steps": 3, "seed": 4, "width": 64, "height": 64}
    guided, late, plain = (
        embedded().generate(prompt, **asked, **cuts).images[0].tobytes()
        for cuts in (
            {"guidance_start": 0.0},
            {"guidance_start": 1.0},
            {"guidance_scale": 1.0, "guidance_start": 0.0},
        )
    )
    assert late == plain != guided


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_level_is_its_settings(level: int) -> None:
    """The recipe has the settings, and draws the same picture without the level."""
    result = embedded().generate("a cat", fast=level, seed=8)
    wanted = dict(shortcuts.LEVELS[level])
    if "linears" in wanted:
        wanted["linears"] = "plain"  # in float32
    assert {name: result.settings[name] for name in wanted} == wanted
    assert not any("linears" in warning for warning in result.warnings)
    settings = {**result.settings, "fast": 0}
    again = embedded().generate(Request.from_dict(settings)).images[0]
    assert again.tobytes() == result.images[0].tobytes()


def test_what_is_asked_for_holds_against_the_level() -> None:
    asked = Request(prompt="a cat", fast=3, cache_every=1, steps=7, sampler="ddim")
    resolved = resolve_request(embedded(), asked)
    assert (resolved.cache_every, resolved.steps, resolved.sampler) == (1, 7, "ddim")
    assert resolved.guidance_start == 0.3


def test_a_distilled_model_keeps_its_steps() -> None:
    fast = safelight.load("embedded-fast", dtype="float32")
    resolved = resolve_request(fast, Request(prompt="a cat", fast=3))
    assert (resolved.steps, resolved.guidance_scale) == (4, 1)
    assert resolved.cache_every == 3


def test_a_model_without_them_says_so() -> None:
    model = safelight.load("embedded-unconditional", dtype="float32")
    result = model.generate(unconditional=True, fast=2, steps=2, sampler="ddim", seed=1)
    assert any("fast does nothing with" in warning for warning in result.warnings)
    assert result.settings["steps"] == 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"fast": 4}, "fast must be a whole number from 0 to 3, not 4"),
        ({"cache_every": 0}, "cache_every must be a whole number from 1 to 100"),
        ({"cache_branch": 6}, "cache_branch must be at most 5, the layers of"),
        ({"guidance_start": 0.5, "guidance_end": 0.2}, "guidance_end must be at least"),
        ({"text_end": 1.5}, "text_end must be a number from 0 to 1"),
    ],
)
def test_what_cannot_be_is_told(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(SafelightError, match=said):
        embedded().generate("a cat", **wrong)
