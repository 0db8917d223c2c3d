"""ZImageTransformer2DModel: one transformer over the tokens of a picture and of its text.

Z-Image and Z-Image-Turbo (arXiv:2511.22699) have it. Picture and text are refined by layers of
their own, then laid end to end and read by the same layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.nets.config import NetConfig
from safelight.nets.joint import bounded
from safelight.nets.layers import timestep_embedding
from safelight.nets.tokens import Product, RMSNorm, rotary_angles, rotate_pairs, split_heads

MULTIPLE = 32
"""The tokens of a picture, and those of a text, are filled up to a multiple of this number."""

TIME_WIDTH = 256
"""The most numbers of a timestep's embedding, and the number of its sines and cosines."""

TIME_HIDDEN = 1024
"""The numbers between the two linear layers that a timestep's sines go through."""

HEAD_EPS = 1e-5
"""Added to the mean square of queries and keys. It does not depend on the config's norm_eps."""

FINAL_EPS = 1e-6
"""The same for the variance in the last norm."""

MAX_KEPT = 4
"""The sizes of picture and text whose angles are kept. A step of one picture has two texts."""


@dataclass(frozen=True)
class ZImageConfig(NetConfig):
    """The keys of transformer/config.json that we build from, with diffusers' defaults.

    axes_lens, the largest positions for which diffusers has a table, is ignored: we compute angles.
    """

    all_patch_size: tuple[int, ...] = (2,)
    in_channels: int = 16
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    n_kv_heads: int = 30
    norm_eps: float = 1e-5
    cap_feat_dim: int = 2560
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, ...] = (32, 48, 48)

    # Videos and pictures as conditions need the other values of these keys.
    _inert: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "all_f_patch_size": ([1],),
        "qk_norm": (True,),
        "siglip_feat_dim": (None,),
    }

    @property
    def depth(self) -> int:
        """How many layers the network has."""
        return self.n_layers + 2 * self.n_refiner_layers

    @property
    def patch(self) -> int:
        """The side of the square of latents that is one token."""
        return self.all_patch_size[0]

    @property
    def patch_name(self) -> str:
        """The name of the layers for patches of this size and of one frame."""
        return f"{self.patch}-1"

    def _validate(self) -> None:
        if len(self.all_patch_size) != 1:
            self._refuse(f"all_patch_size has {len(self.all_patch_size)} values; expected 1")
        if self.n_kv_heads != self.n_heads:
            self._refuse(f"n_kv_heads={self.n_kv_heads} differs from n_heads={self.n_heads}")
        if self.dim % self.n_heads:
            self._refuse(f"{self.dim} channels do not divide into {self.n_heads} heads")
        if len(self.axes_dims) != 3 or any(width % 2 for width in self.axes_dims):
            self._refuse("axes_dims should be three even numbers")
        if sum(self.axes_dims) != self.dim // self.n_heads:
            self._refuse(f"axes_dims should add up to {self.dim // self.n_heads}")


class TimestepEmbedder(nn.Module):
    """From timesteps, [batch], to embeddings, [batch, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # Index 1 is SiLU, which has no weights.
        self.mlp = nn.ModuleList(
            [nn.Linear(TIME_WIDTH, TIME_HIDDEN), nn.SiLU(), nn.Linear(TIME_HIDDEN, width)]
        )

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        sines = timestep_embedding(timestep, TIME_WIDTH, flip=True, freq_shift=0)
        return self.mlp[2](self.mlp[1](self.mlp[0](sines.to(dtype))))


class Attention(nn.Module):
    """Multi-head self-attention of x, [batch, length, dim], with normed queries and keys."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.norm_q = RMSNorm(dim // heads, HEAD_EPS)
        self.norm_k = RMSNorm(dim // heads, HEAD_EPS)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias=False)])
        self.product = Product()

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """Return [batch, length, dim]. angles: those of the positions, [length, d/2]."""
        q, k, v = (split_heads(make(x), self.heads) for make in (self.to_q, self.to_k, self.to_v))
        q = rotate_pairs(self.norm_q(q), angles)
        k = rotate_pairs(self.norm_k(k), angles)
        return self.to_out[0](self.product(q, k, v))


class FeedForward(nn.Module):
    """A linear layer gated by the SiLU of another (arXiv:2002.05202), and one back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        inner = dim * 8 // 3
        self.w1 = nn.Linear(dim, inner, bias=False)
        self.w2 = nn.Linear(inner, dim, bias=False)
        self.w3 = nn.Linear(dim, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(bounded(F.silu(bounded(self.w1(x))) * bounded(self.w3(x))))


class Block(nn.Module):
    """Attention and feed-forward, each between two norms and with a shortcut.

    Both overflow float16, which the network was not trained in. The norm after them takes the
    largest number there is, and no infinity.
    """

    def __init__(self, cfg: ZImageConfig) -> None:
        super().__init__()
        self.attention = Attention(cfg.dim, cfg.n_heads)
        self.feed_forward = FeedForward(cfg.dim)
        self.attention_norm1 = RMSNorm(cfg.dim, cfg.norm_eps)
        self.ffn_norm1 = RMSNorm(cfg.dim, cfg.norm_eps)
        self.attention_norm2 = RMSNorm(cfg.dim, cfg.norm_eps)
        self.ffn_norm2 = RMSNorm(cfg.dim, cfg.norm_eps)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        told = bounded(self.attention(self.attention_norm1(x), angles))
        x = x + self.attention_norm2(told)
        return x + self.ffn_norm2(bounded(self.feed_forward(self.ffn_norm1(x))))


class ModulatedBlock(Block):
    """A block that the timestep scales: what its two parts read, and what they add."""

    def __init__(self, cfg: ZImageConfig) -> None:
        super().__init__(cfg)
        self.adaLN_modulation = nn.ModuleList(
            [nn.Linear(min(cfg.dim, TIME_WIDTH), 4 * cfg.dim)],
        )

    def forward(self, x: Tensor, angles: Tensor, time: Tensor) -> Tensor:  # type: ignore[override]
        """Return [batch, length, dim]. time: the embedding of each row's timestep."""
        numbers = self.adaLN_modulation[0](time)[:, None].chunk(4, dim=-1)
        attention_scale, attention_gate, ff_scale, ff_gate = numbers
        told = self.attention(self.attention_norm1(x) * (1 + attention_scale), angles)
        x = x + attention_gate.tanh() * self.attention_norm2(bounded(told))
        told = self.feed_forward(self.ffn_norm1(x) * (1 + ff_scale))
        return x + ff_gate.tanh() * self.ffn_norm2(bounded(told))


class FinalLayer(nn.Module):
    """From tokens to the numbers of their patches, scaled by the timestep."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out)
        # Index 0 is SiLU, which has no weights.
        self.adaLN_modulation = nn.ModuleList([nn.SiLU(), nn.Linear(min(dim, TIME_WIDTH), dim)])

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale = 1 + self.adaLN_modulation[1](self.adaLN_modulation[0](time))
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=FINAL_EPS) * scale[:, None])


class ZImageTransformer2DModel(nn.Module):
    """Z-Image's denoiser."""

    def __init__(self, config: ZImageConfig) -> None:
        super().__init__()
        self.config = config
        name, numbers = config.patch_name, config.patch**2 * config.in_channels
        self.all_x_embedder = nn.ModuleDict({name: nn.Linear(numbers, config.dim)})
        self.all_final_layer = nn.ModuleDict({name: FinalLayer(config.dim, numbers)})
        self.noise_refiner = nn.ModuleList(
            ModulatedBlock(config) for _ in range(config.n_refiner_layers)
        )
        self.context_refiner = nn.ModuleList(Block(config) for _ in range(config.n_refiner_layers))
        self.t_embedder = TimestepEmbedder(min(config.dim, TIME_WIDTH))
        self.cap_embedder = nn.ModuleList(
            [
                RMSNorm(config.cap_feat_dim, config.norm_eps),
                nn.Linear(config.cap_feat_dim, config.dim),
            ]
        )
        self.x_pad_token = nn.Parameter(torch.zeros(1, config.dim))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, config.dim))
        self.layers = nn.ModuleList(ModulatedBlock(config) for _ in range(config.n_layers))
        self._kept: dict[tuple[Any, ...], Tensor] = {}

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """Return the network's raw output, [batch, in_channels, h, w].

        That is the latents minus the noise, the negative of what flow matching calls the velocity.

        x: latents, [batch, in_channels, h, w]; h and w are multiples of the patch. timestep:
        [batch], from 0 for noise to 1 for a picture. context: the states of a text encoder,
        [batch, n, cap_feat_dim], without padding.
        """
        cfg, size = self.config, (x.shape[2] // self.config.patch, x.shape[3] // self.config.patch)
        tokens = self.all_x_embedder[cfg.patch_name](_patches(x, cfg.patch))
        tokens = _filled(tokens, self.x_pad_token)
        text = _filled(self.cap_embedder[1](self.cap_embedder[0](context)), self.cap_pad_token)
        length = tokens.shape[1]
        angles = self._angles(size, length, text.shape[1], x.device)
        time = self.t_embedder(timestep * cfg.t_scale, x.dtype)
        for block in self.noise_refiner:
            tokens = block(tokens, angles[:length], time)
        for block in self.context_refiner:
            text = block(text, angles[length:])
        tokens = torch.cat([tokens, text], dim=1)
        for block in self.layers:
            tokens = block(tokens, angles, time)
        tokens = tokens[:, : size[0] * size[1]]
        return _picture(self.all_final_layer[cfg.patch_name](tokens, time), size, cfg.patch)

    def _angles(
        self, size: tuple[int, int], length: int, texts: int, device: torch.device
    ) -> Tensor:
        """Return the rotary angles of a picture's tokens and of its text's, [tokens, d/2].

        size: the picture's rows and columns of tokens. length: its tokens, filled up. texts: the
        text's tokens, filled up.

        A text's tokens are at 1, 2, ... on the first axis, also those that fill it up. The picture
        is behind them on that axis, and its rows and columns are the other axes. The tokens that
        fill up the picture are at the origin. Those of the last calls are kept, because all steps
        of a picture have the same.
        """
        key = (size, texts, device)
        if key not in self._kept:
            positions = torch.zeros(length + texts, 3, device="cpu")
            places = positions[: size[0] * size[1]].view(*size, 3)
            places[..., 0] = texts + 1
            places[..., 1] = torch.arange(size[0], device="cpu")[:, None]
            places[..., 2] = torch.arange(size[1], device="cpu")
            positions[length:, 0] = torch.arange(1, texts + 1, device="cpu")
            angles = rotary_angles(positions, self.config.axes_dims, self.config.rope_theta)
            while len(self._kept) >= MAX_KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = angles.to(device)
        return self._kept[key]


def _patches(x: Tensor, side: int) -> Tensor:
    """Return latents [batch, c, h, w] as tokens [batch, h·w/side², side²·c], channels innermost."""
    x = x.unflatten(3, (-1, side)).unflatten(2, (-1, side))
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def _picture(tokens: Tensor, size: tuple[int, int], side: int) -> Tensor:
    """Return the latents of tokens; the inverse of `_patches`."""
    x = tokens.unflatten(2, (side, side, -1)).unflatten(1, size)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def _filled(tokens: Tensor, pad: Tensor) -> Tensor:
    """Return tokens [batch, length, dim] with `pad`, [1, dim], up to a multiple of `MULTIPLE`."""
    missing = -tokens.shape[1] % MULTIPLE
    return torch.cat([tokens, pad.to(tokens.dtype).expand(len(tokens), missing, -1)], dim=1)
