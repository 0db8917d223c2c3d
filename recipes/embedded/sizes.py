"""The sizes of a run of the recipe: networks, data, batches and minutes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from recipes.embedded.grounds import VARIANTS
from safelight.nets.tiny import TinyConfig
from safelight.nets.unet2d import UNet2DConfig
from safelight.train import networks
from safelight.train.plan import Plan

SHARES = {
    "decoder": 0.22,
    "words": 0.09,
    "alone": 0.08,
    "scenes": 0.37,
    "previews": 0.02,
    "unconditional": 0.07,
}
"""Shares of the minutes that a run is given; the rest is for composing, starting, compiling and
`embedded-fast`."""

NETWORKS = replace(
    networks.LARGE,
    vae=replace(networks.LARGE.vae, block_out_channels=(32, 32, 48, 96, 128), latent_channels=8),
    unet=replace(networks.LARGE.unet, sample_size=16, in_channels=8, out_channels=8),
)
"""16.6 million weights, 31.7 MiB as float16. A latent stands for 16×16 pixels."""


TINY = TinyConfig(
    latent_channels=8,
    encoder_block_out_channels=(16,) * 5,
    decoder_block_out_channels=(16,) * 5,
    num_encoder_blocks=(1,) * 5,
    num_decoder_blocks=(2, 1, 1, 1, 1),
    has_encoder=False,
)
"""The decoder for previews: 53,000 weights, a tenth of the other's time."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of networks, data and batches. A plan without steps gets them from the minutes."""

    size: int
    """Side in pixels of the pictures that are drawn. Their latents are those of halved pictures."""
    scenes: int
    """Scenes that are composed and encoded once; of things alone there are half as many."""
    pictures: int
    """Pictures that are composed for the decoder, and for the components."""
    linear: int
    """Pictures that are composed for the decoder in closed form."""
    redrawn: int
    """How many of the decoder's pictures the UNet draws again."""
    captions: int
    """Captions that the text encoder learns from."""
    networks: networks.Networks
    decoder_plan: Plan
    previews_plan: Plan
    text_plan: Plan
    unet_plan: Plan
    pixels: UNet2DConfig
    pixels_plan: Plan
    every: int = 2500
    """Steps between two checkpoints."""
    variants: int = VARIANTS
    """Pictures of each drawn ground."""

    def with_scenes(self, scenes: int) -> Sizes:
        """Return sizes with another number of scenes, and the decoder's pictures in proportion."""
        pictures, redrawn = (
            round(count * scenes / self.scenes) for count in (self.pictures, self.redrawn)
        )
        return replace(self, scenes=scenes, pictures=pictures, redrawn=redrawn)


FULL = Sizes(
    size=256,
    scenes=122_880,
    pictures=20_480,
    linear=2048,
    redrawn=6144,
    captions=131_072,
    networks=NETWORKS,
    decoder_plan=Plan(steps=0, batch=32, learning_rate=1e-3, warmup=100, weight_decay=0.0),
    previews_plan=Plan(steps=0, batch=16, learning_rate=3e-3, warmup=100, weight_decay=0.0),
    text_plan=Plan(steps=0, batch=256, learning_rate=1.5e-3, warmup=50, weight_decay=0.0),
    unet_plan=Plan(steps=0, batch=128, learning_rate=8e-4, warmup=300),
    pixels=replace(
        networks.PIXELS,
        sample_size=64,
        block_out_channels=(16, 32, 64, 96),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    ),
    pixels_plan=Plan(steps=0, batch=32, learning_rate=1e-3, warmup=200),
)

# The same in small: it shows within seconds, on any machine, that all stages work.
DRY = Sizes(
    size=64,
    scenes=64,
    pictures=8,
    linear=8,
    redrawn=4,
    captions=64,
    networks=networks.Networks(
        vae=replace(NETWORKS.vae, block_out_channels=(16, 16, 48, 48, 80), norm_num_groups=4),
        text=replace(NETWORKS.text, hidden_size=32, intermediate_size=64, num_hidden_layers=1),
        unet=replace(
            NETWORKS.unet,
            sample_size=4,
            block_out_channels=(16, 16, 32),
            cross_attention_dim=32,
        ),
    ),
    decoder_plan=replace(FULL.decoder_plan, steps=8, batch=2, warmup=2),
    previews_plan=replace(FULL.previews_plan, steps=8, batch=2, warmup=2),
    text_plan=replace(FULL.text_plan, steps=8, batch=16, warmup=2),
    unet_plan=replace(FULL.unet_plan, steps=8, batch=8, warmup=2),
    pixels=replace(networks.PIXELS, sample_size=16, block_out_channels=(32, 32, 32)),
    pixels_plan=replace(FULL.pixels_plan, steps=8, batch=4, warmup=2),
    every=4,
    variants=2,
)
