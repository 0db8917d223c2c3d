"""Upscalers of the library's own classes, with few features and random weights."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from safelight.upscaling.network import library

library()  # imported without torchvision, which the tests do not have


def esrgan(scale: int = 4) -> nn.Module:
    from spandrel.architectures.ESRGAN import ESRGAN

    return lively(ESRGAN(in_nc=3, out_nc=3, num_filters=4, num_blocks=1, scale=scale))


def compact(scale: int = 2, channels: int = 3) -> nn.Module:
    from spandrel.architectures.Compact import Compact

    own = Compact(num_in_ch=channels, num_out_ch=channels, num_feat=4, num_conv=2, upscale=scale)
    return lively(own)


def span() -> nn.Module:
    from spandrel.architectures.SPAN import SPAN

    return lively(SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=2))


def swinir() -> nn.Module:
    from spandrel.architectures.SwinIR import SwinIR

    return lively(
        SwinIR(
            img_size=16, embed_dim=8, depths=[2], num_heads=[2], window_size=8, mlp_ratio=2,
            upscale=2, upsampler="pixelshuffledirect",
        )
    )  # fmt: skip


def hat() -> nn.Module:
    from spandrel.architectures.HAT import HAT

    return lively(
        HAT(
            img_size=16, embed_dim=8, depths=[2], num_heads=[2], window_size=8, mlp_ratio=2,
            upscale=2, upsampler="pixelshuffle", compress_ratio=2, squeeze_factor=4,
        )
    )  # fmt: skip


def dat() -> nn.Module:
    from spandrel.architectures.DAT import DAT

    return lively(
        DAT(
            img_size=16, split_size=[8, 8], embed_dim=32, depth=[2], num_heads=[2],
            expansion_factor=2, upscale=2, upsampler="pixelshuffledirect",
        )
    )  # fmt: skip


def moesr() -> nn.Module:
    from spandrel.architectures.MoESR import MoESR

    return lively(MoESR(dim=8, n_blocks=1, n_block=1, scale=2, upsample_dim=8))


ALL: dict[str, Callable[[], nn.Module]] = {
    "ESRGAN": esrgan, "RealESRGAN Compact": compact, "SPAN": span, "SwinIR": swinir, "HAT": hat,
    "DAT": dat,
}  # fmt: skip


def lively(network: nn.Module, seed: int = 7) -> nn.Module:
    """Return a network whose pictures are neither black nor white, of random weights."""
    chance = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape, generator=chance) * 0.05
        elif parameter.ndim > 1:
            fan = parameter[0].numel()
            parameter.data = torch.randn(parameter.shape, generator=chance) * (0.7 / fan) ** 0.5
    last = [module for module in network.modules() if isinstance(module, nn.Conv2d)][-1]
    if last.bias is not None:
        last.bias.data.fill_(0.5)
    return network.eval()


def new_names(old: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of an ESRGAN of 4 times by the names that Real-ESRGAN gives them."""
    tops = {"0": "conv_first", "3": "conv_up1", "6": "conv_up2", "8": "conv_hr", "10": "conv_last"}
    found = {}
    for key, tensor in old.items():
        parts = key.split(".")
        if parts[1] != "1":
            name = f"{tops[parts[1]]}.{parts[2]}"
        elif parts[4] in ("weight", "bias"):
            name = f"conv_body.{parts[4]}"
        else:
            name = f"body.{parts[3]}.{parts[4].lower()}.{parts[5]}.{parts[-1]}"
        found[name] = tensor
    return found


def saved(path: Path, network: nn.Module) -> Path:
    torch.save(network.state_dict(), path)
    return path


def picture(width: int = 24, height: int = 16) -> Image.Image:
    values = np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)
