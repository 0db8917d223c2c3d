"""Z-Image's transformer and Qwen3 against diffusers and transformers, weights shared, float32."""

import json
import math
import warnings
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders.single_file_utils import (
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.nets.qwen3 import Qwen3Config, Qwen3Model
from safelight.nets.zimage import ZImageConfig, ZImageTransformer2DModel
from safelight.weights.names import qwen_folder_name, renamed
from safelight.weights.names_zimage import zimage_names, zimage_stacked, zimage_unused


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def twin(ours: nn.Module, theirs: nn.Module) -> None:
    """Give both networks the same random weights; none of them is 0 or 1 throughout."""
    for name, weight in theirs.named_parameters():
        if weight.dim() == 1 and name.endswith(".weight"):
            nn.init.uniform_(weight, 0.5, 1.5)
        elif name.endswith(("pad_token", "bias")):
            nn.init.normal_(weight, std=0.5)
        elif "adaLN" in name:
            nn.init.normal_(weight, std=0.1)
        else:
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ours.eval()
    theirs.eval()


def plain(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dict(config)))


ZIMAGE = {
    "dim": 96,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 4,
    "n_kv_heads": 4,
    "cap_feat_dim": 40,
    "axes_dims": [8, 6, 10],
}


def zimage_twins(**extra: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    theirs = diffusers.ZImageTransformer2DModel(**(ZIMAGE | extra))
    ours = ZImageTransformer2DModel(ZImageConfig.from_dict(plain(theirs.config)))
    twin(ours, theirs)
    return ours, theirs


@pytest.mark.parametrize(
    ("extra", "size", "length"),
    [
        ({}, (6, 10), 5),  # 15 and 5 tokens: both are filled up
        ({}, (8, 16), 64),  # 32 and 64: neither is
        ({}, (2, 70), 33),  # 35 and 33: both are, to 64
        ({"dim": 512, "n_heads": 8, "n_kv_heads": 8, "axes_dims": [24, 20, 20]}, (6, 6), 32),
        ({"dim": 88, "axes_dims": [8, 6, 8]}, (4, 4), 3),  # 88·8/3 is not whole
        ({"all_patch_size": [1], "in_channels": 3, "t_scale": 100.0}, (5, 7), 7),
        ({"rope_theta": 50.0, "norm_eps": 0.05, "n_refiner_layers": 2}, (6, 8), 2),
        ({"n_refiner_layers": 0, "n_layers": 1}, (4, 6), 40),
    ],
    ids=["filled", "whole", "mixed", "wide", "odd", "patch1", "numbers", "no-refiner"],
)
@torch.inference_mode()
def test_zimage(extra: dict[str, Any], size: tuple[int, int], length: int) -> None:
    ours, theirs = zimage_twins(**extra)
    cfg = ours.config
    x = torch.randn(2, cfg.in_channels, *size)
    context, times = torch.randn(2, length, cfg.cap_feat_dim), torch.tensor([0.0025, 0.8])
    wanted = theirs([*x[:, :, None]], times, [*context], patch_size=cfg.patch, return_dict=False)[0]
    found = ours(x, times, context)
    assert found.shape == x.shape
    assert error(found, torch.stack(list(wanted))[:, :, 0]) < 1e-5


@torch.inference_mode()
def test_rows_of_a_batch_are_those_of_single_calls() -> None:
    ours, _ = zimage_twins()
    x, times, context = torch.randn(2, 16, 6, 6), torch.tensor([0.1, 0.9]), torch.randn(2, 9, 40)
    rows = [ours(x[i : i + 1], times[i : i + 1], context[i : i + 1]) for i in range(2)]
    assert error(ours(x, times, context), torch.cat(rows)) < 1e-6


@torch.inference_mode()
def test_bfloat16_stays_bfloat16() -> None:
    ours, _ = zimage_twins()
    x, times, context = torch.randn(1, 16, 6, 6), torch.tensor([0.3]), torch.randn(1, 9, 40)
    wanted = ours(x, times, context)
    found = ours.bfloat16()(x.bfloat16(), times, context.bfloat16())
    assert found.dtype == torch.bfloat16
    assert error(found.float(), wanted) < 0.05


def test_the_published_networks_have_their_names_and_numbers() -> None:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = ZImageTransformer2DModel(ZImageConfig.from_dict({}))
        text = Qwen3Model(Qwen3Config.from_dict(QWEN3_4B))
    with torch.device("meta"):
        theirs = diffusers.ZImageTransformer2DModel()
        their_text = transformers.Qwen3Model(transformers.Qwen3Config(**QWEN3_4B))
    for found, wanted, count in (
        (ours, theirs, 6_154_908_736),
        (text, their_text, 4_022_468_096),
    ):
        shapes = {name: t.shape for name, t in found.state_dict().items()}
        assert shapes == {name: t.shape for name, t in wanted.state_dict().items()}
        assert sum(map(math.prod, shapes.values())) == count
    assert ours.config.depth == 34
    assert text.config.depth == 36


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"siglip_feat_dim": 1152}, "siglip_feat_dim=1152"),
        ({"all_f_patch_size": [2]}, "all_f_patch_size"),
        ({"qk_norm": False}, "qk_norm"),
        ({"all_patch_size": [2, 4]}, "all_patch_size has 2 values"),
        ({"all_patch_size": [0]}, "all_patch_size"),
        ({"n_kv_heads": 10}, "n_kv_heads=10"),
        ({"dim": 3841}, "3841 channels"),
        ({"axes_dims": [32, 48]}, "three even numbers"),
        ({"axes_dims": [31, 49, 48]}, "three even numbers"),
        ({"axes_dims": [32, 48, 50]}, "add up to 128"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"n_layers": 127}, "131 layers"),
        ({"n_layers": True}, "n_layers"),
        ({"t_scale": float("nan")}, "t_scale"),
        ({"cap_feat_dim": 10**6}, "cap_feat_dim"),
    ],
)
def test_zimage_configs_that_we_do_not_build(extra: dict[str, Any], said: str) -> None:
    with pytest.raises(SafelightError, match=said):
        ZImageConfig.from_dict(extra)


QWEN3_4B = {
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3 = QWEN3_4B | {
    "head_dim": 10,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}


@pytest.mark.parametrize(
    "extra",
    [{}, {"num_key_value_heads": 4, "rope_theta": 500.0}, {"num_key_value_heads": 1}],
    ids=["grouped", "each", "shared"],
)
@pytest.mark.parametrize("length", [1, 37])
@torch.inference_mode()
def test_qwen3(extra: dict[str, Any], length: int) -> None:
    torch.manual_seed(0)
    theirs = transformers.Qwen3Model(transformers.Qwen3Config(**(QWEN3 | extra)))
    # As transformers writes it, with rope_parameters and layer_types.
    ours = Qwen3Model(Qwen3Config.from_dict(plain(theirs.config.to_dict())))
    assert ours.config == Qwen3Config.from_dict(QWEN3 | extra)
    twin(ours, theirs)
    ids = torch.randint(50, (2, length))
    wanted = theirs(ids, output_hidden_states=True).hidden_states
    layers = [-2, 0, 1, 2, 3, -1]
    for n, found in zip(layers, ours(ids, layers), strict=True):
        assert error(found, wanted[n]) < 1e-5


@torch.inference_mode()
def test_a_text_alone_has_the_states_of_a_padded_one() -> None:
    torch.manual_seed(0)
    theirs = transformers.Qwen3Model(transformers.Qwen3Config(**QWEN3))
    ours = Qwen3Model(Qwen3Config.from_dict(QWEN3))
    twin(ours, theirs)
    ids, mask = torch.randint(50, (1, 24)), torch.zeros(1, 24, dtype=torch.bool)
    mask[:, :9] = True
    wanted = theirs(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
    (found,) = ours(ids[:, :9], [-2])
    assert error(found[0], wanted[mask]) < 1e-5


@torch.inference_mode()
def test_layers_that_nobody_reads_do_not_run() -> None:
    ours = Qwen3Model(Qwen3Config.from_dict(QWEN3))
    ran: list[int] = []
    for i, layer in enumerate(ours.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    ids = torch.zeros(1, 3, dtype=torch.int64)
    ours(ids, [-2])
    assert ran == [0, 1]
    with pytest.raises(IndexError):
        ours(ids, [4])


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"model_type": "qwen2"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_type='linear'"),
        ({"rope_parameters": {"rope_theta": 1e6, "factor": 4.0}}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": "1e6"}}, "rope_theta"),
        ({"rope_parameters": [1e6]}, "rope_parameters"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"num_key_value_heads": 3}, "do not share"),
        ({"num_key_value_heads": 64}, "do not share"),
        ({"num_key_value_heads": None}, "num_key_value_heads"),
        ({"head_dim": 127}, "head_dim"),
        ({"num_hidden_layers": 129}, "num_hidden_layers"),
        ({"rope_theta": 0.0}, "rope_theta"),
    ],
)
def test_qwen3_configs_that_we_do_not_build(extra: dict[str, Any], said: str) -> None:
    with pytest.raises(SafelightError, match=said):
        Qwen3Config.from_dict(QWEN3_4B | extra)


def test_folder_names_of_qwen3() -> None:
    assert qwen_folder_name("model.layers.0.mlp.up_proj.weight") == "layers.0.mlp.up_proj.weight"
    assert qwen_folder_name("embed_tokens.weight") == "embed_tokens.weight"
    assert qwen_folder_name("lm_head.weight") is None


def original(ours: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Return weights of Z-Image's transformer as a single file names and stacks them."""
    found = dict(ours)
    blocks = {key.split(".attention.")[0] for key in ours if ".attention." in key}
    for block in blocks:
        at = f"{block}.attention."
        found[f"{at}qkv.weight"] = torch.cat([found.pop(f"{at}to_{n}.weight") for n in "qkv"])
        found[f"{at}out.weight"] = found.pop(f"{at}to_out.0.weight")
        for n in "qk":
            found[f"{at}{n}_norm.weight"] = found.pop(f"{at}norm_{n}.weight")
    for key in list(found):
        short = key.replace("all_", "").replace(".2-1.", ".")
        found[short] = found.pop(key)
    found["norm_final.weight"] = torch.ones(config["dim"])
    return found


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_names_of_single_files(prefix: str) -> None:
    ours, theirs = zimage_twins(n_refiner_layers=2)
    config = plain(theirs.config)
    file = original(theirs.state_dict(), config)
    names, stacked = zimage_names(config), zimage_stacked(config)
    found: dict[str, Tensor] = {}
    for key, tensor in file.items():
        if zimage_unused(key):
            continue
        module = key.removesuffix(".weight")
        if module in stacked:
            thirds = zip(stacked[module], tensor.chunk(3), strict=True)
            found |= {f"{name}.weight": third for name, third in thirds}
            assert set(stacked[module].values()) == {1}
        else:
            name = renamed(key, names)
            assert name is not None, key
            found[name] = tensor
    wanted = convert_z_image_transformer_checkpoint_to_diffusers(
        {prefix + key: tensor for key, tensor in file.items()}
    )
    wanted.pop("norm_final.weight", None)
    assert found.keys() == wanted.keys() == ours.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
