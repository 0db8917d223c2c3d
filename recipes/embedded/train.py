"""Train the models that ship, from the cut-outs to the folders."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recipes.embedded.cutouts import LOCK, notice
from recipes.embedded.encode import Encoder, encoded
from recipes.embedded.linear import Filters
from recipes.embedded.looks import Looks
from recipes.embedded.pool import Pool
from recipes.embedded.principal import Principal
from recipes.embedded.redraw import redraw
from recipes.embedded.scenes import Scenes
from recipes.embedded.sharpen import AHEAD, LISTEN, sharpen
from recipes.embedded.sizes import SHARES, TINY, Sizes
from recipes.embedded.stage import Stage
from recipes.embedded.supply import PART
from recipes.embedded.unconditional import DRAW_PIXELS_WITH, PIXELS_SCHEDULER, nameable
from recipes.embedded.words import teach
from safelight.errors import SafelightError
from safelight.nets.clip import CLIPTextModel
from safelight.nets.tiny import AutoencoderTiny
from safelight.nets.unet2d import UNet2DModel
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
from safelight.train.export import export_previews, export_text_to_image, export_unconditional
from safelight.train.finetune import bring_along
from safelight.train.loop import Draw, progress
from safelight.train.plan import Plan
from safelight.train.tokens import train_vocabulary
from safelight.weights import load_model
from safelight.weights.find import PREVIEWS

UNET_STAGES = ("alone", "scenes")
"""What the UNet learns, in this order."""

SHEET = (
    "a red apple", "a cat", "a guitar", "three teddy bears on a yellow background",
    "a penguin in the snow", "a rocket at night under the stars", "a purple octopus under water",
    "a blue car on green grass", "a black bicycle", "a big snowman", "a lion next to a castle",
    "a small house at the bottom on the left",
)  # fmt: skip
"""Prompts whose pictures are drawn while it trains, so that progress can be seen."""

DECODER = "decoder.safetensors"
"""The file of an autoencoder with a trained decoder."""

PRINCIPAL = "principal.safetensors"
"""The file of the components that make the encoder, beside the model trained on their latents."""

DRAW_WITH = {
    "sampler": "dpmpp_2m",
    "steps": 20,
    "guidance_scale": 4.0,
    "guidance_start": 0.25,
}
"""What the model draws best with. If guidance begins at the first step, most seeds give one
picture."""


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
        if self.base is not None and not (self.model / PREVIEWS).exists():
            bring_along(self.base, self.model)
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

        With `begin`, the UNet learns scenes; it learns things alone only if `out` has a checkpoint
        of that stage.
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
        """Compose and encode what a stage of the UNet learns from, for a later training."""
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
        # It stays as it is: the denoiser's loss could teach it less than the questions did.
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
        """Return the components that make the encoder; they are kept in `out` and in the model."""
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
        """Return the autoencoder with the best decoder: trained, of `begin`, or in closed form."""
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
        """Train the decoder, also on what a UNet draws, and return out/embedded.

        The UNet is that of out/embedded, or else of `begin`. If out/embedded has an autoencoder,
        the decoder is written into it.
        """
        principal = self._principal()
        vae = self._untrained(principal)
        pool = Pool(self._stage(self.sizes.size), self.path, self.sizes.pictures, 2)
        plan = self.plan(self.sizes.decoder_plan, "decoder")
        folder, every = self.out / "decoder", self.sizes.every
        sharpen(
            *(_Decode(vae), principal, pool, plan, folder),
            redrawn=self._timed("drawn again", lambda: self._redrawn(principal, pool)),
            # A trained decoder waits only until the discriminator has learned something.
            listen=LISTEN if self.base is None else AHEAD,
            every=every,
            native=self.native,
        )
        _save(vae, self.out / DECODER)
        path = self.model / "vae" / "diffusion_pytorch_model.safetensors"
        if path.exists():
            _save(vae.half(), path)
        return self.model

    def previews(self) -> Path:
        """Train the tiny decoder for previews of out/embedded, and write it there."""
        pool = Pool(self._stage(self.sizes.size), self.path, self.sizes.pictures, 2)
        tiny = AutoencoderTiny(TINY)
        sharpen(
            *(_Tiny(tiny), self._principal(), pool),
            self.plan(self.sizes.previews_plan, "previews"),
            self.out / "previews",
            listen=math.inf,
            every=self.sizes.every,
            native=self.native,
        )
        export_previews(self.model, tiny)
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
        config = self.sizes.pixels
        small = nameable(self._stage(2 * (config.sample_size or 64), alone=True))

        def some(draw: Draw, n: int) -> Tensor:
            return small[draw.pick(len(small), n)]

        def export(net: nn.Module, step: int) -> None:
            assert isinstance(net, UNet2DModel)
            notes = {"data_sha256": self.scenes.sha256, "draw_with": DRAW_PIXELS_WITH}
            export_unconditional(folder, net, PIXELS_SCHEDULER, notes)

        net = train_unconditional(
            config,
            SchedulerConfig.from_dict(PIXELS_SCHEDULER),
            some,
            self.plan(self.sizes.pixels_plan, "unconditional"),
            self.out / "unconditional",
            every=self.sizes.every,
            native=self.native,
            on_device=True,
            on_checkpoint=export,
        )
        export(net, 0)
        return folder

    def prompts(self, count: int) -> Path:
        """Write captions, one a line, for distillation; returns the file."""
        rng = np.random.default_rng(4)
        said = [self.scenes.invent(rng).said for _ in range(count)]
        path = self.out / "prompts.txt"
        path.write_text("\n".join(said) + "\n", encoding="utf-8")
        return path

    def notes(self) -> dict[str, Any]:
        """Return the content of safelight.json."""
        return {
            "data_sha256": self.scenes.sha256,
            "words": sorted(self.scenes.words()),
            "prompts": list(SHEET),
            "draw_with": DRAW_WITH,
        }

    def _encoded(
        self, principal: Principal, tokenizer: Tokenizer, stage: str
    ) -> tuple[Tensor, Tensor]:
        """Return latents of a stage's pictures and the tokens of their captions, on the device.

        They are float16 [n, channels, h, w] and int16 [n, length]. Scenes are mixed with half as
        many things alone, at any place and in any size, because the UNet soon forgets what it is
        not shown.
        """
        kinds = ("alone",) if stage == "alone" else ("things", "scenes")
        made = [self._composed(principal, tokenizer, kind) for kind in kinds]
        return torch.cat([m["latents"] for m in made]), torch.cat([m["ids"] for m in made])

    def _composed(self, principal: Principal, tokenizer: Tokenizer, kind: str) -> dict[str, Tensor]:
        """Return latents and tokens of one kind of scenes; they are kept in `out`.

        kind: "scenes"; "things", each alone at any place; or "alone", each alone in the middle.
        """
        alone = kind != "scenes"
        size, count = self._half, self.sizes.scenes // 2 if alone else self.sizes.scenes
        told = hashlib.sha256(f"{self.scenes.sha256} {size} {count}".encode())
        told.update((principal.parts * principal.scale).numpy().tobytes())
        path = self.out / f"latents-{kind}-{told.hexdigest()[:16]}.safetensors"
        if not path.exists():
            steady = kind == "alone"
            scenes = Scenes(self.path, alone=True, steady=steady) if alone else self.scenes
            kept = self.model / PRINCIPAL
            encoder = Encoder(self.device, size, self.sizes.variants, kept, tokenizer)
            _keep(encoded(scenes, self.path, count, encoder), path)
        return load_file(path, device=str(self.device))

    def _timed(self, what: str, do: Callable[[], Any]) -> Any:
        began = time.monotonic()
        made = do()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        progress(f"{what}: {time.monotonic() - began:.1f} s")
        return made


class _Decode(nn.Module):
    """The decoding half of the autoencoder."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        assert vae.post_quant_conv is not None
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv

    def forward(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))


class _Tiny(nn.Module):
    """The decoder for previews; its pixels of 0..1 are returned as −1..1."""

    def __init__(self, vae: AutoencoderTiny) -> None:
        super().__init__()
        self.decoder = vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        return self.decoder(latents) * 2 - 1


def credit(folder: Path) -> None:
    """Name the sources beside the weights, since the folder may be passed on alone."""
    lock = json.loads(LOCK.read_text(encoding="utf-8"))
    (folder / "NOTICE").write_text(notice([*lock["packages"], lock["names"]]), encoding="utf-8")


def _save(net: nn.Module, path: Path) -> None:
    _keep(net.state_dict(), path)


def _keep(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a file by a rename, so that it is there as a whole or not at all."""
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
