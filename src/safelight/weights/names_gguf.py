"""The names of llama.cpp's GGUF files of text encoders, and what they are in transformers.

Source: `gguf.constants` and `gguf.tensor_mapping` of github.com/ggml-org/llama.cpp. Rows of q and k
stand as in transformers: llama.cpp reorders them for Llama, not for Qwen. The part of Qwen2.5-VL
that reads pictures is another file there.
"""

from __future__ import annotations

import re

from safelight.weights.check import Header, refusal
from safelight.weights.names import some

_ARCHITECTURE = "general.architecture"
_KNOWN = ("t5", "t5encoder", "qwen3", "qwen2vl")
_UNUSED = re.compile(r"output\.weight|rope_freqs\.weight|dec\..*")
"""The head, constants, and T5's decoder: a text encoder has none of them."""

_T5 = {
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    "ffn_norm": "layer.1.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
}
_QWEN = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"(enc\.)?blk\.(\d{1,4})\.(\w+)\.(weight|bias)")
_ENDS = {
    True: {
        "token_embd.weight": "shared.weight",
        "enc.output_norm.weight": "encoder.final_layer_norm.weight",
    },
    False: {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"},
}


def llama_names(header: Header) -> dict[str, str] | None:
    """Return transformers' names by the keys of a file; None if it has no names of llama.cpp.

    Raises SafelightError for another kind of network than T5's encoder, Qwen3 and Qwen2.5-VL, and
    for keys that belong to none.
    """
    if header.format != "gguf" or "token_embd.weight" not in header.tensors:
        return None
    kind = header.metadata.get(_ARCHITECTURE)
    if kind not in (None, *_KNOWN):
        known = "T5 encoders, Qwen3 and Qwen2.5-VL are read"
        raise refusal(header.name, f"a GGUF file of {kind!r:.40}; {known}")
    is_t5 = any(key.startswith("enc.blk.") for key in header.tensors)
    gated = "enc.blk.0.ffn_gate.weight" in header.tensors
    found: dict[str, str] = {}
    unknown: list[str] = []
    for key in header.tensors:
        if _UNUSED.fullmatch(key):
            continue
        name = _ENDS[is_t5].get(key)
        block = _BLOCK.fullmatch(key)
        if block is not None and bool(block[1]) == is_t5:
            inner = (_T5 if is_t5 else _QWEN).get(block[3])
            if is_t5 and not gated and block[3] == "ffn_up":
                inner = "layer.1.DenseReluDense.wi"
            home = f"encoder.block.{block[2]}" if is_t5 else f"layers.{block[2]}"
            name = inner and f"{home}.{inner}.{block[4]}"
        if name is None:
            unknown.append(key)
        else:
            found[key] = name
    if unknown:
        raise refusal(header.name, f"{len(unknown)} keys that we do not know: {some(unknown)}")
    return found
