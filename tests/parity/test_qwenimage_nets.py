"""Qwen-Image's transformer, autoencoder and text encoder against diffusers, in float32."""

import json
import math
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from torch import Tensor

from safelight.errors import SafelightError
from safelight.families.qwenimage_files import QWEN_IMAGE
from safelight.nets.qwen2 import Qwen2Config, Qwen2Model
from safelight.nets.qwenimage import QwenImageConfig, QwenImageTransformer2DModel
from safelight.nets.vae_qwen import AutoencoderKLQwenImage, QwenVAEConfig
from safelight.weights.names import renamed
from safelight.weights.names_qwen import (
    qwen2_folder_name,
    qwen_vae_folder_name,
    qwen_vae_names,
    qwen_vae_shape,
    qwen_vae_unused,
)
from tests.parity.flow_models import QWEN_IMAGE_NET, QWEN_VAE, qwen2_config, randomised
from tests.parity.test_flux2_nets import error, plain

TINY = QWEN_IMAGE_NET | {"joint_attention_dim": 40, "in_channels": 20, "out_channels": 5}


def twins(**extra: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    theirs = randomised(diffusers.QwenImageTransformer2DModel(**(TINY | extra)))
    ours = QwenImageTransformer2DModel(QwenImageConfig.from_dict(plain(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"axes_dims_rope": (2, 6, 12), "attention_head_dim": 20, "num_attention_heads": 2},
        {"out_channels": 3, "num_layers": 1},
    ],
    ids=["plain", "axes", "out"],
)
@torch.inference_mode()
def test_transformer(extra: dict[str, Any]) -> None:
    """Of a picture with odd numbers of rows and columns of patches, for the middle."""
    ours, theirs = twins(**extra)
    x, context = torch.randn(2, 5, 10, 14), torch.randn(2, 9, 40)
    times = torch.tensor([17.0, 803.0])
    patches = torch.nn.functional.pixel_unshuffle(x, 2)
    wanted = theirs(
        patches.flatten(2).transpose(1, 2),
        context,
        timestep=times / 1000,
        img_shapes=[[(1, 5, 7)]] * 2,
    ).sample
    found = torch.nn.functional.pixel_unshuffle(ours(x, times, context), 2)
    assert error(found, wanted.transpose(1, 2).reshape(found.shape)) < 1e-5


@torch.inference_mode()
def test_half_precisions() -> None:
    """float16 holds numbers beyond its largest as that."""
    ours, _ = twins()
    x, times, context = torch.randn(1, 5, 4, 4), torch.tensor([300.0]), torch.randn(1, 9, 40)
    wanted = ours(x, times, context)
    found = ours.bfloat16()(x.bfloat16(), times, context.bfloat16())
    assert found.dtype == torch.bfloat16
    assert error(found.float(), wanted) < 0.05
    for block in ours.float().transformer_blocks:
        block.img_mlp.net[2].weight.mul_(1e5)
        block.txt_mlp.net[2].weight.mul_(1e5)
    assert ours.half()(x.half(), times, context.half()).isfinite().all()


def of_one_frame(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a folder's weights of the autoencoder as they are read."""
    found = {}
    for key, tensor in state.items():
        if (name := qwen_vae_folder_name(key)) is not None:
            last = tensor[:, :, -1] if tensor.ndim == 5 else tensor
            found[name] = last.reshape(qwen_vae_shape(name, tuple(tensor.shape)))
    return found


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"dim_mult": [1, 3, 2], "temperal_downsample": [True, False], "num_res_blocks": 2},
        {"z_dim": 3, "latents_mean": [0.1, 0.2, 0.3], "latents_std": [1.0, 2.0, 3.0]},
    ],
    ids=["plain", "levels", "channels"],
)
@torch.inference_mode()
def test_autoencoder(extra: dict[str, Any]) -> None:
    torch.manual_seed(0)
    theirs = randomised(diffusers.AutoencoderKLQwenImage(**(QWEN_VAE | extra)))
    ours = AutoencoderKLQwenImage(QwenVAEConfig.from_dict(plain(theirs.config))).eval()
    ours.load_state_dict(of_one_frame(theirs.state_dict()), strict=True)
    pixels = torch.randn(2, 3, 32, 48)
    wanted = theirs.encode(pixels[:, :, None]).latent_dist
    mean, std = ours.encode(pixels)
    assert error(mean, wanted.mean[:, :, 0]) < 1e-5
    assert error(std, wanted.std[:, :, 0]) < 1e-5
    decoded = theirs.decode(wanted.mean).sample[:, :, 0]
    assert error(ours.decode(mean).clamp(-1, 1), decoded) < 1e-5
    config = theirs.config
    shift, scale = (
        torch.tensor(v).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std)
    )
    assert error(ours.config.scale(mean), (mean - shift) / scale) < 1e-6
    assert error(ours.config.unscale(ours.config.scale(mean)), mean) < 1e-6


@torch.inference_mode()
def test_text_states() -> None:
    torch.manual_seed(0)
    whole = transformers.Qwen2_5_VLForConditionalGeneration(qwen2_config())
    theirs = randomised(whole, 0.2)
    ours = Qwen2Model(Qwen2Config.from_dict(theirs.config.to_dict())).eval()
    named = {qwen2_folder_name(key): tensor for key, tensor in theirs.state_dict().items()}
    named.pop(None)
    ours.load_state_dict(named, strict=True)
    ids = torch.randint(50, (1, 24))
    wanted = theirs(
        input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True
    ).hidden_states
    for n in (0, 1, -2, -1):
        [found] = ours(ids, [n])
        assert error(found, wanted[n]) < 1e-5


def test_names_of_the_text_encoder() -> None:
    """Older writers have the language model at its root, newer ones below a name."""
    for key in (
        "model.layers.0.mlp.up_proj.weight",
        "model.language_model.layers.0.mlp.up_proj.weight",
    ):
        assert qwen2_folder_name(key) == "layers.0.mlp.up_proj.weight"
    for key in (
        "lm_head.weight",
        "visual.blocks.0.attn.qkv.weight",
        "model.visual.merger.ln_q.weight",
    ):
        assert qwen2_folder_name(key) is None


def test_the_published_networks_have_their_names_and_numbers() -> None:
    config, vae, text = (QWEN_IMAGE.configs[n] for n in ("transformer", "vae", "text_encoder"))
    with torch.device("meta"):
        ours = QwenImageTransformer2DModel(QwenImageConfig.from_dict(config))
        theirs = diffusers.QwenImageTransformer2DModel(**config)
        our_vae = AutoencoderKLQwenImage(QwenVAEConfig.from_dict(vae))
        their_vae = diffusers.AutoencoderKLQwenImage(**vae)
        our_text = Qwen2Model(Qwen2Config.from_dict(text))
    shapes = {name: t.shape for name, t in theirs.state_dict().items()}
    assert shapes == {name: t.shape for name, t in ours.state_dict().items()}
    assert sum(math.prod(shape) for shape in shapes.values()) == 20_430_401_088
    named = {
        name: torch.Size(qwen_vae_shape(name, tuple(t.shape)))
        for key, t in their_vae.state_dict().items()
        if (name := qwen_vae_folder_name(key)) is not None
    }
    assert named == {name: t.shape for name, t in our_vae.state_dict().items()}
    assert sum(math.prod(t.shape) for t in our_text.state_dict().values()) == 7_070_619_136


def wan_names(state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Return an autoencoder's weights as its authors name them. state: of a folder."""
    back = {ours: theirs for theirs, ours in qwen_vae_names(config).items()}
    found = {}
    for key, tensor in state.items():
        name = qwen_vae_folder_name(key.replace("time_conv", "resample.1"))
        if (name := renamed(str(name), back)) is not None:
            found[name.replace("resample.1", "time_conv") if "time_conv" in key else name] = tensor
    return found


def test_original_names_of_the_autoencoder() -> None:
    config = QWEN_IMAGE.configs["vae"]
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKLQwenImage(**config).state_dict()
    original = wan_names(theirs, dict(config))
    assert len(original) == len(theirs)
    assert {"conv1.weight", "decoder.head.0.gamma", "encoder.downsamples.2.resample.1.bias"} < {
        *original
    }
    wanted = convert_wan_vae_to_diffusers(dict(original))
    assert {key: tensor.shape for key, tensor in wanted.items()} == {
        key: tensor.shape for key, tensor in theirs.items()
    }
    kept = [key for key in original if not qwen_vae_unused(key)]
    names = qwen_vae_names(config)
    assert {renamed(key, names) for key in kept} == {*of_one_frame(theirs)}


@pytest.mark.parametrize(
    ("config", "extra", "said"),
    [
        (QwenImageConfig, {"zero_cond_t": True}, "zero_cond_t=True"),
        (QwenImageConfig, {"use_layer3d_rope": True}, "use_layer3d_rope=True"),
        (QwenImageConfig, {"patch_size": 1}, "patch_size=1"),
        (QwenImageConfig, {"axes_dims_rope": [16, 56]}, "three even numbers"),
        (QwenImageConfig, {"in_channels": 63}, "63 channels"),
        (QwenImageConfig, {"num_layers": 900}, "num_layers"),
        (QwenVAEConfig, {"attn_scales": [1.0]}, "attn_scales"),
        (QwenVAEConfig, {"input_channels": 4}, "input_channels=4"),
        (QwenVAEConfig, {"latents_mean": [0.0]}, "a value for each channel"),
        (QwenVAEConfig, {"latents_std": [0.0] * 16}, "latents_std"),
        (QwenVAEConfig, {"base_dim": 3}, "divide by two"),
        (Qwen2Config, {"hidden_size": 36, "num_attention_heads": 8}, "36 does not divide"),
        (Qwen2Config, {"text_config": 3}, "should be a table"),
        (Qwen2Config, {"model_type": "qwen2_vl"}, "model_type"),
        (Qwen2Config, {"use_sliding_window": True}, "use_sliding_window"),
        (Qwen2Config, {"rope_scaling": {"type": "yarn"}}, "type='yarn'"),
        (Qwen2Config, {"rope_parameters": {"factor": 4}}, "rope_parameters"),
    ],
)
def test_configs_that_we_do_not_build(config: Any, extra: dict[str, Any], said: str) -> None:
    with pytest.raises(SafelightError, match=said):
        config.from_dict(extra)


def test_the_published_text_config() -> None:
    """As its folder has it: the numbers at the root, and the same again below a name."""
    published = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "vocab_size": 152064,
    }
    nested = {"text_config": {**published, "model_type": "qwen2_5_vl_text"}, "vision_config": {}}
    wanted = Qwen2Config.from_dict(QWEN_IMAGE.configs["text_encoder"])
    assert wanted.head_dim == 128
    for told in (published, nested, {**published, **nested}):
        assert Qwen2Config.from_dict(json.loads(json.dumps(told))) == wanted
