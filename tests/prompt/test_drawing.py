"""Words that change by step, are composed or drawn at random: what the engine makes of them."""

import dataclasses

import pytest
import torch
from PIL import ImageChops

import safelight
from safelight.engine import Engine, conditionings
from safelight.errors import SafelightError
from safelight.families import encoding
from safelight.recipe import recipe_text
from tests.weights_tiny import text_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    text_folder(folder)
    loaded = safelight.load(folder, device="cpu", dtype="float32")
    return dataclasses.replace(loaded, native_size=(64, 64))


def job_of(model, prompt, **settings):
    settings = {"sampler": "ddim", "steps": 4, "seed": 1, "prompt_syntax": "a1111", **settings}
    engine = Engine(model)
    engine.add(safelight.Request(prompt=prompt, **settings))
    return engine.tickets[0].job


def states(model, prompt, **settings):
    """The prompt's own states at each step, [tokens, width]."""
    job = job_of(model, prompt, **settings)
    return [job.asked_at(i).tokens[-1] for i in range(len(job.table.rows))]


def picture(model, prompt, **settings):
    settings = {"sampler": "ddim", "steps": 4, "seed": 1, "prompt_syntax": "a1111", **settings}
    return model.generate(prompt, **settings).images[0]


def same(a, b):
    return ImageChops.difference(a, b).getbbox() is None


def test_a_schedule_changes_what_the_network_reads_at_its_step(model):
    a, b = states(model, "apple")[0], states(model, "ale")[0]
    found = states(model, "[apple:ale:2]")
    assert [torch.equal(one, a) for one in found] == [True, True, True, False]
    assert [torch.equal(one, b) for one in found] == [False, False, False, True]
    found = states(model, "[apple|ale]")
    assert [torch.equal(one, a) for one in found] == [True, True, False, True]


def test_samplers_that_take_several_rows_for_a_step_change_at_the_same_step(model):
    a = states(model, "apple")[0]
    found = states(model, "[apple:ale:.25]", sampler="heun", steps=4)
    assert len(found) > 4
    assert [torch.equal(one, a) for one in found].count(True) == (len(found) + 1) // 2


def test_the_steps_of_a_picture_to_start_from_are_those_that_are_taken(model):
    image = picture(model, "ale")
    a = states(model, "apple")[0]
    settings = {"image": image, "strength": 0.5, "steps": 8}
    found = states(model, "[apple:ale:.25]", **settings)
    assert [torch.equal(one, a) for one in found] == [True, True, False, False]


def test_a_schedule_of_no_step_draws_what_its_text_draws(model):
    assert same(picture(model, "[apple:ale:0]"), picture(model, "ale"))
    assert not same(picture(model, "[apple:ale:2]"), picture(model, "ale"))


def test_and_composes_by_weight(model):
    alone = picture(model, "apple")
    assert same(picture(model, "apple AND ale:0"), alone)
    assert not same(picture(model, "apple AND ale:0.7"), alone)
    job = job_of(model, "apple:0.5 AND ale", guidance_scale=1.0)
    assert job.conditioning.evaluations == 3
    assert job.conditioning.weights == (0.5, 1.0)


def test_prompts_of_any_length(model):
    long = "apple ale " * 20  # the tiny model has 14 tokens in a chunk
    job = job_of(model, long, negative_prompt="ale")
    assert job.conditioning.tokens.shape[1] in (64, 80, 96, 112, 128, 144)
    for syntax in ("a1111", "comfy", "compel"):
        assert model.generate(long, prompt_syntax=syntax, steps=1, sampler="ddim").warnings == []
    [said] = [w for w in model.generate(long, steps=1, sampler="ddim").warnings if "cut" in w]
    assert said.startswith("prompt was cut")
    with pytest.raises(SafelightError, match="at most 32"):
        picture(model, "apple " * 600)


@pytest.mark.parametrize("syntax", ["plain", "a1111", "comfy", "compel"])
def test_a_layer_computes_keys_of_a_text_once(tmp_path, monkeypatch, syntax):
    """In bfloat16, too: the network gets one tensor for the text at all steps."""
    text_folder(tmp_path)
    model = safelight.load(tmp_path, device="cpu", dtype="bfloat16")
    read, contexts = model.unet.forward, []

    def forward(x, at, context, *rest):
        contexts.append(context)
        return read(x, at, context, *rest)

    monkeypatch.setattr(model.unet, "forward", forward)
    picture(model, "(apple:1.2)", prompt_syntax=syntax, width=64, height=64)
    assert len(contexts) == 4
    assert all(context is contexts[0] for context in contexts)


def test_the_states_of_a_schedule_are_bounded(model, monkeypatch):
    """In all of its stages together, and in the cache."""
    turns = f"[{'|'.join('abcdefghij')}]"
    one, all_of_it = (
        conditionings._bytes(job_of(model, prompt, steps=20).conditioning)
        for prompt in ("a", turns)
    )
    assert all_of_it == 10 * one
    monkeypatch.setattr(encoding, "MAX_HELD", 2 * 16 * 9)
    with pytest.raises(SafelightError, match="take fewer schedules"):
        job_of(model, turns, steps=20)
    # As long as the longest of them, before they are made.
    with monkeypatch.context() as patch:
        patch.setattr("safelight.prompt.states.last_repeated", None)
        with pytest.raises(SafelightError, match="fewer schedules or parts"):
            job_of(model, f"{'a AND ' * 10}{'a BREAK ' * 3} a", steps=20)
    engine = Engine(model)
    monkeypatch.setattr(conditionings, "MAX_CACHED", 2 * one)
    for prompt in ("apple", "ale", "a", "apple ale " * 20):
        engine.add(safelight.Request(prompt=prompt, prompt_syntax="a1111"))
    kept = [
        conditionings._bytes(conditioning) for conditioning in engine._conditionings.found.values()
    ]
    assert len(kept) == 1  # larger than the bound alone
    engine.add(safelight.Request(prompt="a", prompt_syntax="a1111"))
    engine.add(safelight.Request(prompt="ale", prompt_syntax="a1111"))
    assert len(engine._conditionings.found) == 2


def test_batches_hold_prompts_of_different_lengths(model):
    requests = [
        safelight.Request(
            prompt=prompt, prompt_syntax="a1111", sampler="ddim", steps=3, seed=5, count=1
        )
        for prompt in ("apple", "apple ale " * 10, "[apple:ale:1] AND ale", "(ale:1.3)")
    ]
    alone = [model.generate(request).images[0] for request in requests]
    engine = Engine(model, exact=False, rows=16)
    for i, request in enumerate(requests):
        engine.add(request, i)
    found = {}
    while engine.busy:
        for ticket in engine.step()[1]:
            found[ticket.tag] = ticket.image
    for i, image in enumerate(alone):
        difference = ImageChops.difference(image, found[i])
        # Another batch may round otherwise: by one level of 255.
        assert max(high for _, high in difference.getextrema()) <= 1


def test_clip_skip(model):
    assert same(picture(model, "apple", clip_skip=1), picture(model, "apple"))
    assert not same(picture(model, "apple", clip_skip=2), picture(model, "apple"))
    plain = picture(model, "apple", clip_skip=2, prompt_syntax="plain")
    assert not same(plain, picture(model, "apple", prompt_syntax="plain"))
    with pytest.raises(SafelightError, match="at most 2") as caught:
        picture(model, "apple", clip_skip=3)
    assert caught.value.field == "clip_skip"


def test_each_picture_draws_its_own_words_and_its_recipe_keeps_them(model, tmp_path):
    (tmp_path / "drink.txt").write_text("ale\nwater\n")
    drawing = dataclasses.replace(model, wildcards_dir=tmp_path)
    result = drawing.generate(
        "{apple|pear} __drink__", count=6, seed=3, steps=1, sampler="ddim", dynamic_prompts=True
    )
    recipes = [result.recipe(i) for i in range(6)]
    said = {recipe["settings"]["prompt"] for recipe in recipes}
    assert len(said) > 1
    assert said <= {f"{a} {b}" for a in ("apple", "pear") for b in ("ale", "water")}
    assert recipes[0]["template"]["prompt"] == "{apple|pear} __drink__"
    for recipe, image in zip(recipes[:2], result.images, strict=False):
        # Without the folder.
        again = model.generate(safelight.Request.from_dict(recipe["settings"]))
        assert same(again.images[0], image)
    with pytest.raises(SafelightError, match="--wildcards"):
        model.generate("__drink__", dynamic_prompts=True)


def test_the_recipe_says_dialect_and_clip_skip(model):
    result = model.generate(
        "(apple:1.2)", prompt_syntax="a1111", emphasis="no-norm", clip_skip=2, steps=1,
        sampler="ddim",
    )  # fmt: skip
    text = recipe_text(result.recipe())
    assert "Clip skip: 2" in text
    assert "Emphasis: No norm" in text
    settings = result.recipe()["settings"]
    assert (settings["prompt_syntax"], settings["clip_skip"]) == ("a1111", 2)
    assert "Clip skip" not in recipe_text(model.generate("apple", steps=4).recipe())


def test_warnings_say_how_words_were_read(model):
    result = model.generate(
        "(apple <hyper:x:0.5>", prompt_syntax="a1111", steps=1, sampler="ddim", emphasis="no-norm"
    )
    assert any("1 '(' without a partner" in said for said in result.warnings)
    assert any("<hyper:x:0.5> was left out" in said for said in result.warnings)
    told = model.generate("apple", emphasis="ignore", steps=1, sampler="ddim").warnings
    assert "emphasis does nothing without prompt_syntax a1111: leave it out" in told
