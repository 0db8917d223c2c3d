"""The states of 200 prompts in each dialect, against references that share no code with them."""

import weakref

import pyparsing
import pytest
import torch

from safelight.errors import SafelightError
from safelight.prompt import states
from safelight.prompt.dialects import read
from safelight.prompt.states import States, last_repeated, same_length
from safelight.prompt.tokenizer import clip_tokenizer
from tests.prompt import reference
from tests.prompt.reference import prompts

# Two implementations of one CLIP in float32, three layers deep, add numbers in different orders.
BOUND = 1e-5


def ours(clip, text, syntax, *, steps=10, emphasis="original", clip_skip=1):
    def encode(ids, visible):
        return clip.encoder(ids, clip_skip - 1, visible)

    reading = read(text, syntax, steps=steps, emphasis=emphasis)
    states = States(clip.tokenizer, encode, syntax, emphasis)
    with torch.no_grad():
        return reading, [states.of_part(part) for part in reading.parts]


def close(found, wanted):
    assert found.shape == wanted.shape
    scale = max(1.0, wanted.abs().max().item())
    assert (found - wanted).abs().max().item() <= BOUND * scale


A1111 = ["({})", "[{}]", "({}:1.3)", "({}:0.6)", "(({}))", "{} BREAK {}", "({", "{})", r"\({}\)"]


@pytest.mark.parametrize("emphasis", ["original", "no-norm", "ignore", "none"])
def test_a1111_weights_and_chunks(clip, emphasis):
    count = 200 if emphasis == "original" else 20
    longest = 0
    for text in prompts(count, A1111):
        _, [[found]] = ours(clip, text, "a1111", emphasis=emphasis)
        [wanted] = reference.a1111_states(clip.hf_tokenizer, clip.hf_encoder, [text], emphasis)
        close(found, wanted)
        longest = max(longest, found.shape[1] // 77)
    assert longest >= 3


def test_a1111_stages_are_scaled_together(clip):
    around = ["({}:1.4)", "[{}:{}:0.5]", "[{}:3]", "[{}::6]", "[{}|{}]", "({})"]
    scheduled = 0
    for text in prompts(60, around, seed=1, longest=80):
        reading, [found] = ours(clip, text, "a1111")
        stages = reference.a1111_schedule(text, 10)
        assert [s.until for s in reading.parts[0].stages] == [min(e + 1, 10) for e, _ in stages]
        texts = [said for _, said in stages]
        wanted = reference.a1111_states(clip.hf_tokenizer, clip.hf_encoder, texts)
        for one, other in zip(found, wanted, strict=True):
            close(one, other)
        scheduled += len(stages) > 1
    assert scheduled > 20


@pytest.mark.parametrize("skip", [1, 2, 3])
def test_clip_skip_is_a_hidden_state_from_the_end(clip, skip):
    text = "a (red:1.3) house"
    _, [[found]] = ours(clip, text, "a1111", clip_skip=skip)
    [wanted] = reference.a1111_states(clip.hf_tokenizer, clip.hf_encoder, [text], clip_skip=skip)
    close(found, wanted)
    _, [[found]] = ours(clip, text, "comfy", clip_skip=skip)
    close(found, reference.comfy_states(clip.hf_tokenizer, clip.hf_encoder, text, clip_skip=skip))


def test_comfy(clip):
    around = ["({})", "({}:1.3)", "({}:0.4)", "(({}:1.2))", "({}", "{})", r"\({}\)", "[{}]"]
    longest = 0
    for text in prompts(200, around, seed=2):
        _, [[found]] = ours(clip, text, "comfy")
        close(found, reference.comfy_states(clip.hf_tokenizer, clip.hf_encoder, text))
        longest = max(longest, found.shape[1] // 77)
    assert longest >= 3


COMPEL = ["({})1.3", "({})++", "({})0.6", "({})--", '"{}"1.2', "({})", "{}", "((lake)+ {})1.1"]


@pytest.fixture(scope="module")
def compel(clip):
    """compel 2 as its makers ship it, with long prompts in chunks."""
    module = pytest.importorskip("compel")
    # Its parser tries the same places repeatedly: without this, it takes 60 ms a prompt.
    pyparsing.ParserElement.enable_packrat()
    return module.Compel(clip.hf_tokenizer, clip.hf_encoder, truncate_long_prompts=False)


def test_compel_weights(clip, compel):
    light = longest = 0
    for text in prompts(200, COMPEL, seed=3, depth=0):
        text = text.replace("(e.g.)", "e.g.").replace("@!", "")
        reading, [[found]] = ours(clip, text, "compel")
        close(found, compel(text))
        light += any(p.weight < 1 for p in reading.parts[0].stages[0].pieces)
        longest = max(longest, found.shape[1] // 77)
    assert light > 50
    assert longest >= 3


@pytest.mark.parametrize(
    "text",
    [
        '("a red house", "a blue (lake)1.3").blend(1, 0.5)',
        '("a red house", "a blue lake", "a - b").blend(0.7, 0.3, 2)',
        '("a red house", "a lake").blend(1, 0.5, no_normalize)',
        '("a red house", "a blue lake").and()',
        '("a (red)++ house", "a blue lake").and(1, 0.5)',
        "(house, lake).blend(1, 1)",
        "((a red house), (a lake)).and()",
        "a tall man++ in a suit-",
        "a forest-- of best-quality trees++",
        "a (b c)1.3d, e",
        'a "quoted (thing)1.2"0.8, more',
        r"an \(escaped\) word++",
        "foo(bar) (unclosed a++",
        "a -- b + c",
        "(a - b)++",
        "",
        "   ",
    ],
)
def test_compel_syntax(clip, compel, text):
    _, [[found]] = ours(clip, text, "compel")
    close(found, compel(text))


def test_repeating_a_whole_context_changes_no_attention():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    once = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    twice = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1)
    )
    torch.testing.assert_close(once, twice)
    lengths = [s.shape[1] for s in same_length([torch.ones(1, n, 2) for n in (77, 154, 231)])]
    assert lengths == [462, 462, 462]


@pytest.mark.parametrize(
    "text", [f'("{"cat " * 90}",{",".join("ab" * 20)}).blend()', "cat- dog " * 40]
)
def test_texts_that_are_added_up_are_not_all_in_memory(text, monkeypatch):
    seen, most, add = [], 0, states._weighted_sum

    def watched(texts):
        nonlocal most
        for one in texts:
            seen.append(weakref.ref(one))
            most = max(most, sum(ref() is not None for ref in seen))
            yield one

    monkeypatch.setattr(
        states, "_weighted_sum", lambda texts, *how, **more: add(watched(texts), *how, **more)
    )
    tokenizer = clip_tokenizer("<|endoftext|>", 77)
    reader = States(tokenizer, lambda ids, _: torch.ones(1, 77, 2), "compel")
    [found] = reader.of_part(read(text, "compel", steps=2).parts[0])
    assert found.shape == (1, 154, 2)
    assert len(seen) == 41
    assert most < 10


def test_a_repeated_context_is_bounded():
    assert same_length([torch.ones(1, n * 77, 1) for n in (7, 8)])[0].shape[1] == 56 * 77
    with pytest.raises(SafelightError, match="2,387 and 2,464 tokens"):
        same_length([torch.ones(1, n * 77, 1) for n in (31, 32)])
    with pytest.raises(SafelightError, match="negative_prompt has 5,005 tokens with its marks"):
        same_length([torch.ones(1, n * 77, 1) for n in (1, 65)])


def test_equal_parts_count_again():
    """The states of each part are in memory, also if its text was read before."""
    tokenizer = clip_tokenizer("<|endoftext|>", 77)
    reader = States(tokenizer, lambda ids, _: torch.ones(1, 77, 2), "a1111")
    turns = f"[{'|'.join('abcdefgh')}] {'BREAK a ' * 31}"
    first, second, third = read(" AND ".join([turns] * 3), "a1111", steps=8).parts
    assert [len(reader.of_part(part)) for part in (first, second)] == [8, 8]
    with pytest.raises(SafelightError, match="more than 512 chunks"):
        reader.of_part(third)


def test_the_parts_of_and_repeat_their_last_token():
    short, long = torch.arange(4.0).reshape(1, 2, 2), torch.zeros(1, 4, 2)
    first, _ = last_repeated([short, long])
    assert first[0, :, 0].tolist() == [0, 2, 2, 2]
