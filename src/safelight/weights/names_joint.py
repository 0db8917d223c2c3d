"""Where each weight of the transformers of Stable Diffusion 3 and FLUX lies in a single file.

A single file has the names of the original code of Stability AI or of Black Forest Labs. There the
projections to q, k and v are one module, and the last norm has shift before scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safelight.weights.names import Section, under

_NORM_OUT = "norm_out.linear"
_ENDS = {"final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": _NORM_OUT}
# Our modules that are one in the file, with their shares of its rows.
_QKV = dict.fromkeys(("attn.to_q", "attn.to_k", "attn.to_v"), 1)
_ADDED_QKV = dict.fromkeys(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), 1)

_SD3_BLOCK = {
    "x_block.adaLN_modulation.1": "norm1.linear",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
_SD3_STACKED = {
    "x_block.attn.qkv": _QKV,
    "x_block.attn2.qkv": dict.fromkeys(("attn2.to_q", "attn2.to_k", "attn2.to_v"), 1),
    "context_block.attn.qkv": _ADDED_QKV,
}
# Newer versions of ComfyUI call the scales of these norms `weight`.
_DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
_DOUBLE_BLOCK = {
    "img_mod.lin": "norm1.linear",
    "img_attn.proj": "attn.to_out.0",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mod.lin": "norm1_context.linear",
    "txt_attn.proj": "attn.to_add_out",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_DOUBLE_STACKED = {"img_attn.qkv": _QKV, "txt_attn.qkv": _ADDED_QKV}
_SINGLE_BLOCK = {
    "modulation.lin": "norm.linear",
    "linear2": "proj_out",
}
# The feed-forward is four times as wide as the tokens.
_SINGLE_STACKED = {"linear1": {**_QKV, "proj_mlp": 4}}

_FLUX2_DOUBLE = {
    "img_attn.proj": "attn.to_out.0",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_attn.proj": "attn.to_add_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
_FLUX2_SINGLE = {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}
_FLUX2_MODULATIONS = (
    "double_stream_modulation_img",
    "double_stream_modulation_txt",
    "single_stream_modulation",
)


def sd3_section(part: str, config: Mapping[str, Any]) -> Section:
    """Return the keys of Stable Diffusion 3's transformer; see `sd3_names`.

    part: the name that the family gives the network.
    """
    last = f"transformer_blocks.{config['num_layers'] - 1}.norm1_context.linear"
    stacked: dict[str, dict[str, int]] = {}
    for i in range(config["num_layers"]):
        stacked |= _stacks(f"joint_blocks.{i}", f"transformer_blocks.{i}", _SD3_STACKED)
    # The text's norm in the last block is of the same kind as the last norm.
    return Section(part, sd3_names(config), stacked=stacked, swapped={_NORM_OUT, last})


def sd3_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the modules of Stable Diffusion 3's transformer, from the original names to ours.

    config: of the transformer. Modules that have the rows of several of ours are not here, but in
    `sd3_section`.
    """
    names = _ENDS | {
        "pos_embed": "pos_embed.pos_embed",
        "x_embedder.proj": "pos_embed.proj",
        "context_embedder": "context_embedder",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    }
    for i in range(config["num_layers"]):
        names |= under(f"joint_blocks.{i}", f"transformer_blocks.{i}", _SD3_BLOCK)
    return names


def flux_section(part: str, config: Mapping[str, Any]) -> Section:
    """Return the keys of FLUX.1's transformer; see `flux_names`.

    part: the name that the family gives the network.
    """
    stacked: dict[str, dict[str, int]] = {}
    for i in range(config["num_layers"]):
        stacked |= _stacks(f"double_blocks.{i}", f"transformer_blocks.{i}", _DOUBLE_STACKED)
    for i in range(config["num_single_layers"]):
        stacked |= _stacks(f"single_blocks.{i}", f"single_transformer_blocks.{i}", _SINGLE_STACKED)
    return Section(part, flux_names(config), stacked=stacked, swapped={_NORM_OUT})


def flux_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the modules of FLUX.1's transformer, from the original names to ours.

    config: of the transformer. Modules that have the rows of several of ours are not here, but in
    `flux_section`.
    """
    names = _ENDS | {"img_in": "x_embedder", "txt_in": "context_embedder"}
    for theirs, ours in (
        ("time_in", "timestep_embedder"),
        ("vector_in", "text_embedder"),
        ("guidance_in", "guidance_embedder"),
    ):
        names[f"{theirs}.in_layer"] = f"time_text_embed.{ours}.linear_1"
        names[f"{theirs}.out_layer"] = f"time_text_embed.{ours}.linear_2"
    for i in range(config["num_layers"]):
        names |= under(
            f"double_blocks.{i}", f"transformer_blocks.{i}", _DOUBLE_BLOCK | _scales(_DOUBLE_NORMS)
        )
    for i in range(config["num_single_layers"]):
        names |= under(
            f"single_blocks.{i}",
            f"single_transformer_blocks.{i}",
            _SINGLE_BLOCK | _scales(_SINGLE_NORMS),
        )
    return names


def flux2_section(part: str, config: Mapping[str, Any]) -> Section:
    """Return the keys of FLUX.2's transformer; see `flux2_names`.

    part: the name that the family gives the network.
    """
    stacked: dict[str, dict[str, int]] = {}
    for i in range(config["num_layers"]):
        stacked |= _stacks(f"double_blocks.{i}", f"transformer_blocks.{i}", _DOUBLE_STACKED)
    return Section(part, flux2_names(config), stacked=stacked, swapped={_NORM_OUT})


def flux2_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the modules of FLUX.2's transformer, from the original names to ours.

    config: of the transformer. Modules that have the rows of several of ours are not here, but in
    `flux2_section`.
    """
    time = "time_guidance_embed.timestep_embedder"
    names = _ENDS | {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": f"{time}.linear_1",
        "time_in.out_layer": f"{time}.linear_2",
    }
    names |= {f"{name}.lin": f"{name}.linear" for name in _FLUX2_MODULATIONS}
    double, single = _FLUX2_DOUBLE | _scales(_DOUBLE_NORMS), _FLUX2_SINGLE | _scales(_SINGLE_NORMS)
    for i in range(config["num_layers"]):
        names |= under(f"double_blocks.{i}", f"transformer_blocks.{i}", double)
    for i in range(config["num_single_layers"]):
        names |= under(f"single_blocks.{i}", f"single_transformer_blocks.{i}", single)
    return names


def _scales(norms: Mapping[str, str]) -> dict[str, str]:
    """Return the scales of norms by both of their names."""
    # Of two names for one weight, the last is written: that of the authors.
    return {
        f"{theirs}.{leaf}": f"{ours}.weight"
        for leaf in ("weight", "scale")
        for theirs, ours in norms.items()
    }


def _stacks(
    theirs: str, ours: str, stacked: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, int]]:
    """Return the same table with the original name of a block, and ours, before the names."""
    return {
        f"{theirs}.{module}": {f"{ours}.{one}": share for one, share in shares.items()}
        for module, shares in stacked.items()
    }
