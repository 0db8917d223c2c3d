"""LoRA and its kin for SD 3, FLUX and Z-Image: weights and pictures equal those of diffusers.

The original code has queries, keys and values as one layer, and the halves of the last norm in the
other order. What a file in that naming does is computed there, and converted by the functions with
which diffusers converts checkpoints.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import safelight
from safelight.adapters.asked import AskedLora
from safelight.adapters.names import layers_of, table
from safelight.errors import SafelightError
from safelight.request import Request
from safelight.server.names import Names
from safelight.server.settings import WorkerSettings
from safelight.weights.kinds import kind_of
from safelight.weights.names import original_names
from tests.parity.flow_models import FLUX, make_flux, make_klein, make_sd3, make_zimage
from tests.parity.test_pictures import PROMPT, Worst, check, draw

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

from diffusers.loaders import (  # noqa: E402
    lora_conversion_utils,
    lora_pipeline,
    single_file_utils,
)

WITHIN = 1e-6
NAMES = ("sd3", "flux", "klein", "zimage")
PIPELINES = {
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
    "klein": "Flux2KleinPipeline",
    "zimage": "ZImagePipeline",
}
LAYERS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "proj_mlp", "norm_out.linear", "w2"),
    *("to_qkv_mlp_proj", "linear_in"),
)
WIDTH = FLUX["attention_head_dim"] * FLUX["num_attention_heads"]
Pair = dict[str, Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("flow")
    return {
        "sd3": make_sd3(root / "sd3", dual_attention_layers=[0, 1], qk_norm="rms_norm"),
        "flux": make_flux(root / "flux", guided=True),
        "klein": make_klein(root / "klein", distilled=True),
        "zimage": make_zimage(root / "zimage", shift=3.0),
    }


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, Any]:
    return {
        name: safelight.load(folder, device="cpu", dtype="float32", plain=True)
        for name, folder in folders.items()
    }


def pipeline(folder: Path, name: str) -> Any:
    found = getattr(diffusers, PIPELINES[name]).from_pretrained(folder)
    found.set_progress_bar_config(disable=True)
    return found


def same(ours: nn.Module, theirs: Pair, untouched: nn.Module) -> None:
    """Weights are equal within 1e-6, and some are not those without a LoRA."""
    mine, before = ours.state_dict(), untouched.state_dict()
    assert theirs.keys() == mine.keys()
    worst = {name: float((mine[name] - tensor).abs().max()) for name, tensor in theirs.items()}
    assert max(worst.values()) <= WITHIN, max(worst, key=worst.__getitem__)
    assert any(not torch.equal(mine[name], before[name]) for name in mine)


# --- the naming of diffusers ----------------------------------------------------------------------


def pairs(network: nn.Module, ends: tuple[str, ...] = LAYERS) -> dict[str, tuple[Tensor, Tensor]]:
    """Random down and up matrices of rank 4 for the layers whose names end so."""
    torch.manual_seed(1)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in network.named_modules():
        if f".{name}".endswith(tuple(f".{end}" for end in ends)) and hasattr(layer, "weight"):
            out, inner = layer.weight.shape
            found[name] = torch.randn(4, inner) * 0.2, torch.randn(out, 4) * 0.2
    assert found
    return found


def written(path: Path, named: dict[str, tuple[Tensor, Tensor]], ends: tuple[str, str]) -> Pair:
    """Write down and up matrices by the names of their layers."""
    tensors = {
        f"{key}{end}": t for key, two in named.items() for end, t in zip(ends, two, strict=True)
    }
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return tensors


PEFT = ".lora_A.weight", ".lora_B.weight"
KOHYA = ".lora_down.weight", ".lora_up.weight"
DOTTED = ("transformer.", "", "base_model.model.", "diffusion_model.")
FLAT = ("lora_transformer_", "lora_unet_", "lycoris_")


@pytest.mark.parametrize("name", NAMES)
def test_diffusers(
    name: str, models: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    """A file of diffusers with PEFT's alpha, loaded by both."""
    model, pipe = models[name], pipeline(folders[name], name)
    named = {f"transformer.{key}": two for key, two in pairs(model.network).items()}
    path = tmp_path / "a.safetensors"
    tensors = written(path, named, PEFT)
    told = {"r": 4, "lora_alpha": 6, "target_modules": list(LAYERS)}
    metadata = json.dumps({f"transformer.{key}": value for key, value in told.items()})
    save_file(tensors, path, {"lora_adapter_metadata": metadata})
    pipe.load_lora_weights(tmp_path, weight_name=path.name, adapter_name="a")
    pipe.fuse_lora(lora_scale=0.75)
    pipe.unload_lora_weights()
    same(model.adapted([f"{path}:0.75"]).network, pipe.transformer.state_dict(), model.network)


@pytest.mark.parametrize(
    "how",
    [{}, {"use_rslora": True}, {"alpha_pattern": {"attn.to_q": 3}}],
    ids=["alpha", "root of the rank", "alpha of a layer"],
)
def test_a_file_of_a_network_on_its_own(
    how: dict[str, Any], models: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    """Its settings have no part before their names."""
    net = diffusers.FluxTransformer2DModel.from_pretrained(folders["flux"] / "transformer")
    torch.manual_seed(7)
    layers = ["to_q", "proj_mlp"]
    net.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=16, target_modules=layers, init_lora_weights=False, **how)
    )
    net.save_lora_adapter(tmp_path)
    net.fuse_lora()
    net.unload_lora()
    same(models["flux"].adapted([str(tmp_path)]).network, net.state_dict(), models["flux"].network)


@pytest.mark.parametrize(
    "how",
    [{"r": 2}, {"r": 64}, {"r": 64, "rank_pattern": {"attn.to_q": 32}}],
    ids=["low factors", "whole factors", "rank of a layer"],
)
def test_lokr_of_peft(
    how: dict[str, Any], models: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    """PEFT scales by alpha / r even if no factor has r as a side."""
    net = diffusers.FluxTransformer2DModel.from_pretrained(folders["flux"] / "transformer")
    torch.manual_seed(8)
    layers = ["to_q", "proj_mlp"]
    config = peft.LoKrConfig(alpha=16, target_modules=layers, init_weights=False, **how)
    made = peft.get_peft_model(net, config)
    made.save_pretrained(tmp_path)
    wanted = made.merge_and_unload().state_dict()
    ours = models["flux"].adapted([str(tmp_path)]).network.state_dict()
    for key, tensor in wanted.items():
        assert torch.allclose(ours[key], tensor, rtol=1e-5, atol=WITHIN), key


@pytest.mark.parametrize("name", NAMES)
def test_namings(name: str, models: dict[str, Any], tmp_path: Path) -> None:
    """Each prefix, with dots and without, gives the weights W + 0.5 · up · down."""
    model = models[name]
    found = pairs(model.network)
    wanted = {key: tensor.clone() for key, tensor in model.network.state_dict().items()}
    for layer, (down, up) in found.items():
        wanted[f"{layer}.weight"] += 0.5 * (up @ down)
    for i, prefix in enumerate((*DOTTED, *FLAT)):
        flat = prefix in FLAT
        path = tmp_path / f"{i}.safetensors"
        named = {prefix + (k.replace(".", "_") if flat else k): v for k, v in found.items()}
        written(path, named, KOHYA if flat else PEFT)
        same(model.adapted([f"{path}:0.5"]).network, wanted, model.network)


@pytest.mark.parametrize("name", NAMES)
def test_no_spelling_of_two_layers_is_the_same(name: str, models: dict[str, Any]) -> None:
    model = models[name]
    layers = layers_of(model.stored.shapes)
    parts = [part for part in layers if part.startswith(("transformer", "text_encoder"))]
    # A second text encoder that is alone has more names.
    alone = {part: table(model, {"text_encoder": set(), part: layers[part]}) for part in parts}
    for part, found in alone.items():
        assert {one for target in found.values() for one in target.layers} == layers[part]
    spelled = [key for found in alone.values() for key in found]
    assert len(spelled) == len(set(spelled))
    # The same number of spellings of each layer: none was taken by another.
    whole = table(model, layers)
    assert len(whole) == len(spelled)


# --- the naming of the original code --------------------------------------------------------------


def originals(model: Any) -> Pair:
    """The weights of the denoising network as the original code has them."""
    state = model.network.state_dict()
    section = model.family.original("transformer", asdict(model.network.config))
    shapes = {"transformer": {key: tuple(t.shape) for key, t in state.items()}}
    found: Pair = {}
    for key, one in original_names({"": section}, shapes).items():
        tensor = torch.cat([state[name] for name in one.names])
        found[key] = torch.cat(tensor.chunk(2)[::-1]) if one.swapped else tensor
    return found


def converted(name: str, tensors: Pair) -> Pair:
    """What diffusers makes of a single file."""
    if name == "sd3":
        return single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(dict(tensors))
    if name == "zimage":
        return single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers(dict(tensors))
    if name == "klein":
        return single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers(dict(tensors))
    function = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    return narrow(function, single_file_utils)(dict(tensors))


def narrow(function: Any, module: Any) -> Any:
    """Return a function of diffusers that knows the width of the tiny FLUX.1 in place of 3072."""
    source = inspect.getsource(function)
    assert "3072" in source
    source = source.replace("3072", str(WIDTH)).replace("12288", str(4 * WIDTH))
    space = dict(vars(module))
    exec(source, space)
    return space[function.__name__]


def matrices(tensors: Pair) -> list[str]:
    """The names of the layers of the original code that multiply."""
    return [
        key.removesuffix(".weight")
        for key, tensor in tensors.items()
        if key.endswith(".weight") and tensor.dim() == 2
    ]


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model.", ""])
@pytest.mark.parametrize("name", NAMES)
def test_original_names(name: str, prefix: str, models: dict[str, Any], tmp_path: Path) -> None:
    """LoRAs of every layer, joint and swapped ones too, with kohya's alpha."""
    model, tensors = models[name], originals(models[name])
    torch.manual_seed(2)
    file: Pair = {}
    for layer in matrices(tensors):
        out, inner = tensors[f"{layer}.weight"].shape
        down, up = torch.randn(4, inner) * 0.2, torch.randn(out, 4) * 0.2
        tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"] + 0.75 * 2 / 4 * (up @ down)
        key = f"{prefix}{layer.replace('.', '_') if prefix.endswith('_') else layer}"
        file |= {
            f"{key}{KOHYA[0]}": down,
            f"{key}{KOHYA[1]}": up,
            f"{key}.alpha": torch.tensor(2.0),
        }
    save_file(file, path := tmp_path / "a.safetensors")
    assert kind_of(file) == "lora"
    same(model.adapted([f"{path}:0.75"]).network, converted(name, tensors), model.network)


def changed(kind: str, key: str, weight: Tensor) -> tuple[Pair, Tensor]:
    """Tensors of a kind for a layer, and the layer's weight with them at strength 1."""
    out, inner = weight.shape

    def random(*shape: int) -> Tensor:
        return torch.randn(shape) * 0.3

    if kind == "LoHa":
        factors = {"w1_a": (out, 2), "w1_b": (2, inner), "w2_a": (out, 2), "w2_b": (2, inner)}
        made = {name: random(*shape) for name, shape in factors.items()}
        delta = (made["w1_a"] @ made["w1_b"]) * (made["w2_a"] @ made["w2_b"])
        return {f"{key}.hada_{name}": t for name, t in made.items()}, weight + delta
    if kind == "LoKr":
        first, second = random(4, 4), random(out // 4, inner // 4)
        pair = {f"{key}.lokr_w1": first, f"{key}.lokr_w2": second}
        return pair, weight + torch.kron(first, second)
    if kind == "difference":
        made = {f"{key}.diff": random(out, inner)}
        return made, weight + made[f"{key}.diff"]
    down, up = random(2, inner), random(out, 2)
    by = {"DoRA of rows": 1, "DoRA of columns": 0}[kind]
    full = weight + up @ down
    lengths = torch.rand([1 if axis == by else side for axis, side in enumerate(weight.shape)]) + 1
    made = {f"{key}{KOHYA[0]}": down, f"{key}{KOHYA[1]}": up, f"{key}.dora_scale": lengths}
    return made, full * lengths / full.norm(dim=by, keepdim=True)


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "DoRA of rows", "DoRA of columns", "difference"])
@pytest.mark.parametrize("name", NAMES)
def test_kin_of_joint_layers(name: str, kind: str, models: dict[str, Any], tmp_path: Path) -> None:
    """A layer that is several of ours gets its whole change, of which each has its rows."""
    model, tensors = models[name], originals(models[name])
    torch.manual_seed(3)
    file: Pair = {}
    for layer in matrices(tensors):
        made, tensors[f"{layer}.weight"] = changed(
            kind, f"diffusion_model.{layer}", tensors[f"{layer}.weight"]
        )
        file |= made
    save_file(file, path := tmp_path / "a.safetensors")
    same(model.adapted([str(path)]).network, converted(name, tensors), model.network)


@pytest.mark.parametrize("name", NAMES)
def test_norms_and_biases(name: str, models: dict[str, Any], tmp_path: Path) -> None:
    """Differences of everything that is not a matrix, in the original naming."""
    model, tensors = models[name], originals(models[name])
    torch.manual_seed(4)
    file: Pair = {}
    for key, tensor in tensors.items():
        if key.endswith(("pos_embed", "pad_token")) or tensor.dim() != 1:
            continue
        change = torch.randn_like(tensor) * 0.2
        tensors[key] = tensor + change
        layer, _, leaf = key.rpartition(".")
        ending = {"bias": "diff_b", "weight": "diff"}.get(leaf, f"{leaf}.diff")
        file[f"diffusion_model.{layer}.{ending}"] = change
    save_file(file, path := tmp_path / "a.safetensors")
    same(model.adapted([str(path)]).network, converted(name, tensors), model.network)


def test_two_files_that_divide_a_layer_differently(models: dict[str, Any], tmp_path: Path) -> None:
    """One file changes q, k and v as one layer, the next q alone, the third all as one again."""
    model, tensors = models["flux"], originals(models["flux"])
    layer = "single_blocks.1.linear1"
    ours = "single_transformer_blocks.1.attn.to_q"
    torch.manual_seed(5)
    one, new = changed(
        "DoRA of rows", f"lora_unet_{layer.replace('.', '_')}", tensors[f"{layer}.weight"]
    )
    down, up = torch.randn(2, WIDTH), torch.randn(WIDTH, 2)
    new[:WIDTH] += up @ down
    two = {f"transformer.{ours}{PEFT[0]}": down, f"transformer.{ours}{PEFT[1]}": up}
    three, new = changed("DoRA of columns", f"diffusion_model.{layer}", new)
    asked: list[str] = []
    for i, file in enumerate((one, two, three)):
        save_file(file, path := tmp_path / f"{i}.safetensors")
        asked.append(str(path))
    wanted = converted("flux", {**tensors, f"{layer}.weight": new})
    same(model.adapted(asked).network, wanted, model.network)


# --- files of trainers, read by diffusers' own loaders --------------------------------------------


def fused(pipe: Any, path: Path) -> Pair:
    pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name="a")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return pipe.transformer.state_dict()


def block_file(
    path: Path, model: Any, spelled: dict[str, str], ends: tuple[str, str], alpha: bool
) -> None:
    """Write a LoRA of some layers of the original code. spelled: their names in the file."""
    tensors, file = originals(model), Pair()
    torch.manual_seed(6)
    for layer, key in spelled.items():
        out, inner = tensors[f"{layer}.weight"].shape
        out = 3 * WIDTH if key.endswith("processor.qkv_lora") else out
        file[f"{key}{ends[0]}"] = torch.randn(4, inner) * 0.2
        file[f"{key}{ends[1]}"] = torch.randn(out, 4) * 0.2
        if alpha:
            file[f"{key}.alpha"] = torch.tensor(2.0)
    assert kind_of(file) == "lora"
    save_file(file, path)


def test_kohya_s_files_of_flux(
    models: dict[str, Any],
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    function = lora_conversion_utils._convert_kohya_flux_lora_to_diffusers
    monkeypatch.setattr(lora_pipeline, function.__name__, narrow(function, lora_conversion_utils))
    layers = [one for one in matrices(originals(models["flux"])) if "blocks" in one]
    spelled = {one: f"lora_unet_{one.replace('.', '_')}" for one in layers}
    block_file(path := tmp_path / "a.safetensors", models["flux"], spelled, KOHYA, alpha=True)
    wanted = fused(pipeline(folders["flux"], "flux"), path)
    same(models["flux"].adapted([str(path)]).network, wanted, models["flux"].network)


def test_xlabs_files_of_flux(
    models: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    spelled = {"single_blocks.0.linear1": "single_blocks.0.processor.qkv_lora"}
    spelled["single_blocks.1.linear2"] = "single_blocks.1.processor.proj_lora"
    for i, stream in enumerate(("img", "txt"), 1):
        for layer in ("qkv", "proj"):
            key = f"double_blocks.1.processor.{layer}_lora{i}"
            spelled[f"double_blocks.1.{stream}_attn.{layer}"] = key
    path = tmp_path / "a.safetensors"
    block_file(path, models["flux"], spelled, (".down.weight", ".up.weight"), alpha=False)
    wanted = fused(pipeline(folders["flux"], "flux"), path)
    same(models["flux"].adapted([str(path)]).network, wanted, models["flux"].network)


@pytest.mark.parametrize("how", ["dotted", "flat", "cut"])
def test_files_of_flux_2(
    how: str, models: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    """The naming of ai-toolkit, that of kohya's scripts, and a cut name that diffusers knows."""
    model, path = models["klein"], tmp_path / "a.safetensors"
    layers = matrices(originals(model))
    if how == "cut":
        named = {
            key.replace("transformer_blocks.", "diffusion_model.sformer_blocks."): two
            for key, two in pairs(model.network).items()
            if key.startswith("transformer_blocks.")
        }
        written(path, named, PEFT)
    elif how == "dotted":
        # diffusers does not exchange the halves of this layer's change, as it does its weight's.
        spelled = {one: f"diffusion_model.{one}" for one in layers if "adaLN" not in one}
        block_file(path, model, spelled, PEFT, alpha=False)
    else:
        spelled = {
            one: f"lora_unet_{one.replace('.', '_')}"
            for one in layers
            if one.startswith(("double_blocks", "single_blocks"))
        }
        block_file(path, model, spelled, KOHYA, alpha=True)
    wanted = fused(pipeline(folders["klein"], "klein"), path)
    same(model.adapted([str(path)]).network, wanted, model.network)


def test_files_of_z_image(models: dict[str, Any], folders: dict[str, Path], tmp_path: Path) -> None:
    """Layers of the blocks in the naming of kohya's scripts."""
    layers = [one for one in matrices(originals(models["zimage"])) if "attention" in one]
    spelled = {one: f"lora_unet_{one.replace('.', '_')}" for one in layers}
    block_file(path := tmp_path / "a.safetensors", models["zimage"], spelled, KOHYA, alpha=True)
    wanted = fused(pipeline(folders["zimage"], "zimage"), path)
    same(models["zimage"].adapted([str(path)]).network, wanted, models["zimage"].network)


OLD = ".lora.down.weight", ".lora.up.weight"


def test_anime_z_s_files_of_z_image(
    models: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    """Such a file has queries, keys and values twice, and the layer after attention, too."""
    model, tensors = models["zimage"], originals(models["zimage"])
    file: Pair = {}
    torch.manual_seed(9)
    for block in ("layers.0", "noise_refiner.0"):
        side = tensors[f"{block}.attention.qkv.weight"].shape[1]
        sides = {"qkv": 3 * side, "out": side} | dict.fromkeys(
            ("to.q", "to.k", "to.v", "to_out.0"), side
        )
        for layer, out in sides.items():
            key = f"diffusion_model.{block}.attention.{layer}"
            file[f"{key}{OLD[0]}"] = torch.randn(4, side) * 0.2
            file[f"{key}{OLD[1]}"] = torch.randn(out, 4) * 0.2
    alone = "diffusion_model.layers.1.attention.out"  # nothing else says the same
    file |= {f"{alone}{OLD[0]}": torch.randn(4, side), f"{alone}{OLD[1]}": torch.randn(side, 4)}
    save_file(file, path := tmp_path / "a.safetensors")
    assert kind_of(file) == "lora"
    wanted = fused(pipeline(folders["zimage"], "zimage"), path)
    same(model.adapted([str(path)]).network, wanted, model.network)
    [warning] = model.adapters.choose([AskedLora(str(path))]).warnings
    assert "8 of 26 keys repeat others in another naming, and are left out: diffusion" in warning


@pytest.mark.parametrize("kept", ["transformer.", "lora_transformer_"])
def test_files_of_flux_in_two_namings(
    kept: str, models: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    """Those of the original code, in kohya's naming, are left out."""
    model, file, flat = models["flux"], Pair(), kept.endswith("_")
    for layer, (down, up) in pairs(model.network, ("to_q", "to_out.0")).items():
        key = kept + (layer.replace(".", "_") if flat else layer)
        file |= {f"{key}{KOHYA[0]}": down, f"{key}{KOHYA[1]}": up}
        file |= {f"{key}.alpha": torch.tensor(2.0)} if flat else {}
    file |= pair("lora_unet_double_blocks_0_img_attn_qkv", 3 * WIDTH, WIDTH)
    file |= pair("lora_unet_double_blocks_1_img_mlp_0", 4 * WIDTH, WIDTH)
    save_file(file, path := tmp_path / "a.safetensors")
    wanted = fused(pipeline(folders["flux"], "flux"), path)
    same(model.adapted([str(path)]).network, wanted, model.network)
    [warning] = model.adapters.choose([AskedLora(str(path))]).warnings
    assert "keys repeat others in another naming, and are left out: lora_unet_d" in warning


@pytest.mark.parametrize(
    ("name", "idle", "layer"),
    [
        ("zimage", {"diffusion_model.norm_final.diff": torch.ones(48)}, "layers.0.attention.to_q"),
        (
            "flux",
            {"text_encoders.clip_l.transformer.text_projection.lora_up.weight": torch.ones(4, 2)},
            "transformer_blocks.0.attn.to_q",
        ),
    ],
)
def test_keys_that_do_nothing(
    name: str, idle: Pair, layer: str, models: dict[str, Any], tmp_path: Path
) -> None:
    save_file(idle, path := tmp_path / "idle.safetensors")
    with pytest.raises(SafelightError, match="its keys do nothing in any program"):
        models[name].adapted([str(path)])
    two = pairs(models[name].network)[layer]
    tensors = written(path, {f"transformer.{layer}": two}, PEFT)
    save_file(tensors | idle, path)
    [chosen] = (found := models[name].adapters.choose([AskedLora(str(path))])).chosen
    assert [change.parameters for change in chosen.changes] == [(f"{layer}.weight",)]
    assert not found.warnings


# --- text encoders --------------------------------------------------------------------------------

TEXTS = {
    "sd3": {
        "lora_te1_": "text_encoder",
        "lora_te2_": "text_encoder_2",
        "text_encoders.clip_g.transformer.": "text_encoder_2",
        "lora_te3_": "text_encoder_3",
        "text_encoders.t5xxl.transformer.": "text_encoder_3",
    },
    "flux": {
        "lora_te1_": "text_encoder",
        "text_encoder.": "text_encoder",
        "lora_te2_": "text_encoder_2",
        "lora_te3_": "text_encoder_2",
        "text_encoder_2.": "text_encoder_2",
    },
    "klein": dict.fromkeys(
        ("text_encoder.", "text_encoders.qwen3_4b.transformer.", "text_encoders.qwen3_8b."),
        "text_encoder",
    ),
    "zimage": dict.fromkeys(
        (
            "lora_te_",
            "lora_te_model_",
            "lora_te1_model_",
            "text_encoder.",
            "text_encoder.model.",
            "text_encoder.base_model.model.model.",
            "text_encoders.qwen3_4b.transformer.",
            "text_encoders.qwen3_4b.transformer.model.",  # as ComfyUI calls it
        ),
        "text_encoder",
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_text_encoders(name: str, models: dict[str, Any], tmp_path: Path) -> None:
    """CLIP, T5 and Qwen3 get the text's weight, under each of their names."""
    model = models[name]
    for i, (prefix, part) in enumerate(TEXTS[name].items()):
        network = model.parts[part]
        found = pairs(network, ("q_proj", "fc1", "SelfAttention.q", "wi_0", "up_proj"))
        flat = prefix.endswith("_")
        path = tmp_path / f"{i}.safetensors"
        named = {prefix + (k.replace(".", "_") if flat else k): v for k, v in found.items()}
        written(path, named, KOHYA if flat else PEFT)
        wanted = {key: tensor.clone() for key, tensor in network.state_dict().items()}
        for layer, (down, up) in found.items():
            wanted[f"{layer}.weight"] += 0.25 * (up @ down)
        adapted = model.adapted([f"{path}:0.5:0.25"])
        same(adapted.parts[part], wanted, network)
        assert adapted.network is model.network


# --- pictures -------------------------------------------------------------------------------------


def unpacked(latents: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """Return a pipeline's latents as maps: those of FLUX are tokens, in FLUX.1 of four places."""
    _, channels, h, w = shape
    if latents.shape[1:] == (h * w, channels):
        latents = latents.transpose(1, 2)
    elif latents.dim() == 3:
        latents = latents.reshape(h // 2, w // 2, channels, 2, 2).permute(2, 0, 3, 1, 4)
    return latents.reshape(shape).numpy()


@pytest.mark.parametrize("name", NAMES)
def test_pictures(
    worst: Worst, name: str, models: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    """The fast layers draw with a LoRA as diffusers does, and without it as before."""
    model = safelight.load(folders[name], device="cpu", dtype="float32")
    asked = {"prompt": PROMPT, "width": 64, "height": 64}
    before = model.generate(**asked, steps=2, seed=11).images[0]
    named = {f"transformer.{key}": two for key, two in pairs(models[name].network).items()}
    (tmp_path / "Lora").mkdir()
    path = tmp_path / "Lora/ink.safetensors"
    written(path, named, PEFT)
    pipe = pipeline(folders[name], name)
    pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name="a")
    pipe.set_adapters(["a"], [0.7])
    given = {**asked, "num_inference_steps": 2, "guidance_scale": 0.0 if name == "zimage" else 1.0}
    said = {**asked, "steps": 2, "seed": 11, "guidance_scale": 1.0}
    adapted = model.adapted([f"{path}:0.7"])
    made: list[Tensor] = []

    def stepped(_pipe: Any, _step: int, _time: Any, found: dict[str, Any]) -> dict[str, Any]:
        made.append(found["latents"])
        return {}

    generator = torch.Generator().manual_seed(11)
    shown = pipe(generator=generator, callback_on_step_end=stepped, **given).images[0]
    latents, picture = draw(adapted, **said)
    wanted = unpacked(made[-1], latents.shape)
    error = np.linalg.norm(latents - wanted) / np.linalg.norm(wanted)
    check(worst, float(error), float(np.abs(picture.astype(int) - np.asarray(shown)).max()))
    drawn = model.generate(**said, loras=[f"{path}:0.7"]).images[0]
    assert drawn.tobytes() != model.generate(**said).images[0].tobytes()
    assert model.generate(**asked, steps=2, seed=11).images[0].tobytes() == before.tobytes()
    # By a name in the prompt.
    listed = safelight.load(folders[name], device="cpu", dtype="float32", models_dir=str(tmp_path))
    words = {**said, "prompt": f"{PROMPT}<lora:ink:0.7>", "prompt_syntax": "a1111"}
    tagged = listed.generate(**words, negative_prompt="<lora:ink:1>")
    assert tagged.images[0].tobytes() == drawn.tobytes()
    assert tagged.recipe()["loras"][0]["in_prompt"]
    plain = listed.generate(**{**words, "prompt_syntax": "plain"})
    assert any("is text in prompt_syntax plain" in one for one in plain.warnings)


def test_a_tag_in_a_negative_prompt_is_told(folders: dict[str, Path]) -> None:
    model = safelight.load(folders["sd3"], device="cpu", dtype="float32")
    asked = {"prompt_syntax": "a1111", "steps": 1, "width": 64, "height": 64}
    drawn = model.generate("a cat", negative_prompt="red <lora:ink:1>", **asked)
    assert any("LoRAs count in the prompt alone" in one for one in drawn.warnings)


# --- refusals -------------------------------------------------------------------------------------


def pair(key: str, out: int, inner: int) -> Pair:
    return {f"{key}{KOHYA[0]}": torch.ones(2, inner), f"{key}{KOHYA[1]}": torch.ones(out, 2)}


@pytest.mark.parametrize(
    ("name", "tensors", "told"),
    [
        ("flux", pair("lora_unet_double_blocks_0_img_attn_qkv", 64, 64), "(192, 2) would fit"),
        ("flux", pair("diffusion_model.single_blocks.0.linear1", 192, 64), "(448, 2) would fit"),
        ("flux", pair("lora_unet_double_blocks_7_img_attn_qkv", 192, 64), "belong to nothing"),
        ("flux", pair("lora_unet_joint_blocks_0_x_block_attn_qkv", 192, 64), "for Stable Diff"),
        ("sd3", pair("lora_unet_single_blocks_0_linear1", 448, 64), "it is for FLUX.1 or FLUX.2"),
        ("sd3", pair("lora_unet_single_blocks_0_modulation_lin", 9, 9), "it is for FLUX.1, and th"),
        ("sd3", pair("single_transformer_blocks.0.attn.to_qkv_mlp_proj", 9, 9), "for FLUX.2, and"),
        ("klein", pair("lora_unet_double_blocks_7_img_attn_qkv", 192, 64), "belong to nothing"),
        ("klein", pair("lora_unet_double_blocks_0_img_mod_lin", 384, 64), "it is for FLUX.1, and"),
        ("klein", pair("single_blocks.0.processor.qkv_lora", 192, 64), "belong to nothing"),
        ("sd3", pair("transformer.transformer_blocks.9.attn.to_q", 64, 64), "to nothing"),
        ("zimage", pair("unet.down_blocks.0.attn2.to_k", 8, 768), "for Stable Diffusion 1, and"),
        ("zimage", pair("transformer.transformer_blocks.0.attn.to_q", 8, 8), "for a diffusion tr"),
        (
            "zimage",
            pair("diffusion_model.layers.0.attention.qkv", 144, 48)
            | pair("diffusion_model.layers.0.attention.to_q", 48, 48),
            "change one layer in two ways",
        ),
        (
            "flux",
            {
                "double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(16),
                "double_blocks.0.img_attn.proj.lora_A.weight": torch.ones(2, 64),
                "double_blocks.0.img_attn.proj.lora_B.weight": torch.ones(64, 2),
                "double_blocks.0.img_attn.proj.lora_B.bias": torch.ones(64),
            },
            "a Control-LoRA is not supported",
        ),
        ("flux", pair("transformer.x_embedder", 64, 128), "has the shape (2, 128); (2, 64)"),
        ("sd3", {"transformer.pos_embed.diff": torch.ones(3)}, "belongs to nothing"),
        ("zimage", {"diffusion_model..diff": torch.ones(3)}, "belongs to nothing"),
    ],
)
def test_refusals(
    name: str, tensors: Pair, told: str, models: dict[str, Any], tmp_path: Path
) -> None:
    save_file(tensors, path := tmp_path / "a.safetensors")
    with pytest.raises(SafelightError) as caught:
        models[name].adapted([str(path)])
    assert told in str(caught.value)
    assert len(str(caught.value)) <= 400
    assert caught.value.field == "loras"


@pytest.mark.parametrize("name", NAMES)
def test_a_server_refuses_those_of_other_models_at_once(
    name: str, models: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    """The layers' names tell the kind of model, before a weight of the model is read."""
    (tmp_path / "Lora").mkdir()
    for other in NAMES:
        layers = matrices(originals(models[other]))[:20]
        file = {f"diffusion_model.{one}.lora_A.weight": torch.ones(2, 8) for one in layers}
        save_file(file, tmp_path / f"Lora/{other}.safetensors")
    save_file(
        pair("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", 8, 768),
        tmp_path / "Lora/sd1.safetensors",
    )
    names = Names(
        WorkerSettings(model=str(folders[name]), url="", root="", models_dir=str(tmp_path))
    )
    names.check(Request(prompt="a cat", loras=(name,)))
    for other in {*NAMES, "sd1"} - {name}:
        with pytest.raises(SafelightError, match=f"lora {other}: it is for .*this model is"):
            names.check(Request(prompt="a cat", loras=(other,)))


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_are_refused(name: str, models: dict[str, Any], tmp_path: Path) -> None:
    """These models read no embeddings: one inside a LoRA belongs to nothing."""
    model = models[name]
    layer, two = next(iter(pairs(model.network).items()))
    tensors = written(path := tmp_path / "a.safetensors", {f"transformer.{layer}": two}, PEFT)
    save_file({**tensors, "bundle_emb.moss.string_to_param.*": torch.ones(2, 24)}, path)
    with pytest.raises(SafelightError, match=r"1 of 3 keys belongs to nothing .*bundle_emb\.moss"):
        model.generate("moss", loras=[str(path)], steps=1)
    asked = {"steps": 1, "width": 64, "height": 64, "loras": [str(path)]}
    drawn = model.generate("moss", lora_unmatched="warn", **asked)
    assert any("bundle_emb.moss" in one for one in drawn.warnings)
    with pytest.raises(SafelightError, match="reads no embeddings: leave them out"):
        model.generate("moss", embeddings=["moss"], steps=1)


# --- fast layers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", [{}, {"dtype": "bfloat16"}, {"low_memory": True}])
def test_fast_layers_take_other_weights(
    name: str, how: dict[str, Any], models: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    """After their weights are packed and released, the copied layers compute with new ones."""
    model = safelight.load(folders[name], device="cpu", **{"dtype": "float32", **how})
    named = {f"transformer.{k}": two for k, two in pairs(models[name].network).items()}
    written(path := tmp_path / "a.safetensors", named, PEFT)
    asked = {"prompt": PROMPT, "steps": 1, "seed": 3, "width": 64, "height": 64}
    before, _ = draw(model, **asked)
    drawn, _ = draw(model.adapted([str(path)]), **asked)
    wanted, _ = draw(models[name].adapted([str(path)]), **asked)
    assert np.linalg.norm(drawn - before) > 0.1 * np.linalg.norm(before)
    bound = 0.05 if "dtype" in how else 1e-4
    assert np.linalg.norm(drawn - wanted) <= bound * np.linalg.norm(wanted)
    again, _ = draw(model, **asked)
    assert np.array_equal(again, before)
