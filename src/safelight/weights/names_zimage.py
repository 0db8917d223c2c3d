"""Where each weight of Z-Image's transformer lies in a single file.

Single files have the names that ComfyUI reads, with or without `model.diffusion_model.` before
them. There q, k and v of attention are one tensor. Some have the names of diffusers' folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_ATTENTION = {"out": "to_out.0", "q_norm": "norm_q", "k_norm": "norm_k"}
_SAME = ("t_embedder", "cap_embedder", "x_pad_token", "cap_pad_token")


def zimage_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the modules of Z-Image's transformer, from the names in a single file to ours.

    config: of the transformer's folder. The tensors that `zimage_stacked` lists are not here.
    """
    patch = f"{config['all_patch_size'][0]}-1"
    ends = {"x_embedder": f"all_x_embedder.{patch}", "final_layer": f"all_final_layer.{patch}"}
    # Of two names for one module, the last is written: that of ComfyUI.
    names = {name: name for name in (*_SAME, *ends.values())} | ends
    for block in _blocks(config):
        names[block] = block
        for theirs, ours in _ATTENTION.items():
            names[f"{block}.attention.{theirs}"] = f"{block}.attention.{ours}"
    return names


def zimage_stacked(config: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Return the modules that are one tensor of a single file, by its name, in their order.

    Each has one share of the rows. config: as in `zimage_names`.
    """
    return {
        f"{block}.attention.qkv": {f"{block}.attention.to_{letter}": 1 for letter in "qkv"}
        for block in _blocks(config)
    }


def zimage_unused(key: str) -> bool:
    """Return whether a key, without its prefix, is a weight that no version of Z-Image reads."""
    return key == "norm_final.weight"


def _blocks(config: Mapping[str, Any]) -> Iterator[str]:
    for name in ("noise_refiner", "context_refiner"):
        yield from (f"{name}.{i}" for i in range(config["n_refiner_layers"]))
    yield from (f"layers.{i}" for i in range(config["n_layers"]))
