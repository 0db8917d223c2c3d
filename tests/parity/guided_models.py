"""Random networks that guide by a picture, and the comparison of what they guide."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from safelight.engine import job
from safelight.engine.requests import create_job, resolve_request
from safelight.model import Model
from safelight.request import Request

LATENTS, PIXELS = 1e-4, 2
TEXTS = {"prompt": "a red apple on a table", "negative_prompt": "a dog", "guidance_scale": 5.0}


def picture(side: int = 64, seed: int = 1) -> Image.Image:
    """Return smooth random colours: noise alone would hide small differences."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def controlnet(folder: Path, model: Path, seed: int = 5, **config: Any) -> Path:
    """Write a random ControlNet for a model's UNet, whose last layers are not zero."""
    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel.from_pretrained(model / "unet")
    config = {"conditioning_embedding_out_channels": (8, 8, 16, 16), **config}
    net: Any = diffusers.ControlNetModel.from_unet(unet, **config)
    with torch.no_grad():
        for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            torch.nn.init.normal_(layer.weight, std=0.2)
        torch.nn.init.normal_(net.controlnet_cond_embedding.conv_out.weight, std=0.5)
    net.save_pretrained(folder)
    return folder


def compare(
    worst: dict[str, float],
    model: Model,
    task: str,
    folder: Path,
    net: Path | list[Path],
    theirs: dict[str, Any],
    *,
    steps: int = 8,
    kind: str = "ControlNetModel",
    **settings: Any,
) -> None:
    """Compare our picture with that of a pipeline of diffusers.

    net: the network that guides, or several. kind: its class.
    """
    load = getattr(diffusers, kind).from_pretrained
    network = [load(one) for one in net] if isinstance(net, list) else load(net)
    use = "controlnet" if kind == "ControlNetModel" else "adapter"
    if use == "adapter" and isinstance(network, list):
        network = diffusers.MultiAdapter(network)
    pipe = getattr(diffusers, task).from_pretrained(folder, **{use: network})
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    passed: list[Any] = []

    def stepped(_pipe: Any, _step: int, _time: Any, made: dict[str, Any]) -> dict[str, Any]:
        passed.append(made["latents"])
        return {}

    told: dict[str, Any] = {"callback_on_step_end": stepped}
    if use == "adapter":  # those pipelines have the older argument
        told = {"callback": lambda _step, _time, latents: passed.append(latents)}
    shown = pipe(
        **TEXTS,
        **theirs,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(7),
        **told,
    ).images[0]
    asked = resolve_request(
        model, Request(**TEXTS, sampler="ddim", steps=steps, seed=7, **settings)
    )
    with torch.inference_mode():
        made = create_job(model, asked, model.family.encode(model, asked), 7)
        while not made.done:
            job.advance(model, [made])
        latents = job.final_latents(made)
        ours = np.asarray(job.decode(model, latents)).astype(int)
    expected = passed[-1].numpy()
    error = float(np.linalg.norm(latents.numpy() - expected) / np.linalg.norm(expected))
    pixels = float(np.abs(ours - np.asarray(shown).astype(int)).max())
    worst["latents"], worst["pixels"] = max(worst["latents"], error), max(worst["pixels"], pixels)
    assert error <= LATENTS
    assert pixels <= PIXELS
