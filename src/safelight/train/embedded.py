"""Make the two models that ship, from the data recipe to the folders."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.nets.clip import CLIPTextModel
from safelight.sampling.schedule import SchedulerConfig
from safelight.train import shipped
from safelight.train.autoencoder import latent_spread, train_autoencoder
from safelight.train.cutouts import LOCK, notice
from safelight.train.denoiser import (
    TextToImage,
    encode_scenes,
    teach_words,
    train_text_to_image,
    train_unconditional,
)
from safelight.train.distil import distil
from safelight.train.export import export_text_to_image, export_unconditional
from safelight.train.loop import Draw, Plan
from safelight.train.recipe import MIXED, SIMPLE, STYLES, Scenes
from safelight.train.sheet import sheets
from safelight.train.tokens import train_vocabulary

SCENES = 24_000
MIXED_SCENES = 72_000
"""Captioned scenes that are composed and encoded once, to learn from."""

SHEET_EVERY = 1000
"""Training steps between two sheets of samples."""

SHEET = (
    "a red apple", "a cat", "a dog", "a rocket on a blue background",
    "a flat icon of a car", "a 3d render of a penguin", "a blue cat on a yellow background",
    "a purple guitar", "a small house at the bottom on the left",
    "three teddy bears on a yellow background", "a dog to the left of a pizza",
    "a lion above a car on a green background",
)  # fmt: skip
"""Prompts whose pictures are drawn at every checkpoint, so that progress can be seen."""


def train_embedded(data: Path, out: Path, *, native: bool = False) -> Path:
    """Train autoencoder, text encoder and UNet, and write the folder out/embedded.

    data: the folder that the data recipe was built in. Every stage keeps its checkpoint under
    `out` and goes on from there when it is called again.
    """
    scenes = _scenes(data, shipped.SIZE)
    model = out / "embedded"
    spoken = _scenes(data, shipped.SIZE, shipped.STYLES)
    tokenizer = train_vocabulary(
        spoken.captions_corpus(), shipped.VOCABULARY, model / "tokenizer", shipped.TOKENS
    )
    vae = train_autoencoder(
        shipped.VAE, scenes, shipped.VAE_PLAN, out / "autoencoder", native=native
    )
    spread = latent_spread(vae, scenes, Draw.of(shipped.VAE_PLAN.seed, shipped.VAE_PLAN.steps))
    vae.config = replace(vae.config, scaling_factor=round(1 / spread, 5))

    def encoded(from_scenes: Scenes, count: int = SCENES) -> tuple[Tensor, Tensor]:
        latents, captions = encode_scenes(vae, from_scenes, count, shipped.UNET_PLAN.seed)
        ids = [tokenizer.encode(text).ids for text in captions]
        return latents, torch.tensor(ids, dtype=torch.int16)

    notes = _notes(data) | {"words": sorted(spoken.words()), "prompts": list(SHEET)}

    def export(net: nn.Module) -> None:
        assert isinstance(net, TextToImage)
        export_text_to_image(model, vae, net.text_encoder, net.unet, shipped.SCHEDULER, notes)

    credit(model)
    latents, ids = encoded(spoken)
    torch.manual_seed(shipped.TEXT_PLAN.seed)
    text = CLIPTextModel(shipped.TEXT)
    teach_words(text, latents, ids, tokenizer.eos, shipped.TEXT_PLAN, out / "words")
    torch.manual_seed(shipped.UNET_PLAN.seed)
    net = TextToImage(text, shipped.UNET)

    def train(latents: Tensor, ids: Tensor, plan: Plan, folder: Path) -> None:
        train_text_to_image(
            net,
            SchedulerConfig.from_dict(shipped.SCHEDULER),
            latents,
            ids,
            torch.tensor(tokenizer.encode("").ids, dtype=torch.int16),
            plan,
            folder,
            native=native,
            on_checkpoint=sheets(model, export, SHEET_EVERY, SHEET),
        )

    train(latents, ids, shipped.UNET_PLAN, out / "varied")
    latents, ids = encoded(_scenes(data, shipped.SIZE, shipped.STYLES, steady=True))
    train(latents, ids, shipped.STEADY_PLAN, out / "steady")
    train(latents, ids, shipped.FINE_PLAN, out / "fine")
    for steady, plan, folder in (
        (False, shipped.MIXED_PLAN, "mixed"),
        (True, shipped.SETTLED_PLAN, "settled"),
    ):
        mixed = _scenes(data, shipped.SIZE, shipped.STYLES, kinds=MIXED, steady=steady)
        latents, ids = encoded(mixed, MIXED_SCENES)
        train(latents, ids, plan, out / folder)
    export(net)
    return model


def train_embedded_fast(
    data: Path, out: Path, *, model: str = "embedded", native: bool = False
) -> Path:
    """Distil a copy of `model` that draws the recipe's scenes in four steps."""
    scenes = _scenes(data, shipped.SIZE, shipped.STYLES, kinds=MIXED, steady=True)
    rng = np.random.default_rng(shipped.FAST_PLAN.seed)
    folder = out / "embedded-fast"
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.txt"
    said = [scenes.invent(rng).said for _ in range(shipped.FAST_PROMPTS)]
    prompts.write_text("\n".join(said) + "\n")
    return distil(
        prompts,
        folder,
        shipped.FAST_PLAN,
        model=model,
        drawing_steps=shipped.FAST_STEPS,
        guidance_scale=shipped.FAST_GUIDANCE,
        native=native,
    )


def train_embedded_unconditional(data: Path, out: Path, *, native: bool = False) -> Path:
    """Train the pixel model and write the folder out/embedded-unconditional."""
    side = shipped.PIXELS.sample_size or 32
    scenes = _scenes(data, side, shipped.STYLES, steady=True)
    model = out / "embedded-unconditional"
    notes = _notes(data)

    def export(net: Any) -> None:
        export_unconditional(model, net, shipped.PIXELS_SCHEDULER, notes)

    credit(model)
    net = train_unconditional(
        shipped.PIXELS,
        SchedulerConfig.from_dict(shipped.PIXELS_SCHEDULER),
        lambda rng, n: scenes.plain(n, rng, side),
        shipped.PIXELS_PLAN,
        out / "unconditional",
        native=native,
        on_checkpoint=sheets(model, export, SHEET_EVERY),
    )
    export(net)
    return model


def _scenes(
    data: Path,
    side: int,
    styles: Collection[str] = tuple(STYLES),
    *,
    kinds: Mapping[str, int] = SIMPLE,
    steady: bool = False,
) -> Scenes:
    path = data / "cutouts.npz"
    if not path.exists():
        raise SafelightError(f"{path} is not there: build it with `safelight train data {data}`")
    return Scenes(path, size=side, styles=styles, kinds=kinds, steady=steady)


def credit(model: Path, *, whole: bool = False) -> None:
    """Name the sources beside the weights: the folder may be passed on alone."""
    model.mkdir(parents=True, exist_ok=True)
    (model / "NOTICE").write_text(notice(json.loads(LOCK.read_text()), whole=whole))


def _notes(data: Path) -> dict[str, Any]:
    about = json.loads((data / "cutouts.json").read_text())
    return {"data_sha256": about["sha256"]}
