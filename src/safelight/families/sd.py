"""Stable Diffusion 1.x and 2.x: latents, one CLIP text encoder, a UNet with cross-attention.

arXiv:2112.10752. A single file holds weights and no configs. The facts here are those of the
published folders of each variant, in diffusers' keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from safelight.errors import SafelightError
from safelight.families import colours, encoding
from safelight.families.base import Conditioning, Family, Part, SingleFile
from safelight.sampling import SchedulerConfig
from safelight.weights import names
from safelight.weights.check import Header, refusal

if TYPE_CHECKING:
    from torch import Tensor

    from safelight.model import Model
    from safelight.request import Request
    from safelight.weights.folder import Folder

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."

# What a checkpoint may hold besides the weights: the training's moving average, its constants,
# the noise levels as tables (ours come from the scheduler's config), and what only CLIP's
# comparison with pictures needs.
_IGNORED = re.compile(
    r"model_ema\..*|global_step|scale_factor|betas|(sqrt_)?alphas_cumprod(_prev)?|logvar"
    r"|(sqrt|log)_one_minus_alphas_cumprod|sqrt_recip(m1)?_alphas_cumprod"
    r"|sqrt_recipm1_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])"
    r"|first_stage_model\.loss\..*|first_stage_model\.model_ema\..*"
    r"|cond_stage_model\.(transformer|model)\.(text_model\.)?(embeddings\.)?position_ids"
    r"|cond_stage_model\.(model\.)?(logit_scale|text_projection|attn_mask)"
)

_UNET = {
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "act_fn": "silu",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}
_UNET_1 = {**_UNET, "cross_attention_dim": 768, "attention_head_dim": 8}
_UNET_2 = {
    **_UNET,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "act_fn": "silu",
    "scaling_factor": 0.18215,
}
# CLIP ViT-L/14 (arXiv:2103.00020).
_TEXT_1 = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
# OpenCLIP ViT-H/14 without the last of its 24 layers: SD 2 reads the states before it.
_TEXT_2 = {
    **_TEXT_1,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
_SCHEDULER_1 = {
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}
_SCHEDULER_2 = {**_SCHEDULER_1, "_class_name": "DDIMScheduler"}

_END = "<|endoftext|>"


@dataclass(frozen=True, eq=False)
class StableDiffusion(Family):
    """One variant, and the shapes that tell its single files from the others'.

    width: channels of the UNet's first block. context: channels of the text states. native: the
    side, in pixels, of the pictures it was trained on. v_native: the same for its v-prediction
    checkpoints, None if it has none. pad: the token that fills a short prompt.
    """

    name: str
    width: int = 0
    context: int = 0
    in_channels: int = 4
    native: int = 512
    v_native: int | None = None
    pad: str = _END
    unet: Mapping[str, Any] = field(default_factory=dict)
    vae: Mapping[str, Any] = field(default_factory=dict)
    text_encoder: Mapping[str, Any] = field(default_factory=dict)
    scheduler_config: Mapping[str, Any] = field(default_factory=dict)
    latent_rgb: tuple[tuple[float, ...], ...] | None = None

    title: ClassVar[str] = "Stable Diffusion 1.x and 2.x"
    pipelines: ClassVar[tuple[str, ...]] = (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
    )
    parts: ClassVar[Mapping[str, Part]] = {
        "unet": Part("safelight.nets.unet", "UNet2DConditionModel", "UNetConfig"),
        "vae": Part(
            "safelight.nets.vae",
            "AutoencoderKL",
            "VAEConfig",
            rename=names.vae_folder_name,
            reshape=names.vae_shape,
        ),
        "text_encoder": Part(
            "safelight.nets.clip",
            "CLIPTextModel",
            "CLIPTextConfig",
            stem="model",
            rename=names.text_folder_name,
        ),
    }
    tokenizers: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast")
    }
    conditioned_on: ClassVar[tuple[str, ...]] = (
        "prompt",
        "negative_prompt",
        "guidance_scale",
        "prompt_syntax",
        "emphasis",
        "clip_skip",
    )

    # --- files -------------------------------------------------------------------------------

    @property
    def configs(self) -> dict[str, Mapping[str, Any]]:
        """The config of each network of a single file."""
        unet = {**self.unet, "in_channels": self.in_channels, "sample_size": self.native // 8}
        return {"unet": unet, "vae": self.vae, "text_encoder": self.text_encoder}

    def variant(self, configs: Mapping[str, Any]) -> Family:
        unet = configs["unet"]
        shapes = unet.block_out_channels[0], unet.cross_attention_dim, unet.in_channels
        return _variant(*shapes) or self

    def check_configs(self, configs: Mapping[str, Any]) -> None:
        unet, vae = configs["unet"], configs["vae"]
        words, channels = configs["text_encoder"].hidden_size, vae.latent_channels
        if words != unet.cross_attention_dim:
            raise SafelightError(
                f"its text encoder gives {words} numbers for a word, "
                f"and its unet reads {unet.cross_attention_dim}"
            )
        if channels != unet.out_channels:
            raise SafelightError(
                f"its vae decodes {channels} channels, and its unet gives {unet.out_channels}"
            )
        # The state alone; or beside it a mask and the picture around it.
        if unet.in_channels not in (channels, 2 * channels + 1):
            raise SafelightError(
                f"its unet reads {unet.in_channels} channels; expected {channels}, "
                f"or {2 * channels + 1} with a mask"
            )
        if (vae.in_channels, vae.out_channels) != (3, 3):
            raise SafelightError("its vae is not one of pictures, which have 3 channels")

    def native_size(self, configs: Mapping[str, Any]) -> tuple[int, int]:
        side = (configs["unet"].sample_size or 64) * configs["vae"].factor
        return side, side

    def load_tokenizers(self, folder: Folder | None, configs: Mapping[str, Any]) -> dict[str, Any]:
        from safelight.prompt.tokenizer import clip_tokenizer, folder_tokenizer

        config = configs["text_encoder"]
        length = config.max_position_embeddings
        if folder is None:
            return {"tokenizer": clip_tokenizer(self.pad, length)}
        return {"tokenizer": folder_tokenizer(folder, config.vocab_size, length)}

    def identify(self, header: Header) -> Family | None:
        first = header.tensors.get(UNET + "input_blocks.0.0.weight")
        key = header.tensors.get(UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
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

    def single_file(self, header: Header) -> SingleFile:
        layers = self.text_encoder["num_hidden_layers"]
        clip = names.open_clip_names(layers)
        sections = {
            UNET: names.Section("unet", names.unet_names(self.unet)),
            VAE: names.Section("vae", names.vae_names(self.vae)),
            CLIP: names.Section("text_encoder"),
            OPEN_CLIP: names.Section("text_encoder", clip, thirds=True),
        }
        # The states before OpenCLIP's last layer are read, which is therefore not built.
        unused = f"{OPEN_CLIP}transformer.resblocks.{layers}."
        weights = names.from_single_file(
            header,
            self.parts,
            sections,
            lambda key: key.startswith(unused) or _IGNORED.fullmatch(key) is not None,
        )
        return SingleFile(self.configs, weights, self.scheduler_config, self.native, self.v_native)

    # --- drawing -----------------------------------------------------------------------------

    def check_request(self, model: Model, request: Request) -> None:
        if request.unconditional:
            raise SafelightError(
                f"{model.name} draws from words: leave out unconditional, or load "
                "embedded-unconditional",
                field="unconditional",
            )
        encoding.check_request(model, request)

    def warnings(self, model: Model, request: Request) -> list[str]:
        return encoding.warnings(model, request)

    def encode(self, model: Model, request: Request) -> Conditioning:
        return encoding.encode(model, request)

    def conditioning_key(self, request: Request) -> tuple[Any, ...]:
        # Schedules are shares of the steps that are taken; no other prompt depends on them.
        steps = request.steps_taken if request.prompt_syntax == "a1111" else None
        return (*super().conditioning_key(request), steps)

    def scheduler(self, config: SchedulerConfig) -> SchedulerConfig:
        # diffusers' pipelines hold every checkpoint to this, whatever its file says: timesteps
        # begin at 1, and latents have no range to be clipped to.
        return config.override(steps_offset=1, clip_sample=False)

    def call(
        self,
        model: Model,
        inputs: list[Tensor],
        timesteps: list[float],
        conditionings: list[Conditioning],
    ) -> Tensor:
        import torch

        from safelight.nets.unet import guidance_embedding

        net, x, times, scales = model.network, [], [], []
        # Both evaluations of a guided picture read one row, unless pictures without guidance are
        # among them: the network wants as many texts for each row as for any other.
        shared = len({conditioning.evaluations for conditioning in conditionings}) == 1
        for state, timestep, asked in zip(inputs, timesteps, conditionings, strict=True):
            seen = state if asked.extra is None else torch.cat([state, asked.extra], dim=1)
            rows = 1 if shared else asked.evaluations
            x += [seen] * rows
            times += [timestep] * rows
            scales += [asked.guidance] * rows
        tokens = [c.tokens for c in conditionings if c.tokens is not None]
        # The text of one picture stays the same tensor from step to step, so that what is
        # computed from it alone can be kept.
        context = tokens[0] if len(tokens) == 1 else torch.cat(tokens)
        rows_in = torch.cat(x).to(model.dtype)
        embedded = None
        if net.config.time_cond_proj_dim is not None:
            embedded = guidance_embedding(scales, net.config.time_cond_proj_dim)
            embedded = embedded.to(rows_in.device, rows_in.dtype)
        at = torch.tensor(times).to(rows_in.device, torch.float32)
        return net(rows_in, at, context.to(rows_in.dtype), embedded).float()

    def example(self, model: Model) -> Conditioning:
        import torch

        config, (width, height) = model.network.config, model.native_size
        length = 77 if model.tokenizer is None else model.tokenizer.max_length
        like = {"device": model.device, "dtype": model.dtype}
        extra = None
        if self.reads_mask(model):
            f = self.factor(model)
            channels = config.in_channels - config.out_channels
            extra = torch.ones(1, channels, height // f, width // f, **like)
        return Conditioning(torch.ones(1, length, config.cross_attention_dim, **like), extra=extra)

    # --- pictures and latents ----------------------------------------------------------------

    def factor(self, model: Model) -> int:
        return model.vae.config.factor

    def reads_mask(self, model: Model) -> bool:
        return model.network.config.in_channels > model.network.config.out_channels

    def encode_picture(self, model: Model, pixels: Tensor, noise: Tensor) -> Tensor:
        mean, std = model.vae.encode(pixels.to(model.dtype))
        return model.vae.config.scale(mean.float() + std.float() * noise)

    def decode_latents(self, model: Model, latents: Tensor) -> Tensor:
        return model.vae.decode(model.vae.config.unscale(latents).to(model.dtype)).float()


_1: dict[str, Any] = {
    "unet": _UNET_1,
    "vae": _VAE,
    "text_encoder": _TEXT_1,
    "scheduler_config": _SCHEDULER_1,
    "latent_rgb": colours.SD,
}
_2: dict[str, Any] = {
    "unet": _UNET_2,
    "vae": _VAE,
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
"""The family of folders whose UNet has other shapes than the published variants."""


def _variant(width: int, context: int, in_channels: int) -> StableDiffusion | None:
    """Return the variant whose UNet has these shapes."""
    for variant in VARIANTS:
        if (variant.width, variant.context, variant.in_channels) == (width, context, in_channels):
            return variant
    return None
