"""The layers that transformers over tokens share: norms, rotary positions, and attention's product.

Tokens are [batch, length, width]; queries, keys and values [batch, heads, length, d].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from safelight.nets.layers import attend


class RMSNorm(nn.Module):
    """x divided by its root mean square, times a weight (arXiv:1910.07467).

    The mean is taken in float32. The result has the precision of x.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight.float()).to(x.dtype)


class Product(nn.Module):
    """The product of attention, as a leaf that `safelight.fast` replaces. It has no weights."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return softmax(q·kᵀ/√d)·v with the heads side by side, [batch, length, heads·d]."""
        return attend(q, k, v).transpose(1, 2).flatten(2)


def split_heads(t: Tensor, heads: int) -> Tensor:
    """Return [batch, heads, length, d] of t, [batch, length, heads·d]."""
    return t.unflatten(-1, (heads, -1)).transpose(1, 2)


def rotary_angles(positions: Tensor, axes: Sequence[int], theta: float) -> Tensor:
    """Return the angles of rotary embeddings (arXiv:2104.09864), float32 [length, sum(axes)/2].

    positions: [length, number of axes]. axes: how many numbers of a head each axis turns; a pair
    is turned by position·theta^(−2i/axis). That is computed in float64, on the CPU because Apple's
    GPU has none; the angles are on the device of the positions.
    """
    angles = []
    for column, width in zip(positions.cpu().double().unbind(-1), axes, strict=True):
        exponent = torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width
        angles.append(column[:, None] * theta**-exponent)
    return torch.cat(angles, dim=-1).float().to(positions.device)


def places(sizes: Sequence[tuple[int, int]], apart: int) -> Tensor:
    """Return number, row and column of each token of several pictures, float32 [tokens, 3].

    sizes: height and width of each in tokens. apart: the step between the pictures' numbers, the
    first of which is 0. On the CPU, as `rotary_angles` computes there.
    """
    found = []
    for i, (h, w) in enumerate(sizes):
        one = torch.full((h, w, 3), float(apart * i), device="cpu")
        one[..., 1] = torch.arange(h, device="cpu")[:, None]
        one[..., 2] = torch.arange(w, device="cpu")
        found.append(one.flatten(0, 1))
    return torch.cat(found)


def rotate_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Return x with each pair of adjacent numbers turned by an angle, in the precision of x.

    x: [batch, heads, length, d]. angles: float32 [length, d/2].
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return turned.flatten(-2).to(x.dtype)
