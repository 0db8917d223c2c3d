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
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recipes.embedded.cutouts import LOCK, notice
from recipes.embedded.grounds import VARIANTS
from recipes.embedded.linear import Filters
from recipes.embedded.looks import Looks
from recipes.embedded.pool import Pool
from recipes.embedded.principal import Principal
from recipes.embedded.redraw import redraw
from recipes.embedded.scenes import Scenes
from recipes.embedded.sharpen import sharpen
from recipes.embedded.stage import Stage
from recipes.embedded.supply import PART, parts
from recipes.embedded.words import teach
from safelight.errors import SafelightError
from safelight.nets.clip import CLIPTextModel
from safelight.nets.unet2d import UNet2DConfig
from safelight.nets.vae import AutoencoderKL
from safelight.prompt.tokenizer import Tokenizer
from safelight.sampling.schedule import SchedulerConfig
from safelight.train import networks
from safelight.train.autoencoder import to_pixels
from safelight.train.denoiser import (
    TextToImage,
    train_text_to_image,
    train_unconditional,
)
from safelight.train.devices import accelerator
from safelight.train.export import export_text_to_image, export_unconditional
from safelight.train.loop import progress
from safelight.train.plan import Plan
from safelight.train.tokens import train_vocabulary
from safelight.weights import load_model

MINUTES = 13.0
"""Of one H100, for all stages."""

SHARES = {
    "decoder": 0.22,
    "words": 0.09,
    "alone": 0.08,
    "scenes": 0.37,
    "unconditional": 0.07,
}
"""Of the minutes; the rest is for composing, starting, compiling and `embedded-fast`."""

UNET_STAGES = ("alone", "scenes")
"""What the UNet learns, in this order."""

NETWORKS = replace(
    networks.LARGE,
    vae=replace(networks.LARGE.vae, block_out_channels=(32, 32, 48, 96, 128), latent_channels=8),
    unet=replace(networks.LARGE.unet, sample_size=16, in_channels=8, out_channels=8),
)
"""16.6 million weights, 31.7 MiB as float16. A latent stands for 16×16 pixels."""

SHEET = (
    "a red apple", "a cat", "a guitar", "three teddy bears on a yellow background",
    "a penguin in the snow", "a rocket at night under the stars", "a purple octopus under water",
    "a blue car on green grass", "a black bicycle", "a big snowman", "a lion next to a castle",
    "a small house at the bottom on the left",
)  # fmt: skip
"""Prompts whose pictures are drawn while it trains, so that progress can be seen."""

DECODER = "decoder.safetensors"
"""An autoencoder whose decoder is trained."""

PRINCIPAL = "principal.safetensors"
"""The components that are the encoder, beside the model that was trained on their latents."""

DRAW_WITH = {"sampler": "dpmpp_2m", "steps": 20, "guidance_scale": 4.0}
"""What the model draws best with."""


@dataclass(frozen=True)
class Sizes:
    """Of networks, data and batches. A plan without steps gets them from the minutes."""

    size: int
    """Of the pictures that are drawn. Their latents are those of halved pictures."""
    scenes: int
    """Composed and encoded once; half as many of things alone."""
    pictures: int
    """Composed for the decoder, and for the components."""
    linear: int
    """Composed for the decoder in closed form."""
    redrawn: int
    """Of the decoder's, how many the UNet draws again."""
    captions: int
    """That the text encoder learns from."""
    networks: networks.Networks
    decoder_plan: Plan
    text_plan: Plan
    unet_plan: Plan
    pixels: UNet2DConfig
    pixels_plan: Plan
    every: int = 2500
    """Steps between two checkpoints."""
    variants: int = VARIANTS
    """Pictures of each drawn ground."""


FULL = Sizes(
    size=256,
    scenes=122_880,
    pictures=20_480,
    linear=2048,
    redrawn=6144,
    captions=131_072,
    networks=NETWORKS,
    decoder_plan=Plan(steps=0, batch=32, learning_rate=1e-3, warmup=100, weight_decay=0.0),
    text_plan=Plan(steps=0, batch=256, learning_rate=1.5e-3, warmup=50, weight_decay=0.0),
    unet_plan=Plan(steps=0, batch=128, learning_rate=8e-4, warmup=300),
    pixels=replace(networks.PIXELS, sample_size=64, block_out_channels=(64, 128, 192)),
    pixels_plan=Plan(steps=0, batch=128, learning_rate=6e-4, warmup=200),
)

# The same way in small: to see on any machine, within seconds, that all of it works.
DRY = Sizes(
    size=64,
    scenes=64,
    pictures=8,
    linear=8,
    redrawn=4,
    captions=64,
    networks=networks.Networks(
        vae=replace(NETWORKS.vae, block_out_channels=(16, 16, 48, 48, 80), norm_num_groups=4),
        text=replace(NETWORKS.text, hidden_size=32, intermediate_size=64, num_hidden_layers=1),
        unet=replace(
            NETWORKS.unet,
            sample_size=4,
            block_out_channels=(16, 16, 32),
            cross_attention_dim=32,
        ),
    ),
    decoder_plan=replace(FULL.decoder_plan, steps=12, batch=2, warmup=2),
    text_plan=replace(FULL.text_plan, steps=12, batch=16, warmup=2),
    unet_plan=replace(FULL.unet_plan, steps=12, batch=8, warmup=2),
    pixels=replace(networks.PIXELS, sample_size=16, block_out_channels=(32, 32, 32)),
    pixels_plan=replace(FULL.pixels_plan, steps=12, batch=4, warmup=2),
    every=4,
    variants=2,
)


class Recipe:
    """One run of the recipe: its data, its sizes, its folder.

    Each stage keeps its checkpoint under `out` and goes on from there when it is called again.
    begin: a folder that `embedded` wrote, to begin from. Its decoder and UNet are trained further,
    each by its own stage; the rest is taken as it is.
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
        self.begin, self.scenes = begin, Scenes(self.path)
        made_from = f"{self.scenes.sha256} {sizes} {minutes}{made_from}"
        self.digest = hashlib.sha256(made_from.encode()).hexdigest()
        self.model = out / "embedded"
        self.model.mkdir(parents=True, exist_ok=True)
        credit(self.model)

    def plan(self, plan: Plan, stage: str) -> Plan:
        """Return the plan with its own steps, or else its share of the minutes."""
        seconds = None if plan.steps else 60 * self.minutes * SHARES[stage]
        return replace(plan, seconds=seconds, recipe=self.digest)

    def alone(self) -> Path:
        """Train the text encoder and, from things alone, the UNet; write out/embedded."""
        return self._unet("alone")

    def embedded(self) -> Path:
        """Do what `alone` does, and go on with scenes.

        Given weights to begin from, the UNet learns scenes, and things alone if that was begun in
        `out`.
        """
        return self._unet("scenes")

    def _unet(self, last: str) -> Path:
        principal = self._principal()
        tokenizer, net = self._networks(principal)
        vae = self._autoencoder(principal)
        for stage in UNET_STAGES[: UNET_STAGES.index(last) + 1]:
            begun = (self.out / stage / "checkpoint.pt").exists()
            if self.base is None or stage == last or begun:
                self._denoiser(stage, principal, tokenizer, vae, net)
        return self.model

    def compose(self, stage: str) -> None:
        """Compose and encode what a stage of the UNet learns from, for a training to come."""
        self._encoded(self._principal(), self._vocabulary(), stage)

    def _stage(self, size: int, *, alone: bool = False) -> Stage:
        scenes = Scenes(self.path, alone=True) if alone else self.scenes
        return Stage(scenes, self.device, size, self.sizes.variants)

    @property
    def _half(self) -> int:
        return self.sizes.size // 2

    def _networks(self, principal: Principal) -> tuple[Tokenizer, TextToImage]:
        """Return the UNet and its text encoder, which is trained or taken from `begin`."""
        tokenizer = self._vocabulary()
        torch.manual_seed(0)
        net = TextToImage(CLIPTextModel(self.sizes.networks.text), self.sizes.networks.unet)
        if self.base is None:
            count, plan = self.sizes.captions, self.plan(self.sizes.text_plan, "words")
            looks = self._timed("looks", lambda: Looks(self._stage(self._half), principal))
            given = self.scenes, self.path, tokenizer, looks, count, plan, self.out / "words"
            self._timed("words", lambda: teach(net.text_encoder, *given, self.device))
        else:
            _take(net.text_encoder, self.base.text_encoder)
            _take(net.unet, self.base.unet)
        # What the questions taught is more than the denoiser's loss can tell it.
        net.text_encoder.requires_grad_(False)
        return tokenizer, net

    def _denoiser(
        self,
        stage: str,
        principal: Principal,
        tokenizer: Tokenizer,
        vae: AutoencoderKL,
        net: TextToImage,
    ) -> None:
        """Train the UNet for one of UNET_STAGES; write out/embedded."""
        latents, ids = self._timed("latents", lambda: self._encoded(principal, tokenizer, stage))

        def export(trained: nn.Module, step: int) -> None:
            assert isinstance(trained, TextToImage)
            parts = vae, trained.text_encoder, trained.unet
            export_text_to_image(self.model, *parts, networks.SCHEDULER, self.notes())

        plan = self.sizes.unet_plan
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
            middle=True,
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

    def _principal(self) -> Principal:
        """Return the components that are the encoder; they are kept in `out` and in the model."""
        path, kept = self.out / PRINCIPAL, self.model / PRINCIPAL
        if self.begin is not None:
            path = self.begin / PRINCIPAL
            if not path.exists():
                raise SafelightError(f"--begin: {path} is missing: it tells what its latents are")
        elif not path.exists():
            pool = Pool(self._stage(self._half), self.path, self.sizes.pictures, 1)
            channels = self.sizes.networks.vae.latent_channels
            Principal.of(pool.pictures.split(PART), channels).save(path)
        principal = Principal.load(path)
        principal.save(kept)
        return principal

    def _autoencoder(self, principal: Principal) -> AutoencoderKL:
        """Return the autoencoder with the best decoder there is: trained, or of `begin`, or in
        closed form.
        """
        path = self.out / DECODER
        if not path.exists():
            return self._untrained(principal).eval().requires_grad_(False)
        vae = AutoencoderKL(replace(self.sizes.networks.vae, scaling_factor=1.0))
        vae.load_state_dict(load_file(path))
        return vae.eval().requires_grad_(False)

    def _untrained(self, principal: Principal) -> AutoencoderKL:
        """Return the autoencoder whose decoder is to be trained."""
        torch.manual_seed(0)
        vae = AutoencoderKL(replace(self.sizes.networks.vae, scaling_factor=1.0))
        if self.base is not None:
            _take(vae, self.base.vae)
        else:
            pool = Pool(self._stage(self._half), self.path, self.sizes.linear, 5)
            Filters.of(principal, map(to_pixels, pool.pictures.split(PART))).into(vae)
        principal.into(vae)
        return vae

    def decoder(self) -> Path:
        """Train the decoder, also on what the UNet of out/embedded or else of `begin` draws;
        out/embedded gets it if it is there.
        """
        principal = self._principal()
        vae = self._untrained(principal)
        pool = Pool(self._stage(self.sizes.size), self.path, self.sizes.pictures, 2)
        plan = self.plan(self.sizes.decoder_plan, "decoder")
        folder, every = self.out / "decoder", self.sizes.every
        sharpen(
            *(vae, principal, pool, plan, folder),
            redrawn=self._timed("drawn again", lambda: self._redrawn(principal, pool)),
            every=every,
            native=self.native,
        )
        _save(vae, self.out / DECODER)
        path = self.model / "vae" / "diffusion_pytorch_model.safetensors"
        if path.exists():
            _save(vae.half(), path)
        return self.model

    def _redrawn(self, principal: Principal, pool: Pool) -> Tensor | None:
        """Return latents as `redraw` does, None where there is no UNet yet."""
        drawer = self.model if (self.model / "unet").exists() else self.begin
        if drawer is None:
            return None
        model = load_model(str(drawer), device=str(self.device))
        return redraw(model, principal, pool, self.sizes.redrawn).to(self.device)

    def unconditional(self) -> Path:
        """Train the model of pixels and write the folder out/embedded-unconditional."""
        folder = self.out / "embedded-unconditional"
        folder.mkdir(parents=True, exist_ok=True)
        credit(folder)
        side = self.sizes.pixels.sample_size or 64
        stage = self._stage(2 * side)
        rng = np.random.default_rng(3)
        names = [name for name in NAMEABLE if name in self.scenes.names]
        shown = [
            self.scenes.invent(rng, "one", concept, style, "white", disturbed=False)
            for concept in names or self.scenes.names
            for style in ("flat", "3d")
            for _ in range(24)
        ]
        pictures = to_pixels(stage.compose(shown, rng))
        pictures = F.avg_pool2d(pictures, 2)
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

    def _encoded(
        self, principal: Principal, tokenizer: Tokenizer, stage: str
    ) -> tuple[Tensor, Tensor]:
        """Return latents of a stage's pictures, float16 [n, channels, h, w], and the tokens of
        their captions, int16 [n, length], both on the device.

        Scenes are mixed with half as many things alone: what is not shown is soon forgotten.
        """
        made = [self._composed(principal, tokenizer, True)]
        if stage != "alone":
            made.append(self._composed(principal, tokenizer, False))
        return torch.cat([m["latents"] for m in made]), torch.cat([m["ids"] for m in made])

    def _composed(
        self, principal: Principal, tokenizer: Tokenizer, alone: bool
    ) -> dict[str, Tensor]:
        """Return latents and tokens of scenes, or of things alone. They are kept in `out`."""
        size, count = self._half, self.sizes.scenes // 2 if alone else self.sizes.scenes
        told = hashlib.sha256(f"{self.scenes.sha256} {size} {count}".encode())
        told.update((principal.parts * principal.scale).numpy().tobytes())
        name = "alone" if alone else "scenes"
        path = self.out / f"latents-{name}-{told.hexdigest()[:16]}.safetensors"
        if not path.exists():
            drawn = self._stage(size, alone=alone)
            latents: list[Tensor] = []
            said: list[str] = []
            for scenes, things, rng in parts(drawn.scenes, self.path, count, size):
                pixels = to_pixels(drawn.draw(scenes, things, rng))
                latents.append(principal.encode(pixels).half().cpu())
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
