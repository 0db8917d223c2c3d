"""ControlNetModel: lets a picture guide the UNet (Zhang, Rao and Agrawala, arXiv:2302.05543).

It is a copy of the UNet's down blocks and middle block, which also reads a picture: edges, depth,
a pose. What it returns is added to the UNet's skip connections and to its middle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Self

import torch.nn.functional as F
from torch import Tensor, nn

from safelight.nets.layers import Pointwise, rows
from safelight.nets.unet import UNetEncoder
from safelight.nets.unet_config import UNetConfig


@dataclass(frozen=True)
class ControlNetConfig(UNetConfig):
    """The keys of a ControlNet's config.json that the arithmetic depends on."""

    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    controlnet_conditioning_channel_order: str = "rgb"

    _inert: ClassVar = {**UNetConfig._inert, "global_pool_conditions": (False,)}

    @classmethod
    def from_dict(cls, json: Mapping[str, Any]) -> Self:
        """Return the config of a parsed config.json; see `NetConfig.from_dict`."""
        # It has no up blocks. The checks of a UNet's config want as many of them as down blocks.
        down = json.get("down_block_types")
        if isinstance(down, list):
            json = {**json, "up_block_types": ["UpBlock2D"] * len(down)}
        return super().from_dict(json)

    @property
    def factor(self) -> int:
        """How many pixels of the picture a latent stands for."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)

    @property
    def skip_channels(self) -> list[int]:
        """The channels of each skip connection."""
        widths = self.block_out_channels
        each = [width for width in widths for _ in range(self.layers_per_block + 1)]
        return [widths[0], *each[:-1]]  # the last level is not downsampled

    def _validate(self) -> None:
        super()._validate()
        if self.conditioning_channels != 3:
            self._refuse(f"it reads {self.conditioning_channels} channels; pictures have 3")
        order = self.controlnet_conditioning_channel_order
        if order not in ("rgb", "bgr"):
            self._refuse(f"channel order {order!r:.40} is not supported; expected rgb or bgr")


class ConditioningEmbedding(nn.Module):
    """Convolutions from a picture to a map of the latents' size."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        widths = config.conditioning_embedding_out_channels
        self.conv_in = nn.Conv2d(config.conditioning_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for width, wider in pairwise(widths):
            self.blocks.append(nn.Conv2d(width, width, 3, padding=1))
            self.blocks.append(nn.Conv2d(width, wider, 3, stride=2, padding=1))
        self.conv_out = nn.Conv2d(widths[-1], config.block_out_channels[0], 3, padding=1)

    def forward(self, picture: Tensor) -> Tensor:
        x = F.silu(self.conv_in(picture))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


class ControlNetModel(UNetEncoder):
    """The network of a ControlNet."""

    config: ControlNetConfig

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config)
        self.controlnet_cond_embedding = ConditioningEmbedding(config)
        self.controlnet_down_blocks = nn.ModuleList(
            Pointwise(channels, channels) for channels in config.skip_channels
        )
        last = config.block_out_channels[-1]
        self.controlnet_mid_block = Pointwise(last, last)

    def read(self, picture: Tensor) -> Tensor:
        """Return what the network reads of a picture, [1, channels, h, w]; the same at each step.

        picture: [1, 3, factor·h, factor·w] from 0 to 1.
        """
        if self.config.controlnet_conditioning_channel_order == "bgr":
            picture = picture.flip(1)
        return self.controlnet_cond_embedding(picture)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        hint: Tensor,
        scale: float = 1.0,
        pooled: Tensor | None = None,
        sizes: Tensor | None = None,
        most: int | None = None,
    ) -> list[Tensor]:
        """Return what is added to each skip connection, then to the middle block's state.

        Each is [batch or k·batch, channels, h, w]. hint: what `read` returned. scale: factor of all
        of them. most: how many skip connections, without the middle; None for all, and the middle.
        The others are as in UNet2DConditionModel.
        """
        x, temb = self.begin(x, timestep, pooled=pooled, sizes=sizes)
        skips = self.skips(x + rows(hint, len(x)), temb, context, most=most)
        found = zip(self.controlnet_down_blocks, skips, strict=False)
        added = [scale * block(skip) for block, skip in found]
        if most is None:
            x = skips[-1] if self.mid_block is None else self.mid_block(skips[-1], temb, context)
            added.append(scale * self.controlnet_mid_block(x))
        return added
