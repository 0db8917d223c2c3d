"""A random ControlNet for the model that ships, and pictures to guide it with."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from safelight.nets.controlnet import ControlNetConfig, ControlNetModel
from safelight.weights.find import MODELS


def controlnet(folder: Path) -> Path:
    """Write a ControlNet for `embedded`, whose last layers are not zero."""
    unet = json.loads((MODELS / "embedded/unet/config.json").read_text())
    config = {
        **{key: value for key, value in unet.items() if key != "up_block_types"},
        "_class_name": "ControlNetModel",
        "conditioning_embedding_out_channels": [8, 8, 16, 16, 16],
    }
    torch.manual_seed(3)
    net = ControlNetModel(ControlNetConfig.from_dict(config))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(net.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    return folder


def edges(size: tuple[int, int] = (128, 128)) -> Image.Image:
    """Return a white square on black."""
    image = Image.new("RGB", size)
    image.paste("white", (size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2))
    return image


def as_base64(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()
