"""What Stable Diffusion 1.x, 2.x and XL have in common: latents, CLIP, a UNet that reads text.

arXiv:2112.10752. Their own files are `sd` and `sdxl`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from typing import TYPE_CHECKING, Any, ClassVar

from safelight.errors import SafelightError
from safelight.families import encoding
from safelight.families.autoencoded import AutoencodedFamily
from safelight.families.base import SHORTCUTS, Conditioning
from safelight.families.part import NO_PART, Part
from safelight.weights import names

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from safelight.model import Model
    from safelight.nets.reuse import Reuse
    from safelight.request import Request
    from safelight.sampling import SchedulerConfig
    from safelight.weights.check import Header
    from safelight.weights.folder import Folder
    from safelight.weights.plan import Plan

UNET, VAE = "model.diffusion_model.", "first_stage_model."
"""The prefixes of both networks in a single file in the layout of the original code."""

END = "<|endoftext|>"

# Keys that a checkpoint may hold besides the weights: the moving average of training, its
# constants, tables of noise levels (ours come from the scheduler's config), and what only CLIP's
# comparison with pictures needs. The last two are marks, see `told_by_marks`.
IGNORED = re.compile(
    r"model_ema\..*|global_step|scale_factor|betas|(sqrt_)?alphas_cumprod(_prev)?|logvar"
    r"|(sqrt|log)_one_minus_alphas_cumprod|sqrt_recip(m1)?_alphas_cumprod"
    r"|sqrt_recipm1_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])"
    r"|cond_stage_model\.(model\.)?text_projection"
    r"|denoiser\.(log_)?sigmas"
    r"|first_stage_model\.loss\..*|first_stage_model\.model_ema\..*"
    r"|(cond_stage_model|conditioner\.embedders\.\d)\.(transformer|model)"
    r"\.(text_model\.)?(embeddings\.)?position_ids"
    r"|(cond_stage_model|conditioner\.embedders\.\d)\.(model\.)?(logit_scale|attn_mask)"
    r"|v_pred|ztsnr"
)

UNET_PART = Part("safelight.nets.unet", "UNet2DConditionModel", "UNetConfig")
TINY_PART = Part("safelight.nets.tiny", "AutoencoderTiny", "TinyConfig")
VAE_PART = Part(
    "safelight.nets.vae",
    "AutoencoderKL",
    "VAEConfig",
    rename=names.vae_folder_name,
    reshape=names.vae_shape,
    others={"AutoencoderTiny": TINY_PART},
)
TEXT_PART = Part(
    "safelight.nets.clip",
    "CLIPTextModel",
    "CLIPTextConfig",
    stem="model",
    rename=names.text_folder_name,
)
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")

UNET_CONFIG: dict[str, Any] = {
    "out_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "act_fn": "silu",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}
VAE_CONFIG: dict[str, Any] = {
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
CLIP_CONFIG: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
CLIP_L_CONFIG = {**CLIP_CONFIG, "projection_dim": 768, "eos_token_id": 2}
# OpenCLIP ViT-bigG/14.
CLIP_G_CONFIG = {
    **CLIP_L_CONFIG,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
BETAS: dict[str, Any] = {
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


class LatentFamily(AutoencodedFamily):
    """The base of the families of Stable Diffusion.

    text_parts: the names of tokenizer and text encoder, for each text encoder that reads a prompt.
    Their states are concatenated; the last encoder may give a pooled state as well.
    """

    shortcuts: ClassVar[tuple[str, ...]] = SHORTCUTS
    text_parts: ClassVar[tuple[tuple[str, str], ...]] = (("tokenizer", "text_encoder"),)
    conditioned_on: ClassVar[tuple[str, ...]] = (
        "prompt",
        "negative_prompt",
        "guidance_scale",
        "prompt_syntax",
        "emphasis",
        "clip_skip",
    )

    def file_marks(self, scheduler: SchedulerConfig) -> tuple[str, ...]:
        v, zero = scheduler.prediction_type == "v_prediction", scheduler.rescale_betas_zero_snr
        return ("v_pred",) * v + ("ztsnr",) * zero

    def index(self, configs: Mapping[str, Any]) -> dict[str, Any]:
        inpaints = configs["unet"].in_channels > configs["unet"].out_channels
        others = {"feature_extractor", "image_encoder", "text_encoder", "tokenizer"}
        absent = sorted(others - self.parts.keys() - self.tokenizers.keys())
        return {
            "_class_name": self.pipelines[2 if inpaints else 0],
            **dict.fromkeys(absent, NO_PART),
        }

    # --- how prompts are read ----------------------------------------------------------------

    final_norm: ClassVar[bool] = True
    """Whether the text encoder's final norm is applied to the states of the layer that is read."""

    def layers_left_out(self, request: Request, *, negative: bool) -> int:
        """Return the number of last layers of the text encoders to leave out."""
        return (request.clip_skip or 1) - 1

    def reads_zeros(self, request: Request) -> bool:
        """Return whether an empty negative prompt is read as states of zeros."""
        return False

    def size_numbers(
        self, model: Model, request: Request, *, negative: bool
    ) -> tuple[float, ...] | None:
        """Return the numbers about sizes that the network reads, None if it reads none."""
        return None

    # --- files -------------------------------------------------------------------------------

    def pad_token(self, tokenizer: str) -> str:
        """Return the token that fills up a short prompt; single files do not hold it."""
        return END

    def check_configs(self, configs: Mapping[str, Any]) -> None:
        unet, vae = configs["unet"], configs["vae"]
        encoders = [encoder for _, encoder in self.text_parts]
        words, channels = sum(configs[e].hidden_size for e in encoders), vae.latent_channels
        if words != unet.cross_attention_dim:
            gives = "encoder gives" if len(encoders) == 1 else "encoders give"
            raise SafelightError(
                f"its text {gives} {words} numbers for a word, "
                f"and its unet reads {unet.cross_attention_dim}"
            )
        if channels != unet.out_channels:
            raise SafelightError(
                f"its vae decodes {channels} channels, and its unet gives {unet.out_channels}"
            )
        # The state alone, or the state, a mask and the masked picture.
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

    def original(self, part: str, config: Mapping[str, Any]) -> names.Section:
        return names.Section(part, names.unet_names(config) if part == "unet" else None)

    def load_tokenizers(
        self, folder: Folder | None, configs: Mapping[str, Any], names: Set[str] | None = None
    ) -> dict[str, Any]:
        from safelight.prompt.tokenizer import clip_tokenizer, folder_tokenizer

        found: dict[str, Any] = {}
        for name, encoder in self.text_parts:
            config = configs[encoder]
            length = config.max_position_embeddings
            if folder is None or (names is not None and name not in names):
                found[name] = clip_tokenizer(self.pad_token(name), length)
            else:
                found[name] = folder_tokenizer(folder, config.vocab_size, length, name)
        return found

    # --- drawing -----------------------------------------------------------------------------

    def check_request(self, model: Model | Plan, request: Request) -> None:
        if request.unconditional:
            raise SafelightError(
                f"{model.name} draws from words: leave out unconditional, or load "
                "embedded-unconditional",
                field="unconditional",
            )
        encoding.check_request(self, model, request)
        skips = model.configs[self.network].skips
        if request.cache_branch is not None and request.cache_branch >= skips:
            raise SafelightError(
                f"cache_branch must be at most {skips - 1}, the layers of {model.name}'s network, "
                f"not {request.cache_branch}",
                field="cache_branch",
            )

    def warnings(self, model: Model, request: Request) -> list[str]:
        return encoding.warnings(self, model, request)

    def takes_guidance(self, model: Model | Plan) -> bool:
        return model.configs[self.network].time_cond_proj_dim is not None

    def encode(self, model: Model, request: Request) -> Conditioning:
        return encoding.encode(self, model, request)

    def conditioning_key(self, request: Request) -> tuple[Any, ...]:
        # A1111's prompt schedules depend on the number of steps taken; other syntaxes do not.
        steps = request.steps_taken if request.prompt_syntax == "a1111" else None
        return (*super().conditioning_key(request), steps)

    def call(
        self,
        model: Model,
        inputs: list[Tensor],
        timesteps: list[float],
        conditionings: list[Conditioning],
        reuse: Reuse | None = None,
    ) -> Tensor:
        import torch

        from safelight.nets.image_prompt import joined
        from safelight.nets.sums import total
        from safelight.nets.unet import guidance_embedding

        net, x, times, scales = model.network, [], [], []
        # The evaluations of a guided picture share a row, unless other pictures have another
        # number of evaluations: the network needs as many texts for each row as for any other.
        shared = len({conditioning.evaluations for conditioning in conditionings}) == 1
        for state, timestep, asked in zip(inputs, timesteps, conditionings, strict=True):
            seen = state if asked.extra is None else torch.cat([state, asked.extra], dim=1)
            rows = 1 if shared else asked.evaluations
            x += [seen] * rows
            times += [timestep] * rows
            scales += [asked.guidance] * rows
        rows_in = torch.cat(x).to(model.dtype)
        embedded = None
        if net.config.time_cond_proj_dim is not None:
            embedded = guidance_embedding(scales, net.config.time_cond_proj_dim)
            embedded = embedded.to(rows_in.device, rows_in.dtype)
        at = torch.tensor(times).to(rows_in.device, torch.float32)
        context = _joined([c.tokens for c in conditionings], rows_in.dtype)
        pooled = _joined([c.pooled for c in conditionings], rows_in.dtype)
        sizes = _joined([c.sizes for c in conditionings], torch.float32)
        most = reuse.skips if reuse is not None and reuse.taken else None
        alone = rows_in[:, : net.config.out_channels]  # without a mask and the picture around
        guiding = conditionings[0].control  # the same for all of them
        added = total(
            one.network(alone, at, context, one.hint, one.scale, pooled, sizes, most)
            for one in guiding
            if one.hint is not None
        )
        maps = total(one.maps for one in guiding if one.maps)
        seen = [c.image for c in conditionings if c.image is not None]
        image = joined(seen) if seen else None
        given = (rows_in, at, context, embedded, pooled, sizes, reuse, added, image, maps)
        return net(*given).float()

    def example(self, model: Model) -> Conditioning:
        import torch

        config, (width, height) = model.network.config, model.native_size
        encoder = model.parts[self.text_parts[-1][1]].config
        like = {"device": model.device, "dtype": model.dtype}
        extra = pooled = sizes = None
        if self.reads_mask(model):
            f = self.factor(model)
            channels = config.in_channels - config.out_channels
            extra = torch.ones(1, channels, height // f, width // f, **like)
        if config.addition_embed_type is not None:
            pooled = torch.ones(1, encoder.projection_dim, **like)
            numbers = added_numbers(config, encoder)
            sizes = torch.full((1, numbers), float(width), device=model.device)
        tokens = torch.ones(1, encoder.max_position_embeddings, config.cross_attention_dim, **like)
        return Conditioning(tokens, pooled, sizes, extra=extra)

    # --- pictures and latents ----------------------------------------------------------------

    def reads_mask(self, model: Model | Plan) -> bool:
        config = model.configs[self.network]
        return config.in_channels > config.out_channels


def unet_prefix(header: Header) -> str | None:
    """Return what stands before the names of a single file's UNet; None if it has none.

    Files of a UNet alone, as ComfyUI has them, have nothing before the names.
    """
    if f"{UNET}input_blocks.0.0.weight" in header.tensors:
        return UNET
    # A ControlNet's file has the first of these, and not the last.
    alone = {"input_blocks.0.0.weight", "out.2.weight"} <= header.tensors.keys()
    return "" if alone else None


def sections_of(header: Header, sections: dict[str, names.Section]) -> dict[str, names.Section]:
    """Return the sections of a single file, whose UNet may have no prefix.

    sections: of its family's files, by their prefixes.
    """
    return {**sections, "": sections[UNET]} if unet_prefix(header) == "" else sections


def told_by_marks(
    header: Header, scheduler: Mapping[str, Any]
) -> tuple[Mapping[str, Any], str | None]:
    """Return a single file's scheduler and what its network predicts, by its marks.

    They are empty tensors, `v_pred` and `ztsnr`. scheduler: the config of files without marks.
    """
    if "ztsnr" in header.tensors:
        # Trained on pure noise too, whose timestep "leading" never visits (arXiv:2305.08891).
        zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        scheduler = {**scheduler, **zero}
    return scheduler, "v_prediction" if "v_pred" in header.tensors else None


def added_numbers(unet: Any, encoder: Any) -> int:
    """Return how many numbers about sizes a UNet reads beside an encoder's pooled state.

    Raises SafelightError unless they are SDXL's six or its refiner's five.
    """
    width, total = unet.addition_time_embed_dim, unet.projection_class_embeddings_input_dim
    numbers, rest = divmod(total - encoder.projection_dim, width)
    if rest or numbers not in (5, 6):
        raise SafelightError(
            f"its unet reads {total} numbers beside the text; {encoder.projection_dim} of the text "
            f"encoder and 5 or 6 times {width} are expected"
        )
    return numbers


def _joined(tensors: list[Tensor | None], dtype: torch.dtype) -> Tensor | None:
    """Return the rows of all tensors, or None if there are none.

    The text of a single picture stays the same tensor from step to step, so that layers can keep
    what they compute from it.
    """
    import torch

    there = [tensor for tensor in tensors if tensor is not None]
    if not there:
        return None
    return (there[0] if len(there) == 1 else torch.cat(there)).to(dtype)
