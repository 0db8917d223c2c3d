"""A tokenizer.json that is refused, and the time that one can take."""

import base64
import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from safelight.errors import SafelightError
from text_tokenizers import charsmap, folder, made, ours, t5_like
from weights_tiny import write

Change = Callable[[dict[str, Any]], Any]


def said(path: Path) -> str:
    """Return why a tokenizer is refused, in one line of at most 200 characters."""
    with pytest.raises(SafelightError) as refused:
        ours(path)
    text = str(refused.value)
    assert len(text) <= 200
    assert "\n" not in text
    return text


@pytest.mark.parametrize("older", ["spiece.model", "vocab.json", None])
def test_a_folder_without_tokenizer_json(older, tmp_path):
    folder(tmp_path, "{}")
    (tmp_path / "tokenizer/tokenizer.json").unlink()
    if older:
        write(tmp_path / "tokenizer" / older, "{}")
    text = said(tmp_path)
    assert "tokenizer/tokenizer.json is missing" in text
    if older:
        assert text.endswith(f"{older} becomes one by transformers: "
                             "AutoTokenizer.from_pretrained, save_pretrained")  # fmt: skip


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "JSON"),
        ("{", "JSON"),
        ("[]", "not a JSON object"),
        ('{"model": ' + '{"a":' * 100_000, "nested too deeply"),
        ('{"model": ' + "[" * 900 + "]" * 900 + "}", "model"),
        (" " * (2**24 + 1), "too large"),
        ('{"model": NaN}', "not a number"),
        ('{"model": 1, "model": 2}', "twice"),
        ("{}", "model None is not supported"),
        ('{"model": {}}', "model None is not supported"),
    ],
    ids=lambda value: f"{value:.12}",
)
def test_files_that_are_no_tokenizer(content, why, tmp_path):
    folder(tmp_path, content)
    assert why in said(tmp_path)


def model(**extra: Any) -> Change:
    return lambda content: content["model"].update(extra)


def top(**extra: Any) -> Change:
    return lambda content: content.update(extra)


def table(raw: bytes) -> Change:
    return top(normalizer={"type": "Precompiled",
                           "precompiled_charsmap": base64.b64encode(raw).decode()})  # fmt: skip


def splits(pattern: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def replaces(old: Any, new: Any) -> dict[str, Any]:
    return {"type": "Replace", "pattern": old, "content": new}


def template(*pieces: Any, ids: Any = (1,)) -> dict[str, Any]:
    special = {"</s>": {"id": "</s>", "ids": list(ids), "tokens": ["</s>"]}}
    kind = {"type": "TemplateProcessing", "pair": [], "special_tokens": special}
    return {**kind, "single": list(pieces)}


A: dict[str, Any] = {"Sequence": {"id": "A", "type_id": 0}}
END: dict[str, Any] = {"SpecialToken": {"id": "</s>", "type_id": 0}}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (model(type="WordLevel"), "model 'WordLevel' is not supported"),
        (model(type=["BPE"]), "is not supported"),
        (top(model="BPE"), "model 'BPE' is not supported"),
        (model(dropout=0.5), "random"),
        (model(vocab=[]), "no vocabulary"),
        (model(vocab={}), "no vocabulary"),
        (model(vocab=[["a", "b"]]), "not a token with a score"),
        (model(vocab=[["a", True]]), "not a token with a score"),
        (model(vocab=[[1, 0.5]]), "not a token"),
        (model(vocab=[["a" * 513, 0.5]]), "at most 512"),
        (model(vocab=[["é" * 512, 0.5]] * 601), "token id 600"),
        (model(vocab=[["a", 0.5]], unk_id=7), "not usable as a tokenizer"),
        (model(unk_id="2"), "not usable as a tokenizer"),
        (model(type="BPE"), "no vocabulary"),
        (model(type="BPE", vocab={"a": 600}, merges=[]), "token id 600"),
        (model(type="BPE", vocab={"a": -1}, merges=[]), "token id -1"),
        (model(type="BPE", vocab={"a": 1.0}, merges=[]), "token id 1.0"),
        (model(type="BPE", vocab={"a": 1}), "no list of merges"),
        (model(type="BPE", vocab={"a": 1}, merges=["a"]), "not a pair"),
        (model(type="BPE", vocab={"a": 1}, merges=["a b"]), "not usable as a tokenizer"),
        (model(type="BPE", vocab={"a": 1}, merges=[], end_of_word_suffix="x" * 99), "end_of_word"),
        (
            model(type="BPE", vocab={"a": 1}, merges=[], continuing_subword_prefix="a"),
            "continuing_subword_prefix is not supported",
        ),
        (model(type="BPE", vocab={"a": 1}, merges=[], fuse_unk="x"), "not usable as a tokenizer"),
        (model(type="WordPiece", vocab={"a": 1}, max_input_chars_per_word=10**9), "max_input"),
        (top(normalizer={"type": "Magic"}), "normalizer 'Magic'"),
        (top(normalizer=[{"type": "NFC"}] * 9), "9 steps"),
        (top(normalizer={"type": "Sequence", "normalizers": 3}), "normalizer 3"),
        (top(normalizer={"type": "Prepend", "prepend": "x" * 99}), "prepend"),
        (top(normalizer=replaces({"String": "a"}, "aa")), "longer"),
        (top(normalizer=replaces({"String": ""}, "")), "no pattern"),
        (top(normalizer=replaces({"Regex": "(a+)+b"}, "")), "regular expression"),
        (top(normalizer=replaces("a", "a")), "no pattern"),
        (top(normalizer={"type": "Precompiled"}), "not Base64"),
        (table(b""), "cut short"),
        (table(struct.pack("<I", 4000) + b"abc"), "cut short"),
        (table(struct.pack("<II", 4, 0) + b"x" * 65), "over 64 bytes"),
        (top(pre_tokenizer={"type": "FixedLength", "length": 0}), "pre_tokenizer 'FixedLength'"),
        (top(pre_tokenizer=splits({"Regex": "(a+)+b"})), "regular expression '(a+)+b'"),
        (top(pre_tokenizer=splits({"String": ""})), "no pattern"),
        (top(pre_tokenizer=splits({"String": 3})), "no pattern"),
        (top(pre_tokenizer={"type": "Metaspace", "replacement": "ab"}), "not usable"),
        (top(pre_tokenizer="Metaspace"), "pre_tokenizer 'Metaspace'"),
        (top(post_processor={"type": "BertProcessing"}), "post_processor 'BertProcessing'"),
        (top(post_processor={"type": "Sequence", "processors": {}}), "post_processor"),
        (top(post_processor=template()), "post_processor"),
        (top(post_processor=template(A, A, END)), "post_processor"),
        (top(post_processor=template(A, 3)), "post_processor"),
        (top(post_processor=template(A, {"SpecialToken": {"id": "x"}})), "post_processor"),
        (top(post_processor=template(A, *[END] * 9)), "post_processor"),
        (top(post_processor=template(A, END, ids=[600])), "token id 600"),
        (top(post_processor=template(A, END, ids=["1"])), "token id '1'"),
        (top(added_tokens={"a": 1}), "not a list"),
        (top(added_tokens=[3]), "not a list"),
        (top(added_tokens=[{"content": "a"}]), "token id"),
        (top(added_tokens=[{"content": "", "id": 1}]), "the added token 1"),
        (top(added_tokens=[{"content": "\ud800", "id": 1}]), "the added token 1"),
        (model(vocab=[["\ud800", 0.5]] * 9), "not usable as a tokenizer"),
        (top(padding={"pad_token": "\ud800"}), "pad_token is"),
        (top(added_tokens=[{"content": "x" * 513, "id": 299}]), "at most 512"),
        (top(added_tokens=[{"content": "zzz", "id": 5}]), "has id 5"),
        (top(added_tokens=[{"content": "zzz", "id": 600}]), "token id 600"),
    ],
)
def test_hostile_files(change, why, tmp_path):
    content = json.loads(t5_like("older"))
    change(content)
    folder(tmp_path, content)
    assert why in said(tmp_path)


def test_tables_that_would_take_gigabytes(tmp_path):
    content = json.loads(t5_like("older"))
    content["model"]["vocab"] = [[f"{i:04}" + "é" * 500, -1.0] for i in range(1100)]
    folder(tmp_path, content)
    with pytest.raises(SafelightError, match="over 1048576 bytes"):
        ours(tmp_path, 2000)
    content = json.loads(t5_like("older"))
    content["added_tokens"] = [{"content": f"{i:04}" + "x" * 500, "id": i} for i in range(600)]
    folder(tmp_path, content)
    with pytest.raises(SafelightError, match="over 262144 characters"):
        ours(tmp_path, 2000)


def test_ids_that_the_network_lacks(tmp_path):
    made(tmp_path, "qwen")
    with pytest.raises(SafelightError, match="the text encoder has 300"):
        ours(tmp_path, 300)


@pytest.mark.parametrize("side", ["padding_side", "truncation_side"])
def test_the_other_side(side, tmp_path):
    folder(tmp_path, t5_like("older"), **{side: "left"})
    assert f"{side} 'left'" in said(tmp_path)


def test_a_table_of_characters_that_points_beyond_itself(tmp_path, capfd):
    content = json.loads(t5_like("older"))
    table(struct.pack("<II", 4, 2**20 << 10) + b"a\0")(content)
    folder(tmp_path, content)
    tokenizer = ours(tmp_path)
    with pytest.raises(SafelightError, match=r"tokenizer\.json: .*") as refused:
        tokenizer.encode("a cat", 9, pad=False)
    assert len(str(refused.value)) <= 200


def test_a_text_that_grows_most(tmp_path):
    content = json.loads(t5_like("older"))
    table(charsmap({"a": "b" * 64}))(content)
    folder(tmp_path, content, pad_token="<pad>")
    start = time.monotonic()
    ours(tmp_path).encode("a" * 2**14, 77, pad=True)
    assert time.monotonic() - start < 5
