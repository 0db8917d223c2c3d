"""The families of single-file checkpoints, as data.

A single file holds weights and no configs. These are the facts of the configs that stand in the
published folders of each family, in diffusers' keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Family:
    """A family, and the shapes that tell it from the others.

    width: channels of the UNet's first block. context: channels of the text states.
    native: the side, in pixels, of the pictures it was trained on. v_native: the same for its
      v-prediction checkpoints, None if it has none. pad: the token that fills a short prompt.
    """

    name: str
    width: int
    context: int
    in_channels: int
    native: int
    v_native: int | None
    pad: str
    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    scheduler: dict[str, Any]

    @property
    def configs(self) -> dict[str, dict[str, Any]]:
        """The config of each network."""
        unet = {**self.unet, "in_channels": self.in_channels, "sample_size": self.native // 8}
        return {"unet": unet, "vae": self.vae, "text_encoder": self.text_encoder}


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

_1 = {"unet": _UNET_1, "vae": _VAE, "text_encoder": _TEXT_1, "scheduler": _SCHEDULER_1}
_2 = {"unet": _UNET_2, "vae": _VAE, "text_encoder": _TEXT_2, "scheduler": _SCHEDULER_2}

FAMILIES = (
    Family("sd1", 320, 768, 4, 512, None, "<|endoftext|>", **_1),
    Family("sd1-inpainting", 320, 768, 9, 512, None, "<|endoftext|>", **_1),
    Family("sd2", 320, 1024, 4, 512, 768, "!", **_2),
    Family("sd2-inpainting", 320, 1024, 9, 512, None, "!", **_2),
)


def family_by_shape(width: int, context: int, in_channels: int) -> Family | None:
    """The family whose UNet has these shapes."""
    for family in FAMILIES:
        if (family.width, family.context, family.in_channels) == (width, context, in_channels):
            return family
    return None
