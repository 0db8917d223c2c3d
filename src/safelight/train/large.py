"""Make `embedded` anew for the whole vocabulary at 256x256, in 25 minutes of a GPU.

All stages are those of `embedded.py`; here they are given minutes instead of steps, and the
pictures are composed where they are needed, by `stage`.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.nets.clip import CLIPTextConfig, CLIPTextModel
from safelight.nets.unet import UNetConfig
from safelight.nets.vae import AutoencoderKL, VAEConfig
from safelight.prompt.tokenizer import Tokenizer
from safelight.sampling.schedule import SchedulerConfig
from safelight.train import shipped
from safelight.train.autoencoder import latent_spread, train_autoencoder
from safelight.train.denoiser import TextToImage, encode_scenes, teach_words, train_text_to_image
from safelight.train.devices import accelerator
from safelight.train.embedded import SHEET, credit
from safelight.train.export import export_text_to_image
from safelight.train.loop import Draw, Plan, progress
from safelight.train.recipe import MIXED, SIMPLE, Scenes
from safelight.train.sheet import sheets
from safelight.train.stage import Stage
from safelight.train.tokens import train_vocabulary

MINUTES = 25.0
SHARES = {"autoencoder": 0.24, "scenes": 0.09, "words": 0.03, "denoiser": 0.57}
"""Of the minutes; what is left is for starting, reading the data, sheets and checkpoints."""

EVERY = 1000
SHEET_EVERY = 4000


@dataclass(frozen=True)
class Sizes:
    """Of networks, data and batches. The plans get their steps from the minutes."""

    size: int
    scenes: int
    """At most, composed and encoded once."""
    part: int
    """Scenes a file."""
    vocabulary: int
    vae: VAEConfig
    text: CLIPTextConfig
    unet: UNetConfig
    vae_plan: Plan
    text_plan: Plan
    unet_plan: Plan
    seed: int = 0


# 15.9 million weights in all, 30.3 MiB as float16. Factor 8 at 256 leaves 32x32 latents, four times
# what `embedded` has.
_VAE = VAEConfig(
    block_out_channels=(32, 64, 96, 128),
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=8,
    mid_block_add_attention=False,
)
_TEXT = CLIPTextConfig(
    vocab_size=3072,
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=48,
)
WHOLE = Sizes(
    size=256,
    scenes=245_760,
    part=2048,
    vocabulary=_TEXT.vocab_size,
    vae=_VAE,
    text=_TEXT,
    unet=replace(
        shipped.UNET,
        sample_size=256 // _VAE.factor,
        block_out_channels=(80, 128, 176),
        cross_attention_dim=_TEXT.hidden_size,
    ),
    vae_plan=Plan(steps=0, batch=32, learning_rate=1e-3, warmup=200, weight_decay=0.0),
    text_plan=Plan(steps=0, batch=512, learning_rate=2e-3, warmup=50),
    unet_plan=Plan(steps=0, batch=256, learning_rate=1e-3, warmup=500),
)

# The same way in small: to see on any machine, in a minute, that all of it works.
_DRY_TEXT = replace(
    _TEXT, vocab_size=1536, hidden_size=32, intermediate_size=64, num_hidden_layers=1
)
DRY = replace(
    WHOLE,
    size=64,
    scenes=64,
    part=32,
    vocabulary=_DRY_TEXT.vocab_size,
    vae=replace(_VAE, block_out_channels=(8, 8, 16, 16)),
    text=_DRY_TEXT,
    unet=replace(
        WHOLE.unet,
        sample_size=64 // _VAE.factor,
        block_out_channels=(16, 16, 32),
        cross_attention_dim=_DRY_TEXT.hidden_size,
    ),
    vae_plan=replace(WHOLE.vae_plan, batch=2, warmup=5),
    text_plan=replace(WHOLE.text_plan, batch=16, warmup=5),
    unet_plan=replace(WHOLE.unet_plan, batch=8, warmup=5),
)


def train_large(
    data: Path,
    out: Path,
    *,
    minutes: float = MINUTES,
    sizes: Sizes = WHOLE,
    native: bool = False,
) -> Path:
    """Train autoencoder, text encoder and UNet, and write the folder out/embedded-256.

    data: the folder that `safelight train data --whole` wrote. minutes: of computing, in one call
    or several: each stage keeps its checkpoint under `out` and goes on from there. Raises
    SafelightError if the data is missing, or `out` holds a run of other minutes, sizes or data.
    """
    path = data / "cutouts.npz"
    if not path.exists():
        raise SafelightError(
            f"{path} is not there: build it with `safelight train data {data} --whole`"
        )
    device = accelerator().device
    seen = Stage(Scenes(path, sizes.size, kinds=SIMPLE | MIXED), device)
    spoken = Scenes(path, sizes.size, styles=shipped.STYLES, kinds=MIXED)
    about = json.loads(path.with_suffix(".json").read_text())["sha256"]
    digest = hashlib.sha256(f"{about} {sizes} {minutes}".encode()).hexdigest()
    model = out / "embedded-256"
    credit(model, whole=True)
    tokenizer = train_vocabulary(
        spoken.captions_corpus(),
        sizes.vocabulary,
        model / "tokenizer",
        sizes.text.max_position_embeddings,
    )

    def timed(plan: Plan, stage: str) -> Plan:
        seconds = 60 * minutes * SHARES[stage]
        return replace(plan, seed=sizes.seed, seconds=seconds, recipe=digest)

    plan = timed(sizes.vae_plan, "autoencoder")
    vae = train_autoencoder(sizes.vae, seen, plan, out / "autoencoder", native=native)
    spread = latent_spread(vae, seen, Draw.of(sizes.seed, 0), min(512, sizes.scenes))
    vae.config = replace(vae.config, scaling_factor=round(1 / spread, 5))
    seconds = 60 * minutes * SHARES["scenes"]
    latents, ids = _encoded(vae, Stage(spoken, device), tokenizer, sizes, seconds, out / "scenes")
    vae.cpu()

    torch.manual_seed(sizes.seed)
    text = CLIPTextModel(sizes.text)
    plan = timed(sizes.text_plan, "words")
    teach_words(text, latents, ids, tokenizer.eos, plan, out / "words")
    net = TextToImage(text, sizes.unet)
    notes = {"data_sha256": about, "words": sorted(spoken.words()), "prompts": list(SHEET)}

    def export(net: nn.Module) -> None:
        assert isinstance(net, TextToImage)
        export_text_to_image(model, vae, net.text_encoder, net.unet, shipped.SCHEDULER, notes)

    train_text_to_image(
        net,
        SchedulerConfig.from_dict(shipped.SCHEDULER),
        latents,
        ids,
        torch.tensor(tokenizer.encode("").ids, dtype=torch.int16),
        timed(sizes.unet_plan, "denoiser"),
        out / "denoiser",
        every=EVERY,
        native=native,
        on_checkpoint=sheets(model, export, SHEET_EVERY, SHEET),
    )
    export(net)
    return model


def _encoded(
    vae: AutoencoderKL,
    stage: Stage,
    tokenizer: Tokenizer,
    sizes: Sizes,
    seconds: float,
    folder: Path,
) -> tuple[Tensor, Tensor]:
    """Latents, float16 [n, 4, h, w], and tokens, int16 [n, length], of as many scenes as there is
    time for. Each part is a file, and depends on its number alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done, began = folder / "count", time.monotonic()
    wanted = int(done.read_text()) if done.exists() else max(1, sizes.scenes // sizes.part)
    parts: list[dict[str, Any]] = []
    for number in range(wanted):
        path = folder / f"{number:04}.safetensors"
        if not path.exists():
            if parts and not done.exists() and time.monotonic() - began > seconds:
                break
            latents, captions = encode_scenes(vae, stage, sizes.part, number)
            ids = torch.tensor([tokenizer.encode(t).ids for t in captions], dtype=torch.int16)
            save_file({"latents": latents, "ids": ids}, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
        parts.append(load_file(path))
    if not done.exists():
        done.write_text(str(len(parts)))
        progress(f"{len(parts) * sizes.part} scenes in {time.monotonic() - began:.0f} s")
    return torch.cat([p["latents"] for p in parts]), torch.cat([p["ids"] for p in parts])
