"""CLIPTextModel: from tokens to the states that the UNet attends to (arXiv:2103.00020)."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.nets.config import NetConfig
from safelight.nets.layers import ACTIVATIONS


@dataclass(frozen=True)
class CLIPConfig(NetConfig):
    """The keys that CLIP's text encoder and its image encoder share.

    causal: whether a position attends to itself and those before it alone.
    """

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512

    causal: ClassVar[bool]

    def _validate(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            self._refuse(f"hidden_act={self.hidden_act!r:.60}; expected one of {list(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            self._refuse(f"{self.hidden_size} channels do not divide into heads")


@dataclass(frozen=True)
class CLIPTextConfig(CLIPConfig):
    """The keys of text_encoder/config.json that we build from, with transformers' defaults."""

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407

    causal: ClassVar = True
    _inert: ClassVar = {"model_type": ("clip_text_model",)}


class Embeddings(nn.Module):
    """Token and position embeddings.

    learned: vectors of textual inversions, [n, hidden_size]; their ids follow the vocabulary's.
    """

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
    """Multi-head self-attention of x, [batch, length, dim].

    causal: a position attends to itself and those before it, unless `seen` is given.
    """

    def __init__(self, dim: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        causal = self.causal and seen is None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, cfg: CLIPConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[cfg.hidden_act]
        self.fc1 = nn.Linear(cfg.hidden_size, cfg.intermediate_size)
        self.fc2 = nn.Linear(cfg.intermediate_size, cfg.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Layer(nn.Module):
    """Self-attention and an MLP, each with a norm and a shortcut."""

    def __init__(self, cfg: CLIPConfig) -> None:
        super().__init__()
        heads = cfg.num_attention_heads
        self.self_attn = SelfAttention(cfg.hidden_size, heads, causal=cfg.causal)
        self.layer_norm1 = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.mlp = MLP(cfg)
        self.layer_norm2 = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), seen)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The layers of an encoder; the last `skip` are left out."""

    def __init__(self, cfg: CLIPConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.num_hidden_layers))

    def forward(self, x: Tensor, skip: int = 0, seen: Tensor | None = None) -> Tensor:
        return self.between(x, 0, len(self.layers) - skip, seen)

    def between(self, x: Tensor, first: int, end: int, seen: Tensor | None) -> Tensor:
        """Return the states after the layers from `first` to the one before `end`."""
        for layer in self.layers[first:end]:
            x = layer(x, seen)
        return x


class TextTransformer(nn.Module):
    """From ids, int64 [batch, length], to states, [batch, length, hidden_size]."""

    def __init__(self, cfg: CLIPTextConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(cfg)
        self.encoder = Encoder(cfg)
        self.final_layer_norm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)

    def forward(
        self, ids: Tensor, skip: int = 0, seen: Tensor | None = None, norm: bool = True
    ) -> Tensor:
        x = self.encoder(self.embeddings(ids), skip, seen)
        return self.final_layer_norm(x) if norm else x

    def both(self, ids: Tensor, skip: int, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the states before the last `skip` layers and the final norm, and after both."""
        end = len(self.encoder.layers)
        states = self.encoder.between(self.embeddings(ids), 0, end - skip, seen)
        return states, self.final_layer_norm(self.encoder.between(states, end - skip, end, seen))


class _TextEncoder(nn.Module):
    runs_once = True
    """It runs once for a prompt, so packing its weights would take longer than it saves."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)

    def with_learned(self, vectors: Tensor) -> Self:
        """Return a text encoder that shares all weights and has further tokens.

        vectors: [n, hidden_size]; the i-th is that of token vocab_size + i.
        """
        embeddings = _twin(self.text_model.embeddings)
        embeddings.learned = vectors
        return _twin(self, text_model=_twin(self.text_model, embeddings=embeddings))

    def ends(self, ids: Tensor) -> Tensor:
        """Return the position of each text's end token, [batch].

        Configs from before 2023 give its id as 2, but it is the largest id of the vocabulary. Ids
        beyond that are those of textual inversions.
        """
        cfg = self.config
        if cfg.eos_token_id == 2:
            return ids.where(ids < cfg.vocab_size, 0).argmax(-1)
        return (ids == cfg.eos_token_id).int().argmax(-1)


class CLIPTextModel(_TextEncoder):
    """CLIP's text encoder alone."""

    def forward(
        self, ids: Tensor, skip: int = 0, visible: Tensor | None = None, norm: bool = True
    ) -> Tensor:
        """Return the last layer's states after the final norm, [batch, length, hidden_size].

        ids: int64 [batch, length ≤ max_position_embeddings]. skip: number of last layers to leave
        out. visible: bool [batch, length], the tokens that others may attend to; None for all.
        norm: False leaves out the final norm, as SDXL needs.

        SD 2.x reads the layer before OpenCLIP's last. Its folders lack the last layer, so skip is
        0 there too.
        """
        return self.text_model(ids, skip, _seen(ids, visible), norm)


class CLIPTextModelWithProjection(_TextEncoder):
    """CLIP's text encoder with the projection that CLIP compares with pictures."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__(config)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(
        self, ids: Tensor, skip: int = 0, visible: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the states of each token and the pooled state of each text.

        The states, [batch, length, hidden_size], are those before the last `skip` layers and the
        final norm. The pooled state, [batch, projection_dim], is the end token's after all layers
        and the norm, projected. ids, visible: as in `CLIPTextModel`.
        """
        states, last = self.text_model.both(ids, skip, _seen(ids, visible))
        return states, self.text_projection(last[torch.arange(len(ids)), self.ends(ids)])


def _seen(ids: Tensor, visible: Tensor | None) -> Tensor | None:
    """Return what each token attends to, bool [batch, 1, length, length]; None: all before it."""
    if visible is None:
        return None
    earlier = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
    return earlier & visible.to(ids.device)[:, None, None]


def _twin(module: Any, **modules: nn.Module) -> Any:
    """Return a copy of a module that shares everything with it except these submodules."""
    twin = copy(module)
    twin._modules = {**module._modules, **modules}
    return twin
