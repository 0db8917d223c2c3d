"""T2I-Adapter: lets a picture guide the UNet (arXiv:2302.08453).

It reads a picture once, into a feature map for each level of the UNet, which is added to the last
state of that level. A step costs no more than without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from safelight.nets.config import NetConfig

KINDS = FULL, FULL_XL, LIGHT = ("full_adapter", "full_adapter_xl", "light_adapter")


@dataclass(frozen=True)
class T2IAdapterConfig(NetConfig):
    """The keys of an adapter's config.json.

    channels: of its feature maps; a light one has another map, with the channels of the last.
    """

    in_channels: int = 3
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    num_res_blocks: int = 2
    downscale_factor: int = 8
    adapter_type: str = FULL

    @property
    def depth(self) -> int:
        """About how many layers the network has."""
        return self.num_res_blocks * len(self.widths)

    @property
    def widths(self) -> tuple[int, ...]:
        """The channels of each feature map."""
        return (*self.channels, *(self.channels[-1:] if self.adapter_type == LIGHT else ()))

    @property
    def scales(self) -> tuple[int, ...]:
        """How many pixels of the picture a place of each feature map stands for."""
        downs = [0, 0, 1, 1] if self.adapter_type == FULL_XL else range(len(self.widths))
        return tuple(self.downscale_factor << down for down in downs)

    def _validate(self) -> None:
        if self.adapter_type not in KINDS:
            self._refuse(f"adapter_type {self.adapter_type!r:.40}; expected {' or '.join(KINDS)}")
        if self.in_channels not in (1, 3):
            self._refuse(f"it reads {self.in_channels} channels; pictures have 3, or 1 if gray")
        if self.downscale_factor not in (1, 2, 4, 8, 16, 32):
            self._refuse(f"downscale_factor {self.downscale_factor} is no power of 2 up to 32")
        if self.adapter_type == FULL_XL and (
            len(self.channels) != 4 or self.channels[2] != self.channels[3]
        ):
            self._refuse(f"{FULL_XL} has four feature maps, the last two of equal channels")


class ResidualBlock(nn.Module):
    """Two convolutions with a shortcut. kernel: size of the second one's kernel."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.block1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.block2 = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block2(F.relu(self.block1(x)))


class Level(nn.Module):
    """Residual blocks that make one feature map from the one before.

    down: halve its sides first. light: with narrower channels inside.
    """

    def __init__(self, in_ch: int, out_ch: int, blocks: int, *, down: bool, light: bool) -> None:
        super().__init__()
        inner = out_ch // 4 if light else out_ch
        self.down = down
        self.in_conv = nn.Conv2d(in_ch, inner, 1) if light or in_ch != inner else None
        self.resnets = nn.ModuleList(ResidualBlock(inner, 3 if light else 1) for _ in range(blocks))
        self.out_conv = nn.Conv2d(inner, out_ch, 1) if light else None

    def forward(self, x: Tensor) -> Tensor:
        if self.down:
            x = F.avg_pool2d(x, 2, 2, ceil_mode=True)  # an odd side, as the UNet halves it
        if self.in_conv is not None:
            x = self.in_conv(x)
        for block in self.resnets:
            x = block(x)
        return x if self.out_conv is None else self.out_conv(x)


class T2IAdapter(nn.Module):
    """The network of a T2I-Adapter."""

    def __init__(self, config: T2IAdapterConfig) -> None:
        super().__init__()
        self.config = config
        light = config.adapter_type == LIGHT
        pixels = config.in_channels * config.downscale_factor**2
        self.conv_in = None if light else nn.Conv2d(pixels, config.channels[0], 3, padding=1)
        self.body = nn.ModuleList(
            Level(in_ch, out_ch, config.num_res_blocks, down=down, light=light)
            for in_ch, out_ch, down in self._levels(pixels if light else config.widths[0])
        )

    def _levels(self, read: int) -> Iterator[tuple[int, int, bool]]:
        """Yield channels in and out of each level, and whether it halves the sides."""
        scales = self.config.scales
        for i, out_ch in enumerate(self.config.widths):
            yield read, out_ch, i > 0 and scales[i] > scales[i - 1]
            read = out_ch

    def forward(self, picture: Tensor) -> list[Tensor]:
        """Return the feature maps, each [1, channels, h, w]; the same at each step.

        picture: [1, in_channels, h, w] from 0 to 1. Its edge pixels are repeated to whole places.
        """
        factor = self.config.downscale_factor
        beyond = (0, -picture.shape[3] % factor, 0, -picture.shape[2] % factor)
        x = F.pixel_unshuffle(F.pad(picture, beyond, mode="replicate"), factor)
        if self.conv_in is not None:
            x = self.conv_in(x)
        found: list[Tensor] = []
        for level in self.body:
            x = level(x)
            found.append(x)
        return found
