"""A picture in one step: a small distilled network and a tiny autoencoder, of random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from safelight.bench import networks
from safelight.bench.networks import Run
from safelight.families.sd import VARIANTS
from safelight.nets.tiny import AutoencoderTiny, TinyConfig
from safelight.nets.unet import UNet2DConditionModel, UNetConfig

UNET: dict[str, Any] = {
    **VARIANTS[2].configs["unet"],
    "sample_size": 64,
    "layers_per_block": 1,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "mid_block_type": None,
    "attention_head_dim": [5, 10, 20],
}
"""The shapes of SDXS (arXiv:2403.16627), which reads the text states of Stable Diffusion 2."""

TINY: dict[str, Any] = {}
"""TAESD's shapes: the config's defaults."""


def pictures(names: list[str], log: Callable[[str], None]) -> dict[str, Run]:
    """Return what makes one network call without guidance and one decode, for each contender."""
    config, tiny = UNetConfig.from_dict(UNET), TinyConfig.from_dict(TINY)
    state = networks.weights(networks.meta(UNet2DConditionModel, config))
    tiny_state = networks.weights(networks.meta(AutoencoderTiny, tiny))
    generator = torch.Generator().manual_seed(1)
    side = networks.SIDE
    x = torch.randn(1, 4, side, side, generator=generator)
    text = torch.randn(1, 77, UNET["cross_attention_dim"], generator=generator)

    def build(name: str) -> Run:
        dtype, t = networks.dtype_of(name), torch.tensor([999.0])
        if name.startswith("safelight"):
            net = networks.ours(networks.meta(UNet2DConditionModel, config), state, dtype)
            decoder = networks.ours(networks.meta(AutoencoderTiny, tiny), tiny_state, dtype)
            mine, told = x.to(dtype), text.to(dtype)
            return lambda: decoder.decode(net(mine, t, told))
        own = torch.float32 if name.startswith("openvino") else dtype
        net = networks.Step(networks.theirs("UNet2DConditionModel", UNET, state, own))
        decoder = networks.Decode(networks.theirs("AutoencoderTiny", TINY, tiny_state, own))
        given = (x.to(own), t, text.to(own))
        if not name.startswith("openvino"):
            return lambda: decoder(net(*given))
        step = networks.by_openvino(net, given, name)
        decode = networks.by_openvino(decoder, (x,), name)
        return lambda: decode(step(*given))

    return networks.build_all(names, build, log)
