"""Keys of LoRAs that are passed over, as diffusers does: those that do nothing or repeat others."""

from __future__ import annotations

import re
from collections.abc import Collection

from safelight.adapters.keys import FLUX, ZIMAGE

_IDLE = {
    # FLUX.1 takes the state of CLIP's last token before this layer.
    FLUX: re.compile(
        r"(text_encoders\.clip_l\.(transformer\.)?|text_encoder\.|lora_te1?_)text_projection\..+"
    ),
    # Checkpoints have this norm, and no program reads it.
    ZIMAGE: re.compile(r"((model\.)?diffusion_model\.|transformer\.|lora_unet_)?norm_final\..+"),
}
_JOINED = re.compile(r"(.+)\.(qkv|out)\.(lora\.down\.weight|lora\.up\.weight|alpha)")
_OURS = {
    "qkv": ("to.q", "to.k", "to.v", "to_q", "to_k", "to_v"),
    "out": ("to_out.0",),
}
"""Joined layers of Z-Image in the naming with `.lora.down.weight`, and the names that count."""


def is_idle(key: str, family: str) -> bool:
    """Return whether a key that belongs to nothing is known to do nothing in any program."""
    known = _IDLE.get(family)
    return known is not None and known.fullmatch(key) is not None


def is_control(keys: Collection[str]) -> bool:
    """Return whether a file is a Control-LoRA of FLUX.1's makers."""
    norms = any(key.endswith(("query_norm.scale", "key_norm.scale")) for key in keys)
    return norms and any(key.endswith(".lora_A.weight") for key in keys)


def repeated(keys: Collection[str], family: str) -> set[str]:
    """Return the keys that repeat what others of the file say in another naming."""
    if family == FLUX:
        counts = ("transformer.", "lora_transformer_")
        if any(key.startswith(counts) for key in keys):
            return {key for key in keys if key.startswith("lora_unet_")}
    if family != ZIMAGE:
        return set()
    found: set[str] = set()
    for key in keys:
        if (parts := _JOINED.fullmatch(key)) is None:
            continue
        block, layer, ending = parts.groups()
        there = "lora.down.weight" if layer == "qkv" else ending
        if any(f"{block}.{ours}.{there}" in keys for ours in _OURS[layer]):
            found.add(key)
    return found
