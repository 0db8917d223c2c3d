"""Names and shapes of our networks, and the map of single files, against diffusers."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from safelight.families import family_of_file
from safelight.families.sd import CLIP, OPEN_CLIP, SD, UNET, VAE, VARIANTS
from safelight.weights.check import read_header
from safelight.weights.frames import _check_fit
from safelight.weights.load import _read
from safelight.weights.names import (
    from_folder,
    open_clip_names,
    unet_names,
    vae_names,
)
from tests.weights_tiny import sparse_file

# Parameters of the published checkpoints: UNet, VAE, text encoder.
PARAMETERS = {
    "sd1": (859_520_964, 83_653_863, 123_060_480),
    "sd1-inpainting": (859_535_364, 83_653_863, 123_060_480),
    "sd2": (865_910_724, 83_653_863, 340_387_840),
    "sd2-inpainting": (865_925_124, 83_653_863, 340_387_840),
}
FAMILY = {f.name: f for f in VARIANTS}


def ours(family, part):
    config_class, network_class = family.parts[part].load_classes()
    with torch.device("meta"):
        return network_class(config_class.from_dict(family.configs[part]))


def theirs(family, part):
    config = family.configs[part]
    with torch.device("meta"):
        if part == "text_encoder":
            return CLIPTextModel(CLIPTextConfig(**config))
        return (UNet2DConditionModel if part == "unet" else AutoencoderKL).from_config(config)


def shapes(network):
    return {name: tuple(t.shape) for name, t in network.state_dict().items()}


@pytest.mark.parametrize("name", FAMILY)
def test_names_and_shapes_are_those_of_diffusers(name):
    family = FAMILY[name]
    for part, count in zip(("unet", "vae", "text_encoder"), PARAMETERS[name], strict=True):
        found, wanted = shapes(ours(family, part)), shapes(theirs(family, part))
        if part == "text_encoder":
            wanted = {"text_model." + k.removeprefix("text_model."): v for k, v in wanted.items()}
            wanted.pop("text_model.embeddings.position_ids", None)
        assert found == wanted
        assert sum(map(math.prod, found.values())) == count


def inverted(table, names):
    """Return the names on the other side of a table."""
    back = {b: a for a, b in table.items()}
    found = {}
    for name in names:
        module, rest = name, ""
        while module not in back:
            module, dot, leaf = module.rpartition(".")
            rest = dot + leaf + rest
        found[name] = back[module] + rest
    return found


def ldm_shapes(family):
    """The names and shapes of a single file of this family, by the original code's names."""
    file = {}
    for part, prefix, table in (
        ("unet", UNET, unet_names(family.unet)),
        ("vae", VAE, vae_names(family.vae)),
    ):
        network = shapes(ours(family, part))
        for name, key in inverted(table, network).items():
            shape = network[name]
            if part == "vae" and ".attentions." in name and len(shape) == 2:
                shape = (*shape, 1, 1)
            file[prefix + key] = shape
    text = shapes(ours(family, "text_encoder"))
    if family.context == 768 or family.name == "small-1":
        return file | {CLIP + name: shape for name, shape in text.items()}
    layers = family.text_encoder["num_hidden_layers"]
    table = open_clip_names(layers)
    joint = {name for name in text if any(f".{x}_proj." in name for x in "qkv")}
    for name, key in inverted(table, text.keys() - joint).items():
        file[OPEN_CLIP + key] = text[name]
    for name in joint:
        if ".q_proj." in name:
            layer, leaf = name.split(".self_attn.q_proj.")
            key = inverted(table, [layer])[layer]
            rows, *rest = text[name]
            file[f"{OPEN_CLIP}{key}.attn.in_proj_{leaf}"] = (3 * rows, *rest)
    last = {k: v for k, v in file.items() if f"resblocks.{layers - 1}." in k}
    unused = {k.replace(f".{layers - 1}.", f".{layers}."): v for k, v in last.items()}
    width = family.context
    return file | unused | {OPEN_CLIP + "text_projection": (width, width)}


KNOWN = {
    "model.diffusion_model.time_embed.0.weight": (1280, 320),
    "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
    "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
    "model.diffusion_model.input_blocks.8.1.transformer_blocks.0.ff.net.0.proj.bias": (10240,),
    "model.diffusion_model.middle_block.1.norm.weight": (1280,),
    "model.diffusion_model.middle_block.2.emb_layers.1.weight": (1280, 1280),
    "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
    "model.diffusion_model.out.2.bias": (4,),
    "first_stage_model.encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
    "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
    "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
    "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
}
KNOWN_TEXT = {
    768: {
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
        "cond_stage_model.transformer.text_model.final_layer_norm.bias": (768,),
    },
    1024: {
        "cond_stage_model.model.transformer.resblocks.23.attn.in_proj_weight": (3072, 1024),
        "cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.weight": (4096, 1024),
        "cond_stage_model.model.positional_embedding": (77, 1024),
        "cond_stage_model.model.ln_final.weight": (1024,),
    },
}


@pytest.mark.parametrize("name", FAMILY)
def test_the_table_has_the_keys_of_published_checkpoints(name):
    family = FAMILY[name]
    file = ldm_shapes(family)
    assert KNOWN.items() <= file.items()
    assert KNOWN_TEXT[family.context].items() <= file.items()
    wide = 4 if family.in_channels == 4 else 9
    assert file["model.diffusion_model.input_blocks.0.0.weight"] == (320, wide, 3, 3)
    # OpenCLIP: 12 tensors in each of 24 layers, 5 around them; CLIP: 16 in each of 12, and 4.
    assert len(file) == 686 + 248 + {768: 12 * 16 + 4, 1024: 24 * 12 + 5}[family.context]


@pytest.fixture(scope="module", params=["small-1", "small-2"])
def small(request, tmp_path_factory):
    """A single file with the structure of SD 1 or 2, random weights and few channels."""
    version = request.param[-1]
    real = FAMILY["sd" + version]
    family = replace(
        real,
        name=request.param,
        context=48,
        unet={
            **real.unet,
            "block_out_channels": [32, 64, 96, 96],
            "cross_attention_dim": 48,
            "attention_head_dim": 8 if version == "1" else [1, 2, 3, 3],
        },
        vae={**real.vae, "block_out_channels": [32, 32, 64, 64]},
        text_encoder={
            **real.text_encoder,
            "vocab_size": 99,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 23 if version == "2" else 3,
            "num_attention_heads": 4,
        },
    )
    generator = torch.Generator().manual_seed(0)
    file = {k: torch.randn(s, generator=generator) for k, s in ldm_shapes(family).items()}
    file["model_ema.decay"] = torch.tensor(0.9999)
    file["betas"] = torch.zeros(1000)
    path = tmp_path_factory.mktemp("ldm") / "small.safetensors"
    save_file(file, path)
    return family, file, path


def test_single_files_convert_as_diffusers_converts_them(small):
    family, file, path = small
    header = read_header(path)
    found = family.single_file(header).weights
    unet = {**family.configs["unet"], "class_embed_type": None}
    wanted = {
        "unet": convert_ldm_unet_checkpoint(dict(file), unet),
        "vae": convert_ldm_vae_checkpoint(dict(file), family.vae),
    }
    if family.name == "small-1":
        wanted["text_encoder"] = convert_ldm_clip_checkpoint(dict(file))
    else:
        text = theirs(family, "text_encoder")
        wanted["text_encoder"] = convert_open_clip_checkpoint(text, dict(file))
    for part, weights in found.items():
        _check_fit("small", part, ours(family, part), weights)
        cpu = torch.device("cpu")
        read = _read(header, weights, str(header.path), cpu, torch.float32, keep=False)
        assert read.keys() == wanted[part].keys()
        for name, tensor in read.items():
            assert torch.equal(tensor, wanted[part][name]), name


def test_folders_that_diffusers_writes_fit(small, tmp_path):
    family, _, _ = small
    for part in SD.parts:
        network = theirs(family, part).to_empty(device="cpu")
        network.save_pretrained(tmp_path / part)
        headers = [read_header(p) for p in (tmp_path / part).glob("*.safetensors")]
        _check_fit("small", part, ours(family, part), from_folder(SD.parts[part], headers))


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_is_told_by_shapes(name, tmp_path):
    """A sparse file has the full size; only its header is read."""
    read = read_header(sparse_file(tmp_path / "full.safetensors", ldm_shapes(FAMILY[name])))
    family = family_of_file(read)
    assert family.name == name
    for part, weights in family.single_file(read).weights.items():
        _check_fit(name, part, ours(family, part), weights)
