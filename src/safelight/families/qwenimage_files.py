"""Single files of Qwen-Image: their layout, and what they do not hold; see `flow_files`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from safelight.families.flow_files import (
    FLOW_SCHEDULER,
    TEXTS,
    Layout,
    Published,
    Shapes,
    count,
)
from safelight.families.latent import VAE
from safelight.weights.check import Header, axis
from safelight.weights.names import Section
from safelight.weights.names_qwen import qwen_vae_names

MARK = "transformer_blocks.0.img_mod.1.weight"
"""A weight of the transformer that no other family has."""

_OTHERS = {
    "__index_timestep_zero__": "Qwen-Image-Edit",
    "time_text_embed.addition_t_embedding.weight": "Qwen-Image-Layered",
}
"""Tensors that only files of models with the same blocks have, and what those are."""

# The ends of a word in camel case are told by its letters' case: "qwenEditRapid", but "edition".
_EDIT = r"(?:((?<![A-Za-z])|(?<=(?i:image))|(?<=(?i:qwen)))(?i:edit)|Edit)(?![a-z]|ION)"
_NAMES = {
    re.compile(rf"(?i:qwen).*{_EDIT}"): "Qwen-Image-Edit",
    re.compile(r"(?i)qwen.*layered"): "Qwen-Image-Layered",
}
"""The same of their files' names. "Edition" and "credit" tell nothing."""

NOT_READ = "{} is not supported: of Qwen-Image, the model that draws from text alone is"
"""What is said of other models of the kind."""


def other_kind(header: Header, prefix: str) -> str | None:
    """Return which other model a file with these blocks is; None if nothing says so.

    The first two versions of Qwen-Image-Edit have the tensors of Qwen-Image: their name tells.
    prefix: see `Layout`.
    """
    found = [what for key, what in _OTHERS.items() if prefix + key in header.tensors]
    found += [what for name, what in _NAMES.items() if name.search(header.name)]
    return found[0] if found else None


def _wanted(config: Mapping[str, Any]) -> tuple[Any, ...]:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return config["num_layers"], width, config["in_channels"], config["joint_attention_dim"]


def _found(shapes: Shapes) -> tuple[Any, ...]:
    width, reads = axis(shapes, "img_in.weight", 0), axis(shapes, "img_in.weight", 1)
    return count(shapes, "transformer_blocks"), width, reads, axis(shapes, "txt_in.weight", 1)


QWEN_IMAGE_LAYOUT = Layout(
    keys=(MARK,),
    wanted=_wanted,
    found=_found,
    vae=("vae.", VAE),
    texts={f"{TEXTS}qwen25_7b.transformer.": Section("text_encoder")},
    vae_modules=qwen_vae_names,
)
QWEN_IMAGE = Published(
    {
        "transformer": {
            "patch_size": 2,
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 60,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 3584,
            "guidance_embeds": False,
            "axes_dims_rope": [16, 56, 56],
        },
        # The numbers of its latents are the defaults of the network's config.
        "vae": {"base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2},
        # Qwen2.5-VL-7B (arXiv:2502.13923).
        "text_encoder": {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
        },
    },
    {
        **FLOW_SCHEDULER,
        "shift": 1.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 0.9,
        "base_image_seq_len": 256,
        "max_image_seq_len": 8192,
        "shift_terminal": 0.02,
        "time_shift_type": "exponential",
    },
    native=1328,
)
