"""A random ControlNet and IP-Adapter for the model that ships, and pictures for them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from safelight.nets.controlnet import ControlNetConfig, ControlNetModel
from safelight.nets.ip_adapter import IPAdapter, IPAdapterConfig
from safelight.nets.unet_config import UNetConfig
from safelight.nets.vision import CLIPVisionConfig, CLIPVisionModelWithProjection
from safelight.weights.find import MODELS


def controlnet(folder: Path, seed: int = 3) -> Path:
    """Write a ControlNet for `embedded`, whose last layers are not zero."""
    unet = json.loads((MODELS / "embedded/unet/config.json").read_text())
    config = {
        **{key: value for key, value in unet.items() if key != "up_block_types"},
        "_class_name": "ControlNetModel",
        "conditioning_embedding_out_channels": [8, 8, 16, 16, 16],
    }
    torch.manual_seed(seed)
    net = ControlNetModel(ControlNetConfig.from_dict(config))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(net.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    return folder


ENCODER = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
    "hidden_act": "gelu",
    "projection_dim": 24,
}


def ip_adapter(file: Path, **config: Any) -> Path:
    """Write a base IP-Adapter for `embedded`, and its image encoder beside it.

    config: changes to that of the adapter.
    """
    unet = UNetConfig.from_dict(json.loads((MODELS / "embedded/unet/config.json").read_text()))
    shapes = {
        "image_dim": ENCODER["projection_dim"],
        "cross_attention_dim": unet.cross_attention_dim,
        "widths": list(unet.cross_attentions),
    }
    torch.manual_seed(4)
    adapter = IPAdapter(IPAdapterConfig.from_dict({**shapes, **config}))
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(ENCODER))
    with torch.no_grad():
        for net in (adapter, encoder):
            for weight in net.parameters():
                torch.nn.init.normal_(weight, std=0.3)
    folder = file.parent / "image_encoder"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(ENCODER))
    save_file(encoder.state_dict(), folder / "model.safetensors")
    save_file(adapter.state_dict(), file)
    return file


def edges(size: tuple[int, int] = (128, 128)) -> Image.Image:
    """Return a white square on black."""
    image = Image.new("RGB", size)
    image.paste("white", (size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2))
    return image


def as_base64(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()
