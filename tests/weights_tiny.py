"""Checkpoints of a few kilobytes, with the structure of real ones."""

import json
import math
import os
import resource
import struct
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from safelight.errors import SafelightError
from safelight.families.sd import StableDiffusion
from safelight.nets.clip import CLIPTextConfig, CLIPTextModel
from safelight.nets.unet import UNet2DConditionModel, UNetConfig
from safelight.nets.unet2d import UNet2DConfig, UNet2DModel
from safelight.nets.vae import AutoencoderKL, VAEConfig

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
UNET = {
    "sample_size": 8,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
    "norm_num_groups": 16,
}
VAE = {
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
TEXT = {
    "vocab_size": 600,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
PIXELS = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
SCHEDULER = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"}
FAMILY = StableDiffusion(
    "tiny",
    width=32,
    context=24,
    in_channels=4,
    native=16,
    v_native=24,
    pad="!",
    unet=UNET,
    vae=VAE,
    text_encoder={**TEXT, "vocab_size": 49408},
    scheduler_config=SCHEDULER,
)
NETS = {
    "unet": (UNetConfig, UNet2DConditionModel, UNET, "diffusion_pytorch_model"),
    "vae": (VAEConfig, AutoencoderKL, VAE, "diffusion_pytorch_model"),
    "text_encoder": (CLIPTextConfig, CLIPTextModel, TEXT, "model"),
}


def weights(network_class, config):
    """Random weights for a network, by name."""
    with torch.device("meta"):
        network = network_class(config)
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(t.shape, generator=generator) * 0.1
        for name, t in network.state_dict().items()
    }


def part_weights(part, config=None):
    """Return random weights for one part of a text model, the same ones each time."""
    return _part_weights(part, json.dumps(config or NETS[part][2]))


@cache
def _part_weights(part, config):
    config_class, network_class, _, _ = NETS[part]
    return weights(network_class, config_class.from_dict(json.loads(config)))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def letters():
    from tokenizers.pre_tokenizers import ByteLevel

    found = sorted(ByteLevel.alphabet())
    return [*found, *(c + "</w>" for c in found)]


MERGES = [("a", "p"), ("ap", "p"), ("l", "e</w>"), ("app", "le</w>")]


def text_folder(path, pipeline="StableDiffusionPipeline"):
    """A text model in diffusers' layout."""
    index = {
        "_class_name": pipeline,
        "_diffusers_version": "0.30.0",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write(path / "model_index.json", index)
    for part, (_, _, config, stem) in NETS.items():
        write(path / part / "config.json", config)
        save_file(part_weights(part), path / part / f"{stem}.safetensors")
    vocab = [*letters(), *(a + b for a, b in MERGES), BOS, EOS]
    write(path / "tokenizer/vocab.json", {token: i for i, token in enumerate(vocab)})
    write(path / "tokenizer/merges.txt", "#version: 0.2\n" + "\n".join(map(" ".join, MERGES)))
    write(path / "tokenizer/tokenizer_config.json", {"pad_token": "!", "model_max_length": 16})
    write(path / "scheduler/scheduler_config.json", SCHEDULER)
    return path


def pixel_folder(path):
    """A model of pixels in diffusers' layout."""
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    write(path / "model_index.json", index)
    write(path / "unet/config.json", PIXELS)
    write(path / "scheduler/scheduler_config.json", {"_class_name": "DDPMScheduler"})
    tensors = weights(UNet2DModel, UNet2DConfig.from_dict(PIXELS))
    save_file(tensors, path / "unet/diffusion_pytorch_model.safetensors")
    return path


def raw_file(path: Path, header, data=b"", length=None) -> Path:
    """A file with the layout of safetensors and any content: `header` as bytes or as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def sparse_file(path: Path, shapes: Mapping[str, Sequence[int]]) -> Path:
    """Write a safetensors file of float16 zeros, which takes no room on the disk."""
    end, header = 0, {}
    for key, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    raw_file(path, header)
    os.truncate(path, path.stat().st_size + end)
    return path


def change(path, key, value):
    """Set, or with None delete, one key of a JSON file."""
    content = json.loads(path.read_text())
    content.pop(key, None)
    write(path, {**content, key: value} if value is not None else content)


def refused(call, *words):
    """Check that a call is refused in one line of at most 200 characters; return the line."""
    with pytest.raises(SafelightError) as error:
        call()
    line = str(error.value)
    assert len(line) <= 200, line
    assert line.isprintable(), line
    for word in words:
        assert word in line, line
    return line


def refused_cheaply(call, *words):
    """Check that it is refused within 2 s of processor time and 64 MB, as promised."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    refused(call, *words)
    assert time.process_time() - began < 2
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 * 2**10  # in KB
