"""Single files of Stable Diffusion 3, FLUX and Z-Image: their layout, and what they do not hold.

The transformer has the names of the original code, below `model.diffusion_model.` or bare. A file
may hold text encoders and an autoencoder as well, and never a config or T5's or Qwen's tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from safelight.families.latent import CLIP_G_CONFIG, CLIP_L_CONFIG, IGNORED, VAE, VAE_CONFIG
from safelight.weights.check import Header, axis, refusal
from safelight.weights.names import Section, vae_names
from safelight.weights.names_flux2_vae import flux2_vae_names
from safelight.weights.names_qwen import qwen_unused
from safelight.weights.names_zimage import zimage_unused

if TYPE_CHECKING:
    from safelight.families.base import Family

Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of a transformer's tensors, by their names without the prefix."""

_TRANSFORMER = ("model.diffusion_model.", "")
TEXTS = "text_encoders."
_UNPROJECTED = {"text_projection.weight": "text_model.final_layer_norm.weight"}
"""CLIP-L of SD 3 gives its pooled state as it is, where folders have a projection."""

# What writers add and no family reads. CLIP-L's projection is not applied by the original code of
# SD 3, nor by that of FLUX.1, even where a file has it.
_UNUSED = re.compile(
    r"text_encoders\.\w+\.(logit_scale|text_projection)"
    r"|text_encoders\.clip_l\.transformer\.text_projection\.weight"
    r"|text_encoders\.clip_[lg]\.transformer\.(text_model\.)?embeddings\.position_ids"
    r"|text_encoders\.t5xxl\.transformer\.encoder\.embed_tokens\.weight"
    r"|text_encoders\.qwen3_[48]b\.transformer\.lm_head\.weight"
    r"|(vae|first_stage_model)\.bn\.num_batches_tracked"
)


@dataclass(frozen=True, slots=True)
class Published:
    """The published folder of a variant, for its single files.

    configs: of its networks, in diffusers' keys. scheduler: its config. native: side of the
    training pictures in pixels.
    """

    configs: Mapping[str, Mapping[str, Any]]
    scheduler: Mapping[str, Any]
    native: int = 1024


@dataclass(frozen=True, slots=True)
class Layout:
    """How the single files of a family are laid out.

    keys: names of a tensor of the transformer that other families' files do not have, one for each
    writer. wanted, found: what tells variants apart, by a transformer's config and by its tensors.
    vae: the prefixes of the autoencoder; the first is written. texts: the sections of the text
    encoders by their prefixes. vae_modules: the autoencoder's modules, from the original names to
    ours, by its config.
    """

    keys: tuple[str, ...]
    wanted: Callable[[Mapping[str, Any]], tuple[Any, ...]]
    found: Callable[[Shapes], tuple[Any, ...]]
    vae: tuple[str, ...]
    texts: Mapping[str, Section] = field(default_factory=dict)
    vae_modules: Callable[[Mapping[str, Any]], dict[str, str]] = vae_names

    def prefix(self, header: Header) -> str | None:
        """Return what stands before the transformer's names, None if the file has none."""
        there = header.tensors
        return next((p for p in _TRANSFORMER if any(p + key in there for key in self.keys)), None)

    def sections(self, transformer: Section, vae: Mapping[str, Any]) -> dict[str, Section]:
        """Return the sections of a file by their prefixes. vae: the autoencoder's config."""
        whole, bare = _TRANSFORMER
        own = dict.fromkeys(self.vae, Section("vae", self.vae_modules(vae)))
        return {whole: transformer, **own, **self.texts, bare: transformer}

    def told(self, header: Header, prefix: str) -> tuple[Any, ...]:
        """Return what tells variants apart. prefix: of the transformer."""
        return self.found(
            {
                key.removeprefix(prefix): info.shape
                for key, info in header.tensors.items()
                if key.startswith(prefix)
            }
        )


def is_unused(key: str) -> bool:
    """Return whether a key of a single file is known, and read by no network of ours."""
    inner = key.removeprefix(_TRANSFORMER[0])
    known = IGNORED.fullmatch(key) or _UNUSED.fullmatch(key)
    return known is not None or zimage_unused(inner) or qwen_unused(key)


def unknown_variant(header: Header, told: tuple[Any, ...], family: Family) -> Exception:
    """Return the error for a file whose transformer has other shapes than the published ones."""
    return refusal(
        header.name,
        f"a transformer of {family.title}'s kind with other shapes than the published ones, "
        f"{told}; give its diffusers folder",
    )


def count(shapes: Shapes, block: str) -> int:
    """Return how many blocks have this name before their number."""
    return len({key.split(".")[1] for key in shapes if key.startswith(f"{block}.")})


# --- Stable Diffusion 3 --------------------------------------------------------------------------


def _sd3_wanted(config: Mapping[str, Any]) -> tuple[Any, ...]:
    layers, side = config["num_layers"], config["pos_embed_max_size"]
    dual = len(config.get("dual_attention_layers", ()))
    return layers, config["caption_projection_dim"], side**2, dual, "qk_norm" in config


def _sd3_found(shapes: Shapes) -> tuple[Any, ...]:
    # GGUF files may lack the first axis of the positions, which has length 1.
    width, places = axis(shapes, "x_embedder.proj.weight", 0), shapes.get("pos_embed", ())
    positions = places[-2] if len(places) > 1 else 0
    dual = sum(key.endswith(".x_block.attn2.qkv.weight") for key in shapes)
    normed = "joint_blocks.0.x_block.attn.ln_q.weight" in shapes
    return count(shapes, "joint_blocks"), width, positions, dual, normed


SD3_LAYOUT = Layout(
    keys=("joint_blocks.0.context_block.adaLN_modulation.1.bias",),
    wanted=_sd3_wanted,
    found=_sd3_found,
    vae=(VAE, "vae."),
    texts={
        f"{TEXTS}clip_l.transformer.": Section("text_encoder", identity=_UNPROJECTED),
        f"{TEXTS}clip_g.transformer.": Section("text_encoder_2"),
        f"{TEXTS}t5xxl.transformer.": Section("text_encoder_3"),
    },
)

_VAE_16 = {
    **VAE_CONFIG,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_SD3_VAE = {**_VAE_16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
_FLUX_VAE = {**_VAE_16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
# The encoder of T5 v1.1 XXL (arXiv:1910.10683).
_T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
FLOW_SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}


def _sd3(**transformer: Any) -> Published:
    config = {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
    }
    configs = {
        "transformer": {**config, **transformer},
        "vae": _SD3_VAE,
        "text_encoder": CLIP_L_CONFIG,
        "text_encoder_2": CLIP_G_CONFIG,
        "text_encoder_3": _T5_XXL,
    }
    return Published(configs, {**FLOW_SCHEDULER, "shift": 3.0})


SD3_MEDIUM = _sd3()
SD35_MEDIUM = _sd3(
    pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=list(range(13))
)
SD35_LARGE = _sd3(
    num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm"
)

# --- FLUX.1 --------------------------------------------------------------------------------------


def _flux_wanted(config: Mapping[str, Any]) -> tuple[Any, ...]:
    layers, singles = config["num_layers"], config["num_single_layers"]
    guided = bool(config["guidance_embeds"])
    return layers, singles, config["in_channels"], config["joint_attention_dim"], guided


def _flux_found(shapes: Shapes) -> tuple[Any, ...]:
    layers, singles = count(shapes, "double_blocks"), count(shapes, "single_blocks")
    reads, text = axis(shapes, "img_in.weight", 1), axis(shapes, "txt_in.weight", 1)
    return layers, singles, reads, text, "guidance_in.in_layer.weight" in shapes


FLUX_LAYOUT = Layout(
    keys=tuple(f"double_blocks.0.img_attn.norm.key_norm.{leaf}" for leaf in ("scale", "weight")),
    wanted=_flux_wanted,
    found=_flux_found,
    vae=("vae.", VAE),
    texts={
        f"{TEXTS}clip_l.transformer.": Section("text_encoder"),
        f"{TEXTS}t5xxl.transformer.": Section("text_encoder_2"),
    },
)


def _flux(guided: bool, **scheduler: Any) -> Published:
    configs = {
        "transformer": {
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": guided,
            "axes_dims_rope": [16, 56, 56],
        },
        "vae": _FLUX_VAE,
        "text_encoder": CLIP_L_CONFIG,
        "text_encoder_2": _T5_XXL,
    }
    return Published(configs, {**FLOW_SCHEDULER, **scheduler})


FLUX_DEV = _flux(
    guided=True,
    shift=3.0,
    use_dynamic_shifting=True,
    base_shift=0.5,
    max_shift=1.15,
    base_image_seq_len=256,
    max_image_seq_len=4096,
)
FLUX_SCHNELL = _flux(guided=False, shift=1.0, use_dynamic_shifting=False)

# --- FLUX.2 --------------------------------------------------------------------------------------

_DEV = "guidance_in.in_layer.weight"


def _flux2_wanted(config: Mapping[str, Any]) -> tuple[Any, ...]:
    layers, singles = config["num_layers"], config["num_single_layers"]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return layers, singles, width, config["joint_attention_dim"]


def _flux2_found(shapes: Shapes) -> tuple[Any, ...]:
    layers, singles = count(shapes, "double_blocks"), count(shapes, "single_blocks")
    return layers, singles, axis(shapes, "img_in.weight", 0), axis(shapes, "txt_in.weight", 1)


def flux2_is_dev(header: Header, prefix: str) -> bool:
    """Return whether a file of FLUX.2 is dev: it reads a guidance scale. prefix: see `Layout`."""
    return f"{prefix}{_DEV}" in header.tensors


FLUX2_TEXTS = {2560: f"{TEXTS}qwen3_4b.transformer.", 4096: f"{TEXTS}qwen3_8b.transformer."}
"""The prefix of the text encoder by the width of its states."""

FLUX2_LAYOUT = Layout(
    keys=("single_stream_modulation.lin.weight",),
    wanted=_flux2_wanted,
    found=_flux2_found,
    vae=("vae.", VAE),
    texts=dict.fromkeys(FLUX2_TEXTS.values(), Section("text_encoder")),
    vae_modules=flux2_vae_names,
)


def _qwen3(hidden: int, inner: int) -> dict[str, Any]:
    """Return the config of Qwen3-4B or 8B (arXiv:2505.09388)."""
    return {
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 1000000.0,
    }


_FLUX2_VAE = {
    **{key: value for key, value in VAE_CONFIG.items() if key != "scaling_factor"},
    "latent_channels": 32,
    "batch_norm_eps": 1e-4,
    "patch_size": [2, 2],
}


def _klein(layers: int, singles: int, heads: int, text: Mapping[str, Any]) -> Published:
    configs = {
        "transformer": {
            "in_channels": 128,
            "num_layers": layers,
            "num_single_layers": singles,
            "attention_head_dim": 128,
            "num_attention_heads": heads,
            "joint_attention_dim": 3 * text["hidden_size"],
            "guidance_embeds": False,
            "axes_dims_rope": [32, 32, 32, 32],
            "rope_theta": 2000,
        },
        "vae": _FLUX2_VAE,
        "text_encoder": text,
    }
    return Published(configs, {**FLOW_SCHEDULER, "shift": 3.0, "use_dynamic_shifting": True})


_QWEN3_4B = _qwen3(2560, 9728)
KLEIN_4B = _klein(5, 20, 24, _QWEN3_4B)
KLEIN_9B = _klein(8, 24, 32, _qwen3(4096, 12288))

# --- Z-Image -------------------------------------------------------------------------------------


def _zimage_wanted(config: Mapping[str, Any]) -> tuple[Any, ...]:
    layers, refiners = config["n_layers"], config["n_refiner_layers"]
    return layers, refiners, config["dim"], config["cap_feat_dim"]


def _zimage_found(shapes: Shapes) -> tuple[Any, ...]:
    layers, refiners = count(shapes, "layers"), count(shapes, "noise_refiner")
    embedder = "x_embedder.weight"
    if embedder not in shapes:  # diffusers' name, with the patch's sides
        embedder = "all_x_embedder.2-1.weight"
    width, text = axis(shapes, embedder, 0), axis(shapes, "cap_embedder.1.weight", 1)
    return layers, refiners, width, text


ZIMAGE_LAYOUT = Layout(
    keys=("layers.0.adaLN_modulation.0.weight",),
    wanted=_zimage_wanted,
    found=_zimage_found,
    vae=("vae.", VAE),
    texts={f"{TEXTS}qwen3_4b.transformer.": Section("text_encoder")},
)
Z_IMAGE = Published(
    {
        "transformer": {
            "all_patch_size": [2],
            "in_channels": 16,
            "dim": 3840,
            "n_layers": 30,
            "n_refiner_layers": 2,
            "n_heads": 30,
            "n_kv_heads": 30,
            "cap_feat_dim": 2560,
            "rope_theta": 256.0,
            "axes_dims": [32, 48, 48],
        },
        "vae": _FLUX_VAE,
        "text_encoder": _QWEN3_4B,
    },
    {**FLOW_SCHEDULER, "shift": 6.0},
)
