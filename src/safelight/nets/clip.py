"""CLIPTextModel: words to the states that the UNet attends to (arXiv:2103.00020)."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.nets.config import NetConfig
from safelight.nets.layers import ACTIVATIONS


@dataclass(frozen=True)
class CLIPTextConfig(NetConfig):
    """The keys of text_encoder/config.json that we build from. Defaults are transformers'."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    _inert: ClassVar = {"model_type": ("clip_text_model",)}

    def _validate(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            self._refuse(f"hidden_act={self.hidden_act!r:.60}; expected one of {list(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            self._refuse(f"{self.hidden_size} channels do not divide into heads")


class Embeddings(nn.Module):
    """learned: vectors of textual inversions [n, hidden_size], whose ids follow the vocabulary's"""

    def __init__(self, cfg: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.position_embedding = nn.Embedding(cfg.max_position_embeddings, cfg.hidden_size)
        self.learned: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        return self._tokens(ids) + self.position_embedding(positions)

    def _tokens(self, ids: Tensor) -> Tensor:
        if self.learned is None:
            return self.token_embedding(ids)
        beyond = ids - self.token_embedding.num_embeddings
        known = self.token_embedding(ids.masked_fill(beyond >= 0, 0))
        learned = self.learned.to(known)[beyond.clamp(min=0)]
        return torch.where(beyond[..., None] >= 0, learned, known)


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        # Causal: a word sees those before it, as CLIP was trained.
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, cfg: CLIPTextConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[cfg.hidden_act]
        self.fc1 = nn.Linear(cfg.hidden_size, cfg.intermediate_size)
        self.fc2 = nn.Linear(cfg.intermediate_size, cfg.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, cfg: CLIPTextConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(cfg.hidden_size, cfg.num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.mlp = MLP(cfg)
        self.layer_norm2 = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), seen)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, cfg: CLIPTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.num_hidden_layers))

    def forward(self, x: Tensor, skip: int = 0, seen: Tensor | None = None) -> Tensor:
        for layer in self.layers[: len(self.layers) - skip]:
            x = layer(x, seen)
        return x


class TextTransformer(nn.Module):
    def __init__(self, cfg: CLIPTextConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(cfg)
        self.encoder = Encoder(cfg)
        self.final_layer_norm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)

    def forward(self, ids: Tensor, skip: int = 0, seen: Tensor | None = None) -> Tensor:
        return self.final_layer_norm(self.encoder(self.embeddings(ids), skip, seen))


class CLIPTextModel(nn.Module):
    runs_once = True
    """Once for a prompt: to pack its weights for speed would take longer than that."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)

    def with_learned(self, vectors: Tensor) -> CLIPTextModel:
        """Return a text encoder that shares all weights and knows further tokens.

        vectors: [n, hidden_size]; token vocab_size + i is the i-th of them.
        """
        embeddings = _twin(self.text_model.embeddings)
        embeddings.learned = vectors
        text_model = _twin(self.text_model, embeddings=embeddings)
        return _twin(self, text_model=text_model)

    def forward(self, ids: Tensor, skip: int = 0, visible: Tensor | None = None) -> Tensor:
        """ids: int64 [batch, length ≤ max_position_embeddings]. Returns the last layer's
        states after the final norm, [batch, length, hidden_size].

        skip: layers at the end that are left out. visible: bool [batch, length], the tokens that
        others may look at; None for all.

        SD 2.x reads the layer before OpenCLIP's last: its folders hold one layer less, so the
        last that is there is the one that is meant.
        """
        if visible is None:
            return self.text_model(ids, skip)
        earlier = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        return self.text_model(ids, skip, earlier & visible.to(ids.device)[:, None, None])


def _twin(module: Any, **modules: nn.Module) -> Any:
    """Return a module that shares everything with another but these parts of it."""
    twin = copy(module)
    twin._modules = {**module._modules, **modules}
    return twin
