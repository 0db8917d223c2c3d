"""The T5 encoder against transformers' own, weights shared, float32."""

import json
import math
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.t5.modeling_t5 import T5Attention

from safelight.errors import SafelightError
from safelight.nets.t5 import T5Config, T5EncoderModel, distance_buckets
from safelight.weights.names import t5_folder_name

TINY: dict[str, Any] = {
    "vocab_size": 99,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 37,
    "num_layers": 3,
    "num_heads": 5,
}


def pair(**extra: Any) -> tuple[T5EncoderModel, nn.Module]:
    torch.manual_seed(0)
    config = transformers.T5Config(**(TINY | extra))
    theirs = transformers.T5EncoderModel(config).eval()
    for weight in theirs.parameters():
        # Far from transformers' start, where all norms are ones and biases hardly matter.
        nn.init.normal_(weight, mean=1.0 if weight.ndim == 1 else 0.0, std=0.3)
    ours = T5EncoderModel(T5Config.from_dict(json.loads(config.to_json_string()))).eval()
    weights = {t5_folder_name(key): value for key, value in theirs.state_dict().items()}
    assert None in weights  # the embeddings, for the second time
    del weights[None]
    ours.load_state_dict(weights, strict=True)
    return ours, theirs


@pytest.mark.parametrize(
    "extra",
    [
        {"feed_forward_proj": "gated-gelu"},
        {"feed_forward_proj": "relu"},
        {"relative_attention_num_buckets": 7, "relative_attention_max_distance": 21},
        {"layer_norm_epsilon": 0.05, "num_layers": 1, "d_kv": 64, "num_heads": 1},
    ],
    ids=["gated-gelu", "relu", "buckets", "one-layer"],
)
@pytest.mark.parametrize("length", [1, 7, 160])
@torch.inference_mode()
def test_states(extra: dict[str, Any], length: int) -> None:
    ours, theirs = pair(**extra)
    ids = torch.randint(0, 99, (2, length))
    ids[1, length // 2 :] = 0  # padding, which is not masked
    found, expected = ours(ids), theirs(ids).last_hidden_state
    assert found.shape == (2, length, 32)
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@torch.inference_mode()
def test_a_text_in_a_batch_has_the_states_it_has_alone() -> None:
    ours, _ = pair(feed_forward_proj="gated-gelu")
    ids = torch.randint(0, 99, (2, 9))
    torch.testing.assert_close(ours(ids)[1:], ours(ids[1:]))


@pytest.mark.parametrize(("count", "furthest"), [(32, 128), (4, 2), (7, 21), (64, 1000)])
def test_buckets_of_all_distances(count: int, furthest: int) -> None:
    positions = torch.arange(-700, 701)
    expected = T5Attention._relative_position_bucket(
        positions, bidirectional=True, num_buckets=count, max_distance=furthest
    )
    assert torch.equal(distance_buckets(701, count, furthest), expected)


@torch.inference_mode()
def test_float16_does_not_overflow() -> None:
    ours, _ = pair(feed_forward_proj="gated-gelu")
    for block in ours.encoder.block:
        block.layer[1].DenseReluDense.wo.weight.mul_(3e4)
    ids = torch.randint(0, 99, (2, 9))
    expected = ours(ids)
    sums = []
    wo = ours.encoder.block[1].layer[1]
    wo.register_forward_hook(lambda *args: sums.append(args[2].abs().max().item()))
    found = ours.half()(ids)
    assert found.dtype == torch.float16
    assert math.isfinite(sums[0])
    assert sums[0] > torch.finfo(torch.float16).max
    assert float((found.float() - expected).norm() / expected.norm()) < 0.02


@torch.inference_mode()
def test_bfloat16() -> None:
    ours, _ = pair(feed_forward_proj="gated-gelu")
    ids = torch.randint(0, 99, (2, 9))
    expected = ours(ids)
    found = ours.bfloat16()(ids)
    assert found.dtype == torch.bfloat16
    assert float((found.float() - expected).norm() / expected.norm()) < 0.1


def test_xxl_is_built_without_memory_or_warnings() -> None:
    config = T5Config(
        d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("error")
        net = T5EncoderModel(config)
    assert sum(weight.numel() for weight in net.parameters()) == 4_762_310_656
    assert T5EncoderModel.runs_once


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"model_type": "umt5"}, "model_type"),
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj"),
        ({"feed_forward_proj": 3}, "feed_forward_proj"),
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "relu"}, "dense_act_fn"),
        ({"feed_forward_proj": "relu", "is_gated_act": True}, "is_gated_act"),
        ({"relative_attention_num_buckets": 3}, "from 4"),
        ({"relative_attention_max_distance": 8}, "too small"),
        ({"num_layers": 129}, "num_layers"),
        ({"d_model": 2**20}, "d_model"),
        ({"d_ff": True}, "d_ff"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon"),
    ],
)
def test_configs_that_cannot_be(extra: dict[str, Any], said: str) -> None:
    with pytest.raises(SafelightError, match=said):
        T5Config.from_dict(extra)
