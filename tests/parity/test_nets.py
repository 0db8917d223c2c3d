"""Each network against diffusers' and transformers' own, weights shared, float32."""

import json
from typing import Any

import diffusers
import pytest
import torch
import transformers
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.nets.clip import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from safelight.nets.unet import UNet2DConditionModel, UNetConfig, guidance_embedding
from safelight.nets.unet2d import UNet2DConfig, UNet2DModel
from safelight.nets.vae import AutoencoderKL, VAEConfig

TIMES = torch.tensor([3.5, 991.0])


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def twin(ours: nn.Module, theirs: nn.Module) -> None:
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ours.eval()
    theirs.eval()


def plain(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dict(config)))


@pytest.mark.parametrize(
    "extra",
    [
        {"attention_head_dim": 2},
        {"attention_head_dim": [1, 2, 4], "use_linear_projection": True},
        {"time_cond_proj_dim": 32, "in_channels": 9},
        {"flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0},
        {"only_cross_attention": True},
    ],
    ids=["sd1", "sd2", "lcm-inpainting", "other-padding", "only-cross"],
)
@torch.inference_mode()
def test_unet(extra: dict[str, Any]) -> None:
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64, 64),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=16,
        **extra,
    )
    ours = UNet2DConditionModel(UNetConfig.from_dict(plain(theirs.config)))
    twin(ours, theirs)
    # Odd sides: the way up must meet skips that are not twice its own size.
    x = torch.randn(2, extra.get("in_channels", 4), 17, 20)
    context = torch.randn(2, 7, 32)
    guidance = None
    if "time_cond_proj_dim" in extra:
        guidance = guidance_embedding([7.5, 2.0], 32)
    found = ours(x, TIMES, context, guidance)
    expected = theirs(x, TIMES, context, timestep_cond=guidance).sample
    assert error(found, expected) < 1e-5


@pytest.mark.parametrize(
    "extra",
    [
        {"transformer_layers_per_block": [1, 2, 3]},
        {
            "transformer_layers_per_block": [1, [2], [3]],
            "reverse_transformer_layers_per_block": [[1, 4], [2, 1], 1],
            "mid_block_type": "UNetMidBlock2D",
        },
        {"mid_block_type": None, "time_cond_proj_dim": 32},
    ],
    ids=["sdxl", "ssd-1b", "no-middle"],
)
@torch.inference_mode()
def test_unet_with_pooled_text_and_sizes(extra: dict[str, Any]) -> None:
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(1, 2, 4),
        cross_attention_dim=24,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=12 + 6 * 8,
        **extra,
    )
    ours = UNet2DConditionModel(UNetConfig.from_dict(plain(theirs.config)))
    twin(ours, theirs)
    x, context = torch.randn(2, 4, 16, 20), torch.randn(4, 7, 24)
    pooled = torch.randn(4, 12)
    sizes = torch.tensor([[64.0, 80, 0, 0, 64, 80], [1024.0, 768, 8, 16, 64, 80]]).repeat(2, 1)
    guidance = guidance_embedding([7.5, 2.0], 32) if "time_cond_proj_dim" in extra else None
    found = ours(x, TIMES, context, guidance, pooled, sizes)

    def twice(t: Tensor | None) -> Any:
        return None if t is None else t.repeat_interleave(2, dim=0)

    # diffusers wants a row for each text; ours shares those of a picture until the texts part.
    expected = theirs(
        twice(x),
        twice(TIMES),
        context,
        timestep_cond=twice(guidance),
        added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes},
    ).sample
    assert error(found, expected) < 1e-5


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"transformer_layers_per_block": [1, [1, 1], 1, 1]}, "reverse_transformer"),
        ({"transformer_layers_per_block": [1, 2]}, "2 levels"),
        (
            {
                "transformer_layers_per_block": [1, 1, 1, [1, 2]],
                "reverse_transformer_layers_per_block": [1, 1, 1, 1],
            },
            "no single number",
        ),
        (
            {
                "transformer_layers_per_block": [1, 1, [1] * 3, 1],
                "reverse_transformer_layers_per_block": [1, 1, 1, 1],
            },
            "not 2 layers",
        ),
        ({"transformer_layers_per_block": [1, 1, 1, 99]}, "from 0 to 32"),
        ({"transformer_layers_per_block": [32] * 4}, "layers"),
        ({"transformer_layers_per_block": [1, 1, "x", 1]}, "should be"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
        ({"addition_embed_type": "image"}, "addition_embed_type"),
        ({"addition_embed_type": "text_time"}, "addition_time_embed_dim"),
    ],
)
def test_unets_that_cannot_be(extra: dict[str, Any], said: str) -> None:
    with pytest.raises(SafelightError, match=said):
        UNetConfig.from_dict(extra)


def test_guidance_embedding() -> None:
    from diffusers import LatentConsistencyModelPipeline

    expected = LatentConsistencyModelPipeline.get_guidance_scale_embedding(
        None,  # it uses nothing of itself
        torch.tensor([6.5, 1.0]),
        embedding_dim=32,
    )
    # The angles go to 6,500 radians, where float32 has four digits left behind the point.
    assert error(guidance_embedding([7.5, 2.0], 32), expected) < 1e-4


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {
            "attention_head_dim": None,
            "norm_eps": 1e-6,
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
        },
        # A level without attention may have fewer channels than a head.
        {"block_out_channels": (16, 64, 64), "attention_head_dim": 32, "norm_num_groups": 16},
    ],
    ids=["defaults", "ddpm", "narrow"],
)
@torch.inference_mode()
def test_unet2d(extra: dict[str, Any]) -> None:
    torch.manual_seed(0)
    blocks: dict[str, Any] = {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    }
    theirs = diffusers.UNet2DModel(**(blocks | extra))
    ours = UNet2DModel(UNet2DConfig.from_dict(plain(theirs.config)))
    twin(ours, theirs)
    x = torch.randn(2, 3, 16, 20)
    assert error(ours(x, TIMES), theirs(x, TIMES).sample) < 1e-5


@pytest.mark.parametrize("narrow", [0, 1, 2])
def test_channels_of_a_level_with_attention_divide_into_heads(narrow: int) -> None:
    channels = [64, 64, 64]
    channels[narrow] = 16
    config = {
        "block_out_channels": channels,
        "down_block_types": ["AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": 32,
        "norm_num_groups": 16,
    }  # the last level's are those of the middle, too
    with pytest.raises(SafelightError, match="16 channels do not divide into heads"):
        UNet2DConfig.from_dict(config)


@torch.inference_mode()
def test_autoencoder() -> None:
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    ours = AutoencoderKL(VAEConfig.from_dict(plain(theirs.config)))
    twin(ours, theirs)
    pixels = torch.randn(1, 3, 48, 64)
    mean, std = ours.encode(pixels)
    expected = theirs.encode(pixels).latent_dist
    assert error(mean, expected.mean) < 1e-5
    assert error(std, expected.std) < 1e-5
    assert error(ours.decode(mean), theirs.decode(expected.mean).sample) < 1e-5


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@torch.inference_mode()
def test_text_encoder(act: str) -> None:
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act=act,
        bos_token_id=97,
        eos_token_id=98,
    )
    theirs = transformers.CLIPTextModel(config).eval()
    ours = CLIPTextModel(CLIPTextConfig.from_dict(json.loads(config.to_json_string()))).eval()
    # transformers 5 leaves out the prefix that the checkpoints have.
    weights = {
        name if name.startswith("text_model.") else f"text_model.{name}": value
        for name, value in theirs.state_dict().items()
        if "position_ids" not in name
    }
    ours.load_state_dict(weights, strict=True)
    ids = torch.randint(0, 97, (2, 77))
    assert error(ours(ids), theirs(ids).last_hidden_state) < 1e-5


@pytest.mark.parametrize("eos", [2, 98])
@torch.inference_mode()
def test_text_encoder_with_projection(eos: int) -> None:
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=20,
        bos_token_id=97,
        eos_token_id=eos,
    )
    theirs = transformers.CLIPTextModelWithProjection(config).eval()
    said = json.loads(config.to_json_string())
    ours = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(said)).eval()
    weights = {k: v for k, v in theirs.state_dict().items() if "position_ids" not in k}
    ours.load_state_dict(weights, strict=True)
    ids = torch.randint(0, 97, (3, 77))
    # The end mark, 98 or the largest id, is where the text ends; the padding may be equal to it.
    for row, end in enumerate((5, 40, 76)):
        ids[row, end:] = 98 if eos == 98 else 0
        ids[row, end] = 98 if eos == 98 else 99
    expected = theirs(ids, output_hidden_states=True)
    for skip in (0, 1, 4):
        states, pooled = ours(ids, skip)
        assert error(states, expected.hidden_states[-1 - skip]) < 1e-5
        assert error(pooled, expected.text_embeds) < 1e-5
    first = CLIPTextModel(ours.config).eval()
    first.load_state_dict({k: v for k, v in weights.items() if k != "text_projection.weight"})
    assert torch.equal(first(ids, 1, norm=False), ours(ids, 1)[0])
