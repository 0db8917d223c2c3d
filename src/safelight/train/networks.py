"""Networks that small models are made of: sizes, noise schedules, plans of training.

SMALL are for 64 pixels a side; LARGE, for 256, are those that `embedded` was made from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from safelight.nets.clip import CLIPTextConfig
from safelight.nets.unet import UNetConfig
from safelight.nets.unet2d import UNet2DConfig
from safelight.nets.vae import VAEConfig
from safelight.train.plan import Plan


@dataclass(frozen=True)
class Networks:
    """The three networks of a text-to-image model."""

    vae: VAEConfig
    text: CLIPTextConfig
    unet: UNetConfig

    def sized(self, size: int) -> Networks:
        """Return them for pictures of `size` pixels a side."""
        return replace(self, unet=replace(self.unet, sample_size=size // self.vae.factor))


_TEXT = CLIPTextConfig(
    vocab_size=1280,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=32,
)

# Factor 4, not 8: at 64 pixels a factor of 8 leaves 8x8 latents, too few to draw with.
SMALL = Networks(
    vae=VAEConfig(
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
    ),
    text=_TEXT,
    unet=UNetConfig(
        sample_size=16,
        block_out_channels=(64, 96, 144),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=_TEXT.hidden_size,
        norm_num_groups=16,
    ),
)

# 16.5 million weights, 31.6 MiB as float16. Factor 8 at 256 leaves 32x32 latents.
LARGE = Networks(
    vae=replace(SMALL.vae, block_out_channels=(32, 48, 96, 128)),
    text=replace(
        _TEXT,
        vocab_size=3072,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        max_position_embeddings=48,
    ),
    unet=replace(
        SMALL.unet,
        sample_size=32,
        block_out_channels=(64, 128, 192),
        cross_attention_dim=192,
    ),
)

VAE_PLAN = Plan(steps=3500, batch=16, learning_rate=2e-3, weight_decay=0.0)
TEXT_PLAN = Plan(steps=600, batch=128, learning_rate=2e-3, warmup=50)

# More noise at the end than Stable Diffusion's 0.012: with few latents less of it is averaged
# away, and a background colour must be decided by the words alone.
SCHEDULER: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.02,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
}

PIXELS = UNet2DConfig(
    sample_size=32,
    block_out_channels=(32, 64, 96),
    down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    attention_head_dim=32,
    norm_num_groups=16,
)
"""Draws pixels from noise alone."""

PIXELS_SCHEDULER: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "variance_type": "fixed_small",
    "clip_sample": True,
}
