"""Names and shapes of SDXL's variants and of the small networks, on the meta device."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from safelight.families import family_of_file
from safelight.families.sd import VARIANTS as SD_VARIANTS
from safelight.families.sdxl import VARIANTS
from safelight.nets.unet import UNet2DConditionModel as Ours
from safelight.nets.unet import UNetConfig
from safelight.weights.check import read_header
from safelight.weights.frames import _check_fit
from tests.parity.sdxl_models import original_names
from tests.parity.test_ldm_keys import ours, shapes, theirs
from tests.weights_tiny import sparse_file

FAMILIES = {family.name: family for family in VARIANTS}
# UNet, autoencoder, text encoders.
PARAMETERS = {
    "sdxl": (2_567_463_684, 83_653_863, 123_060_480, 694_659_840),
    "sdxl-inpainting": (2_567_478_084, 83_653_863, 123_060_480, 694_659_840),
}
KNOWN = {
    "sdxl": {
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "model.diffusion_model.label_emb.0.2.bias": (1280,),
        "model.diffusion_model.input_blocks.7.1.transformer_blocks.9.attn2.to_k.weight": (
            1280,
            2048,
        ),
        "model.diffusion_model.middle_block.1.transformer_blocks.9.norm3.bias": (1280,),
        "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
        "model.diffusion_model.input_blocks.4.1.proj_in.weight": (640, 640),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (768,),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
        "conditioner.embedders.1.model.positional_embedding": (77, 1280),
    },
    "sdxl-refiner": {
        "model.diffusion_model.label_emb.0.0.weight": (1536, 2560),
        "model.diffusion_model.middle_block.1.transformer_blocks.3.attn2.to_k.weight": (
            1536,
            1280,
        ),
        "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias": (1280,),
    },
    "ssd-1b": {
        "model.diffusion_model.output_blocks.2.1.transformer_blocks.9.attn1.to_q.weight": (
            1280,
            1280,
        ),
        "model.diffusion_model.middle_block.0.out_layers.3.weight": (1280, 1280, 3, 3),
    },
}
# Of folders: arXiv:2305.15798 (BK-SDM), its child tiny-sd, and arXiv:2403.16627 (SDXS).
_SD = dict(SD_VARIANTS[0].unet)
_THREE = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3,
    "mid_block_type": None,
}
SMALL: dict[str, tuple[dict[str, Any], int]] = {
    "bk-sdm-base": ({**_SD, "layers_per_block": 1}, 579_384_964),
    "bk-sdm-small": ({**_SD, "layers_per_block": 1, "mid_block_type": None}, 482_346_884),
    "bk-sdm-tiny": ({**_SD, "layers_per_block": 1, **_THREE}, 323_384_964),
    "sdxs": (
        {
            **SD_VARIANTS[2].unet,
            "layers_per_block": 1,
            **_THREE,
            "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
            "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
            "attention_head_dim": [5, 10, 20],
        },
        0,
    ),
}


def wanted_shapes(family: Any, part: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of diffusers' and transformers' networks."""
    if part == "text_encoder_2":
        with torch.device("meta"):
            network = CLIPTextModelWithProjection(CLIPTextConfig(**family.configs[part]))
    else:
        network = theirs(family, part)
    found = shapes(network)
    if part == "text_encoder":
        found = {"text_model." + k.removeprefix("text_model."): v for k, v in found.items()}
    return {k: v for k, v in found.items() if "position_ids" not in k}


@pytest.mark.parametrize("name", FAMILIES)
def test_names_and_shapes_are_those_of_diffusers(name: str) -> None:
    family = FAMILIES[name]
    counts = []
    for part in family.parts:
        found = shapes(ours(family, part))
        assert found == wanted_shapes(family, part), part
        counts.append(sum(map(math.prod, found.values())))
    assert name not in PARAMETERS or tuple(counts) == PARAMETERS[name]


@pytest.mark.parametrize("name", SMALL)
def test_small_networks_are_those_of_diffusers(name: str) -> None:
    config, count = SMALL[name]
    with torch.device("meta"):
        found = shapes(Ours(UNetConfig.from_dict(config)))
        wanted = shapes(UNet2DConditionModel.from_config(config))
    assert found == wanted
    assert not count or sum(map(math.prod, found.values())) == count


@pytest.mark.parametrize("name", FAMILIES)
def test_the_family_of_a_single_file_is_told_by_its_shapes(name: str, tmp_path: Path) -> None:
    """A sparse file has the full size; only its header is read."""
    family = FAMILIES[name]
    file: dict[str, tuple[int, ...]] = {}
    for prefix, section in family.sections().items():
        state = ours(family, section.part).state_dict()
        for key, tensor in original_names(section, state).items():
            file[prefix + key] = tuple(tensor.shape)
    assert KNOWN.get(name, {}).items() <= file.items()
    read = read_header(sparse_file(tmp_path / "full.safetensors", file))
    found = family_of_file(read)
    assert found.name == name
    for part, weights in found.single_file(read).weights.items():
        _check_fit(name, part, ours(family, part), weights)
