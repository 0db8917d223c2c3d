"""T5EncoderModel: from tokens to the states that SD 3 and FLUX.1 attend to (arXiv:1910.10683)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.nets.config import NetConfig
from safelight.nets.tokens import RMSNorm, split_heads


def gelu_new(x: Tensor) -> Tensor:
    """Return GELU by its approximation with tanh (arXiv:1606.08415)."""
    return F.gelu(x, approximate="tanh")


FEED_FORWARDS: dict[str, tuple[str, Callable[[Tensor], Tensor], bool]] = {
    "relu": ("relu", F.relu, False),
    "gated-gelu": ("gelu_new", gelu_new, True),
}
"""By feed_forward_proj: dense_act_fn, that function, and whether it gates a second projection."""


@dataclass(frozen=True)
class T5Config(NetConfig):
    """The keys of a T5 encoder's config.json that we build from, with transformers' defaults.

    dense_act_fn, is_gated_act: repeat what feed_forward_proj says, in newer files.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"
    dense_act_fn: str | None = None
    is_gated_act: bool | None = None

    _inert: ClassVar = {"model_type": ("t5",)}

    @property
    def depth(self) -> int:
        return self.num_layers

    def _validate(self) -> None:
        if self.feed_forward_proj not in FEED_FORWARDS:
            self._refuse(
                f"feed_forward_proj={self.feed_forward_proj!r:.60}; "
                f"expected one of {list(FEED_FORWARDS)}"
            )
        name, _, gated = FEED_FORWARDS[self.feed_forward_proj]
        if self.dense_act_fn not in (None, name) or self.is_gated_act not in (None, gated):
            self._refuse(
                f"dense_act_fn={self.dense_act_fn!r:.40} and is_gated_act={self.is_gated_act} "
                f"are not those of feed_forward_proj={self.feed_forward_proj!r}"
            )
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 4:
            self._refuse(
                f"relative_attention_max_distance={self.relative_attention_max_distance} is too "
                f"small for {self.relative_attention_num_buckets} buckets"
            )


def distance_buckets(length: int, count: int, furthest: int) -> Tensor:
    """Return the bucket of each distance from a token to another, int64 [2·length − 1] on the CPU.

    The distances are 1 − length to length − 1. Half of the `count` buckets are for tokens before,
    half for tokens after. The first half of those are for one distance each. The others grow with
    the logarithm up to `furthest`; the last one has all greater distances too (arXiv:1910.10683,
    section 2.1).
    """
    distance = torch.arange(1 - length, length)
    half = count // 2
    single = half // 2
    far = distance.abs()
    share = torch.log(far.clamp(min=1).float() / single) / math.log(furthest / single)
    bucket = (single + (share * (half - single)).long()).clamp(max=half - 1)
    return torch.where(far < single, far, bucket) + half * (distance > 0)


class Attention(nn.Module):
    """Multi-head self-attention that adds a bias to the products and does not scale them.

    biased: it holds the biases, by bucket and head. One layer does, for all layers.
    """

    def __init__(self, cfg: T5Config, *, biased: bool) -> None:
        super().__init__()
        self.config = cfg
        inner = cfg.num_heads * cfg.d_kv
        self.q = nn.Linear(cfg.d_model, inner, bias=False)
        self.k = nn.Linear(cfg.d_model, inner, bias=False)
        self.v = nn.Linear(cfg.d_model, inner, bias=False)
        self.o = nn.Linear(inner, cfg.d_model, bias=False)
        if biased:
            self.relative_attention_bias = nn.Embedding(
                cfg.relative_attention_num_buckets, cfg.num_heads
            )

    def bias(self, length: int) -> Tensor:
        """Return what is added to the products, [1, heads, length, length]."""
        cfg = self.config
        table = self.relative_attention_bias
        # The logarithm is taken on the CPU, so that a distance is in the same bucket everywhere.
        buckets = distance_buckets(
            length, cfg.relative_attention_num_buckets, cfg.relative_attention_max_distance
        )
        by_distance = table(buckets.to(table.weight.device)).T
        # The row of a token is the window of distances that begins at minus its position.
        return by_distance.unfold(-1, length, 1).flip(1)[None]

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (split_heads(t, self.config.num_heads) for t in (self.q(x), self.k(x), self.v(x)))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(out.transpose(1, 2).flatten(2))


class SelfAttentionLayer(nn.Module):
    """Norm and attention with a shortcut."""

    def __init__(self, cfg: T5Config, *, biased: bool) -> None:
        super().__init__()
        self.SelfAttention = Attention(cfg, biased=biased)
        self.layer_norm = RMSNorm(cfg.d_model, cfg.layer_norm_epsilon)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.SelfAttention(_normed(self.layer_norm, x), bias)


class FeedForward(nn.Module):
    """A linear layer, the activation, which may gate a second linear layer, and one back."""

    def __init__(self, cfg: T5Config) -> None:
        super().__init__()
        _, self.act, self.gated = FEED_FORWARDS[cfg.feed_forward_proj]
        if self.gated:
            self.wi_0 = nn.Linear(cfg.d_model, cfg.d_ff, bias=False)
            self.wi_1 = nn.Linear(cfg.d_model, cfg.d_ff, bias=False)
        else:
            self.wi = nn.Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.wo = nn.Linear(cfg.d_ff, cfg.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.wi_0(x)) * self.wi_1(x) if self.gated else self.act(self.wi(x))
        if self.wo.weight.dtype == torch.float16:
            # The sums of T5's trained weights go beyond 65504, the largest number of float16.
            return F.linear(h.float(), self.wo.weight.float())
        return self.wo(h)


class FeedForwardLayer(nn.Module):
    """Norm and feed-forward with a shortcut."""

    def __init__(self, cfg: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = FeedForward(cfg)
        self.layer_norm = RMSNorm(cfg.d_model, cfg.layer_norm_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(_normed(self.layer_norm, x))


class Block(nn.Module):
    """Attention and feed-forward."""

    def __init__(self, cfg: T5Config, *, biased: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([SelfAttentionLayer(cfg, biased=biased), FeedForwardLayer(cfg)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.layer[1](self.layer[0](x, bias))


class Encoder(nn.Module):
    """The blocks and the final norm. The biases of the first block's attention are for all."""

    def __init__(self, cfg: T5Config) -> None:
        super().__init__()
        self.block: Any = nn.ModuleList(Block(cfg, biased=i == 0) for i in range(cfg.num_layers))
        self.final_layer_norm = RMSNorm(cfg.d_model, cfg.layer_norm_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.block[0].layer[0].SelfAttention.bias(x.shape[1])
        for block in self.block:
            x = block(x, bias)
        return _normed(self.final_layer_norm, x)


class T5EncoderModel(nn.Module):
    """T5's encoder.

    It is meant for float32 and bfloat16. In float16 the sum over the layers, and each
    feed-forward's last product, are computed in float32, since they would overflow.
    """

    runs_once = True
    """It runs once for a prompt, so packing its weights would take longer than it saves."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Encoder(config)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the states after the final norm, [batch, length, d_model].

        ids: int64 [batch, length], of any length. Padding is read like text: SD 3 and FLUX.1 were
        trained so.
        """
        x = self.shared(ids)
        return self.encoder(x.float() if x.dtype == torch.float16 else x)


def _normed(norm: RMSNorm, x: Tensor) -> Tensor:
    """Return the norm of x in the precision of its weight, which differs in float16 alone."""
    return norm(x).to(norm.weight.dtype)
