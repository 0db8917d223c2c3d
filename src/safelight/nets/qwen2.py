"""Qwen2Model: the language model of Qwen2.5-VL, which Qwen-Image reads texts with.

arXiv:2502.13923. It differs from Qwen3 (`nets.qwen3`) in its attention: queries, keys and values
have a bias and no norm. The vision encoder is not built. M-RoPE gives a text token the same
position on all three axes, which equals plain rotary embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from safelight.errors import SafelightError
from safelight.nets.config import shown
from safelight.nets.qwen3 import Qwen3Config, Qwen3Model


@dataclass(frozen=True)
class Qwen2Config(Qwen3Config):
    """The keys of text_encoder/config.json that we build from, with transformers' defaults.

    Newer writers have them below "text_config".
    """

    biased: ClassVar[bool] = True
    normed: ClassVar[bool] = False

    vocab_size: int = 152064
    hidden_size: int = 8192
    intermediate_size: int = 29568
    num_hidden_layers: int = 80
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1000000.0

    _inert: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "model_type": ("qwen2_5_vl", "qwen2_5_vl_text"),
        "hidden_act": ("silu",),
        "use_sliding_window": (False,),
    }
    _rope_kinds: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "rope_type": ("default", "mrope"),
        "type": ("default", "mrope"),
    }
    _rope_unread: ClassVar[tuple[str, ...]] = ("mrope_section",)

    @classmethod
    def from_dict(cls, json: Mapping[str, Any]) -> Self:
        """Return the config of a parsed config.json; raises SafelightError as `NetConfig` does."""
        inner = json.get("text_config", {})
        if not isinstance(inner, Mapping):
            raise SafelightError(f"{cls._label()}: text_config={shown(inner)} should be a table")
        told = {**json, **inner}
        cls._rope(told.get("rope_scaling"))  # refuses what would change the positions
        hidden, heads = (
            told.get(key, getattr(cls, key)) for key in ("hidden_size", "num_attention_heads")
        )
        if type(hidden) is type(heads) is int and heads > 0 and hidden % heads == 0:
            told = {**told, "head_dim": hidden // heads}
        config = super().from_dict(told)
        if config.head_dim * config.num_attention_heads != config.hidden_size:
            config._refuse(
                f"hidden_size={config.hidden_size} does not divide into "
                f"{config.num_attention_heads} heads"
            )
        return config


class Qwen2Model(Qwen3Model):
    """The layers of Qwen2.5-VL's language model, without the head that predicts the next token."""
