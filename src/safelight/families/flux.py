"""FLUX.1 schnell, dev and Kontext: a transformer that reads T5's states and CLIP's pooled state.

dev was distilled to take the guidance scale as an input, schnell to draw in few steps without one.
Neither reads a negative prompt. Kontext is dev, trained further to edit a picture
(arXiv:2506.15742); its shapes and keys are dev's.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from safelight.errors import SafelightError
from safelight.families import colours
from safelight.families.base import Conditioning
from safelight.families.flow import (
    T5_PART,
    T5_TOKENIZERS,
    FlowFamily,
    Reader,
    Rows,
    t5_states,
)
from safelight.families.flow_files import (
    FLUX_DEV,
    FLUX_LAYOUT,
    FLUX_SCHNELL,
    Layout,
    Published,
)
from safelight.families.latent import END, TEXT_PART, TOKENIZERS, VAE_PART
from safelight.families.part import NO_PART, Part
from safelight.weights.names_joint import flux_section

if TYPE_CHECKING:
    from torch import Tensor

    from safelight.model import Model
    from safelight.request import Request
    from safelight.weights.folder import Folder
    from safelight.weights.names import Section
    from safelight.weights.plan import Plan

_SIDE = 1024
"""Width and height of the training pictures; no config of a folder holds it."""

_CELL = 16
"""Pixels of the side of a token."""

_DEV = MappingProxyType({"sampler": "euler", "steps": 28, "guidance_scale": 3.5})
_SCHNELL = MappingProxyType({"sampler": "euler", "steps": 4, "guidance_scale": 1.0})
"""The defaults of diffusers' FluxPipeline, and of the published folder of schnell."""

_KONTEXT = MappingProxyType({**_DEV, "guidance_scale": 2.5})
"""The scale of Kontext's model card."""

_EDITS = "FluxKontextPipeline"
_EDITED = tuple(
    (16 * width, 16 * height)
    for width, height in (
        *((42, 98), (43, 94), (45, 91), (47, 87), (50, 83), (52, 78), (55, 74), (59, 69)),
        *((64, 64), (69, 59), (74, 55), (78, 52), (83, 50), (87, 47), (91, 45), (94, 43)),
        (98, 42),
    )
)
"""Width and height of the pictures that Kontext was trained to edit, as diffusers has them."""


@dataclass(frozen=True, eq=False)
class Flux(FlowFamily):
    """One variant.

    layers, singles: blocks of two streams and of one. guided: whether it reads a guidance scale.
    longest: the most tokens of T5. kontext: whether it is known to be Kontext.
    """

    name: str
    layers: int = 0
    singles: int = 0
    guided: bool = False
    longest: int = 512
    kontext: bool = False
    defaults: Mapping[str, Any] = field(default_factory=lambda: _DEV)
    distilled: bool = False
    latent_rgb: tuple[tuple[float, ...], ...] | None = None
    published: Published | None = None

    title: ClassVar[str] = "FLUX.1"
    pipelines: ClassVar[tuple[str, ...]] = (
        "FluxPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        _EDITS,
        "FluxKontextInpaintPipeline",
    )
    parts: ClassVar[Mapping[str, Part]] = {
        "transformer": Part("safelight.nets.flux", "FluxTransformer2DModel", "FluxConfig"),
        "vae": VAE_PART,
        "text_encoder": TEXT_PART,
        "text_encoder_2": T5_PART,
    }
    tokenizers: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "tokenizer": TOKENIZERS,
        "tokenizer_2": T5_TOKENIZERS,
    }
    layout: ClassVar[Layout] = FLUX_LAYOUT
    told_by_index: ClassVar[bool] = True
    usual: ClassVar[bool] = True

    # --- files -------------------------------------------------------------------------------

    def variant(
        self, configs: Mapping[str, Any], index: Mapping[str, Any], scheduler: Mapping[str, Any]
    ) -> Flux:
        super().variant(configs, index, scheduler)
        net = configs["transformer"]
        shapes = net.num_layers, net.num_single_layers, net.guidance_embeds
        kontext = net.guidance_embeds and "Kontext" in str(index.get("_class_name"))
        for one in VARIANTS:
            if (one.layers, one.singles, one.guided) == shapes and one.kontext == kontext:
                return one
        if kontext:
            return CUSTOM_KONTEXT
        return CUSTOM if net.guidance_embeds else CUSTOM_SCHNELL

    def named_index(self, name: str) -> Mapping[str, Any]:
        # As in flux1-kontext-dev.safetensors.
        return {"_class_name": _EDITS} if "kontext" in name.casefold() else {}

    def published_variants(self) -> tuple[FlowFamily, ...]:
        return tuple(one for one in VARIANTS if not one.kontext)

    def check_configs(self, configs: Mapping[str, Any]) -> None:
        net, vae = configs["transformer"], configs["vae"]
        for what, gives, reads in (
            ("T5", configs["text_encoder_2"].d_model, net.joint_attention_dim),
            ("CLIP", configs["text_encoder"].hidden_size, net.pooled_projection_dim),
            ("vae", self.patch**2 * vae.latent_channels, net.in_channels),
        ):
            if gives != reads:
                raise SafelightError(
                    f"its {what} gives {gives} numbers, and its transformer reads {reads}"
                )

    def native_size(self, configs: Mapping[str, Any]) -> tuple[int, int]:
        return _SIDE, _SIDE

    def index(self, configs: Mapping[str, Any]) -> dict[str, Any]:
        absent = dict.fromkeys(("image_encoder", "feature_extractor"), NO_PART)
        named = {"_class_name": _EDITS} if self.kontext else {}
        return {**super().index(configs), **absent, **named}

    def original(self, part: str, config: Mapping[str, Any]) -> Section:
        if part == self.network:
            return flux_section(part, config)
        return super().original(part, config)

    def load_tokenizers(
        self, folder: Folder | None, configs: Mapping[str, Any], names: Set[str] | None = None
    ) -> dict[str, Any]:
        from safelight.prompt.text_tokenizer import folder_text_tokenizer
        from safelight.prompt.tokenizer import clip_tokenizer, folder_tokenizer

        clip, t5 = configs["text_encoder"], configs["text_encoder_2"]
        length = clip.max_position_embeddings
        if folder is None:
            return {"tokenizer": clip_tokenizer(END, length)}
        if names is None or "tokenizer" in names:
            first = folder_tokenizer(folder, clip.vocab_size, length, "tokenizer")
        else:
            first = clip_tokenizer(END, length)
        second = folder_text_tokenizer(folder, t5.vocab_size, "tokenizer_2")
        return {"tokenizer": first, "tokenizer_2": second}

    # --- drawing -----------------------------------------------------------------------------

    def takes_guidance(self, model: Model | Plan) -> bool:
        return True

    def warnings(self, model: Model, request: Request) -> list[str]:
        found = super().warnings(model, request)
        if not self.guided and request.guidance_scale != 1:
            found.append(f"guidance_scale does nothing with {model.name}: leave it out")
        if request.reference_images and not self.kontext:
            found.append(
                f"{model.name} is not known to be FLUX.1 Kontext: other models of FLUX.1 were not "
                "trained to read reference_images"
            )
        return found

    def reader(self, tokenizers: Mapping[str, Any]) -> Reader:
        return Reader(tokenizers["tokenizer_2"], self.longest)

    def encode_text(self, model: Model, text: str) -> Conditioning:
        import torch

        clip = model.parts["text_encoder"]
        ids = torch.tensor([model.parts["tokenizer"].encode(text).ids], device=model.device)
        pooled = clip(ids)[torch.arange(1), clip.ends(ids)]
        tokens = t5_states(model, text, "tokenizer_2", "text_encoder_2", self.longest)
        return Conditioning(tokens.to(model.dtype), pooled)

    def velocity(self, model: Model, rows: Rows) -> Tensor:
        scale = rows.guidance if self.guided else None
        return model.network(
            rows.x, rows.timestep, rows.tokens, rows.pooled, scale, rows.references
        )

    def example(self, model: Model) -> Conditioning:
        import torch

        config = model.network.config
        like = {"device": model.device, "dtype": model.dtype}
        tokens = torch.ones(1, self.longest, config.joint_attention_dim, **like)
        return Conditioning(tokens, torch.ones(1, config.pooled_projection_dim, **like))

    # --- pictures ----------------------------------------------------------------------------

    @property
    def references(self) -> int:
        # Files of dev and Kontext look the same; Kontext has a guidance scale, so schnell is none.
        return 1 if self.guided else 0

    @property
    def edits(self) -> bool:
        return self.kontext

    @property
    def only_edits(self) -> bool:
        return self.kontext

    def reference_sizes(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        # diffusers' pipeline looks for the nearest proportions, and does not keep those of the
        # picture.
        width, height = (max(side // _CELL, 1) for side in size)
        _, *near = min((abs(width / height - w / h), w, h) for w, h in _EDITED)
        return (near[0], near[1]), (near[0], near[1])


CUSTOM = Flux("flux-custom", guided=True)
CUSTOM_KONTEXT = Flux("flux-kontext-custom", guided=True, kontext=True, defaults=_KONTEXT)
CUSTOM_SCHNELL = Flux("flux-custom", longest=256, defaults=_SCHNELL, distilled=True)
"""The variants of folders whose transformer has the shapes of no published one."""

_DEV_SHAPE: dict[str, Any] = {
    "layers": 19,
    "singles": 38,
    "guided": True,
    "latent_rgb": colours.FLUX,
    "published": FLUX_DEV,
}
VARIANTS = (
    Flux("flux-dev", **_DEV_SHAPE),
    Flux(
        "flux-schnell",
        *(19, 38),
        longest=256,
        defaults=_SCHNELL,
        distilled=True,
        latent_rgb=colours.FLUX,
        published=FLUX_SCHNELL,
    ),
    Flux("flux-kontext", **_DEV_SHAPE, kontext=True, defaults=_KONTEXT),
)
FLUX = CUSTOM
