"""Read the keys of an adapter's file: a key's ending says what its tensor is to the layer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safelight.families import Family

WRITTEN = {
    # kohya and LyCORIS
    ".lora_up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_mid.weight": "mid",
    ".lora_up": "up",
    ".lora_down": "down",
    ".lora_mid": "mid",
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
    # PEFT and diffusers
    ".lora_B.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B": "up",
    ".lora_A": "down",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude",
    # older diffusers
    ".lora.up.weight": "up",
    ".lora.down.weight": "down",
    "_lora.up.weight": "up",
    "_lora.down.weight": "down",
    ".up.weight": "up",
    ".down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.alpha": "alpha",
    ".lora.alpha": "alpha",
    ".a1.weight": "a1",
    ".a2.weight": "a2",
    ".b1.weight": "b1",
    ".b2.weight": "b2",
    ".diff": "diff",
    ".w_norm": "diff",
    ".diff_b": "bias",
    ".b_norm": "bias",
    ".set_weight": "set",
    ".weight": "ia3",
    ".on_input": "on_input",
    ".oft_blocks": "oft",
    ".rescale": "rescale",
    ".lokr_t2": "kr_t2",
    ".hada_t1": "t1",
    ".hada_t2": "t2",
    **{f".hada_w{n}_{half}": f"w{n}_{half}" for n in "12" for half in "ab"},
    **{f".lokr_w{n}{half}": f"kr{n}{half}" for n in "12" for half in ("", "_a", "_b")},
}
"""The endings of keys, and what such a tensor is to its layer."""

REFUSED = {
    ".oft_R.weight": "PEFT's OFT",
    ".oft_R": "PEFT's OFT",
    ".oft_r": "PEFT's OFT",
    ".boft_R": "PEFT's BOFT",
    ".boft_s": "PEFT's BOFT",
    ".ia3_l": "PEFT's IA³",
    ".lambda_layer": "T-LoRA",
    ".lokr_t1": "LoKr with Tucker's form on both sides",
    ".vera_lambda_b": "VeRA",
    ".vera_lambda_d": "VeRA",
    ".lora_embedding_A": "a LoRA of a vocabulary",
    ".lora_embedding_B": "a LoRA of a vocabulary",
    ".reshape_weight": "a change of a layer's size",
    ".bm.weight": "GLoRA in Tucker's form",
    ".lora_B.bias": "a LoRA with a bias of its own",
}
"""The endings of kinds that are not supported, and what the kinds are called."""

_LONGEST_FIRST = sorted((*WRITTEN, *REFUSED), key=len, reverse=True)


def endings(key: str) -> Iterator[tuple[str, str]]:
    """Yield each way to take a key apart: the layer's spelling, and the ending."""
    for ending in _LONGEST_FIRST:
        if key.endswith(ending):
            yield key.removesuffix(ending), ending


def slot_of(ending: str) -> str | None:
    """Return what a tensor is to its layer, None if its kind is not supported."""
    return WRITTEN.get(ending)


def refused_kind(ending: str) -> str:
    """Return what a kind that is not supported is called."""
    return REFUSED[ending]


FLUX, FLUX2, SD3, ZIMAGE = "FLUX.1", "FLUX.2", "Stable Diffusion 3", "Z-Image"
QWEN_IMAGE = "Qwen-Image"
"""What families are called in errors; see `called`."""

_TRANSFORMER = "a diffusion transformer"
_BLACK_FOREST = "FLUX.1 or FLUX.2"

# Parts of keys that show what kind of model a file is for. The first that is in any key counts.
_MARKS = (
    (("to_qkv_mlp_proj", "stream_modulation"), FLUX2),
    (("mod.lin", "mod_lin", "modulation.lin", "modulation_lin", "proj_mlp"), FLUX),
    (("double_blocks", "single_blocks", "single_transformer_blocks"), _BLACK_FOREST),
    (("joint_blocks",), SD3),
    (("img_mod.1", "img_mod_1", "img_mlp.net", "img_mlp_net"), QWEN_IMAGE),
    (("noise_refiner", "layers_0_attention", "layers.0.attention"), ZIMAGE),
    (("transformer_blocks.0.attn.", "transformer_blocks_0_attn_"), _TRANSFORMER),
    (("lora_te3_",), _TRANSFORMER),
    (("lora_prior_unet",), "another family"),
    (("lora_controlnet", "control_"), "a Control-LoRA"),
)

_WIDTHS = {
    768: "Stable Diffusion 1",
    1024: "Stable Diffusion 2",
    2048: "SDXL",
    1280: "SDXL's refiner",
}


def family_of_width(width: int | None) -> str | None:
    """Return the family whose network reads text states of this width."""
    return _WIDTHS.get(width or 0)


def called(family: Family, config: Any) -> str:
    """Return what a model's kind is called in errors. config: of the network that denoises."""
    if not hasattr(config, "cross_attention_dim"):
        return family.title
    return family_of_width(config.cross_attention_dim) or family.name


def differ(made_for: str, family: str) -> bool:
    """Return whether a file's kind of model, by `family_of`, is not that of a model.

    family: see `called`.
    """
    alike = {_TRANSFORMER: (FLUX, FLUX2, SD3, QWEN_IMAGE), _BLACK_FOREST: (FLUX, FLUX2)}
    return made_for != family and family not in alike.get(made_for, ())


def text_width(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Return the width of the text states that an adapter is for, None if no key tells."""
    for key, shape in shapes.items():
        reads = "attn2_to_k" in key or "attn2.to_k" in key or "attn2.processor.to_k" in key
        if reads and key.endswith(("down.weight", "lora_A.weight")) and len(shape) > 1:
            return shape[1]
    return None


def family_of_keys(keys: Collection[str]) -> str | None:
    """Return what kind of model an adapter was made for, None if no name of a layer tells."""
    named = ((mark, family) for marks, family in _MARKS for mark in marks)
    return next((family for mark, family in named if any(mark in key for key in keys)), None)


def family_of(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> str | None:
    """Return what kind of model an adapter was made for, None if its file does not tell."""
    stated = metadata.get("ss_base_model_version", "") or metadata.get("modelspec.architecture", "")
    stated = stated.lower()
    for word, family in (
        *(("sdxl", "SDXL"), ("stable-diffusion-xl", "SDXL")),
        *(("flux2", FLUX2), ("flux-2", FLUX2), ("flux.2", FLUX2), ("flux", FLUX)),
        *(("sd3", SD3), ("stable-diffusion-3", SD3)),
        *(("qwen-image", QWEN_IMAGE), ("qwen_image", QWEN_IMAGE)),
        *(("zimage", ZIMAGE), ("z-image", ZIMAGE), ("z_image", ZIMAGE)),
        *(("sd_v1", "Stable Diffusion 1"), ("stable-diffusion-v1", "Stable Diffusion 1")),
        *(("sd_v2", "Stable Diffusion 2"), ("stable-diffusion-v2", "Stable Diffusion 2")),
    ):
        if stated.startswith(word):
            return family
    if (marked := family_of_keys(shapes)) is not None:
        return marked
    width = text_width(shapes)
    if width is not None:
        return family_of_width(width)
    if any(key.startswith(("lora_te2_", "text_encoder_2.")) for key in shapes):
        return "SDXL"
    return None
