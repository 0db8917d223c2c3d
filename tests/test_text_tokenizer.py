"""The tokenizers of T5 and Qwen against transformers'."""

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from safelight.errors import SafelightError
from test_weights_tokenizer import PROMPTS
from text_tokenizers import folder, made, ours, qwen_like, t5_like, word_piece
from weights_tiny import write

CHAT = "<|im_start|>user\na red apple<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
TYPED = [
    *PROMPTS,
    CHAT,
    "an apple</s> and <extra_id_0>, <pad><unk>",
    "trailing blanks   \n",
    "  ﬁ ligature\tof\u3000wide blanks",
    "a\r\n\r\n  b\n\n\n c   \n",
]


@pytest.fixture(scope="module", params=["older", "newer", "qwen"])
def pair(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    return *made(path, request.param), PreTrainedTokenizerFast.from_pretrained(path / "tokenizer")


def reference(tokenizer: Any, text: str, length: int, pad: bool) -> list[int]:
    padding = "max_length" if pad else False
    return tokenizer(
        text, padding=padding, truncation=True, max_length=length, add_special_tokens=True
    ).input_ids


@pytest.mark.parametrize("text", TYPED)
def test_ids_are_those_of_transformers(pair, text):
    tokenizer, theirs, whole = pair
    for length in (12, 77, 400):
        for pad in (True, False):
            found = tokenizer.encode(text, length, pad)
            assert found.ids == reference(theirs, text, length, pad)
            assert found.ids == reference(whole, text, length, pad)


@given(text=st.text(max_size=80))
@settings(max_examples=100, deadline=None)
def test_any_text_has_the_ids_of_transformers(pair, text):
    tokenizer, _, whole = pair
    assert tokenizer.encode(text, 30, pad=True).ids == reference(whole, text, 30, True)


def test_word_piece_and_a_template_with_tokens_before_the_text(tmp_path):
    folder(tmp_path, word_piece(), pad_token="[UNK]")
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")
    for text in ("", "A red app", "appp x red " * 9):
        for length in (3, 8, 40):
            found = ours(tmp_path).encode(text, length, pad=True)
            assert found.ids == reference(theirs, text, length, True)


def test_what_is_cut_is_told(tmp_path):
    tokenizer, _ = made(tmp_path, "older")
    whole = tokenizer.encode("a red apple, on the Table", 60, pad=True)
    assert whole.cut is None
    assert whole.used == whole.count + 1
    assert whole.ids[whole.used - 1 :] == [1] + [0] * (60 - whole.used)
    found = tokenizer.encode("a red apple, " * 20 + "on the Table", 60, pad=True)
    assert found.cut is not None
    assert found.cut.endswith("on the Table")
    assert (found.used, found.ids[-1]) == (60, 1)
    assert found.count > 60
    exact = tokenizer.encode("a red apple, on the Table", whole.used, pad=False)
    assert (exact.cut, exact.ids) == (None, whole.ids[: whole.used])
    assert tokenizer.encode("a red apple, on the Table", whole.used - 1, pad=False).cut is not None


def test_a_chat_of_marks(tmp_path):
    tokenizer, theirs = made(tmp_path, "qwen")
    found = tokenizer.encode(CHAT, 400, pad=False)
    marks = theirs.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<think>", "</think>"])
    assert [number for number in found.ids if number in marks] == [
        marks[0], marks[1], marks[0], marks[2], marks[3],
    ]  # fmt: skip
    assert (found.used, found.count) == (len(found.ids), len(found.ids))


def test_tokens_of_the_config_are_added(tmp_path):
    _, theirs = made(tmp_path, "qwen")
    theirs.add_tokens([AddedToken("<glow>", lstrip=True)])
    theirs.save_pretrained(tmp_path / "tokenizer")
    write(tmp_path / "tokenizer/tokenizer.json", qwen_like())
    config = json.loads((tmp_path / "tokenizer/tokenizer_config.json").read_text())
    told = {"content": "<glow>", "lstrip": True, "normalized": True}
    config["added_tokens_decoder"] = {str(len(theirs) - 1): told}
    write(tmp_path / "tokenizer/tokenizer_config.json", config)
    text = "a red  <glow> apple<|im_end|>"
    assert ours(tmp_path).encode(text, 40, pad=True).ids == reference(theirs, text, 40, True)
    config["added_tokens_decoder"] = {"590": told}
    write(tmp_path / "tokenizer/tokenizer_config.json", config)
    with pytest.raises(SafelightError, match="has id 590, but would be"):
        ours(tmp_path)


@pytest.mark.parametrize("where", ["map", "object", "json", "none", "unknown"])
def test_the_padding_token(where, tmp_path):
    content, config = json.loads(t5_like("older")), {}
    if where == "map":
        write(tmp_path / "tokenizer/special_tokens_map.json", {"pad_token": "<pad>"})
    elif where == "object":
        config = {"pad_token": {"content": "<pad>"}}
    elif where == "json":
        content["padding"] = {"pad_token": "<pad>", "strategy": "BatchLongest"}
    elif where == "unknown":
        config = {"pad_token": "<fill>"}
    folder(tmp_path, content, **config)
    if where == "unknown":
        with pytest.raises(SafelightError, match=r"pad_token '<fill>' is no token"):
            ours(tmp_path)
        return
    tokenizer = ours(tmp_path)
    assert tokenizer.encode("a", 9, pad=False).ids[-1] == 1
    if where == "none":
        with pytest.raises(SafelightError, match="no pad_token"):
            tokenizer.encode("a", 9, pad=True)
    else:
        assert tokenizer.encode("a", 9, pad=True).ids[-1] == 0


def test_texts_and_lengths_that_cannot_be(tmp_path):
    tokenizer, _ = made(tmp_path, "older")
    with pytest.raises(SafelightError, match="UTF-8"):
        tokenizer.encode("a \ud83d cat", 9, pad=True)
    with pytest.raises(SafelightError, match="no room"):
        tokenizer.encode("a cat", 1, pad=True)


@pytest.mark.parametrize("kind", ["older", "newer", "qwen"])
def test_long_text_takes_little_time(kind, tmp_path):
    tokenizer, _ = made(tmp_path, kind)
    start = time.monotonic()
    for piece in (
        "a",
        " ",
        "a ",
        "\n",
        " \n",
        "!",
        "'",
        "é",
        "漢",
        "e\u0301",
        "<|im_end|>",
        "</s>",
    ):
        tokenizer.encode(piece * (2**15 // len(piece)), 77, pad=True)
    assert time.monotonic() - start < 5
