"""FLUX.2 klein, with 4 or 9 billion weights: a transformer that reads a chat model's states.

The text encoder is Qwen3, which reads the prompt as a user's message, filled up to 512 tokens. The
transformer reads the states after three of its layers, side by side, those of the filling too.
klein was distilled to draw in 4 steps without guidance; its base models take guidance.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from safelight.errors import SafelightError
from safelight.families.base import Conditioning
from safelight.families.flow import (
    QWEN3_PART,
    QWEN_TOKENIZERS,
    FlowFamily,
    Reader,
    Rows,
    qwen_tokenizer,
)
from safelight.families.flow_files import (
    FLUX2_LAYOUT,
    FLUX2_TEXTS,
    KLEIN_4B,
    KLEIN_9B,
    Layout,
    Published,
    flux2_is_dev,
)
from safelight.families.part import Part
from safelight.families.references import AREA, within
from safelight.request_pictures import MAX_REFERENCES
from safelight.weights.check import refusal
from safelight.weights.names import vae_shape
from safelight.weights.names_flux2_vae import flux2_vae_folder_name
from safelight.weights.names_joint import flux2_section

if TYPE_CHECKING:
    from torch import Tensor

    from safelight.model import Model
    from safelight.request import Request
    from safelight.weights.check import Header
    from safelight.weights.folder import Folder
    from safelight.weights.names import Section
    from safelight.weights.plan import Plan

LONGEST = 512
"""The tokens of a prompt, those of the chat around it and what fills it up included."""

LAYERS = (9, 18, 27)
"""The layers of the text encoder after which its states are read."""

DEV = (
    "this is FLUX.2 dev, whose text encoder (Mistral) is not supported; of FLUX.2, klein and klein "
    "base are"
)
"""What is said of the other model of FLUX.2."""

_SIDE = 1024
"""Width and height of the training pictures; no config of a folder holds it."""

_CELL = 16
"""Pixels of the side of a token."""

_SHORT, _LONG = 64, 8
"""Of a reference picture: the shortest side, and how many times as long the other may be."""

_BEFORE = "<|im_start|>user\n"
_AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
"""What Qwen3's chat template puts around a user's message, for an answer without thinking."""

_PAD = "<|endoftext|>"
_MARKS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", _PAD)
"""What must be one token each. Tokenizers of older Qwens have no <think>."""

_DISTILLED = MappingProxyType({"sampler": "euler", "steps": 4, "guidance_scale": 1.0})
_BASE = MappingProxyType({"sampler": "euler", "steps": 50, "guidance_scale": 4.0})
"""The settings of the published folders; the second are the defaults of diffusers' pipeline."""

FLUX2_VAE_PART = Part(
    "safelight.nets.vae_flux2",
    "AutoencoderKLFlux2",
    "Flux2VAEConfig",
    rename=flux2_vae_folder_name,
    reshape=vae_shape,
)


@dataclass(frozen=True, eq=False)
class Flux2(FlowFamily):
    """One variant.

    layers, singles: blocks of two streams and of one.
    """

    name: str
    layers: int = 0
    singles: int = 0
    defaults: Mapping[str, Any] = field(default_factory=lambda: _BASE)
    distilled: bool = False
    published: Published | None = None

    title: ClassVar[str] = "FLUX.2"
    pipelines: ClassVar[tuple[str, ...]] = ("Flux2KleinPipeline", "Flux2KleinInpaintPipeline")
    parts: ClassVar[Mapping[str, Part]] = {
        "transformer": Part("safelight.nets.flux2", "Flux2Transformer2DModel", "Flux2Config"),
        "vae": FLUX2_VAE_PART,
        "text_encoder": QWEN3_PART,
    }
    tokenizers: ClassVar[Mapping[str, tuple[str, ...]]] = {"tokenizer": QWEN_TOKENIZERS}
    patch: ClassVar[int] = 1  # the autoencoder makes the patches
    empirical: ClassVar[bool] = True
    layout: ClassVar[Layout] = FLUX2_LAYOUT
    told_by_index: ClassVar[bool] = True

    # --- files -------------------------------------------------------------------------------

    def variant(
        self, configs: Mapping[str, Any], index: Mapping[str, Any], scheduler: Mapping[str, Any]
    ) -> Flux2:
        super().variant(configs, index, scheduler)
        distilled = index.get("is_distilled", False)
        if not isinstance(distilled, bool):
            raise SafelightError(
                f"is_distilled in its model_index.json is {distilled!r:.40}; expected true or false"
            )
        net = configs["transformer"]
        for one in VARIANTS:
            shapes = one.layers, one.singles, one.distilled
            if shapes == (net.num_layers, net.num_single_layers, distilled):
                return one
        return CUSTOM if distilled else CUSTOM_BASE

    def named_index(self, name: str) -> Mapping[str, Any]:
        # As in flux-2-klein-4b.safetensors and flux-2-klein-base-4b.safetensors.
        lower = name.casefold()
        return {"is_distilled": "base" not in lower} if "klein" in lower else {}

    def published_variants(self) -> tuple[FlowFamily, ...]:
        # A distilled model has the shapes of its base: a folder's index or a file's name tells
        # them apart.
        return tuple(one for one in VARIANTS if not one.distilled)

    def identify(self, header: Header) -> FlowFamily | None:
        prefix = self.layout.prefix(header)
        if prefix is not None and flux2_is_dev(header, prefix):
            raise refusal(header.name, DEV)
        return super().identify(header)

    def sections(self) -> dict[str, Section]:
        found = super().sections()
        mine = FLUX2_TEXTS.get(self.configs.get("text_encoder", {}).get("hidden_size", 0))
        others = set() if mine is None else {*FLUX2_TEXTS.values()} - {mine}
        return {prefix: section for prefix, section in found.items() if prefix not in others}

    def check_configs(self, configs: Mapping[str, Any]) -> None:
        net, text, vae = (configs[name] for name in ("transformer", "text_encoder", "vae"))
        for what, gives, reads in (
            ("text encoder", len(LAYERS) * text.hidden_size, net.joint_attention_dim),
            # Another autoencoder, as --vae may name it, makes no patches.
            ("vae", getattr(vae, "channels", vae.latent_channels), net.in_channels),
            ("transformer", net.out_channels or net.in_channels, net.in_channels),
        ):
            if gives != reads:
                raise SafelightError(
                    f"its {what} gives {gives} numbers, and its transformer reads {reads}"
                )
        if text.num_hidden_layers < LAYERS[-1]:
            raise SafelightError(
                f"its text encoder has {text.num_hidden_layers} layers; FLUX.2 reads the states "
                f"after layer {LAYERS[-1]}"
            )

    def native_size(self, configs: Mapping[str, Any]) -> tuple[int, int]:
        return _SIDE, _SIDE

    def index(self, configs: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().index(configs), "is_distilled": self.distilled}

    def original(self, part: str, config: Mapping[str, Any]) -> Section:
        if part == self.network:
            return flux2_section(part, config)
        return super().original(part, config)

    def load_tokenizers(
        self, folder: Folder | None, configs: Mapping[str, Any], names: Set[str] | None = None
    ) -> dict[str, Any]:
        if folder is None:
            return {}
        found = qwen_tokenizer(folder, configs, _MARKS)
        # The states of the filling are read, too. A tokenizer.json alone names no token for it, and
        # GGUF files name others.
        found.pad = found.pieces(_PAD)[0].id
        return {"tokenizer": found}

    # --- drawing -----------------------------------------------------------------------------

    def takes_guidance(self, model: Model | Plan) -> bool:
        # Like FLUX.1 schnell it draws in one evaluation, whatever the scale.
        return self.distilled

    def warnings(self, model: Model, request: Request) -> list[str]:
        found = super().warnings(model, request)
        if self.distilled and request.guidance_scale != 1:
            found.append(f"guidance_scale does nothing with {model.name}: leave it out")
        return found

    def reader(self, tokenizers: Mapping[str, Any]) -> Reader:
        return Reader(tokenizers["tokenizer"], LONGEST, _BEFORE, _AFTER)

    def encode_text(self, model: Model, text: str) -> Conditioning:
        import torch

        read = model.parts["tokenizer"].encode(f"{_BEFORE}{text}{_AFTER}", LONGEST, pad=True)
        ids = torch.tensor([read.ids], device=model.device)
        states = model.parts["text_encoder"](ids, LAYERS, read.used)
        return Conditioning(torch.cat(states, dim=-1).to(model.dtype))

    def velocity(self, model: Model, rows: Rows) -> Tensor:
        return model.network(rows.x, rows.timestep, rows.tokens, rows.references)

    def example(self, model: Model) -> Conditioning:
        import torch

        like = {"device": model.device, "dtype": model.dtype}
        tokens = torch.ones(1, LONGEST, model.network.config.joint_attention_dim, **like)
        return Conditioning(tokens)

    # --- pictures and latents ----------------------------------------------------------------

    @property
    def references(self) -> int:
        return MAX_REFERENCES

    def reference_sizes(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        return within(size, AREA, _CELL)

    def reference_problem(self, size: tuple[int, int]) -> str:
        # What diffusers' pipeline refuses.
        short, long = sorted(size)
        if short < _SHORT:
            return f"sides must be at least {_SHORT}"
        return f"one side may be at most {_LONG} times the other" if long > _LONG * short else ""

    def latent_shape(self, model: Model, size: tuple[int, int]) -> tuple[int, int, int, int]:
        *_, height, width = super().latent_shape(model, size)
        return 1, model.vae.config.channels, height, width


CUSTOM = Flux2("flux2-klein-custom", defaults=_DISTILLED, distilled=True)
CUSTOM_BASE = Flux2("flux2-klein-base-custom")
"""The variants of folders whose transformer has the shapes of no published one."""

VARIANTS = (
    Flux2("flux2-klein-4b", 5, 20, _DISTILLED, distilled=True, published=KLEIN_4B),
    Flux2("flux2-klein-9b", 8, 24, _DISTILLED, distilled=True, published=KLEIN_9B),
    Flux2("flux2-klein-base-4b", 5, 20, published=KLEIN_4B),
    Flux2("flux2-klein-base-9b", 8, 24, published=KLEIN_9B),
)
FLUX2 = CUSTOM_BASE
