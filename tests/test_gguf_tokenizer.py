"""Tokenizers in the metadata of GGUF files, and alone: ids of transformers', and hostile files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast, Qwen2TokenizerFast, T5TokenizerFast

from safelight.prompt.text_tokenizer import TextTokenizer, folder_text_tokenizer
from safelight.weights.headers import header_of
from safelight.weights.tokenizers import FileHome, Gathered, Home, gguf_home
from test_text_tokenizer import TYPED, reference
from tests.gguf_text import Say, qwen_metadata, t5_metadata
from text_tokenizers import made
from weights_tiny import refused, write

SIZE = 600


def file(path: Path, *said: Say) -> Path:
    """Write a GGUF file with metadata and one small tensor."""
    writer = gguf.GGUFWriter(path, "t5encoder")
    for say in said:
        say(writer)
    writer.add_tensor("token_embd.weight", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(home: Home, size: int = SIZE) -> TextTokenizer:
    return folder_text_tokenizer(Gathered({"tokenizer": home}, "tiny"), size, "tokenizer")


def of_file(path: Path, size: int = SIZE) -> TextTokenizer:
    found = gguf_home(header_of(path))
    assert found is not None
    return read(found[0], size)


def content_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "tokenizer/tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=["older", "older-extra", "qwen"])
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[TextTokenizer, Any, Any]:
    """Our tokenizer of a GGUF file, transformers' of the folder, and its generic one."""
    path = tmp_path_factory.mktemp(request.param)
    kind = request.param.partition("-")[0]
    _, theirs = made(path, kind)
    content = content_of(path)
    if kind == "older":  # T5's own marks count down
        added = content["added_tokens"]
        for one, other in zip(added[3:53], added[:52:-1], strict=True):
            one["content"], other["content"] = other["content"], one["content"]
        write(path / "tokenizer/tokenizer.json", content)
        theirs = T5TokenizerFast.from_pretrained(path / "tokenizer")
    if kind == "qwen":
        say = qwen_metadata(content, SIZE, theirs.pad_token_id)
    else:
        say = t5_metadata(content, SIZE, extra="extra" in request.param)
    whole = PreTrainedTokenizerFast.from_pretrained(path / "tokenizer")
    return of_file(file(path / "a.gguf", say)), theirs, whole


@pytest.mark.parametrize("text", TYPED)
def test_ids_of_gguf_are_those_of_transformers(pair: Any, text: str) -> None:
    ours, theirs, whole = pair
    for length in (12, 77, 400):
        for pad in (True, False):
            found = ours.encode(text, length, pad).ids
            assert found == reference(theirs, text, length, pad)
            assert found == reference(whole, text, length, pad)


@given(text=st.text(max_size=80))
@settings(max_examples=100, deadline=None)
def test_any_text_has_the_same_ids(pair: Any, text: str) -> None:
    ours, theirs, _ = pair
    assert ours.encode(text, 30, pad=True).ids == reference(theirs, text, 30, True)


def test_what_is_made_is_a_tokenizer_of_transformers(tmp_path: Path) -> None:
    """`safelight convert` writes it into a folder, which other programs read."""
    for kind, say, theirs in (
        ("older", t5_metadata, T5TokenizerFast),
        ("qwen", qwen_metadata, Qwen2TokenizerFast),
    ):
        made(tmp_path / kind, kind)
        path = file(tmp_path / f"{kind}.gguf", say(content_of(tmp_path / kind), SIZE))
        found = gguf_home(header_of(path))
        assert found is not None
        for name in ("tokenizer.json", "tokenizer_config.json"):
            write(tmp_path / f"new-{kind}/{name}", found[0].json(name))
        tokenizer, ours = theirs.from_pretrained(tmp_path / f"new-{kind}"), read(found[0])
        for text in TYPED:
            assert ours.encode(text, 400, False).ids == reference(tokenizer, text, 400, False)


def test_a_tokenizer_json_alone_knows_t5_s_padding(tmp_path: Path) -> None:
    whole, _ = made(tmp_path, "older")
    path = tmp_path / "t5.json"
    (tmp_path / "tokenizer/tokenizer.json").rename(path)
    home = FileHome(path)
    assert read(home).encode("a red apple", 20, True) == whole.encode("a red apple", 20, True)
    assert home.files == {"t5.json": path}


def test_qwen_s_tables_are_read_as_its_tokenizer(tmp_path: Path) -> None:
    """As ComfyUI has them: vocab.json, merges.txt and the added tokens in the config."""
    whole, theirs = made(tmp_path / "whole", "qwen")
    content = content_of(tmp_path / "whole")
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    place = tmp_path / "tables/tokenizer"
    write(place / "vocab.json", content["model"]["vocab"])
    write(place / "merges.txt", "#version: 0.2\n" + "\n".join(merges) + "\n")
    added = {str(told["id"]): told for told in content["added_tokens"]}
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added}
    write(place / "tokenizer_config.json", {**config, "pad_token": "<|endoftext|>"})
    write(tmp_path / "tables/model_index.json", {})
    from safelight.weights.folder import Folder

    ours = folder_text_tokenizer(Folder(tmp_path / "tables", "tiny"), SIZE, "tokenizer")
    for text in TYPED:
        assert ours.encode(text, 400, True).ids == whole.encode(text, 400, True).ids
        assert ours.encode(text, 400, False).ids == reference(theirs, text, 400, False)


# --- hostile metadata ----------------------------------------------------------------------------

GGML = "tokenizer.ggml."
TOKENS = ["<pad>", "</s>", "<unk>", "▁", "a", "b"]


def t5_say(**changed: Any) -> Say:
    """Return what writes a small T5 tokenizer with some keys changed; None leaves one out."""
    lists = {
        "tokens": TOKENS,
        "scores": [0.0, 0.0, 0.0, -2.0, -3.0, -4.0],
        "token_type": [3, 3, 2, 1, 1, 1],
        **changed,
    }

    def say(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("t5")
        for key, value in lists.items():
            if isinstance(value, int):
                writer.add_uint32(GGML + key, value)
            elif isinstance(value, str):
                writer.add_string(GGML + key, value)
            elif value is not None:
                writer.add_array(GGML + key, value)

    return say


def qwen_say(**changed: Any) -> Say:
    lists = {"tokens": ["a", "b", "ab"], "token_type": [1, 1, 1], "merges": ["a b"], **changed}

    def say(writer: gguf.GGUFWriter) -> None:
        t5_say(**{"scores": None, **lists})(writer)
        writer.kv_data[0][GGML + "model"].value = "gpt2"
        writer.add_tokenizer_pre("qwen2")

    return say


HOSTILE: dict[str, tuple[Callable[..., Say], dict[str, Any], list[str]]] = {
    "no tokens": (t5_say, {"tokens": None}, ["tokens"]),
    "tokens are numbers": (t5_say, {"tokens": [1, 2, 3]}, ["no list of texts"]),
    "tokens are a number": (t5_say, {"tokens": 3}, ["no list of texts"]),
    "tokens twice": (t5_say, {"tokens": [*TOKENS[:5], "a"]}, ["'a'", "once"]),
    "an empty token": (t5_say, {"tokens": [*TOKENS[:5], ""]}, ["once"]),
    "a long token": (t5_say, {"tokens": [*TOKENS[:5], "x" * 600]}, ["512"]),
    "a longer token": (t5_say, {"tokens": [*TOKENS[:5], "x" * 6000]}, ["6000 bytes"]),
    "no scores": (t5_say, {"scores": None}, ["scores"]),
    "few scores": (t5_say, {"scores": [0.0]}, ["1 numbers for 6"]),
    "scores are texts": (t5_say, {"scores": ["0"] * 6}, ["no list of numbers"]),
    "a score that is none": (t5_say, {"scores": [float("nan")] * 6}, ["finite"]),
    "no types": (t5_say, {"token_type": None}, ["token_type"]),
    "all unused": (t5_say, {"token_type": [5] * 6}, ["<unk>"]),
    "a mark beyond": (t5_say, {"eos_token_id": 99}, ["eos_token_id"]),
    "a mark of text": (t5_say, {"unknown_token_id": "-1"}, ["unknown_token_id"]),
    "no charsmap": (t5_say, {"precompiled_charsmap": ["x"]}, ["precompiled_charsmap"]),
    "half a charsmap": (t5_say, {"precompiled_charsmap": b"\xff\xff\xff\x7f"}, ["cut short"]),
    "a huge charsmap": (t5_say, {"precompiled_charsmap": bytes(2**20 + 4)}, ["over 1048576 bytes"]),
    "too many ids": (t5_say, {"tokens": [*TOKENS, *map(str, range(700))],
                              "scores": [0.0] * 706, "token_type": [1] * 706}, ["600"]),
    "no merges": (qwen_say, {"merges": None}, ["merges"]),
    "a merge of one": (qwen_say, {"merges": ["ab"]}, ["pair"]),
    "a merge of what is not there": (qwen_say, {"merges": ["a c"]}, ["tokenizer"]),
    "ids with holes": (qwen_say, {"token_type": [1, 5, 3], "merges": ["a a"]}, []),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_metadata(tmp_path: Path, case: str) -> None:
    say, changed, words = HOSTILE[case]
    path = file(tmp_path / "bad.gguf", say(**changed))
    refused(lambda: of_file(path), *words)


def test_a_huge_list_is_not_read(tmp_path: Path) -> None:
    """Its count is compared with the file's size before memory is taken."""
    raw = file(tmp_path / "a.gguf", t5_say()).read_bytes()
    at = raw.index(b"tokenizer.ggml.scores") + len(b"tokenizer.ggml.scores") + 8
    for count in (2**62, 2**32, 2**21):
        changed = raw[:at] + count.to_bytes(8, "little") + raw[at + 8 :]
        path = tmp_path / f"{count}.gguf"
        path.write_bytes(changed)
        refused(lambda path=path: of_file(path), "")


def test_other_tokenizers_are_not_ours(tmp_path: Path) -> None:
    def llama(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")

    def other(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("llama-bpe")

    for number, say in enumerate((llama, other, lambda _: None)):
        assert gguf_home(header_of(file(tmp_path / f"{number}.gguf", say))) is None
