"""Stable Diffusion 1.x and 2.x: latents, one CLIP text encoder, a UNet with cross-attention.

arXiv:2112.10752. A single file holds weights and no configs. The configs here are those of the
published folders of each variant, in diffusers' keys.
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
    CLIP_CONFIG,
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
    sections_of,
    told_by_marks,
    unet_prefix,
)
from safelight.families.part import NO_PART, Part
from safelight.families.single import SingleFile
from safelight.sampling import SchedulerConfig
from safelight.weights import names
from safelight.weights.check import Header, refusal

if TYPE_CHECKING:
    import torch

    from safelight.nets.config import NetConfig

CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."

_UNET = {
    **UNET_CONFIG,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
_UNET_1 = {**_UNET, "cross_attention_dim": 768, "attention_head_dim": 8}
_UNET_2 = {
    **_UNET,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
# OpenCLIP ViT-H/14 without the last of its 24 layers: SD 2 reads the states before it.
_TEXT_2 = {
    **CLIP_CONFIG,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
_SCHEDULER_1 = {"_class_name": "PNDMScheduler", **BETAS}
_SCHEDULER_2 = {"_class_name": "DDIMScheduler", **BETAS}
_CONSISTENT = MappingProxyType({"sampler": "lcm", "steps": 4, "guidance_scale": 8.5})
"""The defaults of diffusers' LatentConsistencyModelPipeline."""


@dataclass(frozen=True, eq=False)
class StableDiffusion(LatentFamily):
    """One variant, and the shapes by which its single files are recognised.

    width: channels of the UNet's first block. context: channels of the text states. native: side,
    in pixels, of the training pictures. v_native: the same for its v-prediction checkpoints, None
    if it has none. pad: the token that fills up a short prompt. defaults: settings for what a
    request leaves out. distilled: see `Family`.
    """

    name: str
    width: int = 0
    context: int = 0
    in_channels: int = 4
    native: int = 512
    v_native: int | None = None
    pad: str = END
    unet: Mapping[str, Any] = field(default_factory=dict)
    vae: Mapping[str, Any] = field(default_factory=dict)
    text_encoder: Mapping[str, Any] = field(default_factory=dict)
    scheduler_config: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    distilled: bool = False
    latent_rgb: tuple[tuple[float, ...], ...] | None = None

    title: ClassVar[str] = "Stable Diffusion 1.x and 2.x"
    pipelines: ClassVar[tuple[str, ...]] = (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "LatentConsistencyModelPipeline",
        "LatentConsistencyModelImg2ImgPipeline",
        "StableDiffusionControlNetPipeline",
        "StableDiffusionControlNetImg2ImgPipeline",
        "StableDiffusionControlNetInpaintPipeline",
        "StableDiffusionAdapterPipeline",
    )
    parts: ClassVar[Mapping[str, Part]] = {
        "unet": UNET_PART,
        "vae": VAE_PART,
        "text_encoder": TEXT_PART,
    }
    tokenizers: ClassVar[Mapping[str, tuple[str, ...]]] = {"tokenizer": TOKENIZERS}

    # --- files -------------------------------------------------------------------------------

    @property
    def configs(self) -> dict[str, Mapping[str, Any]]:
        """The config of each network of a single file."""
        unet = {**self.unet, "in_channels": self.in_channels, "sample_size": self.native // 8}
        return {"unet": unet, "vae": self.vae, "text_encoder": self.text_encoder}

    def variant(
        self, configs: Mapping[str, Any], index: Mapping[str, Any], scheduler: Mapping[str, Any]
    ) -> Family:
        unet = configs["unet"]
        shapes = unet.block_out_channels[0], unet.cross_attention_dim, unet.in_channels
        found = _variant(*shapes) or self
        # A network that takes the guidance scale as an input is a latent consistency model.
        if unet.time_cond_proj_dim is None:
            return found
        return replace(found, defaults=_CONSISTENT, distilled=True)

    def dtype_of(self, part: str, config: NetConfig, dtype: torch.dtype) -> torch.dtype:
        import torch

        # The autoencoder of a small model, such as `embedded`, takes a few milliseconds. One whose
        # training began with a closed form subtracts large numbers: bfloat16 costs it 20 dB.
        return torch.float32 if part == "vae" and not self.width else dtype

    def pad_token(self, tokenizer: str) -> str:
        return self.pad

    def identify(self, header: Header) -> Family | None:
        before = unet_prefix(header)
        if before is None:
            return None
        first = header.tensors.get(before + "input_blocks.0.0.weight")
        key = header.tensors.get(before + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
        if not (first and key and len(first.shape) == 4 and len(key.shape) == 2):
            return None
        found = _variant(first.shape[0], key.shape[1], first.shape[1])
        if found is None:
            raise refusal(
                header.name,
                f"a UNet with {first.shape[1]} input channels and text states of {key.shape[1]} "
                f"is not supported; {self.title} are",
            )
        return found

    def sections(self) -> dict[str, names.Section]:
        clip = names.open_clip_names(self.text_encoder["num_hidden_layers"])
        texts = {
            CLIP: names.Section("text_encoder"),
            OPEN_CLIP: names.Section("text_encoder", clip, thirds=True),
        }
        # SD 2's text encoder is OpenCLIP's, which pads with "!".
        order = reversed(texts) if self.pad == "!" else texts
        return {
            UNET: names.Section("unet", names.unet_names(self.unet)),
            VAE: names.Section("vae", names.vae_names(self.vae)),
            **{prefix: texts[prefix] for prefix in order},
        }

    def index(self, configs: Mapping[str, Any]) -> dict[str, Any]:
        checker = {"safety_checker": NO_PART, "requires_safety_checker": False}
        return {**super().index(configs), **checker}

    def single_file(self, header: Header) -> SingleFile:
        # OpenCLIP's last layer is not built, as the states before it are read.
        layers = self.text_encoder["num_hidden_layers"]
        unused = f"{OPEN_CLIP}transformer.resblocks.{layers}."
        weights = names.from_single_file(
            header,
            self.parts,
            sections_of(header, self.sections()),
            lambda key: key.startswith(unused) or IGNORED.fullmatch(key) is not None,
        )
        scheduler, prediction = told_by_marks(header, self.scheduler_config)
        return SingleFile(self.configs, weights, scheduler, self.native, self.v_native, prediction)

    # --- drawing -----------------------------------------------------------------------------

    def scheduler(self, config: SchedulerConfig) -> SchedulerConfig:
        # diffusers' pipelines set both for every checkpoint, whatever its file says: timesteps
        # begin at 1, and latents have no range to clip them to.
        return config.override(steps_offset=1, clip_sample=False)


_1: dict[str, Any] = {
    "unet": _UNET_1,
    "vae": VAE_CONFIG,
    "text_encoder": CLIP_CONFIG,
    "scheduler_config": _SCHEDULER_1,
    "latent_rgb": colours.SD,
}
_2: dict[str, Any] = {
    "unet": _UNET_2,
    "vae": VAE_CONFIG,
    "text_encoder": _TEXT_2,
    "scheduler_config": _SCHEDULER_2,
    "latent_rgb": colours.SD,
}
VARIANTS = (
    StableDiffusion("sd1", 320, 768, **_1),
    StableDiffusion("sd1-inpainting", 320, 768, 9, **_1),
    StableDiffusion("sd2", 320, 1024, v_native=768, pad="!", **_2),
    StableDiffusion("sd2-inpainting", 320, 1024, 9, pad="!", **_2),
)
SD = StableDiffusion("custom")
"""The family of folders whose UNet has the shapes of no published variant."""


def _variant(width: int, context: int, in_channels: int) -> StableDiffusion | None:
    """Return the variant whose UNet has these shapes."""
    for variant in VARIANTS:
        if (variant.width, variant.context, variant.in_channels) == (width, context, in_channels):
            return variant
    return None
