"""A decoder in closed form: the best that is linear in the latents and their neighbours.

A decoder in AutoencoderKL's layout repeats each place (nearest-neighbour upsampling), then
convolves with kernels of 3×3. It has to learn which of the repeated places it is in, and that takes
long: after minutes on a GPU its pictures were worse than plain sums of the components. But its
linear part can be computed. Each pixel of a cell has a filter over the latents of 3×3 cells. A row
of equal latents must become a row of equal pixels, because the repeated places cannot be told apart
then. Least squares finds the best filters of this kind, and `into` writes them as weights. Training
goes on from there.

How one level becomes a convolution, in one dimension: places 2k and 2k + 1 must have E[k] and O[k].
Their difference has no constant part, so it is t[k + 1] − t[k] for some t. With E and t as
channels, the kernels (0, 1, 0) over E and (0, −1, 1) over t give E at even places and O at odd.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.embedded.principal import FACTOR, SIDE, Principal, pass_through, steady
from safelight.errors import SafelightError
from safelight.nets.vae import AutoencoderKL, VAEConfig

NOISE = 0.15
"""Standard deviation of the errors that latents are expected to have."""

HERE, NEXT = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, -1.0, 1.0])
"""Kernels of one dimension: for what both places get, and for what the second gets in addition."""

SMOOTH = torch.tensor([0.25, 0.5, 0.25])
"""Turns repeated places into linear interpolation."""

# Combinations of the latents of the cell before, the cell itself and the cell after. The first is
# that of the cell itself; the others are zero where all three are equal.
_BASIS = torch.tensor([[0.0, 1.0, 0.0], [1.0, -1.0, 0.0], [0.0, -1.0, 1.0]], dtype=torch.float64)


@dataclass(frozen=True)
class Filters:
    """Pixels as sums over the latents of 3×3 cells.

    weights: [3, SIDE, SIDE, channels, 3, 3]: colour, phase down and right, latent, cell down and
    right; bias: [3]. They read latents minus `white`, [channels], the latents of a white patch, so
    that padding with zeros means white beyond the picture.
    """

    weights: Tensor
    bias: Tensor
    white: Tensor

    @classmethod
    def of(cls, principal: Principal, halves: Iterable[Tensor]) -> Filters:
        """Return the best filters for halved pictures, [n, 3, side, side] each, from −1 to 1."""
        channels = len(principal.scale)
        patch = torch.ones(1, 3, SIDE, SIDE)
        white = principal.encode(patch).flatten()
        count = 9 * channels + 1
        gram = torch.zeros(count, count).double()
        products = torch.zeros(count, 3 * SIDE**2).double()
        for some in halves:
            pixels = some.cpu()
            latents = principal.encode(pixels) - white.view(1, -1, 1, 1)
            # Without the cells at the rim, whose neighbours are not known.
            rows = F.unfold(latents, 3).transpose(1, 2).flatten(0, 1).double()
            rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
            wanted = F.pixel_unshuffle(pixels, SIDE)[:, :, 1:-1, 1:-1]
            wanted = wanted.flatten(2).transpose(1, 2).flatten(0, 1).double()
            gram += rows.T @ rows
            products += rows.T @ wanted
        gram.diagonal()[:-1] += NOISE**2 * gram[-1, -1]
        weights, bias = _solve(gram, products, channels)
        return cls(weights, bias, white)

    def picture(self, latents: Tensor) -> Tensor:
        """Return the halved pictures [n, 3, SIDE·h, SIDE·w] of latents [n, channels, h, w]."""
        latents = latents - self.white.view(1, -1, 1, 1)
        kernels = self.weights.flatten(0, 2)
        drawn = F.conv2d(latents, kernels, padding=1)
        return F.pixel_shuffle(drawn, SIDE) + self.bias.view(1, 3, 1, 1)

    @torch.no_grad()
    def into(self, vae: AutoencoderKL) -> None:
        """Write the weights of vae.decoder and vae.post_quant_conv: they then draw `picture`.

        It is enlarged to twice its sides by linear interpolation. Residual branches are zero at
        first. Channels that are not needed keep their weights, and nothing reads them yet.
        """
        channels = len(self.white)
        check(vae.config, channels)
        decoder: Any = vae.decoder
        post: Any = vae.post_quant_conv
        torch.nn.init.dirac_(post.weight)
        post.bias.copy_(-self.white)
        decoder.conv_in.weight[: 9 * channels] = 0
        decoder.conv_in.bias[: 9 * channels] = 0
        for cell in range(9 * channels):
            latent, down, right = cell // 9, cell % 9 // 3, cell % 3
            decoder.conv_in.weight[cell, latent, down, right] = 1
        for block in [decoder.mid_block, *decoder.up_blocks]:
            for resnet in block.resnets:
                for part in (resnet.conv2.weight, resnet.conv2.bias):
                    part.zero_()
                if (shortcut := resnet.conv_shortcut) is not None:
                    pass_through(shortcut, shortcut.in_channels)
        *inner, last = [block.upsamplers[0].conv for block in decoder.up_blocks[:-1]]
        wanted = [self.weights]
        for _ in inner[1:]:
            wanted.append(_coarser(wanted[-1]))
        # The first reads the latents themselves.
        filters = _coarser(wanted.pop()).flatten(3).squeeze(1).squeeze(1)
        _write(inner[0], torch.einsum("otl,tyx->olyx", filters.unflatten(0, (-1, 4)), _kernels()))
        for conv, finer in zip(inner[1:], reversed(wanted), strict=True):
            kernels = torch.zeros(len(finer), 4 * len(finer), 3, 3)
            for channel in range(len(finer)):
                kernels[channel, 4 * channel : 4 * channel + 4] = _kernels()
            _write(conv, kernels)
        norm, out = decoder.conv_norm_out, decoder.conv_out
        steady(last, SMOOTH.outer(SMOOTH), norm, out, 3, vae.config.norm_num_groups, rest=True)
        out.bias.copy_(self.bias)


def check(config: VAEConfig, channels: int) -> None:
    """Raise SafelightError unless `Filters.into` can write a decoder of these sizes."""
    widths = config.block_out_channels[::-1]
    size = widths[-1] // config.norm_num_groups
    need = (9 * channels, 3 * (SIDE // 2) ** 2, 3 * (SIDE // 4) ** 2, 3, 3)
    fits = (
        config.factor == FACTOR
        and all(width >= least for width, least in zip(widths, need, strict=False))
        and size >= 4
        and size % 2 == 0
        and config.use_post_quant_conv
    )
    if not fits:
        raise SafelightError(
            "a decoder in closed form needs an autoencoder of factor 16, with widths of at least "
            f"{', '.join(map(str, reversed(need)))}, and at least 4 channels a group in the first"
        )


def _solve(gram: Tensor, products: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Return weights and bias of `Filters`.

    gram, products: the sums of products of features with each other, and with pixels. The features
    are the 9 cells of each latent, and 1. Those of _BASIS that are constant down or right have one
    weight for all phases in that direction.
    """
    change = torch.eye(len(gram)).double()
    change[:-1, :-1] = torch.kron(torch.eye(channels).double(), torch.kron(_BASIS, _BASIS))
    gram, products = change @ gram @ change.T, change @ products
    kinds: dict[tuple[int, ...], int] = {}
    places = torch.empty(SIDE, SIDE, len(gram), dtype=torch.long)
    for down in range(SIDE):
        for right in range(SIDE):
            for i in range(len(gram)):
                y, x = (i % 9 // 3, i % 3) if i < len(gram) - 1 else (0, 0)
                kind = i, down if y else -1, right if x else -1
                places[down, right, i] = kinds.setdefault(kind, len(kinds))
    total = torch.zeros(len(kinds), len(kinds)).double()
    against = torch.zeros(len(kinds), 3).double()
    products = products.view(len(gram), 3, SIDE, SIDE)
    for down in range(SIDE):
        for right in range(SIDE):
            at = places[down, right]
            total[at[:, None], at[None, :]] += gram
            against[at] += products[:, :, down, right]
    found = torch.linalg.solve(total, against)[places]  # [SIDE, SIDE, features, 3]
    weights = (found.transpose(-1, -2) @ change).permute(2, 0, 1, 3)
    shape = 3, SIDE, SIDE, channels, 3, 3
    return weights[..., :-1].reshape(shape).float(), weights[:, 0, 0, -1].float()


def _kernels() -> Tensor:
    """Return the kernels for the filters of `_coarser`, in its order, [4, 3, 3]."""
    pairs = (HERE, HERE), (HERE, NEXT), (NEXT, HERE), (NEXT, NEXT)
    return torch.stack([down.outer(right) for down, right in pairs])


def _coarser(finer: Tensor) -> Tensor:
    """Return filters [4·n, p/2, p/2, …], from which a convolution makes the finer ones.

    finer: [n, p, p, channels, 3, 3].
    """
    first = finer[:, ::2, ::2]
    right, down = finer[:, ::2, 1::2] - first, finer[:, 1::2, ::2] - first
    both = finer[:, 1::2, 1::2] - first - right - down
    made = [
        first,
        _summed(right, 2, -1),
        _summed(down, 1, -2),
        _summed(_summed(both, 2, -1), 1, -2),
    ]
    return torch.stack(made, dim=1).flatten(0, 1)


def _summed(steps: Tensor, phases: int, cells: int) -> Tensor:
    """Return the filters whose differences from one place to the next are `steps`.

    phases, cells: the dimensions that count the places of a cell, and the cells.
    """
    before, _, after = steps.sum(dim=phases, keepdim=True).unbind(cells)
    start = torch.stack([-before, after, torch.zeros_like(after)], dim=cells)
    return start + steps.cumsum(dim=phases) - steps


def _write(conv: Any, kernels: Tensor) -> None:
    """Write kernels that make the first outputs of a convolution from its first inputs alone."""
    outputs, inputs = kernels.shape[:2]
    conv.weight[:outputs] = 0
    conv.bias[:outputs] = 0
    conv.weight[:outputs, :inputs] = kernels
