"""Train a text-to-image model from nothing, on a user's own captioned pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from safelight.errors import SafelightError
from safelight.nets.clip import CLIPTextModel
from safelight.sampling.schedule import SchedulerConfig
from safelight.train.autoencoder import encode, latent_spread, train_autoencoder
from safelight.train.denoiser import TextToImage, teach_words, train_text_to_image
from safelight.train.devices import accelerator, memory_told
from safelight.train.export import export_text_to_image, replacing, writing
from safelight.train.folder import Pixels, captioned, check_apart, digest, read
from safelight.train.loop import Draw, check_plan
from safelight.train.networks import LARGE, SCHEDULER, SMALL, TEXT_PLAN, VAE_PLAN, Networks
from safelight.train.plan import Plan
from safelight.train.sheet import draw_sheet
from safelight.train.tokens import token_ids, train_vocabulary
from safelight.words import words_in

CHECKPOINT_EVERY = 500
SHEET_PROMPTS = 12
MAX_SMALL = 96
"""Largest side in pixels for which the small networks are taken."""


class Album:
    """Pictures, uint8 [n, size, size, 3], and their captions."""

    def __init__(self, squares: Pixels, captions: list[str]) -> None:
        self.squares, self.captions = squares, captions

    def batch(self, n: int, rng: np.random.Generator) -> tuple[Pixels, list[str]]:
        """Return `n` of them, drawn with replacement."""
        pick = rng.integers(len(self.captions), size=n)
        return self.squares[pick], [self.captions[i] for i in pick]


@memory_told()
def text_to_image(
    folder: Path,
    out: Path,
    plan: Plan,
    *,
    size: int = 64,
    autoencoder_steps: int = VAE_PLAN.steps,
    native: bool = False,
) -> Path:
    """Train autoencoder, text encoder and UNet on captioned pictures; return out/model.

    folder: see `train.folder.captioned`. plan: of the UNet. size: side of the squares that pictures
    are cut to. Each stage goes on where it was stopped. Raises SafelightError if there is nothing
    to learn from.
    """
    if size % 32 or not 64 <= size <= 512:
        raise SafelightError(f"size {size}: expected a multiple of 32 from 64 to 512")
    net = networks(size)
    vae_config, text_config, unet_config = net.vae, net.text, net.unet
    check_apart(folder, out)
    examples = captioned(folder)
    captions = [example.caption for example in examples]
    squares = read([example.path for example in examples], size)
    album = Album(squares, captions)
    recipe = digest(squares, captions)
    plan = replace(plan, recipe=recipe)
    first = replace(
        VAE_PLAN,
        steps=autoencoder_steps,
        warmup=min(VAE_PLAN.warmup, max(1, autoencoder_steps // 10)),
        seed=plan.seed,
        recipe=recipe,
    )
    second = replace(
        TEXT_PLAN,
        steps=min(TEXT_PLAN.steps, plan.steps),
        seed=plan.seed,
        recipe=recipe,
    )
    # `out` comes first: in another training's folder nothing is made.
    for stage, its in ((out, plan), (out / "autoencoder", first), (out / "words", second)):
        check_plan(stage, its, native=native)
    made = out / "model"
    tokenizer = train_vocabulary(
        captions, text_config.vocab_size, None, text_config.max_position_embeddings
    )
    vae = train_autoencoder(vae_config, album, first, out / "autoencoder", native=native)
    spread = latent_spread(vae, album, Draw.of(plan.seed, 0))
    vae.config = replace(vae.config, scaling_factor=round(1 / spread, 5))
    latents = encode(vae, squares)
    del squares, album  # their memory is needed now
    ids = token_ids(tokenizer, captions)

    torch.manual_seed(plan.seed)
    text = CLIPTextModel(text_config)
    teach_words(text, latents, ids, tokenizer.eos, second, out / "words")
    both = TextToImage(text, unet_config)
    prompts = list(dict.fromkeys(captions))[:SHEET_PROMPTS]
    notes = {"words": sorted({word for caption in captions for word in words_in(caption)})}

    def show(trained: Any, step: int) -> Image.Image:
        parts = vae, trained.text_encoder, trained.unet
        with writing(made):
            with replacing(made) as new:
                tokenizer.save(new / "tokenizer")
                export_text_to_image(new, *parts, SCHEDULER, notes)
            return draw_sheet(made, out / f"step-{step:06}.png", prompts)

    train_text_to_image(
        both,
        SchedulerConfig.from_dict(SCHEDULER),
        latents,
        ids,
        torch.tensor(tokenizer.encode("").ids, dtype=torch.int32),
        plan,
        out,
        every=CHECKPOINT_EVERY,
        native=native,
        on_checkpoint=show,
    )
    if accelerator().is_main_process:  # an earlier run may have ended before it was written
        show(both, plan.steps)
    return made


def networks(size: int) -> Networks:
    """Return networks for pictures of `size` pixels a side."""
    return (SMALL if size <= MAX_SMALL else LARGE).sized(size)
