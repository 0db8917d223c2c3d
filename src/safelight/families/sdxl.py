"""Stable Diffusion XL (arXiv:2307.01952), its refiner, and the smaller networks made from it.

Two CLIP text encoders are read, both before their last layer and without the final norm; the
second gives a pooled state as well. The network also reads numbers about sizes: the original size,
the place of the crop, and the target size. The configs here are those of the published folders, in
diffusers' keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from safelight.families import colours
from safelight.families.base import Family
from safelight.families.latent import (
    BETAS,
    CLIP_G_CONFIG,
    CLIP_L_CONFIG,
    END,
    IGNORED,
    TEXT_PART,
    TOKENIZERS,
    UNET,
    UNET_CONFIG,
    UNET_PART,
    VAE,
    VAE_CONFIG,
    VAE_PART,
    LatentFamily,
    added_numbers,
    sections_of,
    told_by_marks,
    unet_prefix,
)
from safelight.families.part import Part
from safelight.families.single import SingleFile
from safelight.weights import names
from safelight.weights.check import Header, refusal

if TYPE_CHECKING:
    import torch

    from safelight.model import Model
    from safelight.nets.config import NetConfig
    from safelight.request import Request

EMBEDDERS = "conditioner.embedders."
"""Prefix of the text encoders in a single file, numbered from 0. A refiner's only encoder, number
0, is the second one of SDXL."""

_UNET: dict[str, Any] = {
    **UNET_CONFIG,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "transformer_layers_per_block": [1, 2, 10],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SSD_1B = {
    **_UNET,
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    "mid_block_type": "UNetMidBlock2D",
}
_VEGA = {
    **_UNET,
    "transformer_layers_per_block": [1, [1, 1], [2, 2]],
    "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
    "mid_block_type": "UNetMidBlock2D",
}
_REFINER = {
    **_UNET,
    "block_out_channels": [384, 768, 1536, 1536],
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
    "attention_head_dim": [6, 12, 24, 24],
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 4,
    "projection_class_embeddings_input_dim": 2560,
}
_VAE = {**VAE_CONFIG, "scaling_factor": 0.13025, "force_upcast": True}
_SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    **BETAS,
    "timestep_spacing": "leading",
}
_DEFAULTS = MappingProxyType({"sampler": "euler", "steps": 50, "guidance_scale": 5.0})
"""The defaults of diffusers' pipelines."""

_EDM = "the model is made for EDM's noise levels, which are not supported"
_TEXT_PART_2 = replace(TEXT_PART, network="CLIPTextModelWithProjection")
_READ = (
    *LatentFamily.conditioned_on,
    *("empty_negative", "width", "height", "original_width", "original_height"),
    *("crop_left", "crop_top", "target_width", "target_height"),
)


@dataclass(frozen=True, eq=False)
class StableDiffusionXL(LatentFamily):
    """One variant.

    unet: its config; its shapes tell its single files from those of others. native: side, in
    pixels, of the training pictures. zeros: whether an empty negative prompt is read as states of
    zeros, unless a request says. defaults: settings for what a request leaves out.
    """

    name: str
    unet: Mapping[str, Any] = field(default_factory=dict)
    in_channels: int = 4
    native: int = 1024
    zeros: bool = True
    vae: Mapping[str, Any] = field(default_factory=lambda: _VAE)
    text_encoder: Mapping[str, Any] = field(default_factory=lambda: CLIP_L_CONFIG)
    text_encoder_2: Mapping[str, Any] = field(default_factory=lambda: CLIP_G_CONFIG)
    defaults: Mapping[str, Any] = field(default_factory=lambda: _DEFAULTS)
    latent_rgb: tuple[tuple[float, ...], ...] | None = colours.SDXL

    title: ClassVar[str] = "Stable Diffusion XL"
    pipelines: ClassVar[tuple[str, ...]] = (
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline",
        "StableDiffusionXLControlNetInpaintPipeline",
        "StableDiffusionXLAdapterPipeline",
    )
    parts: ClassVar[Mapping[str, Part]] = {
        "unet": UNET_PART,
        "vae": VAE_PART,
        "text_encoder": TEXT_PART,
        "text_encoder_2": _TEXT_PART_2,
    }
    tokenizers: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "tokenizer": TOKENIZERS,
        "tokenizer_2": TOKENIZERS,
    }
    text_parts: ClassVar[tuple[tuple[str, str], ...]] = (
        ("tokenizer", "text_encoder"),
        ("tokenizer_2", "text_encoder_2"),
    )
    final_norm: ClassVar[bool] = False
    # It was trained on many shapes of 0.9 to 1 times its own area (arXiv:2307.01952, appendix I).
    areas: ClassVar[tuple[float, float] | None] = (0.85, 1.15)
    trainable: ClassVar[bool] = False
    refinable: ClassVar[bool] = True
    conditioned_on: ClassVar[tuple[str, ...]] = _READ

    # --- files -------------------------------------------------------------------------------

    def owns(self, index: Mapping[str, Any]) -> bool:
        return super().owns(index) and index.get("text_encoder") != [None, None]

    @property
    def configs(self) -> dict[str, Mapping[str, Any]]:
        """The config of each network of a single file."""
        unet = {**self.unet, "in_channels": self.in_channels, "sample_size": self.native // 8}
        found = {
            "unet": unet,
            "vae": self.vae,
            "text_encoder": self.text_encoder,
            "text_encoder_2": self.text_encoder_2,
        }
        return {part: found[part] for part in self.parts}

    def variant(
        self, configs: Mapping[str, Any], index: Mapping[str, Any], scheduler: Mapping[str, Any]
    ) -> Family:
        unet = type(configs["unet"])
        named = (v for v in VARIANTS if isinstance(v, type(self)))
        shapes = ("block_out_channels", "down_depths", "up_depths", "mid_block_type")
        found = next(
            (
                v
                for v in named
                if all(
                    getattr(unet.from_dict(v.configs["unet"]), key) == getattr(configs["unet"], key)
                    for key in (*shapes, "in_channels", "cross_attention_dim")
                )
            ),
            self,
        )
        from safelight.sampler_names import sampler_and_schedule

        if str(scheduler.get("_class_name")).startswith("EDM"):
            raise refusal("scheduler", _EDM)
        sampler = sampler_and_schedule(str(scheduler.get("_class_name", "")))
        return replace(
            found,
            zeros=index.get("force_zeros_for_empty_prompt", True) is not False,
            defaults=self.defaults if sampler is None else {**self.defaults, "sampler": sampler[0]},
        )

    def check_configs(self, configs: Mapping[str, Any]) -> None:
        super().check_configs(configs)
        if configs["unet"].addition_embed_type is None:
            raise refusal("unet", "addition_embed_type should be text_time")
        added_numbers(configs["unet"], configs["text_encoder_2"])

    def dtype_of(self, part: str, config: NetConfig, dtype: torch.dtype) -> torch.dtype:
        import torch

        # The autoencoder's activations overflow float16, which would make pictures black.
        if dtype == torch.float16 and getattr(config, "force_upcast", False):
            return torch.float32
        return dtype

    def pad_token(self, tokenizer: str) -> str:
        return "!" if tokenizer == "tokenizer_2" else END

    def identify(self, header: Header) -> Family | None:
        before = unet_prefix(header)
        if before is None or f"{before}label_emb.0.0.weight" not in header.tensors:
            return None
        if "edm_mean" in header.tensors or "edm_vpred.sigma_max" in header.tensors:
            raise refusal(header.name, _EDM)
        found = _marks_of(header, before)
        for variant in VARIANTS:
            if variant.marks == found:
                return variant
        raise refusal(
            header.name,
            f"a UNet of SDXL's kind, {found}, with other shapes than "
            f"{', '.join(v.name for v in VARIANTS)}; give its diffusers folder",
        )

    @property
    def marks(self) -> tuple[Any, ...]:
        """The shapes by which its single files are recognised: see `_marks_of`."""
        unet = self.unet
        depths = unet["transformer_layers_per_block"]
        blocks = unet["down_block_types"]
        levels = [depths] * len(blocks) if isinstance(depths, int) else depths
        down = [
            d
            for level, kind in zip(levels, blocks, strict=True)
            if kind.startswith("CrossAttn")
            for d in (level if isinstance(level, list) else [level] * unet["layers_per_block"])
        ]
        total = unet["projection_class_embeddings_input_dim"]
        return unet["block_out_channels"][0], self.in_channels, total, tuple(down)

    def sections(self) -> dict[str, names.Section]:
        """Return which keys of a single file belong to which network, by their prefixes."""
        clip = names.open_clip_names(self.text_encoder_2["num_hidden_layers"])
        clip["text_projection"] = "text_projection.weight"
        second = names.Section(
            "text_encoder_2", clip, thirds=True, transposed={"text_projection.weight"}
        )
        return {
            UNET: names.Section("unet", names.unet_names(self.unet)),
            VAE: names.Section("vae", names.vae_names(self.vae)),
            f"{EMBEDDERS}0.transformer.": names.Section("text_encoder"),
            f"{EMBEDDERS}1.model.": second,
        }

    def index(self, configs: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().index(configs), "force_zeros_for_empty_prompt": self.zeros}

    def single_file(self, header: Header) -> SingleFile:
        weights = names.from_single_file(
            header,
            self.parts,
            sections_of(header, self.sections()),
            lambda key: IGNORED.fullmatch(key) is not None,
        )
        scheduler, prediction = told_by_marks(header, _SCHEDULER)
        return SingleFile(self.configs, weights, scheduler, self.native, prediction=prediction)

    # --- drawing -----------------------------------------------------------------------------

    def layers_left_out(self, request: Request, *, negative: bool) -> int:
        """Return the number of last layers to leave out: 1 without `clip_skip`.

        diffusers counts `clip_skip` from the layer before the last, and ignores it for the negative
        prompt. ComfyUI counts from the last layer. A1111 and compel have no such setting for SDXL.
        """
        asked = request.clip_skip
        if request.prompt_syntax == "comfy":
            return (asked or 2) - 1
        if request.prompt_syntax == "plain" and not negative:
            return asked or 1
        return 1

    def reads_zeros(self, request: Request) -> bool:
        """Return `empty_negative`; by default A1111 has zeros, ComfyUI a text, others `zeros`."""
        rule = request.empty_negative
        if rule is None:
            rule = {"a1111": "zeros", "comfy": "encoded"}.get(request.prompt_syntax, "model")
        return self.zeros if rule == "model" else rule == "zeros"

    def size_numbers(
        self, model: Model, request: Request, *, negative: bool
    ) -> tuple[float, ...] | None:
        width, height = request.width or 0, request.height or 0
        original = (request.original_height or height, request.original_width or width)
        target = (request.target_height or height, request.target_width or width)
        return (*original, request.crop_top, request.crop_left, *target)

    def warnings(self, model: Model, request: Request) -> list[str]:
        found = super().warnings(model, request)
        if request.clip_skip is not None and request.prompt_syntax in ("a1111", "compel"):
            found.append(
                f"clip_skip does nothing with SDXL in prompt_syntax {request.prompt_syntax}"
            )
        return found


@dataclass(frozen=True, eq=False)
class Refiner(StableDiffusionXL):
    """The model for the last steps; it reads the second text encoder and an aesthetic score."""

    zeros: bool = False

    parts: ClassVar[Mapping[str, Part]] = {
        "unet": UNET_PART,
        "vae": VAE_PART,
        "text_encoder_2": _TEXT_PART_2,
    }
    tokenizers: ClassVar[Mapping[str, tuple[str, ...]]] = {"tokenizer_2": TOKENIZERS}
    text_parts: ClassVar[tuple[tuple[str, str], ...]] = (("tokenizer_2", "text_encoder_2"),)
    conditioned_on: ClassVar[tuple[str, ...]] = (
        *_READ,
        "aesthetic_score",
        "negative_aesthetic_score",
    )

    def owns(self, index: Mapping[str, Any]) -> bool:
        return Family.owns(self, index) and index.get("text_encoder") == [None, None]

    def index(self, configs: Mapping[str, Any]) -> dict[str, Any]:
        told = {"_class_name": self.pipelines[1], "requires_aesthetics_score": True}
        return {**super().index(configs), **told}

    def sections(self) -> dict[str, names.Section]:
        found = super().sections()
        del found[f"{EMBEDDERS}0.transformer."]
        second = found.pop(f"{EMBEDDERS}1.model.")
        return {**found, f"{EMBEDDERS}0.model.": second}

    def size_numbers(
        self, model: Model, request: Request, *, negative: bool
    ) -> tuple[float, ...] | None:
        numbers = super().size_numbers(model, request, negative=negative)
        unet, encoder = model.network.config, model.parts["text_encoder_2"].config
        if numbers is None or added_numbers(unet, encoder) == 6:
            return numbers
        score = request.negative_aesthetic_score if negative else request.aesthetic_score
        return (*numbers[:4], score)


VARIANTS: tuple[StableDiffusionXL, ...] = (
    StableDiffusionXL("sdxl", _UNET),
    StableDiffusionXL("sdxl-inpainting", _UNET, 9),
    StableDiffusionXL("ssd-1b", _SSD_1B),
    StableDiffusionXL("vega", _VEGA),
    Refiner("sdxl-refiner", _REFINER),
)
SDXL = StableDiffusionXL("sdxl-custom")
REFINER = Refiner("sdxl-refiner-custom")
"""The families of folders whose UNet has the shapes of no variant."""


def _marks_of(header: Header, before: str) -> tuple[Any, ...]:
    """Return the shapes of a UNet that tell variants apart.

    Its first width, its input channels, the width of its input of pooled text and sizes, and the
    depths of the transformers in its down blocks. before: what stands before its names.
    """
    shapes = {key: info.shape for key, info in header.tensors.items() if key.startswith(before)}
    first = shapes.get(f"{before}input_blocks.0.0.weight", (0, 0))
    label = shapes[f"{before}label_emb.0.0.weight"]
    depths = []
    for n in range(12):
        prefix = f"{before}input_blocks.{n}.1.transformer_blocks."
        depth = len({k.removeprefix(prefix).split(".")[0] for k in shapes if k.startswith(prefix)})
        depths += [depth] if depth else []
    return (*first[:2], label[-1] if label else 0, tuple(depths))
