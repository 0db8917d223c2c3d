"""Write trained networks as a folder that Safelight and diffusers both load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from safelight.errors import SafelightError
from safelight.families.part import NO_PART
from safelight.nets.clip import CLIPTextModel
from safelight.nets.tiny import AutoencoderTiny
from safelight.nets.unet import UNet2DConditionModel
from safelight.nets.unet2d import UNet2DModel
from safelight.nets.vae import AutoencoderKL
from safelight.picture import reason
from safelight.weights.find import PREVIEWS
from safelight.weights.folder import DIFFUSION

DIFFUSERS = "0.42.0"
"""The version of diffusers whose layout is written and tested against."""


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn an error of writing the model or its sheet into a SafelightError of one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise SafelightError(
            f"{folder} could not be written ({reason(error)}); checkpoints are kept: make room "
            "and start the same command again"
        ) from None


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`, which takes its place once all is written."""
    folder = folder.resolve()  # a link stays one
    new, old = (folder.with_name(f"{folder.name}.{end}") for end in ("part", "old"))
    shutil.rmtree(new, ignore_errors=True)  # left by a run that was killed
    new.mkdir(parents=True)
    try:
        yield new
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.replace(old)
        new.replace(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists() and not folder.exists():  # the second rename failed
            old.replace(folder)


def export_text_to_image(
    folder: Path,
    vae: AutoencoderKL | AutoencoderTiny,
    text: CLIPTextModel,
    unet: UNet2DConditionModel,
    scheduler: Mapping[str, Any],
    notes: Mapping[str, Any],
) -> None:
    """Write a StableDiffusionPipeline folder; its tokenizer/ must have been written before.

    notes become safelight.json: the words it was trained on, and what made it.
    """
    if isinstance(vae, AutoencoderTiny):
        _tiny(folder / "vae", vae)
    else:
        depth = len(vae.config.block_out_channels)
        _network(
            folder / "vae",
            vae,
            DIFFUSION,
            {
                "_class_name": "AutoencoderKL",
                **asdict(vae.config),
                "down_block_types": ["DownEncoderBlock2D"] * depth,
                "up_block_types": ["UpDecoderBlock2D"] * depth,
                "sample_size": (unet.config.sample_size or 0) * vae.config.factor,
                "act_fn": "silu",
            },
        )
    _network(
        folder / "unet",
        unet,
        DIFFUSION,
        {
            "_class_name": "UNet2DConditionModel",
            **asdict(unet.config),
        },
    )
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    _network(
        folder / "text_encoder",
        text,
        "model",
        {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            **asdict(text.config),
            "bos_token_id": vocabulary["<|startoftext|>"],
            "eos_token_id": vocabulary["<|endoftext|>"],
            "pad_token_id": vocabulary["<|endoftext|>"],
            "projection_dim": text.config.hidden_size,
            # Without it transformers computes in the stored precision, and the UNet in another.
            "dtype": "float32",
        },
    )
    _json(folder / "scheduler" / "scheduler_config.json", dict(scheduler))
    _json(
        folder / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": DIFFUSERS,
            "feature_extractor": NO_PART,
            "image_encoder": NO_PART,
            "requires_safety_checker": False,
            "safety_checker": NO_PART,
            "scheduler": ["diffusers", scheduler["_class_name"]],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", type(vae).__name__],
        },
    )
    _json(folder / "safelight.json", dict(notes))


def export_previews(folder: Path, vae: AutoencoderTiny) -> None:
    """Add a tiny autoencoder, which decodes previews, to the folder of a model."""
    _tiny(folder / PREVIEWS, vae)


def export_unconditional(
    folder: Path, unet: UNet2DModel, scheduler: Mapping[str, Any], notes: Mapping[str, Any]
) -> None:
    """Write a DDPMPipeline folder."""
    _network(
        folder / "unet",
        unet,
        DIFFUSION,
        {
            "_class_name": "UNet2DModel",
            **asdict(unet.config),
        },
    )
    _json(folder / "scheduler" / "scheduler_config.json", dict(scheduler))
    _json(
        folder / "model_index.json",
        {
            "_class_name": "DDPMPipeline",
            "_diffusers_version": DIFFUSERS,
            "scheduler": ["diffusers", scheduler["_class_name"]],
            "unet": ["diffusers", "UNet2DModel"],
        },
    )
    _json(folder / "safelight.json", dict(notes))


def _tiny(folder: Path, vae: AutoencoderTiny) -> None:
    _network(folder, vae, DIFFUSION, {"_class_name": "AutoencoderTiny", **asdict(vae.config)})


def _network(folder: Path, net: nn.Module, stem: str, config: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # float16 halves what ships; the networks are run in float32 all the same.
    weights = {
        name: t.detach().to(torch.float16).contiguous() for name, t in net.state_dict().items()
    }
    save_file(weights, folder / f"{stem}.safetensors", metadata={"format": "pt"})
    _json(folder / "config.json", config)


def _json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")
