"""Qwen3Model: a language model whose hidden states other networks read as a text's encoding.

arXiv:2505.09388. Z-Image and FLUX.2 klein read it. `nets.qwen2` is the version before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.nets.config import NetConfig, shown
from safelight.nets.tokens import RMSNorm, rotary_angles, split_heads


@dataclass(frozen=True)
class Qwen3Config(NetConfig):
    """The keys of text_encoder/config.json that we build from, with transformers' defaults.

    biased: whether queries, keys and values have a bias. normed: whether queries and keys are
    normed in each head.
    """

    biased: ClassVar[bool] = False
    normed: ClassVar[bool] = True

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    _inert: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "model_type": ("qwen3",),
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "use_sliding_window": (False,),
        "rope_scaling": (None,),
    }
    _rope_kinds: ClassVar[Mapping[str, tuple[str, ...]]] = {"rope_type": ("default",)}
    _rope_unread: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_dict(cls, json: Mapping[str, Any]) -> Self:
        """Return the config of a parsed config.json; raises SafelightError as `NetConfig` does."""
        kinds = json.get("layer_types")
        if kinds is not None and (
            not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)
        ):
            raise SafelightError(
                f"{cls._label()}: layer_types has other layers than full_attention"
            )
        return super().from_dict({**json, **cls._rope(json.get("rope_parameters"))})

    @classmethod
    def _rope(cls, table: Any) -> dict[str, Any]:
        """Return rope_theta of a config's rope_parameters, where newer writers put it."""
        if table is None:
            return {}
        known = {"rope_theta", *cls._rope_kinds, *cls._rope_unread}
        if not isinstance(table, Mapping) or set(table) - known:
            raise SafelightError(f"{cls._label()}: rope_parameters={shown(table)} is not supported")
        for key, kinds in cls._rope_kinds.items():
            if (kind := table.get(key, kinds[0])) not in kinds:
                raise SafelightError(
                    f"{cls._label()}: {key}={shown(kind)} is not supported; expected {kinds[0]!r}"
                )
        return {"rope_theta": table["rope_theta"]} if "rope_theta" in table else {}

    def _validate(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            self._refuse(
                f"{self.num_attention_heads} heads do not share {self.num_key_value_heads} keys"
            )
        if self.head_dim % 2:
            self._refuse(f"head_dim={self.head_dim} should be even")


def rotate_halves(x: Tensor, angles: Tensor) -> Tensor:
    """Return x with its i-th number and its (d/2 + i)-th turned by the i-th angle.

    x: [batch, heads, length, d]; the result has its precision. angles: float32 [length, d/2].
    `tokens.rotate_pairs` is the same for numbers that are adjacent.
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class SelfAttention(nn.Module):
    """Causal attention of x, [batch, length, hidden]; groups of heads share keys and values.

    Grouped queries are arXiv:2305.13245.
    """

    def __init__(self, cfg: Qwen3Config) -> None:
        super().__init__()
        self.heads, self.key_heads = cfg.num_attention_heads, cfg.num_key_value_heads
        inner, shared = self.heads * cfg.head_dim, self.key_heads * cfg.head_dim
        self.q_proj = nn.Linear(cfg.hidden_size, inner, bias=cfg.biased)
        self.k_proj = nn.Linear(cfg.hidden_size, shared, bias=cfg.biased)
        self.v_proj = nn.Linear(cfg.hidden_size, shared, bias=cfg.biased)
        self.o_proj = nn.Linear(inner, cfg.hidden_size, bias=False)
        self.q_norm, self.k_norm = (_head_norm(cfg) for _ in range(2))

    def forward(self, x: Tensor, angles: Tensor, used: int) -> Tensor:
        """Return [batch, length, hidden]. angles: those of the positions, [length, head_dim/2].

        used: see `Qwen3Model`.
        """
        q = rotate_halves(self.q_norm(split_heads(self.q_proj(x), self.heads)), angles)
        k = rotate_halves(self.k_norm(split_heads(self.k_proj(x), self.key_heads)), angles)
        v = split_heads(self.v_proj(x), self.key_heads)
        # Padding is behind the text: without its keys, a causal mask lets it see the whole text.
        # tokens.Product has neither a causal mask nor shared keys; an encoder that runs once for a
        # prompt is not made faster.
        k, v = k[:, :, :used], v[:, :, :used]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def _head_norm(cfg: Qwen3Config) -> nn.Module:
    return RMSNorm(cfg.head_dim, cfg.rms_norm_eps) if cfg.normed else nn.Identity()


class MLP(nn.Module):
    """A linear layer gated by the SiLU of another (arXiv:2002.05202), and one back."""

    def __init__(self, cfg: Qwen3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Self-attention and an MLP, each with a norm and a shortcut."""

    def __init__(self, cfg: Qwen3Config) -> None:
        super().__init__()
        self.self_attn = SelfAttention(cfg)
        self.mlp = MLP(cfg)
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def forward(self, x: Tensor, angles: Tensor, used: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), angles, used)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3Model(nn.Module):
    """Qwen3's layers, without the head that predicts the next token."""

    runs_once = True
    """It runs once for a prompt, so packing its weights would take longer than it saves."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids: Tensor, layers: Sequence[int], used: int | None = None) -> list[Tensor]:
        """Return the states that `layers` names, each [batch, length, hidden_size].

        ids: int64 [batch, length]. layers: 0 for the embeddings, n for the states after n layers;
        those after the last layer are normed. Negative numbers count from the end: -2 is the states
        before the last layer. Layers that no number needs do not run. used: how many of the ids are
        text; the others fill it up at its end, and nothing attends to them. None: all are text.

        Raises IndexError for a number that the network has no states for.
        """
        count = len(self.layers)
        wanted = [range(count + 1)[n] for n in layers]
        cfg, positions = self.config, torch.arange(ids.shape[1], device="cpu")
        angles = rotary_angles(positions[:, None], (cfg.head_dim,), cfg.rope_theta).to(ids.device)
        states = [self.embed_tokens(ids)]
        for layer in self.layers[: max(wanted)]:
            states.append(layer(states[-1], angles, ids.shape[1] if used is None else used))
        if max(wanted) == count:
            states[-1] = self.norm(states[-1])
        return [states[n] for n in wanted]
