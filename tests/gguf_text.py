"""GGUF files of text encoders, as llama.cpp's converter writes them: names, and the tokenizer."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

NORMAL, UNKNOWN, CONTROL, ADDED, UNUSED = 1, 2, 3, 4, 5
Say = Callable[[gguf.GGUFWriter], None]


def t5_metadata(content: Mapping[str, Any], size: int, *, extra: bool = False) -> Say:
    """Return what writes T5's tokenizer as its SentencePiece file says it.

    content: of its tokenizer.json. size: of the vocabulary; what lacks is filled up. extra: with
    the marks of left-out words, which SentencePiece's file does not hold.
    """
    pieces = content["model"]["vocab"]
    tokens = [f"[PAD{i}]" for i in range(size)]
    scores, types = [-10000.0] * size, [UNUSED] * size
    for i, (piece, score) in enumerate(pieces):
        if piece.startswith("<extra_id_") and not extra:
            continue
        tokens[i], scores[i], types[i] = piece, score, NORMAL
    for added in content["added_tokens"]:
        i = added["id"]
        if i < 3:
            types[i] = UNKNOWN if added["content"] == "<unk>" else CONTROL
        elif extra:
            tokens[i], scores[i], types[i] = added["content"], -1000.0, ADDED
    types[:3] = CONTROL, CONTROL, UNKNOWN

    def say(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("t5")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(types)
        writer.add_add_space_prefix(True)
        writer.add_remove_extra_whitespaces(True)
        normal = content["normalizer"] or {}
        for step in (normal, *normal.get("normalizers", ())):
            if "precompiled_charsmap" in step:
                writer.add_precompiled_charsmap(base64.b64decode(step["precompiled_charsmap"]))
        writer.add_eos_token_id(1)
        writer.add_unk_token_id(2)
        writer.add_pad_token_id(0)
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(True)

    return say


def qwen_metadata(content: Mapping[str, Any], size: int, pad: int | None = None) -> Say:
    """Return what writes Qwen's tokenizer. content: of its tokenizer.json. See `t5_metadata`."""
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for token, i in content["model"]["vocab"].items():
        tokens[i], types[i] = token, NORMAL
    for added in content["added_tokens"]:
        i = added["id"]
        tokens[i], types[i] = added["content"], CONTROL if added["special"] else ADDED
    merges = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]
    ]

    def say(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
        if pad is not None:
            writer.add_pad_token_id(pad)

    return say


@cache
def _names(is_t5: bool) -> gguf.TensorNameMap:
    which = gguf.MODEL_ARCH.T5ENCODER if is_t5 else gguf.MODEL_ARCH.QWEN3
    return gguf.get_tensor_name_map(which, 99)


def llama_name(key: str) -> str:
    """Return llama.cpp's name of a weight of T5's encoder or a Qwen, from transformers'."""
    is_t5 = key.startswith(("encoder.", "shared."))
    names = _names(is_t5)
    theirs = key if is_t5 or key.startswith("model.") else f"model.{key}"
    name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
    assert name is not None, key
    return name


def llama_file(
    path: Path,
    state: Mapping[str, Tensor],
    said: Say | None = None,
    kind: str | None = None,
    arch: str | None = None,
) -> dict[str, Tensor]:
    """Write a text encoder as GGUF; return the numbers that its codes stand for, by state's names.

    state: by transformers' names, of T5 or Qwen3. said: writes more metadata. kind: the type of
    ggml for matrices whose rows it fits, None for float32.
    """
    is_t5 = any(key.startswith("encoder.block.") for key in state)
    which = gguf.MODEL_ARCH.T5ENCODER if is_t5 else gguf.MODEL_ARCH.QWEN3
    writer = gguf.GGUFWriter(path, arch or gguf.MODEL_ARCH_NAMES[which])
    if said is not None:
        said(writer)
    numbers = dict(state)
    for key, tensor in state.items():
        name = llama_name(key)
        array, raw = tensor.float().numpy(), None
        if kind is not None and tensor.dim() == 2 and tensor.shape[-1] % 32 == 0:
            raw = gguf.GGMLQuantizationType[kind]
            array = gguf.quants.quantize(array, raw)
            numbers[key] = torch.from_numpy(np.array(gguf.quants.dequantize(array, raw)))
        writer.add_tensor(name, array, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return numbers


def tokenizer_content(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
