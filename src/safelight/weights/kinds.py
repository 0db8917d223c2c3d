"""What a weight file is, by the names and shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

PNG_TEXT = "sd-ti-embedding"
"""The text of a PNG that A1111 keeps an embedding in."""

_ADAPTER = re.compile(
    r"(^|\.)(lora_|lycoris_)|[._]lora\d?\.(up|down)\."
    r"|\.(lora_(A|B|up|down|mid|linear_layer)|hada_|lokr_|alpha$|dora_scale|diff(_b)?$)"
)
_VAE = re.compile(
    r"(vae\.|first_stage_model\.)?((en|de)coder\.|(post_)?quant_conv\.|bn\.|conv[12]\.)"
)
# What `vae_file` passes over: tensors of training, and constants that some writers add.
_BESIDE_VAE = re.compile(
    r"(vae\.|first_stage_model\.)?(loss|model_ema)\..*|.*\bnum_batches_tracked"
)
_CONTROLNET = (
    *("control_model.", "input_hint_block.", "controlnet_cond_embedding."),
    "lora_controlnet",  # a Control-LoRA, which loading refuses by its name
)
_T2I_ADAPTER = re.compile(r"(adapter\.)?(body\.\d+\.|conv_in\.)")
# Of the original full and light ones, and of diffusers'. Upscalers have bodies, too.
_T2I_BLOCK = re.compile(
    r"(adapter\.)?body\.\d+\.(block\d\.|in_conv\.|(body|resnets)\.\d+\.block\d\.)"
)
IP_ADAPTER = ("image_proj.", "ip_adapter.")
_IMAGE_ENCODER = ("vision_model.embeddings.", "visual.ln_pre.")
# One name of each kind of text encoder; in the last two as llama.cpp names them.
_TEXT_ENCODER = re.compile(
    r"(.*\.)?embeddings\.token_embedding\.weight"
    r"|(.*\.)?encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight"
    r"|(.*\.)?layers\.0\.self_attn\.q_norm\.weight"
    r"|(.*\.)?(?<!encoder\.)layers\.0\.self_attn\.q_proj\.bias"
    r"|(enc\.)?blk\.0\.attn_q\.weight"
)
_DENOISER = ("model.diffusion_model.", "first_stage_model.", "double_blocks.", "joint_blocks.")
# Of the commonest architectures: SwinIR and most others, ESRGAN, Compact, SPAN, OmniSR, PLKSR,
# MoSR, SAFMN, DCTLSA, DITN, Real-CUGAN and RCAN.
_UPSCALER = re.compile(
    r"(params(_ema|-ema)?\.|module\.|netG\.)?"
    r"(conv_first\.weight|RRDB_trunk\.|model\.1\.sub\.|body\.0\.(weight$|rdb1\.)|block_1\.c1_r\."
    r"|residual_layer\.0\.residual_layer\.|feats\.0\.(weight|norm1|layers)|gblocks\.0\.weight"
    r"|fea_conv\.|UFONE\.|unet1\.conv1\.conv\.|body\.0\.body\.0\.body\.0\.weight)"
)
_EMBEDDING = ("emb_params", "clip_l", "clip_g", "string_to_param")


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


def kind_of(tensors: Mapping[str, _Shaped]) -> str | None:
    """Return the kind of a file, a key of `library.SUBFOLDERS`; None if it looks like nothing.

    tensors: by their names in the file. Each loader looks closer; this is for a list.
    """
    if not tensors:
        return None
    if any(name.startswith(_CONTROLNET) for name in tensors) or is_t2i_adapter(tensors):
        return "controlnet"
    if any(name.startswith(IP_ADAPTER) for name in tensors):
        return "ip_adapter"
    if any(name.startswith(_IMAGE_ENCODER) for name in tensors):
        return "image_encoder"
    if any(_UPSCALER.match(name) for name in tensors):
        return "upscaler"
    if any(_ADAPTER.search(name) for name in tensors):
        return "lora"
    if any(_TEXT_ENCODER.fullmatch(name) for name in tensors) and not any(
        name.startswith(_DENOISER) for name in tensors
    ):
        return "text_encoder"
    own = [name for name in tensors if not _BESIDE_VAE.fullmatch(name)]
    if own and all(_VAE.match(name) for name in own):
        return "vae"
    # A tiny autoencoder's layers are numbered in one list.
    if all(re.match(r"\d+\.(conv\.\d\.|skip\.)?(weight|bias)$", name) for name in tensors):
        return "vae"
    few = len(tensors) <= 4 and all(len(t.shape) in (1, 2) for t in tensors.values())
    if few and (len(tensors) == 1 or any(n.startswith(_EMBEDDING) for n in tensors)):
        return "embedding"
    return "model"


def is_t2i_adapter(names: Collection[str]) -> bool:
    """Return whether the names of a file's tensors are those of a T2I-Adapter."""
    return any(map(_T2I_BLOCK.match, names)) and all(map(_T2I_ADAPTER.match, names))


def holds_embedding(picture: Path) -> bool:
    """Return whether a picture has an embedding in its text.

    Raises SafelightError if it is no picture.
    """
    from safelight.picture import opened

    with opened(picture, picture.name) as image:
        return PNG_TEXT in image.info
