"""The models that ship: their sizes, their noise schedules, their plans of training."""

from __future__ import annotations

from typing import Any

from safelight.nets.clip import CLIPTextConfig
from safelight.nets.unet import UNetConfig
from safelight.nets.unet2d import UNet2DConfig
from safelight.nets.vae import VAEConfig
from safelight.train.loop import Plan

STYLES = ("flat", "3d")
"""The two that share their outlines: a small model learns one set of shapes, not two."""

SIZE = 64
"""Side of the pictures of `embedded`, in pixels."""

TOKENS = 32
"""Length of a prompt in tokens: the longest captions of the recipe take 26."""

VOCABULARY = 1280
"""Byte-pair tokens: 512 for bytes, the rest for what the captions say."""

# Factor 4, not 8: at 64 pixels a factor of 8 leaves 8x8 latents, too few to draw with.
VAE = VAEConfig(
    block_out_channels=(16, 32, 64),
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=8,
    mid_block_add_attention=False,
)
VAE_PLAN = Plan(steps=3500, batch=16, learning_rate=2e-3, weight_decay=0.0)

TEXT = CLIPTextConfig(
    vocab_size=VOCABULARY,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=TOKENS,
)
TEXT_PLAN = Plan(steps=600, batch=128, learning_rate=2e-3, warmup=50)
UNET = UNetConfig(
    sample_size=SIZE // VAE.factor,
    block_out_channels=(64, 96, 144),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    attention_head_dim=4,
    cross_attention_dim=TEXT.hidden_size,
    norm_num_groups=16,
)
UNET_PLAN = Plan(steps=2500, batch=16, learning_rate=1e-3, cooldown=1)
# Then one size and place for each thing: in the hours that there were, a small model drew blobs
# where things vary, and drew things where they do not.
STEADY_PLAN = Plan(steps=2500, batch=16, learning_rate=1e-3, warmup=100, cooldown=1000)
# Shapes come while the rate falls: at a constant 1e-3 the loss stayed where it was.
FINE_PLAN = Plan(steps=10_000, batch=16, learning_rate=6e-4, warmup=100, cooldown=7000)
# Last, all that captions can ask for: sizes, places, colours, numbers, pairs.
MIXED_PLAN = Plan(steps=6500, batch=16, learning_rate=5e-4, warmup=200, cooldown=4000)

# The same once more with one size and place for what is said, for the reason above.
SETTLED_PLAN = Plan(steps=7000, batch=16, learning_rate=6e-4, warmup=200, cooldown=5500)

# Then a copy that draws in four steps without guidance, from as many of the teacher's pictures.
FAST_PROMPTS = 9600
FAST_STEPS = 4
FAST_GUIDANCE = 4.0
FAST_PLAN = Plan(
    steps=2000, batch=32, learning_rate=4e-4, warmup=100, cooldown=1400, weight_decay=0.0, ema=0.99
)

# More noise at the end than Stable Diffusion's 0.012: with 16x16 latents less of it is averaged
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
PIXELS_PLAN = Plan(steps=6000, batch=24, learning_rate=1e-3)
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
