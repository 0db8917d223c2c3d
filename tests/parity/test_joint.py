"""The networks of Stable Diffusion 3 and FLUX.1 against diffusers' own, weights shared, float32."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.families.part import Part
from safelight.nets.flux import FluxConfig, FluxTransformer2DModel
from safelight.nets.sd3 import SD3Config, SD3Transformer2DModel
from safelight.weights.check import read_header
from safelight.weights.names import Section, from_single_file, original_names
from safelight.weights.names_joint import flux_section, sd3_section
from safelight.weights.stored import stored_tensor
from safelight.weights.tensors import open_tensors

TIMES = torch.tensor([3.5, 991.0])
GUIDANCE = torch.tensor([3.5, 1.0])

SD3: dict[str, Any] = {
    "sample_size": 16,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 20,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 12,
    "pos_embed_max_size": 12,
}
FLUX: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 20,
    "pooled_projection_dim": 12,
    "axes_dims_rope": (4, 6, 6),
}


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def plain(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dict(config)))


def randomised(net: Any) -> Any:
    """Give norms other weights than 1, and all layers weights that make every part count."""
    for name, parameter in net.named_parameters():
        if "norm_" in name and parameter.dim() == 1 and ".linear" not in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif parameter.dim() == 1:
            nn.init.normal_(parameter, std=0.3)
    return net.eval()


def sd3(**extra: Any) -> tuple[Any, SD3Transformer2DModel]:
    torch.manual_seed(0)
    theirs = randomised(diffusers.SD3Transformer2DModel(**(SD3 | extra)))
    ours = SD3Transformer2DModel(SD3Config.from_dict(plain(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def flux(**extra: Any) -> tuple[Any, FluxTransformer2DModel]:
    torch.manual_seed(0)
    theirs = randomised(diffusers.FluxTransformer2DModel(**(FLUX | extra)))
    ours = FluxTransformer2DModel(FluxConfig.from_dict(plain(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def drawn(channels: int, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return random latents, states of texts and pooled states, for two pictures."""
    return torch.randn(2, channels, *size), torch.randn(2, 7, 20), torch.randn(2, 12)


def from_flux(
    theirs: Any, x: Tensor, context: Tensor, pooled: Tensor, guidance: Tensor | None = None
) -> Tensor:
    """Return what diffusers' network predicts; its pipeline packs and unpacks the latents."""
    pipe = diffusers.FluxPipeline
    _, channels, h, w = x.shape
    out = theirs(
        pipe._pack_latents(x, 2, channels, h, w),
        context,
        pooled,
        TIMES / 1000,
        pipe._prepare_latent_image_ids(2, h // 2, w // 2, x.device, torch.float32),
        torch.zeros(7, 3),
        guidance,
    ).sample
    # It wants the sides of the picture, and the factor of the autoencoder.
    return pipe._unpack_latents(out, 8 * h, 8 * w, 8)


@pytest.mark.parametrize(
    ("extra", "size"),
    [
        ({}, (10, 14)),
        ({"qk_norm": "rms_norm", "dual_attention_layers": (0, 2)}, (24, 6)),
        ({"qk_norm": "rms_norm", "num_layers": 1, "in_channels": 5, "out_channels": 3}, (2, 2)),
        ({"patch_size": 3, "sample_size": 24, "out_channels": None}, (9, 15)),
    ],
    ids=["sd3", "sd3.5-medium", "sd3.5-large", "other-patches"],
)
@torch.inference_mode()
def test_sd3(extra: dict[str, Any], size: tuple[int, int]) -> None:
    theirs, ours = sd3(**extra)
    x, context, pooled = drawn(extra.get("in_channels", 16), size)
    expected = theirs(x, context, pooled, TIMES).sample
    found = ours(x, TIMES, context, pooled)
    assert found.shape == expected.shape
    assert error(found, expected) < 1e-5


@pytest.mark.parametrize(
    ("extra", "size"),
    [
        ({}, (6, 10)),
        ({"guidance_embeds": True}, (14, 2)),
        ({"num_single_layers": 0, "in_channels": 24, "out_channels": 8}, (4, 4)),
    ],
    ids=["schnell", "dev", "other-channels"],
)
@torch.inference_mode()
def test_flux(extra: dict[str, Any], size: tuple[int, int]) -> None:
    theirs, ours = flux(**extra)
    x, context, pooled = drawn(extra.get("in_channels", 16) // 4, size)
    guidance = GUIDANCE if "guidance_embeds" in extra else None
    expected = from_flux(theirs, x, context, pooled, guidance)
    for _ in range(2):  # the second time with the angles that were kept
        found = ours(x, TIMES, context, pooled, guidance)
        assert found.shape == expected.shape
        assert error(found, expected) < 1e-5


@torch.inference_mode()
def test_angles_are_of_this_call() -> None:
    _, ours = flux()
    x, context, pooled = drawn(4, (4, 8))
    first = ours(x, TIMES, context, pooled)
    ours(x[..., :6], TIMES, context, pooled)
    ours(x.mT, TIMES, context, pooled)
    assert torch.equal(ours(x, TIMES, context, pooled), first)


@torch.inference_mode()
def test_sizes_that_networks_do_not_take() -> None:
    _, stable = sd3()
    context, pooled = torch.randn(1, 7, 20), torch.randn(1, 12)
    with pytest.raises(SafelightError, match="multiples of 2"):
        stable(torch.randn(1, 16, 5, 4), TIMES[:1], context, pooled)
    with pytest.raises(SafelightError, match="24×24 are the largest"):
        stable(torch.randn(1, 16, 4, 26), TIMES[:1], context, pooled)
    _, ours = flux(guidance_embeds=True)
    with pytest.raises(SafelightError, match="multiples of 2"):
        ours(torch.randn(1, 4, 4, 5), TIMES[:1], context, pooled, GUIDANCE[:1])
    with pytest.raises(SafelightError, match="none is given"):
        ours(torch.randn(1, 4, 4, 4), TIMES[:1], context, pooled)


@torch.inference_mode()
def test_flux_in_float16_where_it_overflows() -> None:
    theirs, ours = flux()
    for block in theirs.transformer_blocks:
        block.norm1_context.linear.bias[-32:] = 2  # the gate of what follows
        block.ff_context.net[2].bias[:3] = 6e4
    for block in theirs.single_transformer_blocks:
        block.norm.linear.bias[-32:] = 2
        block.proj_out.bias[:3] = -6e4
    ours.load_state_dict(theirs.half().state_dict(), assign=True)
    x, context, pooled = (t.half() for t in drawn(4, (4, 4)))
    found = ours(x, TIMES, context, pooled)
    assert found.isfinite().all()
    assert error(found, from_flux(theirs, x, context, pooled)) < 0.01


@pytest.mark.parametrize(
    ("kind", "extra", "said"),
    [
        (SD3Config, {"caption_projection_dim": 1024}, "caption_projection_dim"),
        (SD3Config, {"qk_norm": "layer_norm"}, "rms_norm"),
        (SD3Config, {"dual_attention_layers": [18]}, "beyond the 18"),
        (SD3Config, {"dual_attention_layers": [0] * 129}, "at most 128"),
        (SD3Config, {"dual_attention_layers": [-1]}, "from 0 to 127"),
        (SD3Config, {"dual_attention_layers": ["0"]}, "should be"),
        (SD3Config, {"dual_attention_layers": 3}, "should be"),
        (SD3Config, {"num_layers": 129}, "from 1 to 128"),
        (SD3Config, {"pos_embed_max_size": None}, "should be int"),
        (FluxConfig, {"patch_size": 2}, "patch_size"),
        (FluxConfig, {"axes_dims_rope": [16, 56]}, "axes_dims_rope"),
        (FluxConfig, {"axes_dims_rope": [16, 57, 55]}, "axes_dims_rope"),
        (FluxConfig, {"axes_dims_rope": [16, 56, 64]}, "sum of attention_head_dim=128"),
        (FluxConfig, {"in_channels": 62}, "62 channels"),
        (FluxConfig, {"num_layers": 100}, "138 layers"),
    ],
)
def test_configs_that_cannot_be(kind: Any, extra: dict[str, Any], said: str) -> None:
    with pytest.raises(SafelightError, match=said):
        kind.from_dict(extra)


def test_published_configs_build_without_memory() -> None:
    medium = {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "qk_norm": "rms_norm",
        "dual_attention_layers": list(range(13)),
    }
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("error")
        nets = (
            SD3Transformer2DModel(SD3Config.from_dict(medium)),
            FluxTransformer2DModel(FluxConfig.from_dict({"guidance_embeds": True})),
        )
    counts = [sum(p.numel() for p in net.parameters()) / 1e9 for net in nets]
    assert [round(count, 1) for count in counts] == [2.2, 11.9]


# --- single files --------------------------------------------------------------------------------

PREFIX = "model.diffusion_model."


def converter(net: nn.Module) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Return diffusers' function from the keys of a single file to those of its folders."""
    if isinstance(net, SD3Transformer2DModel):
        return single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers
    function = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    # It knows one width alone, that of the published model.
    source = inspect.getsource(function)
    assert source.count("3072") == 1
    space = dict(vars(single_file_utils))
    exec(source.replace("3072", str(FLUX["attention_head_dim"] * 2)), space)
    return space[function.__name__]


def original(net: Any, section: Section, prefix: str) -> dict[str, Tensor]:
    """Return a network's weights as the original code has them."""
    state = net.state_dict()
    shapes = {"transformer": {name: t.shape for name, t in state.items()}}
    found: dict[str, Tensor] = {}
    for key, one in original_names({prefix: section}, shapes).items():
        tensor = torch.cat([state[name] for name in one.names])
        found[key] = torch.cat(tensor.chunk(2)[::-1]) if one.swapped else tensor
    return found


NETS: dict[str, Any] = {
    "sd3": lambda: sd3()[1],
    "sd3.5": lambda: sd3(qk_norm="rms_norm", dual_attention_layers=(0, 1))[1],
    "schnell": lambda: flux()[1],
    "dev": lambda: flux(guidance_embeds=True)[1],
}


@pytest.mark.parametrize("prefix", [PREFIX, ""])
@pytest.mark.parametrize("name", NETS)
def test_single_files(name: str, prefix: str, tmp_path: Path) -> None:
    net = NETS[name]()
    section = (sd3_section if name.startswith("sd3") else flux_section)(
        "transformer", asdict(net.config)
    )
    tensors = original(net, section, prefix)
    converted = converter(net)(dict(tensors))
    state = net.state_dict()
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[key], state[key]) for key in state)
    save_file(tensors, tmp_path / "one.safetensors")
    header = read_header(tmp_path / "one.safetensors")
    parts = {"transformer": Part("safelight.nets.sd3", "", "")}
    weights = from_single_file(header, parts, {prefix: section}, lambda key: False)["transformer"]
    assert {key: weight.shape for key, weight in weights.items()} == {
        key: tuple(tensor.shape) for key, tensor in state.items()
    }
    with open_tensors(header) as read:
        for key, weight in weights.items():
            assert torch.equal(stored_tensor(read, weight), state[key]), key


def test_original_names_of_published_files() -> None:
    """The keys by which the published files are told apart, and the last of each kind."""
    medium = sd3_section("transformer", {"num_layers": 24})
    assert medium.names is not None
    assert medium.names["joint_blocks.0.context_block.adaLN_modulation.1"] == (
        "transformer_blocks.0.norm1_context.linear"
    )
    assert medium.swapped == {"norm_out.linear", "transformer_blocks.23.norm1_context.linear"}
    dev = flux_section("transformer", {"num_layers": 19, "num_single_layers": 38})
    assert dev.names is not None
    assert dev.names["double_blocks.0.img_attn.norm.key_norm.scale"] == (
        "transformer_blocks.0.attn.norm_k.weight"
    )
    assert list(dev.stacked["single_blocks.37.linear1"].values()) == [1, 1, 1, 4]


def test_a_single_file_whose_rows_do_not_divide(tmp_path: Path) -> None:
    tensors = {"joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(4, 3)}
    save_file(tensors, tmp_path / "one.safetensors")
    header = read_header(tmp_path / "one.safetensors")
    parts = {"transformer": Part("safelight.nets.sd3", "", "")}
    section = sd3_section("transformer", {"num_layers": 1})
    with pytest.raises(SafelightError, match="keys that we do not know"):
        from_single_file(header, parts, {"": section}, lambda key: False)
