"""Latents in closed form: the principal components of a picture's patches.

A picture is halved, cut into patches of 8×8 pixels, and each patch becomes a few numbers: how much
of each principal component it holds. The components take seconds to compute; an encoder that was
trained on 43,000 pictures on a GPU kept less of a picture. They can be written as the weights of an
encoder in AutoencoderKL's layout, so every program that loads such a folder computes the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.nets.vae import AutoencoderKL, VAEConfig
from safelight.train.autoencoder import to_pixels

SIDE = 8
"""Side of a patch, in pixels of the halved picture."""

NUMBERS = 3 * SIDE**2

FACTOR = 2 * SIDE
"""The side of a picture over the side of its latents."""

EVEN = 0.5
"""How far the components' spreads are evened out: 0 leaves them, with 1 all have unit variance. The
first, a patch's mean colour, has twelve times the spread of the eighth. With 0 a denoiser's loss is
that of the picture; with 1 it would be mostly that of details."""

QUIET = -20.0
"""Logarithm of the variance of an encoder's latents: there is almost none."""

STEADY = 64.0
"""Size of the constants that keep a norm from changing what passes through it."""

AT_ONCE = 1 << 25
"""Numbers of patches that are held at a time."""


@dataclass(frozen=True)
class Principal:
    """Maps patches to latents and back: mean [NUMBERS], parts [NUMBERS, channels], which are
    orthogonal, and scale [channels], the factor of each latent.
    """

    mean: Tensor
    parts: Tensor
    scale: Tensor

    @classmethod
    def of(cls, pictures: Iterable[Tensor], channels: int) -> Principal:
        """Return the components of halved pictures, uint8 [n, side, side, 3] each.

        The latents have zero mean and, over all channels, unit variance.
        """
        count, total, products = 0, 0.0, 0.0
        for some in pictures:
            rows = _patches(to_pixels(some)).flatten(0, 2).double()
            count += len(rows)
            total = total + rows.sum(dim=0)
            products = products + rows.T @ rows
        mean = torch.as_tensor(total).cpu() / count
        spread = torch.as_tensor(products).cpu() / count - mean.outer(mean)
        values, vectors = torch.linalg.eigh(spread)
        values, parts = values.flip(0)[:channels], vectors.flip(1)[:, :channels]
        # Of a vector and its opposite, take the one whose largest number is positive.
        largest = parts.gather(0, parts.abs().argmax(dim=0, keepdim=True))
        scale = values.clamp(min=1e-12).pow(-EVEN / 2)
        scale = scale / (values * scale.square()).mean().sqrt()
        return cls(mean.float(), (parts * largest.sign()).float(), scale.float())

    @classmethod
    def load(cls, path: Path) -> Principal:
        """Read what `save` wrote."""
        return cls(**load_file(path))

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        tensors = {"mean": self.mean, "parts": self.parts, "scale": self.scale}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

    def to(self, device: torch.device | str) -> Principal:
        """Return the same on a device."""
        return Principal(self.mean.to(device), self.parts.to(device), self.scale.to(device))

    def encode(self, pixels: Tensor) -> Tensor:
        """Return latents [n, channels, side/8, side/8] of halved pictures [n, 3, side, side]."""
        here = self.to(pixels.device)
        parts = here.parts * here.scale
        made = [
            (_patches(some) - here.mean) @ parts
            for some in pixels.split(max(1, AT_ONCE // pixels[0].numel()))
        ]
        return torch.cat(made).permute(0, 3, 1, 2)

    def picture(self, latents: Tensor) -> Tensor:
        """Return the halved pictures that have these latents and are nearest to the mean."""
        here = self.to(latents.device)
        rows = latents.permute(0, 2, 3, 1) / here.scale @ here.parts.T + here.mean
        return F.pixel_shuffle(rows.permute(0, 3, 1, 2), SIDE)

    @torch.no_grad()
    def into(self, vae: AutoencoderKL) -> None:
        """Write the weights of vae.encoder and vae.quant_conv: they halve pictures and encode them.

        Residual branches are zero. The first strided convolution averages 2×2 pixels, the others
        gather 2×2 into channels. Large constants beside the latents keep the last norm from
        changing them. Its SiLU changes nothing either, since silu(x) − silu(−x) is x.
        """
        channels = len(self.scale)
        check(vae.config, channels)
        encoder: Any = vae.encoder
        for block in [*encoder.down_blocks, encoder.mid_block]:
            for resnet in block.resnets:
                for part in (resnet.conv2.weight, resnet.conv2.bias):
                    part.zero_()
                if resnet.conv_shortcut is not None:
                    pass_through(
                        resnet.conv_shortcut, min(NUMBERS, resnet.conv_shortcut.in_channels)
                    )
        pass_through(encoder.conv_in, 3)
        strided = [block.downsamplers[0].conv for block in encoder.down_blocks[:-1]]
        for conv in strided:
            conv.weight.zero_()
            conv.bias.zero_()
        for c in range(3):
            strided[0].weight[c, c, :2, :2] = 0.25
        for level, conv in enumerate(strided[1:-1]):
            for c in range(3 * 4**level):
                for down in (0, 1):
                    for right in (0, 1):
                        conv.weight[4 * c + 2 * down + right, c, down, right] = 1
        # pixel_unshuffle's channels, [colour, down, right] of 8×8, in the order gathered here.
        order = torch.arange(NUMBERS).view(1, 3, SIDE, SIDE).float()
        while order.shape[-1] > 1:
            order = F.pixel_unshuffle(order, 2)
        numbers = order.flatten().long().view(-1, 2, 2)
        parts = (self.parts * self.scale).T
        for k in range(channels):
            strided[-1].weight[k, : len(numbers), :2, :2] = parts[k][numbers]
        strided[-1].bias[:channels] = -(parts @ self.mean)
        self._steady(vae)

    def _steady(self, vae: AutoencoderKL) -> None:
        """Write the weights that take the latents through the last norm unchanged."""
        encoder: Any = vae.encoder
        quant: Any = vae.quant_conv
        channels = len(self.scale)
        lay = encoder.down_blocks[-1].resnets[0].conv_shortcut
        norm, out = encoder.conv_norm_out, encoder.conv_out
        steady(lay, torch.ones(1, 1), norm, out, channels, vae.config.norm_num_groups)
        nn.init.dirac_(quant.weight)
        quant.bias.zero_()
        quant.bias[channels:] = QUIET


def check(config: VAEConfig, channels: int) -> None:
    """Raise SafelightError unless `Principal.into` can write an encoder of these sizes."""
    widths, groups = config.block_out_channels, config.norm_num_groups
    size = widths[-1] // groups
    fits = (
        config.factor == FACTOR
        and config.layers_per_block == 1
        and all(w >= need for w, need in zip(widths, (3, 12, 48, channels, 1), strict=False))
        and widths[-2] != widths[-1]
        and size % 2 == 0
        and 2 * -(-channels // groups) < size
        and not config.mid_block_add_attention
        and config.use_quant_conv
    )
    if not fits:
        raise SafelightError(
            "principal components need an autoencoder of factor 16 with one layer a block, without "
            f"attention, and widths of at least 3, 12, 48, {channels} and {4 * channels}"
        )


def _patches(pixels: Tensor) -> Tensor:
    """Return [n, side/8, side/8, NUMBERS] of pictures [n, 3, side, side]."""
    return F.pixel_unshuffle(pixels, SIDE).permute(0, 2, 3, 1)


def pass_through(conv: Any, count: int) -> None:
    """Write weights that let the first `count` channels through as they are, and no others."""
    conv.weight.zero_()
    conv.bias.zero_()
    middle = conv.weight.shape[-1] // 2
    for c in range(min(count, *conv.weight.shape[:2])):
        conv.weight[c, c, middle, middle] = 1


def steady(
    lay: Any, kernel: Tensor, norm: Any, out: Any, count: int, groups: int, *, rest: bool = False
) -> None:
    """Write weights that take `count` channels through `lay`, a group norm and SiLU to `out`.

    Only `kernel`, that of the convolution `lay`, changes them. rest: whether groups that are not
    needed keep their weights; `out` does not read them.
    """
    out.weight.zero_()
    out.bias.zero_()
    size = len(norm.weight) // groups
    each = -(-count // groups)
    needed = size * (-(-count // each) if rest else groups)
    for part in (lay.weight, lay.bias, norm.weight, norm.bias):
        part[:needed] = 0
    for group in range(needed // size):
        mine = range(group * each, min(count, (group + 1) * each))
        used, base = 2 * len(mine), group * size
        for i in range(used, size):
            lay.bias[base + i] = STEADY if i % 2 else -STEADY
        # (size − used) is even, so that the constants have a mean of zero, as ±x has.
        spread = STEADY * ((size - used) / size) ** 0.5
        for at, k in enumerate(mine):
            for sign, i in ((1.0, base + 2 * at), (-1.0, base + 2 * at + 1)):
                lay.weight[i, k] = sign * kernel
                norm.weight[i] = spread
                out.weight[k, i, 1, 1] = sign
