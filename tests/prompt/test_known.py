"""Words that a model was never taught are left out of prompts in every dialect, with a warning."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken

import safelight
from safelight.engine.requests import resolve_request
from safelight.model import Model
from safelight.prompt.learned import Learned
from safelight.prompt.tokenizer import Tokenizer, _clip_tables, clip_tokenizer
from safelight.request import Request
from safelight.train.finetune import _notes
from safelight.words import known_alone, unknown_words

KNOWN = frozenset({"a", "cat", "on", "blue", "caf", "2"})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return clip_tokenizer("<|endoftext|>", 77)


@pytest.fixture(scope="module")
def model() -> Model:
    return safelight.load("embedded", device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("a cat", "a cat"),
        ("A Cat on the moon", "A Cat on         "),
        ("a\ncat-like, blue!", "a\ncat-    , blue!"),
        ("2 cats, 3 dogs", "2     ,       "),
        ("<|endoftext|> a snow", "<|endoftext|> a     "),
        ("caf\u00e9 a", "caf\u00e9 a"),  # as captions were split once
        ("\u732b \u00fcber", "      "),
        ("", ""),
    ],
)
def test_blanks_stand_where_words_are_unknown(text: str, left: str) -> None:
    assert known_alone(text, KNOWN) == left
    if "<|" not in text:
        assert unknown_words(left, KNOWN) == []


def test_a_tokenizer_leaves_out_what_it_was_not_taught(tokenizer: Tokenizer) -> None:
    knowing = tokenizer.with_words(KNOWN)
    text, same = "a blue cat in the snow", "a blue cat"
    assert knowing.encode(text) == tokenizer.encode(same)
    assert knowing.ids(text) == tokenizer.ids(same)
    assert knowing.with_words(None).ids(text) == tokenizer.ids(text)
    long = " ".join(["snow cat"] * 90)  # the words that are left out take no room
    cut = knowing.encode(long).cut
    assert cut is not None
    assert cut.split().count("cat") == 15


def test_the_names_of_embeddings_are_known(tokenizer: Tokenizer) -> None:
    inked = tokenizer.with_words(KNOWN).with_learned([Learned("inkx7", None, (50000, 50001))])
    assert inked.expanded_ids("a snow inkx7") == [*tokenizer.ids("a"), 50000, 50001]


def test_added_tokens_are_known() -> None:
    vocab, merges = _clip_tables()
    adding = Tokenizer(vocab, merges, added={49408: AddedToken("<sks-7>")}).with_words(KNOWN)
    assert adding.ids("a snow <sks-7> cat") == [*adding.ids("a"), 49408, *adding.ids("cat")]


@pytest.mark.parametrize(
    ("prompt", "same", "syntax"),
    [
        ("a penguin in the zeppelin", "a penguin in the", "plain"),
        ("a (penguin:1.3) in (the:0.8) (zeppelin:1.2)", "a (penguin:1.3) in (the:0.8)", "a1111"),
        ("a (penguin:1.3) in the (zeppelin:1.2)", "a (penguin:1.3) in the", "comfy"),
    ],
)
def test_the_picture_is_that_without_the_word(
    model: Model, prompt: str, same: str, syntax: str
) -> None:
    settings: dict[str, Any] = {"steps": 2, "seed": 3, "prompt_syntax": syntax}
    drawn, without = (model.generate(text, **settings) for text in (prompt, same))
    assert np.array_equal(drawn.images[0], without.images[0])
    told = [said for said in drawn.warnings if "never taught" in said]
    assert told == ["embedded was never taught: zeppelin; left out"]
    assert not [said for said in without.warnings if "never taught" in said]


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("eine Katze", "embedded was never taught: eine, katze; left out; no other word says what"),
        ("a the", "no word of the prompt says what to draw, so the picture shows anything"),
        ("", "no word of the prompt says what to draw, so the picture shows anything"),
    ],
)
def test_a_prompt_without_a_known_word_is_told(model: Model, prompt: str, told: str) -> None:
    def warnings(**pictures: Any) -> list[str]:
        asked = Request(prompt=prompt, steps=1, **pictures)
        return model.family.warnings(model, resolve_request(model, asked))

    [said] = warnings()
    assert said.startswith(told)
    assert said.endswith(" (embedded knows English words)")
    # A picture that is given says what to draw.
    assert not any("anything" in said for said in warnings(image=Image.new("RGB", (256, 256))))


def test_training_tells_all_words_of_its_captions(model: Model) -> None:
    words = _notes(model, ["Ein gr\u00fcner Hund"])["words"]
    assert {"gr\u00fcner", "hund", "cat"} <= set(words)
