"""Tiny random models in the layouts of diffusers, written by diffusers itself."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


@pytest.fixture
def worst(request: pytest.FixtureRequest) -> dict[str, float]:
    """Collect the largest differences of a test's whole pictures, for the suite's summary."""
    found = {"latents": 0.0, "pixels": 0.0}
    request.node.user_properties.append(("against diffusers", found))
    return found


SD1_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Ignore the warnings of diffusers and transformers about themselves."""
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _stable_diffusion(folder: Path, *, in_channels: int = 4, v2: bool = False) -> Path:
    torch.manual_seed(0)
    tokenizer = folder / "tokenizer"
    from safelight.train.tokens import train_vocabulary

    train_vocabulary(["a red apple on a table", "a cat, a dog"], 560, tokenizer, 77)
    text = transformers.CLIPTextConfig(
        vocab_size=560,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_act="gelu" if v2 else "quick_gelu",
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(2, 4) if v2 else 4,
        cross_attention_dim=32,
        use_linear_projection=v2,
        norm_num_groups=8,
    )
    # Usual random weights hardly react to their input; larger ones show errors.
    with torch.no_grad():
        unet.conv_out.weight.mul_(4)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        sample_size=64,
    )
    scheduler = dict(SD1_SCHEDULER, prediction_type="v_prediction" if v2 else "epsilon")
    kind = "StableDiffusionInpaintPipeline" if in_channels == 9 else "StableDiffusionPipeline"
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "PNDMScheduler", **scheduler})
    )
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    transformers.CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    parts = {
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind, **parts}))
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "sd1": _stable_diffusion(root / "sd1"),
        "sd2": _stable_diffusion(root / "sd2", v2=True),
        "inpainting": _stable_diffusion(root / "inpainting", in_channels=9),
        "pixels": _pixels(root / "pixels"),
    }


def _pixels(folder: Path) -> Path:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
    )
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder
