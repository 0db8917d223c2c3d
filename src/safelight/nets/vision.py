"""CLIPVisionModelWithProjection: from a picture to the states that an IP-Adapter reads.

A vision transformer (arXiv:2010.11929), as CLIP has it (arXiv:2103.00020).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from safelight.nets.clip import CLIPConfig, Encoder


@dataclass(frozen=True)
class CLIPVisionConfig(CLIPConfig):
    """The keys of image_encoder/config.json that we build from, with transformers' defaults."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32

    causal: ClassVar = False
    _inert: ClassVar = {"model_type": ("clip_vision_model",), "num_channels": (3,)}

    @property
    def positions(self) -> int:
        """The patches of a picture, and one position for all of it."""
        return (self.image_size // self.patch_size) ** 2 + 1

    def _validate(self) -> None:
        super()._validate()
        if self.image_size < self.patch_size:
            self._refuse(f"patches of {self.patch_size} pixels do not fit into {self.image_size}")


class Embeddings(nn.Module):
    """The embedding of each patch, after one that is learned, each with its position's."""

    def __init__(self, cfg: CLIPVisionConfig) -> None:
        super().__init__()
        size = cfg.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(cfg.hidden_size))
        self.patch_embedding = nn.Conv2d(3, cfg.hidden_size, size, stride=size, bias=False)
        self.position_embedding = nn.Embedding(cfg.positions, cfg.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        x = torch.cat([first, patches], dim=1)
        return x + self.position_embedding(torch.arange(x.shape[1], device=x.device))


class VisionTransformer(nn.Module):
    """From pixels, [batch, 3, image_size, image_size], to states, [batch, positions, width]."""

    def __init__(self, cfg: CLIPVisionConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(cfg)
        # The published files have this name.
        self.pre_layrnorm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.encoder = Encoder(cfg)
        self.post_layernorm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)

    def forward(self, pixels: Tensor, skip: int = 0) -> Tensor:
        """Return the states after the layers without the last `skip`, before the final norm."""
        return self.encoder(self.pre_layrnorm(self.embeddings(pixels)), skip)


class CLIPVisionModelWithProjection(nn.Module):
    """CLIP's image encoder with the projection that CLIP compares with texts."""

    runs_once = True
    """It runs once for a picture, so packing its weights would take longer than it saves."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionTransformer(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the embedding of each picture, [batch, projection_dim].

        pixels: [batch, 3, image_size, image_size], as `engine.ip_adapter.seen_pixels` makes them.
        """
        states = self.vision_model(pixels)
        return self.visual_projection(self.vision_model.post_layernorm(states[:, 0]))

    def states(self, pixels: Tensor) -> Tensor:
        """Return the states before the last layer, [batch, positions, hidden_size]."""
        return self.vision_model(pixels, skip=1)
