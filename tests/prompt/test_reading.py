"""How dialects are read: published examples, an Earley parser as reference, and fuzzing."""

import contextlib
import gc
import os
import random
import time
from itertools import pairwise

import pytest

from safelight.errors import SafelightError
from safelight.prompt import a1111, comfy, compel
from safelight.prompt.dialects import read
from safelight.prompt.reading import Piece
from safelight.prompt.schedule import stages_of
from safelight.prompt.show import describe
from safelight.prompt.tokenizer import clip_tokenizer
from tests.prompt import reference


def pieces(sections):
    return [[p.text, p.weight] for section in sections for p in section]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("normal text", [["normal text", 1.0]]),
        ("an (important) word", [["an ", 1.0], ["important", 1.1], [" word", 1.0]]),
        ("(unbalanced", [["unbalanced", 1.1]]),
        (r"\(literal\]", [["(literal]", 1.0]]),
        ("(unnecessary)(parens)", [["unnecessaryparens", 1.1]]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ["a ", 1.0],
                ["house", 1.5730000000000004],
                [" ", 1.1],
                ["on", 1.0],
                [" a ", 1.1],
                ["hill", 0.55],
                [", sun, ", 1.1],
                ["sky", 1.4641000000000006],
                [".", 1.1],
            ],
        ),
    ],
)
def test_a1111s_published_examples_of_emphasis(text, wanted):
    found = pieces(a1111.emphasised(text, "original")[0])
    assert [said for said, _ in found] == [said for said, _ in wanted]
    # The product of the same factors, perhaps in another order.
    assert [w for _, w in found] == pytest.approx([w for _, w in wanted], rel=1e-15)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("test", [(10, "test")]),
        ("a [b:3]", [(3, "a "), (10, "a b")]),
        ("a [b: 3]", [(3, "a "), (10, "a b")]),
        ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
        ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
        ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
        ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
        ("a [unbalanced", [(10, "a [unbalanced")]),
        ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
        ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
        ("[fe|]male", [(i, "male" if i % 2 == 0 else "female") for i in range(1, 11)]),
        ("[fe|||]male", [(i, "female" if i % 4 == 1 else "male") for i in range(1, 11)]),
        ("[a|(b:1.1)]", [(i, "(b:1.1)" if i % 2 == 0 else "a") for i in range(1, 11)]),
        ("[from::4] to", [(4, "from to"), (10, " to")]),
        ("[a:b:0]", [(10, "b")]),
        ("[a:b:-1]", [(10, "b")]),
        ("[a:b:1e999]", [(10, "a")]),
    ],
)
def test_a1111s_published_examples_of_schedules(text, wanted):
    assert stages_of(text, 10)[0] == wanted


def test_schedules_are_what_an_earley_parser_of_the_grammar_finds():
    draw = random.Random(5)
    signs = [
        "[",
        "]",
        "(",
        ")",
        ":",
        "|",
        "a",
        "b ",
        " c",
        "3",
        ".5",
        r"\[",
        "[a:",
        ":3]",
        ":.5]",
        "|b]",
    ]
    scheduled = 0
    for _ in range(400):
        text = "".join(draw.choice(signs) for _ in range(draw.randint(1, 14)))
        found = [list(stage) for stage in stages_of(text, 10)[0]]
        assert found == reference.a1111_schedule(text, 10), text
        scheduled += len(found) > 1
    assert scheduled > 10


@pytest.mark.parametrize(
    ("text", "steps", "wanted"),
    [
        ("[a:b:5]", 10, "aaaaaabbbb"),
        ("[a:b:0.5]", 10, "aaaaaabbbb"),
        ("[a|b]", 6, "aababa"),
        ("[a:b:0]", 3, "bbb"),
        ("[a:b:9]", 10, "a" * 10),
        ("[a:b:1]", 1, "a"),
    ],
)
def test_stages_change_at_the_steps_of_the_web_ui(text, steps, wanted):
    [part] = read(text, "a1111", steps=steps).parts
    stages = [part.stages[part.index_at(step)] for step in range(1, steps + 1)]
    assert "".join(next(stage.pieces).text for stage in stages) == wanted
    # The web UI takes the first stage of its table that ends at or after a step, counted from 0.
    table = reference.a1111_schedule(text, steps)
    assert wanted == "".join(next(t for e, t in table if step <= e) for step in range(steps))
    shown = describe(read(text, "a1111", steps=steps), clip_tokenizer("!", 77), "a1111")
    assert len(shown["parts"][0]["stages"]) == 1 + sum(a != b for a, b in pairwise(wanted[1:]))


def test_break_and_its_blanks():
    found, _ = a1111.emphasised("a \n BREAK  b BREAK", "original")
    assert found == ((Piece("a"),), (Piece("b"),), (Piece(""),))
    assert a1111.emphasised("BREAKFAST", "original")[0] == ((Piece("BREAKFAST"),),)
    assert a1111.emphasised("(a BREAK b", "none")[0] == ((Piece("(a BREAK b"),),)


def test_and_parts_their_weights_and_what_is_no_text():
    text = "a cat:0.5 AND a dog : -1.2 AND ANDROID <lora:some name:0.8>"
    reading = read(text, "a1111", steps=10)
    assert [part.weight for part in reading.parts] == [0.5, -1.2, 1.0]
    said = ["".join(p.text for p in part.stages[0].pieces) for part in reading.parts]
    assert [one.strip() for one in said] == ["a cat", "a dog", "ANDROID"]
    assert reading.networks == (("lora", "some name", "0.8"),)
    [negative] = read("a AND b", "a1111", steps=10, negative=True).parts
    assert [p.text for p in negative.stages[0].pieces] == ["a AND b"]


def test_unbalanced_brackets_are_said():
    for syntax in ("a1111", "comfy", "compel"):
        assert "'('" in read("(a (b c", syntax, steps=1).warnings[0]
        assert "')'" in read("a) b", syntax, steps=1).warnings[0]
        assert read("a (b)1.1 c", syntax, steps=1).warnings == ()


def test_comfys_numbers_set_and_its_brackets_multiply():
    [section], _ = comfy.read(r"((a:1.2)) (b) (c (d):0.5) \(e\) [f]")
    weights = {p.text.strip(): p.weight for p in section}
    assert weights["a"] == 1.2
    assert weights["b"] == pytest.approx(1.1)
    assert weights["c"] == 0.5
    assert weights["d"] == pytest.approx(0.55)
    assert weights["(e) [f]"] == 1


def test_compels_signs_numbers_and_lists():
    [blend], _ = compel.read('a tall man++ in "a dark forest"0.8 -- e')
    assert [(p.text, round(p.weight, 6)) for p in blend.texts[0][0]] == [
        ("a tall", 1.0),
        ("man", 1.21),
        ("in", 1.0),
        ("a dark forest", 0.8),
        ("-- e", 1.0),
    ]
    [blend], _ = compel.read('("a cat", "a dog").blend(1, 0.5, no_normalize)')
    assert (blend.weights, blend.normalize) == ((1.0, 0.5), False)
    blends, _ = compel.read('("a cat", "a dog").and(1, 0.5)')
    assert [blend.weight for blend in blends] == [1.0, 0.5]
    assert "taken as text" in compel.read('("a", "b").blend(1)')[1][0]


@pytest.mark.parametrize(
    ("syntax", "text"),
    [
        ("a1111", f"(a:{'9' * 400})"),
        ("a1111", f"(a:{'9' * 39})"),  # beyond float32
        ("a1111", "a AND b:-1000001"),
        ("comfy", "(a:1e999)"),
        ("comfy", "(a:-1e7)"),
        ("compel", "a" + "+" * 200),
        ("compel", "a" + "+" * 7500),  # beyond all floats
        ("compel", '("a", "b").and(1, 1000001)'),
    ],
)
def test_a_weight_that_is_too_large_is_refused(syntax, text):
    with pytest.raises(SafelightError, match="not between -1,000,000 and 1,000,000"):
        read(text, syntax, steps=10)


def test_a_blend_that_is_divided_by_0_is_refused():
    for weights in ("1, -1, 0", "0, 0, 0", "0.1, 0.2, -0.3"):
        text = f'("a", "b", "c").blend({weights})'
        with pytest.raises(SafelightError, match="sum to 0"):
            read(text, "compel", steps=10)
        read(text.replace(")", ", no_normalize)"), "compel", steps=10)
    read('("a").blend(0)', "compel", steps=10)  # alone it is not divided


def test_too_many_parts_are_refused():
    assert len(read(" AND ".join("a" * 64), "a1111", steps=10).parts) == 64
    with pytest.raises(SafelightError, match="65 parts between AND; at most 64"):
        read(" AND ".join("a" * 65), "a1111", steps=10)
    read(" AND ".join("a" * 65), "a1111", steps=10, negative=True)  # it is text there


def test_a_list_of_too_many_texts_is_refused():
    for operator in ("and", "blend"):
        listed = ",".join("a" * 512)
        read(f"({listed}).{operator}()", "compel", steps=10)
        with pytest.raises(SafelightError, match="list of 513 texts; at most 512"):
            read(f"({listed},a).{operator}()", "compel", steps=10)


SIGNS = [
    *"()[]:|{}<>,.\\+-\"'= \n",
    *("BREAK", " AND ", "1.2", ":0.5", "a cat", "__", "$$", "::", "].blend(", ".and("),
    *("מילים", "🐈‍⬛", "\u202e", "\ud800", "\x7f"),
]


def fuzzed(count, seed):
    draw = random.Random(seed)
    for _ in range(count):
        signs = draw.choices(SIGNS, k=draw.choice([1, 3, 10, 30, 100]))
        yield "".join(signs)


def test_fuzzed_prompts_are_read_or_refused():
    # `make soak` takes the long run.
    for text in fuzzed(100_000 if os.environ.get("SAFELIGHT_SOAK") else 2000, 0):
        for syntax in ("a1111", "comfy", "compel"):
            with contextlib.suppress(SafelightError):
                for part in read(text, syntax, steps=7).parts:
                    assert part.stages[-1].until == 7


HARD = [
    *("(", ")", "[", "]", "()", "(a)", "[a|b]", "[a:", "(a:1.1)", "BREAK ", "\\", '"', "a+ ", "+"),
    *(": ", " ", "((a)+", "<a:", ".5", "AND ", "((a", "a))"),
]


def seconds(text, syntax):
    began = time.process_time()
    with contextlib.suppress(SafelightError):  # ten thousand brackets weigh beyond all floats
        read(text, syntax, steps=20)
    return time.process_time() - began


@pytest.mark.parametrize("syntax", ["a1111", "comfy", "compel"])
def test_reading_takes_linear_time(syntax):
    gc.freeze()  # what the suite has loaded is not walked through for each thousand brackets
    for sign in HARD:
        short, long = sign * (2048 // len(sign)), sign * (16384 // len(sign))
        # Eight times the text: 32 times the time is not quadratic, which would be 64. What takes
        # less than 50 ms is quick enough, whatever the ratio of two short times.
        quick = min(seconds(long, syntax) for _ in range(2))
        assert quick < max(0.05, 32 * min(seconds(short, syntax) for _ in range(2))), sign
