"""Where each weight of our networks lies in a checkpoint.

Our names are those of diffusers' folders, so a folder needs two rules for old names only. A
single file has the names of the original code (CompVis latent-diffusion for UNet and VAE,
OpenCLIP for the text encoder of SD 2.x); `unet_names`, `vae_names` and `open_clip_names` are
the table from those to ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from safelight.weights.check import Header, refusal
from safelight.weights.families import Family, family_by_shape

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."

# What a checkpoint may hold besides the weights: the training's moving average, its constants,
# the noise levels as tables (ours come from the scheduler's config), and what only CLIP's
# comparison with pictures needs.
_IGNORED = re.compile(
    r"model_ema\..*|global_step|scale_factor|betas|(sqrt_)?alphas_cumprod(_prev)?|logvar"
    r"|(sqrt|log)_one_minus_alphas_cumprod|sqrt_recip(m1)?_alphas_cumprod"
    r"|sqrt_recipm1_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])"
    r"|first_stage_model\.loss\..*|first_stage_model\.model_ema\..*"
    r"|cond_stage_model\.(transformer|model)\.(text_model\.)?(embeddings\.)?position_ids"
    r"|cond_stage_model\.(model\.)?(logit_scale|text_projection|attn_mask)"
)
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE_RESNET = {n: n for n in ("norm1", "conv1", "norm2", "conv2")} | {
    "nin_shortcut": "conv_shortcut"
}
_VAE_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight of one of our networks: tensor `key` of a file, read as `shape`.

    third: OpenCLIP keeps the projections to q, k and v in one tensor; 0, 1 or 2 is the third of
      its rows to take.
    """

    header: Header
    key: str
    shape: tuple[int, ...]
    third: int | None = None

    @property
    def dtype(self) -> str:
        return self.header.tensors[self.key].dtype


def family_of(header: Header) -> Family:
    """The family of a single-file checkpoint, by the shapes of its UNet.

    Raises SafelightError that says what the file is instead, where its keys tell.
    """
    first = header.tensors.get(UNET + "input_blocks.0.0.weight")
    key = header.tensors.get(UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    if first and key and len(first.shape) == 4 and len(key.shape) == 2:
        family = family_by_shape(first.shape[0], key.shape[1], first.shape[1])
        if family:
            return family
        raise refusal(
            header.name,
            f"a UNet with {first.shape[1]} input channels and text states of {key.shape[1]} is "
            "not supported; Stable Diffusion 1.x and 2.x are",
        )
    for prefix, what in (
        ("conditioner.embedders.", "Stable Diffusion XL, which is not supported yet"),
        ("control_model.", "a ControlNet, not a whole model"),
        ("lora_", "a LoRA, not a whole model"),
        ("down_blocks.", "one part of a model folder; give the folder's path"),
        ("encoder.", "one part of a model; the whole model is needed"),
        ("text_model.", "one part of a model folder; give the folder's path"),
    ):
        if any(k.startswith(prefix) for k in header.tensors):
            raise refusal(header.name, f"this is {what}")
    raise refusal(header.name, "not a checkpoint of Stable Diffusion 1.x or 2.x")


def from_single_file(header: Header, family: Family) -> dict[str, dict[str, Weight]]:
    """The weights of "unet", "vae" and "text_encoder", by our names.

    Raises SafelightError that names keys which belong to none of them, and a part of which
    there is nothing.
    """
    unet, vae = unet_names(family.unet), vae_names(family.vae)
    layers = family.text_encoder["num_hidden_layers"]
    clip = open_clip_names(layers)
    last_layer = f"{OPEN_CLIP}transformer.resblocks.{layers}."
    found: dict[str, dict[str, Weight]] = {"unet": {}, "vae": {}, "text_encoder": {}}
    left: list[str] = []
    for key, info in header.tensors.items():
        if _IGNORED.fullmatch(key) or key.startswith(last_layer):
            continue
        part, name = "", None
        if key.startswith(UNET):
            part, name = "unet", _renamed(key.removeprefix(UNET), unet)
        elif key.startswith(VAE):
            part, name = "vae", _renamed(key.removeprefix(VAE), vae)
        elif key.startswith(CLIP):
            part, name = "text_encoder", _text_name(key.removeprefix(CLIP))
        elif key.startswith(OPEN_CLIP):
            part, name = "text_encoder", _renamed(key.removeprefix(OPEN_CLIP), clip)
            joint = re.fullmatch(r".*\.attn\.in_proj_(weight|bias)", key)
            if joint and info.shape and info.shape[0] % 3 == 0:
                name = None
                layer = clip.get(key.removeprefix(OPEN_CLIP).partition(".attn.")[0])
                if layer:
                    shape = (info.shape[0] // 3, *info.shape[1:])
                    for third, letter in enumerate("qkv"):
                        ours = f"{layer}.self_attn.{letter}_proj.{joint[1]}"
                        found[part][ours] = Weight(header, key, shape, third)
                    continue
        if name is None:
            left.append(key)
        else:
            found[part][name] = Weight(header, key, _shape(part, name, info.shape))
    for part, prefix in (("unet", UNET), ("vae", VAE), ("text_encoder", "cond_stage_model.")):
        if not found[part]:
            raise refusal(header.name, f"no {part} ({prefix}*) in the file; a full one is needed")
    if left:
        raise refusal(header.name, f"{len(left)} keys that we do not know: {some(left)}")
    return found


def from_folder(part: str, headers: Iterable[Header]) -> dict[str, Weight]:
    """The weights of one part of a folder, by our names."""
    tensors = [(h, key, info.shape) for h in headers for key, info in h.tensors.items()]
    found: dict[str, Weight] = {}
    for header, key, shape in tensors:
        name = key
        if part == "text_encoder":
            name = _text_name(key)
            if name == "text_model.embeddings.position_ids":
                continue
        elif part == "vae":
            head, _, leaf = key.rpartition(".")
            head, _, module = head.rpartition(".")
            name = f"{head}.{_OLD_VAE_ATTENTION.get(module, module)}.{leaf}" if head else key
        if name in found:
            raise refusal(
                header.name, f"{key!r:.60} and {found[name].key!r:.60} are the same weight"
            )
        found[name] = Weight(header, key, _shape(part, name, shape))
    return found


def some(names: Iterable[str]) -> str:
    """Up to three of the names, for an error."""
    names = sorted(names)
    return ", ".join(f"{n:.48}" for n in names[:3]) + (" …" if len(names) > 3 else "")


def unet_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Modules of a UNet, from the original names to ours.

    The original numbers all blocks on one list, a downsampler being a block of its own, an
    upsampler the last member of a block.
    """
    names = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.1": "mid_block.attentions.0",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    names |= _under("middle_block.0", "mid_block.resnets.0", _RESNET)
    names |= _under("middle_block.2", "mid_block.resnets.1", _RESNET)
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    n = 1
    for i, kind in enumerate(config["down_block_types"]):
        for j in range(layers):
            names |= _under(f"input_blocks.{n}.0", f"down_blocks.{i}.resnets.{j}", _RESNET)
            if kind.startswith("CrossAttn"):
                names[f"input_blocks.{n}.1"] = f"down_blocks.{i}.attentions.{j}"
            n += 1
        if i < levels - 1:
            names[f"input_blocks.{n}.0.op"] = f"down_blocks.{i}.downsamplers.0.conv"
            n += 1
    n = 0
    for i, kind in enumerate(config["up_block_types"]):
        attends = kind.startswith("CrossAttn")
        for j in range(layers + 1):
            names |= _under(f"output_blocks.{n}.0", f"up_blocks.{i}.resnets.{j}", _RESNET)
            if attends:
                names[f"output_blocks.{n}.1"] = f"up_blocks.{i}.attentions.{j}"
            n += 1
        if i < levels - 1:
            upsampler = f"output_blocks.{n - 1}.{2 if attends else 1}.conv"
            names[upsampler] = f"up_blocks.{i}.upsamplers.0.conv"
    return names


def vae_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Modules of a VAE, from the original names to ours. The original counts the decoder's
    levels from the picture's side, we count in the order that they run."""
    names = {n: n for n in ("quant_conv", "post_quant_conv")}
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    for half in ("encoder", "decoder"):
        names |= {f"{half}.{n}": f"{half}.{n}" for n in ("conv_in", "conv_out")}
        names[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        middle = f"{half}.mid_block"
        names |= _under(f"{half}.mid.block_1", f"{middle}.resnets.0", _VAE_RESNET)
        names |= _under(f"{half}.mid.block_2", f"{middle}.resnets.1", _VAE_RESNET)
        names |= _under(f"{half}.mid.attn_1", f"{middle}.attentions.0", _VAE_ATTENTION)
    for i in range(levels):
        down, up = f"encoder.down_blocks.{i}", f"decoder.up_blocks.{levels - 1 - i}"
        for j in range(layers):
            names |= _under(f"encoder.down.{i}.block.{j}", f"{down}.resnets.{j}", _VAE_RESNET)
        for j in range(layers + 1):
            names |= _under(f"decoder.up.{i}.block.{j}", f"{up}.resnets.{j}", _VAE_RESNET)
        names[f"encoder.down.{i}.downsample.conv"] = f"{down}.downsamplers.0.conv"
        names[f"decoder.up.{i}.upsample.conv"] = f"{up}.upsamplers.0.conv"
    return names


def open_clip_names(layers: int) -> dict[str, str]:
    """Modules of an OpenCLIP text encoder, from its names to ours."""
    names = {
        "token_embedding": "text_model.embeddings.token_embedding",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final": "text_model.final_layer_norm",
    }
    for i in range(layers):
        theirs, ours = f"transformer.resblocks.{i}", f"text_model.encoder.layers.{i}"
        names |= {theirs: ours} | _under(theirs, ours, _CLIP_LAYER)
    return names


def _under(theirs: str, ours: str, names: Mapping[str, str]) -> dict[str, str]:
    return {f"{theirs}.{a}": f"{ours}.{b}" for a, b in names.items()}


def _renamed(key: str, names: Mapping[str, str]) -> str | None:
    """Our name of a key: that of the innermost module the table knows, and what follows it."""
    module, rest = key, ""
    while module:
        if module in names:
            return names[module] + rest
        module, dot, leaf = module.rpartition(".")
        rest = dot + leaf + rest
    return None


def _text_name(key: str) -> str:
    """Newer writers leave out the prefix `text_model.`."""
    return key if key.startswith("text_model.") else f"text_model.{key}"


def _shape(part: str, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape to read a tensor in: the VAE's attention was once made of 1×1 convolutions."""
    if part == "vae" and ".attentions." in name and len(shape) > 2 and set(shape[2:]) == {1}:
        return shape[:2]
    return shape
