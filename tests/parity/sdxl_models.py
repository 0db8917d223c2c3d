"""Tiny random models of SDXL, as folders that diffusers writes and as single files."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import load_file, save_file

from safelight.families import sdxl
from safelight.prompt.tokenizer import clip_tokenizer

EOS = "<|endoftext|>"
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
ZERO_SNR = {
    **SCHEDULER,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
TEXT = {
    "vocab_size": 49408,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "hidden_act": "quick_gelu",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "projection_dim": 16,
}
TEXT_2 = {**TEXT, "hidden_size": 24, "hidden_act": "gelu", "projection_dim": 20}
UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": [2, 4],
    "transformer_layers_per_block": [1, 2],
    "cross_attention_dim": 40,
    "use_linear_projection": True,
    "norm_num_groups": 8,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}
REFINER = {
    **UNET,
    "transformer_layers_per_block": 2,
    "cross_attention_dim": 24,
    "projection_class_embeddings_input_dim": 20 + 5 * 8,
}
VAE = {
    "block_out_channels": [8, 8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "scaling_factor": 0.13025,
    "sample_size": 64,
}


def _text_encoder(kind: str, config: dict[str, Any], folder: Path) -> None:
    torch.manual_seed(0)
    network = getattr(transformers, kind)(transformers.CLIPTextConfig(**config))
    # Random weights as they come barely tell one word from another.
    with torch.no_grad():
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    network.save_pretrained(folder)


@cache
def _clip_files(pad: str) -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        clip_tokenizer(pad, 77).save(Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def write_clip_tokenizer(folder: Path, pad: str) -> None:
    """Write CLIP's own tokenizer, whose text is made once."""
    folder.mkdir()
    for name, content in _clip_files(pad).items():
        (folder / name).write_bytes(content)


def make_folder(
    folder: Path,
    unet: dict[str, Any],
    scheduler: dict[str, Any] = SCHEDULER,
    *,
    pipeline: str = "StableDiffusionXLPipeline",
    zeros: bool = True,
    vae: dict[str, Any] = VAE,
) -> Path:
    """Write a model folder, without the first text encoder where the UNet does not read it."""
    first = unet["cross_attention_dim"] == TEXT["hidden_size"] + TEXT_2["hidden_size"]
    torch.manual_seed(1)
    network = diffusers.UNet2DConditionModel(**unet)
    with torch.no_grad():
        network.conv_out.weight.mul_(4)
    network.save_pretrained(folder / "unet")
    torch.manual_seed(2)
    diffusers.AutoencoderKL(**vae).save_pretrained(folder / "vae")
    if first:
        _text_encoder("CLIPTextModel", TEXT, folder / "text_encoder")
        write_clip_tokenizer(folder / "tokenizer", EOS)
    _text_encoder("CLIPTextModelWithProjection", TEXT_2, folder / "text_encoder_2")
    write_clip_tokenizer(folder / "tokenizer_2", "!")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {
        "_class_name": pipeline,
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"] if first else [None, None],
        "tokenizer": ["transformers", "CLIPTokenizer"] if first else [None, None],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "force_zeros_for_empty_prompt": zeros,
    }
    if not first:
        index["requires_aesthetics_score"] = True
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def tiny_family(name: str) -> sdxl.StableDiffusionXL:
    """Return the variant of the same structure with the sizes of the tiny models."""
    [real] = [v for v in sdxl.VARIANTS if v.name == name]
    keys = ("sample_size", "in_channels")
    unet = REFINER if name == "sdxl-refiner" else UNET
    return replace(
        real,
        unet={k: v for k, v in unet.items() if k not in keys},
        native=64,
        vae=VAE,
        text_encoder=TEXT,
        text_encoder_2=TEXT_2,
    )


def single_file(folder: Path, path: Path, family: sdxl.StableDiffusionXL, *marks: str) -> Path:
    """Write a folder's weights as one file in the layout of the original code.

    marks: names of empty tensors that stand in it as well.
    """
    file = {mark: torch.zeros(0) for mark in marks}
    for prefix, section in family.sections().items():
        part = folder / section.part
        [weights] = part.glob("*.safetensors")
        state = load_file(weights)
        if section.part.startswith("text_encoder"):
            state = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in state.items()}
            state = {k.replace("text_model.text_proj", "text_proj"): v for k, v in state.items()}
            state.pop("text_model.embeddings.position_ids", None)
        for name, tensor in original_names(section, state).items():
            file[prefix + name] = tensor.contiguous()
    save_file(file, path)
    return path


def original_names(section: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors by the names of the original code."""
    if section.names is None:
        return state
    back = {ours: theirs for theirs, ours in section.names.items()}
    found: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if section.thirds and any(f".{x}_proj." in name for x in "qkv"):
            if ".q_proj." in name:
                layer, leaf = name.split(".self_attn.q_proj.")
                thirds = [state[f"{layer}.self_attn.{x}_proj.{leaf}"] for x in "qkv"]
                found[f"{back[layer]}.attn.in_proj_{leaf}"] = torch.cat(thirds)
            continue
        module, rest = name, ""
        while module not in back:
            module, dot, leaf = module.rpartition(".")
            rest = dot + leaf + rest
        if name in section.transposed:
            tensor = tensor.t()
        if section.part == "vae" and ".attentions." in name and tensor.dim() == 2:
            tensor = tensor[..., None, None]
        found[back[module] + rest] = tensor
    return found
