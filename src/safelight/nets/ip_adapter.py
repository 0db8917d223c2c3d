"""IP-Adapter: lets a picture be a prompt (arXiv:2308.06721).

It turns what an image encoder says of the picture into a few tokens beside those of the text. Each
cross-attention of the UNet attends to them by itself, with keys and values of their own. These are
the same at every step, so that they are computed once for a picture, and the UNet has no weight of
the adapter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.nets.config import Layers, NetConfig
from safelight.nets.image_prompt import ImagePrompt
from safelight.nets.layers import attend

KINDS = ("base", "plus", "full")
"""The kinds of networks between the image encoder and the tokens."""


@dataclass(frozen=True)
class IPAdapterConfig(NetConfig):
    """The shapes of an adapter, which its file tells by those of its tensors.

    kind: see KINDS. image_dim: numbers that it reads of each state of the image encoder.
    num_tokens: tokens of a picture, without meaning in the kind "full", which has one for each
    state. widths: channels of the UNet's cross-attentions, in the order of
    `UNetConfig.cross_attentions`. The others are of the kind "plus" alone: the width of its states,
    of its heads together and of its feed-forward, the number of heads, and of layers.
    """

    kind: str = "base"
    image_dim: int = 1024
    cross_attention_dim: int = 768
    num_tokens: int = 4
    widths: Layers = ()
    hidden_size: int = 768
    heads_size: int = 768
    intermediate_size: int = 3072
    num_heads: int = 12
    num_hidden_layers: int = 1

    def _validate(self) -> None:
        if self.kind not in KINDS:
            self._refuse(f"kind {self.kind!r:.40}; expected one of {', '.join(KINDS)}")
        if self.heads_size % self.num_heads:
            self._refuse(f"{self.heads_size} channels do not divide into {self.num_heads} heads")


class Projection(nn.Module):
    """From the embedding of a picture, [batch, image_dim], to its tokens; the kind "base"."""

    def __init__(self, cfg: IPAdapterConfig) -> None:
        super().__init__()
        self.tokens = cfg.num_tokens
        self.proj = nn.Linear(cfg.image_dim, cfg.num_tokens * cfg.cross_attention_dim)
        self.norm = nn.LayerNorm(cfg.cross_attention_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).unflatten(-1, (self.tokens, -1)))


class FullProjection(nn.Module):
    """From each state of a picture to a token; the kind "full"."""

    def __init__(self, cfg: IPAdapterConfig) -> None:
        super().__init__()
        # Index 1 is GELU in the files; it has no weights.
        self.proj = nn.ModuleList(
            [
                nn.Linear(cfg.image_dim, cfg.image_dim),
                nn.Identity(),
                nn.Linear(cfg.image_dim, cfg.cross_attention_dim),
                nn.LayerNorm(cfg.cross_attention_dim),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj[3](self.proj[2](F.gelu(self.proj[0](x))))


class PerceiverAttention(nn.Module):
    """Attention of the latents to the picture's states and to themselves (arXiv:2103.03206)."""

    def __init__(self, cfg: IPAdapterConfig) -> None:
        super().__init__()
        self.heads = cfg.num_heads
        self.norm1 = nn.LayerNorm(cfg.hidden_size)
        self.norm2 = nn.LayerNorm(cfg.hidden_size)
        self.to_q = nn.Linear(cfg.hidden_size, cfg.heads_size, bias=False)
        self.to_kv = nn.Linear(cfg.hidden_size, 2 * cfg.heads_size, bias=False)
        self.to_out = nn.Linear(cfg.heads_size, cfg.hidden_size, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        latents = self.norm2(latents)
        k, v = self.to_kv(torch.cat([self.norm1(x), latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.to_q(latents), k, v)
        )
        return self.to_out(attend(q, k, v).transpose(1, 2).flatten(2))


def _feed_forward(cfg: IPAdapterConfig) -> nn.ModuleList:
    """Return the layers of a feed-forward. Index 2 is GELU in the files; it has no weights."""
    return nn.ModuleList(
        [
            nn.LayerNorm(cfg.hidden_size),
            nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False),
            nn.Identity(),
            nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False),
        ]
    )


class Resampler(nn.Module):
    """From the states of a picture, [batch, n, image_dim], to few tokens; the kind "plus"."""

    def __init__(self, cfg: IPAdapterConfig) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(1, cfg.num_tokens, cfg.hidden_size))
        self.proj_in = nn.Linear(cfg.image_dim, cfg.hidden_size)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(cfg), _feed_forward(cfg)])
            for _ in range(cfg.num_hidden_layers)
        )
        self.proj_out = nn.Linear(cfg.hidden_size, cfg.cross_attention_dim)
        self.norm_out = nn.LayerNorm(cfg.cross_attention_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj_in(x)
        latents = self.latents.to(x.dtype).expand(len(x), -1, -1)
        for layer in self.layers:
            attention, (norm, widen, _, narrow) = _both(layer)
            latents = latents + attention(x, latents)
            latents = latents + narrow(F.gelu(widen(norm(latents))))
        return self.norm_out(self.proj_out(latents))


def _both(layer: Any) -> tuple[PerceiverAttention, Iterable[nn.Module]]:
    return layer[0], layer[1]


class KeysAndValues(nn.Module):
    """What one cross-attention reads of a picture's tokens."""

    def __init__(self, cross: int, width: int) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(cross, width, bias=False)
        self.to_v_ip = nn.Linear(cross, width, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.to_k_ip(tokens), self.to_v_ip(tokens)


class IPAdapter(nn.Module):
    """The networks of an adapter, with the names of the published files."""

    runs_once = True
    """It runs once for a picture, so packing its weights would take longer than it saves."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.config = config
        kinds = {"base": Projection, "plus": Resampler, "full": FullProjection}
        self.image_proj = kinds[config.kind](config)
        # The files number all attentions of the UNet, of which every second one is to the text.
        self.ip_adapter = nn.ModuleDict(
            {
                str(2 * i + 1): KeysAndValues(config.cross_attention_dim, width)
                for i, width in enumerate(config.widths)
            }
        )

    def forward(self, x: Tensor) -> ImagePrompt:
        """Return what the UNet reads of pictures.

        x: their embeddings [batch, image_dim] in the kind "base"; in others the states before the
        image encoder's last layer, [batch, n, image_dim].
        """
        tokens = self.image_proj(x)
        return ImagePrompt(tuple(one(tokens) for one in self.ip_adapter.values()))
