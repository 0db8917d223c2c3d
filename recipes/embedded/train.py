"""Train the models that ship, from the cut-outs to the folders."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recipes.embedded.cutouts import LOCK, notice
from recipes.embedded.grounds import VARIANTS
from recipes.embedded.looks import Looks
from recipes.embedded.pool import Pool
from recipes.embedded.scenes import Scenes
from recipes.embedded.sharpen import sharpen
from recipes.embedded.stage import Stage
from recipes.embedded.supply import parts
from recipes.embedded.words import teach
from safelight.errors import SafelightError
from safelight.nets.clip import CLIPTextModel
from safelight.nets.unet2d import UNet2DConfig
from safelight.nets.vae import AutoencoderKL
from safelight.prompt.tokenizer import Tokenizer
from safelight.sampling.schedule import SchedulerConfig
from safelight.train import networks
from safelight.train.autoencoder import encode, latent_spread, to_pixels, train_autoencoder
from safelight.train.denoiser import (
    TextToImage,
    train_text_to_image,
    train_unconditional,
)
from safelight.train.devices import accelerator
from safelight.train.export import export_text_to_image, export_unconditional
from safelight.train.loop import Draw, Plan, progress
from safelight.train.tokens import train_vocabulary
from safelight.weights import load_model

MINUTES = 13.0
"""Of one H100, for all stages."""

SHARES = {
    "autoencoder": 0.12,
    "words": 0.09,
    "alone": 0.12,
    "half": 0.16,
    "denoiser": 0.2,
    "sharp": 0.055,
    "unconditional": 0.07,
}
"""Of the minutes; the rest is for composing, starting, compiling and `embedded-fast`."""

UNET_STAGES = ("alone", "half", "denoiser")
"""What the UNet learns, in this order: things alone, scenes, and scenes at full size."""

SHEET = (
    "a red apple", "a cat", "a guitar", "three teddy bears on a yellow background",
    "a penguin in the snow", "a rocket at night under the stars", "a purple octopus under water",
    "a blue car on green grass", "a black bicycle", "a big snowman", "a lion next to a castle",
    "a small house at the bottom on the left",
)  # fmt: skip
"""Prompts whose pictures are drawn while it trains, so that progress can be seen."""

SHARP = "vae-sharp.safetensors"
"""The autoencoder whose decoder was trained further."""

DRAW_WITH = {"sampler": "dpmpp_2m", "steps": 20, "guidance_scale": 4.0}
"""What the model draws best with."""


@dataclass(frozen=True)
class Sizes:
    """Of networks, data and batches. A plan without steps gets them from the minutes."""

    size: int
    scenes: int
    """Composed and encoded once, at full and at half size; half as many of things alone."""
    captions: int
    """That the text encoder learns from."""
    networks: networks.Networks
    vae_plan: Plan
    text_plan: Plan
    half_plan: Plan
    unet_plan: Plan
    sharp_plan: Plan
    pixels: UNet2DConfig
    pixels_plan: Plan
    every: int = 2500
    """Steps between two checkpoints."""
    variants: int = VARIANTS
    """Pictures of each drawn ground."""


FULL = Sizes(
    size=256,
    scenes=122_880,
    captions=131_072,
    networks=networks.LARGE,
    vae_plan=Plan(steps=0, batch=32, learning_rate=1e-3, warmup=100, weight_decay=0.0),
    text_plan=Plan(steps=0, batch=256, learning_rate=1.5e-3, warmup=50, weight_decay=0.0),
    half_plan=Plan(steps=0, batch=128, learning_rate=8e-4, warmup=300),
    unet_plan=Plan(steps=0, batch=128, learning_rate=8e-4, warmup=300),
    sharp_plan=Plan(steps=0, batch=32, learning_rate=2e-4, warmup=50, weight_decay=0.0, ema=0.99),
    pixels=replace(networks.PIXELS, sample_size=64, block_out_channels=(64, 128, 192)),
    pixels_plan=Plan(steps=0, batch=128, learning_rate=6e-4, warmup=200),
)

# The same way in small: to see on any machine, within seconds, that all of it works.
DRY = Sizes(
    size=64,
    scenes=64,
    captions=64,
    networks=networks.Networks(
        vae=replace(networks.LARGE.vae, block_out_channels=(8, 8, 16, 16)),
        text=replace(
            networks.LARGE.text, hidden_size=32, intermediate_size=64, num_hidden_layers=1
        ),
        unet=replace(
            networks.LARGE.unet,
            sample_size=8,
            block_out_channels=(16, 16, 32),
            cross_attention_dim=32,
        ),
    ),
    vae_plan=replace(FULL.vae_plan, steps=12, batch=2, warmup=2),
    text_plan=replace(FULL.text_plan, steps=12, batch=16, warmup=2),
    half_plan=replace(FULL.half_plan, steps=12, batch=8, warmup=2),
    unet_plan=replace(FULL.unet_plan, steps=12, batch=8, warmup=2),
    sharp_plan=replace(FULL.sharp_plan, steps=12, batch=2, warmup=2),
    pixels=replace(networks.PIXELS, sample_size=16, block_out_channels=(32, 32, 32)),
    pixels_plan=replace(FULL.pixels_plan, steps=12, batch=4, warmup=2),
    every=4,
    variants=2,
)


class Recipe:
    """One run of the recipe: its data, its sizes, its folder.

    Each stage keeps its checkpoint under `out` and goes on from there when it is called again.
    begin: a folder that `embedded` wrote, to begin from: its vocabulary and autoencoder are
    taken as they are, its text encoder and UNet are trained further.
    """

    def __init__(
        self,
        data: Path,
        out: Path,
        minutes: float,
        sizes: Sizes,
        native: bool = False,
        begin: Path | None = None,
    ) -> None:
        self.path = data / "cutouts.npz"
        if not self.path.exists():
            raise SafelightError(f"{self.path} is missing: run the data stage first")
        self.out, self.minutes, self.sizes, self.native = out, minutes, sizes, native
        self.base = None
        made_from = ""
        if begin is not None:
            self.base = load_model(str(begin), device="cpu", dtype="float32", plain=True)
            made_from = f" {self.base.sha256}"
        self.device = accelerator().device
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
        self.stage = Stage(Scenes(self.path), self.device, sizes.size, sizes.variants)
        self.scenes = self.stage.scenes
        made_from = f"{self.scenes.sha256} {sizes} {minutes}{made_from}"
        self.digest = hashlib.sha256(made_from.encode()).hexdigest()
        self.model = out / "embedded"
        self.model.mkdir(parents=True, exist_ok=True)
        credit(self.model)

    def plan(self, plan: Plan, stage: str) -> Plan:
        """Return the plan with its own steps, or else its share of the minutes."""
        seconds = None if plan.steps else 60 * self.minutes * SHARES[stage]
        return replace(plan, seconds=seconds, recipe=self.digest)

    def embedded(self) -> Path:
        """Train autoencoder, text encoder and UNet, and write the folder out/embedded.

        The UNet learns things alone, then scenes, both at half of the size, then scenes at full
        size. Given weights to begin from, it learns the last of these, and those before that were
        begun in `out`.
        """
        return self._unet("denoiser")

    def half(self) -> Path:
        """Do what `embedded` does, but end the UNet's training with scenes at half of the size."""
        return self._unet("half")

    def alone(self) -> Path:
        """Do what `embedded` does, but end the UNet's training with things alone."""
        return self._unet("alone")

    def _unet(self, last: str) -> Path:
        tokenizer, vae, net = self._networks()
        for stage in UNET_STAGES[: UNET_STAGES.index(last) + 1]:
            begun = (self.out / stage / "checkpoint.pt").exists()
            if self.base is None or stage == last or begun:
                self._denoiser(stage, tokenizer, vae, net)
        return self.model

    def compose(self, stage: str) -> None:
        """Compose and encode what a stage of the UNet learns from, for a training to come."""
        tokenizer, vae, _ = self._networks()
        self._encoded(vae, tokenizer, self._size(stage), stage)

    def _size(self, stage: str) -> int:
        return self.sizes.size if stage == "denoiser" else self.sizes.size // 2

    def _networks(self) -> tuple[Tokenizer, AutoencoderKL, TextToImage]:
        """Return autoencoder and text encoder, trained or taken from `begin`, and the UNet."""
        tokenizer = self._vocabulary()
        vae = self._timed("autoencoder", self._encoder)
        torch.manual_seed(0)
        net = TextToImage(CLIPTextModel(self.sizes.networks.text), self.sizes.networks.unet)
        if self.base is None:
            count, plan = self.sizes.captions, self.plan(self.sizes.text_plan, "words")
            small = Stage(self.scenes, self.device, self.sizes.size // 2, self.sizes.variants)
            looks = self._timed("looks", lambda: Looks(small, vae))
            given = self.scenes, self.path, tokenizer, looks, count, plan, self.out / "words"
            self._timed("words", lambda: teach(net.text_encoder, *given, self.device))
        else:
            _take(net.text_encoder, self.base.text_encoder)
            _take(net.unet, self.base.unet)
        # What the questions taught is more than the denoiser's loss can tell it.
        net.text_encoder.requires_grad_(False)
        if (self.out / SHARP).exists():
            vae.load_state_dict(load_file(self.out / SHARP))
        return tokenizer, vae, net

    def _denoiser(
        self, stage: str, tokenizer: Tokenizer, vae: AutoencoderKL, net: TextToImage
    ) -> None:
        """Train the UNet for one of UNET_STAGES; write out/embedded.

        A picture of half the size costs a third or less, and shows as well what a thing looks like.
        """
        size, half = self._size(stage), stage != "denoiser"
        plan = self.sizes.half_plan if half else self.sizes.unet_plan
        net.unet.config = replace(net.unet.config, sample_size=size // vae.config.factor)
        latents, ids = self._timed(
            f"latents of {size} pixels", lambda: self._encoded(vae, tokenizer, size, stage)
        )

        def export(trained: nn.Module, step: int) -> None:
            assert isinstance(trained, TextToImage)
            parts = vae, trained.text_encoder, trained.unet
            export_text_to_image(self.model, *parts, networks.SCHEDULER, self.notes())

        train_text_to_image(
            net,
            SchedulerConfig.from_dict(networks.SCHEDULER),
            latents,
            ids,
            torch.tensor(tokenizer.encode("").ids, dtype=torch.int16),
            self.plan(plan, stage),
            self.out / stage,
            every=self.sizes.every,
            native=self.native,
            middle=half,
            on_checkpoint=export,
        )
        export(net, plan.steps)

    def _vocabulary(self) -> Tokenizer:
        """Return the tokenizer, and write it into the folder of the model."""
        text, folder = self.sizes.networks.text, self.model / "tokenizer"
        if self.base is not None:
            assert self.base.tokenizer is not None
            self.base.tokenizer.save(folder)
            return self.base.tokenizer
        captions = [*self.scenes.captions_corpus(), *self.scenes.unknown]
        return train_vocabulary(captions, text.vocab_size, folder, text.max_position_embeddings)

    def _encoder(self) -> AutoencoderKL:
        """Return the autoencoder, trained or taken from `begin`; it is kept in `out`, too."""
        config = self.sizes.networks.vae
        if self.base is not None:
            assert self.base.vae is not None
            vae = AutoencoderKL(config)
            _take(vae, self.base.vae)
            factor = self.base.vae.config.scaling_factor
        else:
            plan = self.plan(self.sizes.vae_plan, "autoencoder")
            pool = Pool(self.stage, self.path, self._pool_size(), 1)
            vae = train_autoencoder(
                config, pool, plan, self.out / "autoencoder", native=self.native
            )
            spread = latent_spread(vae, pool, Draw.of(0, 0), min(512, len(pool)))
            factor = round(1 / spread, 5)
        vae.config = replace(vae.config, scaling_factor=factor)
        _save(vae, self.out / "vae.safetensors")
        (self.out / "scaling").write_text(str(factor))
        return vae.eval().requires_grad_(False)

    def sharp(self) -> Path:
        """Train the decoder further, on latents with errors, and put it into out/embedded."""
        if not (self.out / "vae.safetensors").exists():
            raise SafelightError("the stage sharp needs an autoencoder: run embedded first")
        factor = float((self.out / "scaling").read_text())
        vae = AutoencoderKL(replace(self.sizes.networks.vae, scaling_factor=factor))
        vae.load_state_dict(load_file(self.out / "vae.safetensors"))
        pool = Pool(self.stage, self.path, self._pool_size(), 2)
        plan = self.plan(self.sizes.sharp_plan, "sharp")
        sharpen(vae, pool, plan, self.out / "sharp", every=self.sizes.every, native=self.native)
        _save(vae, self.out / SHARP)
        path = self.model / "vae" / "diffusion_pytorch_model.safetensors"
        if path.exists():
            _save(vae.half(), path)
        return self.model

    def unconditional(self) -> Path:
        """Train the model of pixels and write the folder out/embedded-unconditional."""
        folder = self.out / "embedded-unconditional"
        folder.mkdir(parents=True, exist_ok=True)
        credit(folder)
        side = self.sizes.pixels.sample_size or 64
        stage = Stage(self.scenes, self.device, 2 * side, self.sizes.variants)
        rng = np.random.default_rng(3)
        names = [name for name in NAMEABLE if name in self.scenes.names]
        shown = [
            self.scenes.invent(rng, "one", concept, style, "white", disturbed=False)
            for concept in names or self.scenes.names
            for style in ("flat", "3d")
            for _ in range(24)
        ]
        pictures = to_pixels(stage.compose(shown, rng))
        pictures = torch.nn.functional.avg_pool2d(pictures, 2)
        small = ((pictures + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)

        def some(rng: np.random.Generator, n: int) -> Tensor:
            return small[torch.from_numpy(rng.integers(len(small), size=n)).to(small.device)]

        net = train_unconditional(
            self.sizes.pixels,
            SchedulerConfig.from_dict(networks.PIXELS_SCHEDULER),
            some,
            self.plan(self.sizes.pixels_plan, "unconditional"),
            self.out / "unconditional",
            every=self.sizes.every,
            native=self.native,
        )
        notes = {"data_sha256": self.scenes.sha256}
        export_unconditional(folder, net, networks.PIXELS_SCHEDULER, notes)
        return folder

    def prompts(self, count: int) -> Path:
        """Write captions, one a line, for distillation; returns the file."""
        rng = np.random.default_rng(4)
        said = [self.scenes.invent(rng).said for _ in range(count)]
        path = self.out / "prompts.txt"
        path.write_text("\n".join(said) + "\n", encoding="utf-8")
        return path

    def notes(self) -> dict[str, Any]:
        """Return what goes to safelight.json."""
        return {
            "data_sha256": self.scenes.sha256,
            "words": sorted(self.scenes.words()),
            "prompts": list(SHEET),
            "draw_with": DRAW_WITH,
        }

    def _pool_size(self) -> int:
        """Return the number of scenes whose pictures an autoencoder learns from: they are large."""
        return max(8, self.sizes.scenes // 6)

    def _encoded(
        self, vae: AutoencoderKL, tokenizer: Tokenizer, size: int, stage: str
    ) -> tuple[Tensor, Tensor]:
        """Return latents of a stage's pictures, float16 [n, 4, h, w], and the tokens of their
        captions, int16 [n, length], both on the device.

        Scenes are mixed with half as many things alone: what only scenes show is soon forgotten.
        """
        made = [self._composed(vae, tokenizer, size, True)]
        if stage != "alone":
            made.append(self._composed(vae, tokenizer, size, False))
        return torch.cat([m["latents"] for m in made]), torch.cat([m["ids"] for m in made])

    def _composed(
        self, vae: AutoencoderKL, tokenizer: Tokenizer, size: int, alone: bool
    ) -> dict[str, Tensor]:
        """Return latents and tokens of scenes, or of things alone. They are kept in `out`."""
        count = self.sizes.scenes // 2 if alone else self.sizes.scenes
        told = hashlib.sha256(f"{self.scenes.sha256} {size} {count}".encode())
        for weights in vae.cpu().state_dict().values():
            told.update(weights.numpy().tobytes())
        name = "alone" if alone else "scenes"
        path = self.out / f"latents-{name}-{size}-{told.hexdigest()[:16]}.safetensors"
        if not path.exists():
            source = Scenes(self.path, alone=True) if alone else self.scenes
            drawn = Stage(source, self.device, size, self.sizes.variants)
            latents: list[Tensor] = []
            said: list[str] = []
            for scenes, things, rng in parts(source, self.path, count, size):
                latents.append(encode(vae, drawn.draw(scenes, things, rng)))
                said += [scene.said for scene in scenes]
            ids = torch.tensor([tokenizer.encode(text).ids for text in said], dtype=torch.int16)
            _keep({"latents": torch.cat(latents), "ids": ids}, path)
        return load_file(path, device=str(self.device))

    def _timed(self, what: str, do: Callable[[], Any]) -> Any:
        began = time.monotonic()
        made = do()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        progress(f"{what}: {time.monotonic() - began:.1f} s")
        return made


def credit(folder: Path) -> None:
    """Name the sources beside the weights, since the folder may be passed on alone."""
    lock = json.loads(LOCK.read_text(encoding="utf-8"))
    (folder / "NOTICE").write_text(notice([*lock["packages"], lock["names"]]), encoding="utf-8")


NAMEABLE = (
    "a red apple", "a banana", "a strawberry", "a pizza", "a hamburger", "a birthday cake",
    "a cat", "a dog", "a lion", "a fox", "a panda", "a pig", "an elephant", "a penguin", "an owl",
    "a frog", "a turtle", "a fish", "a whale", "an octopus", "a butterfly", "a car", "a bus",
    "a tractor", "a bicycle", "a rocket", "a sailboat", "a smiling face", "a robot", "a ghost",
    "a pumpkin", "a key", "a light bulb", "a camera", "a guitar", "a balloon", "a gift", "a crown",
    "an umbrella", "a teddy bear", "a soccer ball", "a tree", "a cactus", "a sunflower", "a star",
    "a rainbow", "a snowman", "a house",
)  # fmt: skip
"""What the unconditional model draws: few things, that a person can name."""


def _save(net: nn.Module, path: Path) -> None:
    _keep(net.state_dict(), path)


def _keep(tensors: dict[str, Tensor], path: Path) -> None:
    """Write by a rename, so that what is there is whole."""
    beside = path.with_suffix(".part")
    whole = {name: t.cpu().contiguous() for name, t in tensors.items()}
    save_file(whole, beside, metadata={"format": "pt"})
    beside.replace(path)


def _take(net: nn.Module, other: nn.Module | None) -> None:
    """Take over the weights of another network. Raises SafelightError if its sizes differ."""
    try:
        net.load_state_dict({} if other is None else other.state_dict())
    except RuntimeError:
        raise SafelightError(
            f"--begin: its {type(net).__name__} has other sizes than the recipe's: expected a "
            "folder that the stage embedded wrote"
        ) from None
