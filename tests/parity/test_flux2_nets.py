"""FLUX.2's transformer and autoencoder against diffusers, weights shared, in float32."""

import json
import math
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline, compute_empirical_mu
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.families.flow_files import KLEIN_4B, KLEIN_9B, Published
from safelight.nets.flux2 import Flux2Config, Flux2Transformer2DModel
from safelight.nets.qwen3 import Qwen3Config, Qwen3Model
from safelight.nets.vae_flux2 import AutoencoderKLFlux2, Flux2VAEConfig
from safelight.sampling.flow import empirical_mu
from safelight.weights.names import renamed
from safelight.weights.names_flux2_vae import flux2_vae_folder_name
from safelight.weights.names_joint import flux2_section
from tests.parity.flow_models import KLEIN, KLEIN_QWEN, KLEIN_VAE, randomised

TINY = KLEIN | {"joint_attention_dim": 40, "in_channels": 20}


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def plain(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dict(config)))


def twins(**extra: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    theirs = randomised(diffusers.Flux2Transformer2DModel(**(TINY | extra)))
    ours = Flux2Transformer2DModel(Flux2Config.from_dict(plain(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"mlp_ratio": 2.55, "rope_theta": 90},
        {"axes_dims_rope": (2, 6, 4, 8), "attention_head_dim": 20, "num_attention_heads": 2},
        {"out_channels": 12, "num_layers": 1, "num_single_layers": 1},
        {"num_single_layers": 0},
    ],
    ids=["plain", "numbers", "axes", "out", "double"],
)
@torch.inference_mode()
def test_transformer(extra: dict[str, Any]) -> None:
    ours, theirs = twins(**extra)
    x, context = torch.randn(2, 20, 5, 7), torch.randn(2, 9, 40)
    times = torch.tensor([17.0, 803.0])
    pipe = Flux2KleinPipeline
    wanted = theirs(
        x.flatten(2).transpose(1, 2),
        context,
        times / 1000,
        pipe._prepare_latent_ids(x),
        pipe._prepare_text_ids(context),
    ).sample
    found = ours(x, times, context)
    assert error(found, wanted.transpose(1, 2).reshape(found.shape)) < 1e-5


@torch.inference_mode()
def test_rows_of_a_batch_are_those_of_single_calls() -> None:
    ours, _ = twins()
    x, times, context = torch.randn(2, 20, 4, 4), torch.tensor([90.0, 900.0]), torch.randn(2, 9, 40)
    rows = [ours(x[i : i + 1], times[i : i + 1], context[i : i + 1]) for i in range(2)]
    assert error(ours(x, times, context), torch.cat(rows)) < 1e-6


@torch.inference_mode()
def test_half_precisions() -> None:
    """float16 holds numbers beyond its largest as that."""
    ours, _ = twins()
    x, times, context = torch.randn(1, 20, 4, 4), torch.tensor([300.0]), torch.randn(1, 9, 40)
    wanted = ours(x, times, context)
    found = ours.bfloat16()(x.bfloat16(), times, context.bfloat16())
    assert found.dtype == torch.bfloat16
    assert error(found.float(), wanted) < 0.05
    for block in ours.float().single_transformer_blocks:
        block.attn.to_out.weight.mul_(1e5)
    assert ours.half()(x.half(), times, context.half()).isfinite().all()


def vae_twins(**extra: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    theirs = randomised(diffusers.AutoencoderKLFlux2(**(KLEIN_VAE | extra)))
    nn.init.normal_(theirs.bn.running_mean)
    nn.init.uniform_(theirs.bn.running_var, 0.5, 2.0)
    ours = AutoencoderKLFlux2(Flux2VAEConfig.from_dict(plain(theirs.config))).eval()
    named = {flux2_vae_folder_name(key): one for key, one in theirs.state_dict().items()}
    named.pop(None)
    ours.load_state_dict(named, strict=True)
    return ours, theirs


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"batch_norm_eps": 0.05, "layers_per_block": 2},
        {"decoder_block_out_channels": (4, 8, 8, 12)},
        {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 3},
    ],
    ids=["plain", "eps", "decoder", "bare"],
)
@torch.inference_mode()
def test_autoencoder(extra: dict[str, Any]) -> None:
    ours, theirs = vae_twins(**extra)
    pixels = torch.randn(2, 3, 32, 48)
    std = torch.sqrt(theirs.bn.running_var + theirs.config.batch_norm_eps).view(1, -1, 1, 1)
    mean = theirs.bn.running_mean.view(1, -1, 1, 1)
    latents = Flux2KleinPipeline._patchify_latents(theirs.encode(pixels).latent_dist.mode())
    found, deviation = ours.encode(pixels)
    assert found.shape == (2, ours.config.channels, 32 // ours.config.factor, 3)
    assert error(found, (latents - mean) / std) < 1e-5
    assert not deviation.any()
    z = torch.randn_like(found)
    wanted = theirs.decode(Flux2KleinPipeline._unpatchify_latents(z * std + mean)).sample
    assert error(ours.decode(z), wanted) < 1e-5


@pytest.mark.parametrize("used", [1, 9, 24])
@torch.inference_mode()
def test_states_of_a_text_that_is_filled_up(used: int) -> None:
    torch.manual_seed(0)
    theirs = randomised(transformers.Qwen3Model(transformers.Qwen3Config(**KLEIN_QWEN)))
    ours = Qwen3Model(Qwen3Config.from_dict(KLEIN_QWEN)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ids, mask = torch.randint(50, (1, 24)), torch.zeros(1, 24, dtype=torch.int64)
    mask[:, :used] = 1
    wanted = theirs(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    for n, found in zip((0, 9, 18, 27), ours(ids, (0, 9, 18, 27), used), strict=True):
        assert error(found, wanted[n]) < 1e-5


@pytest.mark.parametrize(
    ("published", "count"), [(KLEIN_4B, 3_875_544_576), (KLEIN_9B, 9_078_581_248)]
)
def test_the_published_networks_have_their_names_and_numbers(
    published: Published, count: int
) -> None:
    config, vae, text = (published.configs[n] for n in ("transformer", "vae", "text_encoder"))
    with torch.device("meta"):
        ours = Flux2Transformer2DModel(Flux2Config.from_dict(config))
        theirs = diffusers.Flux2Transformer2DModel(**config)
        our_vae = AutoencoderKLFlux2(Flux2VAEConfig.from_dict(vae))
        their_vae = diffusers.AutoencoderKLFlux2(**vae)
        our_text = Qwen3Model(Qwen3Config.from_dict(text))
        their_text = transformers.Qwen3Model(transformers.Qwen3Config(**text))
    for found, wanted in ((ours, theirs), (our_vae, their_vae), (our_text, their_text)):
        shapes = {name: t.shape for name, t in wanted.state_dict().items()}
        shapes.pop("bn.num_batches_tracked", None)
        assert shapes == {name: t.shape for name, t in found.state_dict().items()}
    assert sum(math.prod(t.shape) for t in ours.state_dict().values()) == count


@pytest.mark.parametrize("steps", [1, 4, 10, 50, 200])
@pytest.mark.parametrize("tokens", [1, 256, 4096, 4300, 4301, 16384])
def test_empirical_mu(tokens: int, steps: int) -> None:
    assert empirical_mu(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps))


@pytest.mark.parametrize(
    ("config", "extra", "said"),
    [
        (Flux2Config, {"guidance_embeds": True}, "guidance_embeds=True"),
        (Flux2Config, {"patch_size": 2}, "patch_size=2"),
        (Flux2Config, {"eps": 1e-5}, "eps"),
        (Flux2Config, {"timestep_guidance_channels": 128}, "timestep_guidance_channels"),
        (Flux2Config, {"axes_dims_rope": [32, 48, 48]}, "four even numbers"),
        (Flux2Config, {"axes_dims_rope": [31, 33, 32, 32]}, "four even numbers"),
        (Flux2Config, {"axes_dims_rope": [32, 32, 32, 16]}, "attention_head_dim=128"),
        (Flux2Config, {"mlp_ratio": 1e9}, "mlp_ratio"),
        (Flux2Config, {"mlp_ratio": float("nan")}, "mlp_ratio"),
        (Flux2Config, {"num_layers": 90}, "138 layers"),
        (Flux2VAEConfig, {"patch_size": [4, 4]}, "patch_size"),
        (Flux2VAEConfig, {"batch_norm_eps": 0.0}, "batch_norm_eps"),
        (Flux2VAEConfig, {"latents_mean": [0.0]}, "latents_mean"),
        (Flux2VAEConfig, {"decoder_block_out_channels": [32, 64]}, "levels"),
        (Flux2VAEConfig, {"decoder_block_out_channels": [32, 64, 64, 65]}, "norm groups"),
    ],
)
def test_configs_that_we_do_not_build(config: Any, extra: dict[str, Any], said: str) -> None:
    with pytest.raises(SafelightError, match=said):
        config.from_dict(extra)


MODULATIONS = (
    "double_stream_modulation_img",
    "double_stream_modulation_txt",
    "single_stream_modulation",
)


def original(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of the transformer as its authors name, stack and order them."""
    found = dict(theirs)
    time = "time_guidance_embed.timestep_embedder.linear_"
    for old, new in (
        ("x_embedder", "img_in"),
        ("context_embedder", "txt_in"),
        (f"{time}1", "time_in.in_layer"),
        (f"{time}2", "time_in.out_layer"),
        ("proj_out", "final_layer.linear"),
        *((f"{name}.linear", f"{name}.lin") for name in MODULATIONS),
    ):
        found[f"{new}.weight"] = found.pop(f"{old}.weight")
    norm = found.pop("norm_out.linear.weight")
    found["final_layer.adaLN_modulation.1.weight"] = torch.cat(norm.chunk(2)[::-1])
    for i in range(KLEIN["num_layers"]):
        at, to = f"transformer_blocks.{i}.", f"double_blocks.{i}."
        for side, names in (
            ("img", ("to_q", "to_k", "to_v")),
            ("txt", ("add_q_proj", "add_k_proj", "add_v_proj")),
        ):
            three = [found.pop(f"{at}attn.{name}.weight") for name in names]
            found[f"{to}{side}_attn.qkv.weight"] = torch.cat(three)
        for old, new in (
            ("attn.to_out.0.weight", "img_attn.proj.weight"),
            ("attn.to_add_out.weight", "txt_attn.proj.weight"),
            ("attn.norm_q.weight", "img_attn.norm.query_norm.scale"),
            ("attn.norm_k.weight", "img_attn.norm.key_norm.scale"),
            ("attn.norm_added_q.weight", "txt_attn.norm.query_norm.scale"),
            ("attn.norm_added_k.weight", "txt_attn.norm.key_norm.scale"),
            ("ff.linear_in.weight", "img_mlp.0.weight"),
            ("ff.linear_out.weight", "img_mlp.2.weight"),
            ("ff_context.linear_in.weight", "txt_mlp.0.weight"),
            ("ff_context.linear_out.weight", "txt_mlp.2.weight"),
        ):
            found[to + new] = found.pop(at + old)
    for i in range(KLEIN["num_single_layers"]):
        at, to = f"single_transformer_blocks.{i}.attn.", f"single_blocks.{i}."
        for old, new in (
            ("to_qkv_mlp_proj.weight", "linear1.weight"),
            ("to_out.weight", "linear2.weight"),
            ("norm_q.weight", "norm.query_norm.scale"),
            ("norm_k.weight", "norm.key_norm.scale"),
        ):
            found[to + new] = found.pop(at + old)
    return found


def test_names_of_single_files() -> None:
    ours, theirs = twins()
    config = plain(theirs.config)
    file, section = original(theirs.state_dict()), flux2_section("transformer", config)
    assert section.names is not None
    found: dict[str, Tensor] = {}
    for key, tensor in file.items():
        module = key.removesuffix(".weight")
        if module in section.stacked:
            thirds = zip(section.stacked[module], tensor.chunk(3), strict=True)
            found |= {f"{name}.weight": third for name, third in thirds}
            continue
        name = renamed(key, section.names)
        assert name is not None, key
        swapped = name.removesuffix(".weight") in section.swapped
        found[name] = torch.cat(tensor.chunk(2)[::-1]) if swapped else tensor
    wanted = convert_flux2_transformer_checkpoint_to_diffusers(dict(file))
    assert found.keys() == wanted.keys() == ours.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
