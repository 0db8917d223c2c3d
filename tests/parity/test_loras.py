"""LoRA and its kin: weights and pictures equal those of diffusers with PEFT, and of LyCORIS.

Files are written by PEFT, by diffusers and by LyCORIS themselves, or in the naming of kohya's
scripts, OneTrainer and SimpleTuner.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import safelight
from safelight.errors import SafelightError
from safelight.weights.names import renamed, unet_names
from tests.parity.sdxl_models import UNET, make_folder

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
lycoris = pytest.importorskip("lycoris")

WITHIN = 1e-6
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = ["q_proj", "v_proj", "fc1"]
Pair = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(folders: dict[str, Path]) -> Path:
    return folders["sd1"]


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return safelight.load(folder, device="cpu", dtype="float32", plain=True)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    found = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    found.set_progress_bar_config(disable=True)
    return found


def pairs(
    network: nn.Module, suffixes: list[str], rank: int = 4
) -> dict[str, tuple[Tensor, Tensor]]:
    """Random down and up matrices for the layers whose names end so."""
    torch.manual_seed(1)
    found = {}
    for name, layer in network.named_modules():
        if name.endswith(tuple(f".{s}" for s in suffixes)) and hasattr(layer, "weight"):
            out, *inner = layer.weight.shape
            up = (out, rank, *[1] * (len(inner) - 1))
            found[name] = torch.randn(rank, *inner) * 0.2, torch.randn(up) * 0.2
    assert found
    return found


def added(network: nn.Module, found: dict[str, tuple[Tensor, Tensor]], scale: float) -> Pair:
    """The weights of a network with scale · up · down added."""
    weights = {name: t.detach().clone() for name, t in network.state_dict().items()}
    for name, (down, up) in found.items():
        weight = weights[f"{name}.weight"]
        weight += scale * (up.flatten(1) @ down.flatten(1)).view_as(weight)
    return weights


def same(theirs: Pair, ours: nn.Module, untouched: nn.Module) -> None:
    """Weights are equal within 1e-6, and some are not those without a LoRA."""
    mine, before = ours.state_dict(), untouched.state_dict()
    names = {name if name in mine else f"text_model.{name}": t for name, t in theirs.items()}
    names.pop("text_model.embeddings.position_ids", None)
    assert names.keys() == mine.keys()
    worst = max(float((mine[name] - t).abs().max()) for name, t in names.items())
    assert worst <= WITHIN
    assert any(not torch.equal(mine[name], before[name]) for name in mine)


# --- LoRA, in the naming of each trainer ----------------------------------------------------------


def kohya(name: str) -> str:
    return name.replace(".", "_")


def text_name(name: str) -> str:
    return name if name.startswith("text_model.") else f"text_model.{name}"


def ldm(pipeline: Any, name: str) -> str:
    back = {ours: theirs for theirs, ours in unet_names(pipeline.unet.config).items()}
    found = renamed(name, back)
    assert found is not None
    return found


Naming = Callable[[Any, str, str], tuple[str, str, str]]


def _named(
    down: str, up: str, unet: Callable[[Any, str], str], text: Callable[[str], str]
) -> Naming:
    def keys(pipeline: Any, part: str, name: str) -> tuple[str, str, str]:
        base = unet(pipeline, name) if part == "unet" else text(name)
        return base + down, base + up, f"{base}.alpha"

    return keys


def _processor(name: str) -> str:
    head, _, leaf = name.removesuffix(".0").rpartition(".")
    return f"unet.{head}.processor.{leaf}_lora"


_KOHYA = ".lora_down.weight", ".lora_up.weight"
_PEFT = ".lora_A.weight", ".lora_B.weight"
NAMINGS: dict[str, Naming] = {
    "kohya": _named(
        *_KOHYA,
        lambda _, n: f"lora_unet_{kohya(n)}",
        lambda n: f"lora_te_{kohya(text_name(n))}",
    ),
    "kohya, original names": _named(
        *_KOHYA,
        lambda p, n: f"lora_unet_{kohya(ldm(p, n))}",
        lambda n: f"lora_te1_{kohya(text_name(n))}",
    ),
    "PEFT in diffusers": _named(
        *_PEFT, lambda _, n: f"unet.{n}", lambda n: f"text_encoder.{text_name(n)}"
    ),
    "PEFT, newer transformers": _named(
        ".lora_A.default.weight",
        ".lora_B.default.weight",
        lambda _, n: f"base_model.model.{n}",
        lambda n: f"base_model.model.{n.removeprefix('text_model.')}",
    ),
    "older diffusers": _named(
        ".down.weight",
        ".up.weight",
        lambda _, n: _processor(n),
        lambda n: f"text_encoder.{text_name(n)}.lora_linear_layer",
    ),
    "diffusers between": _named(
        ".lora.down.weight",
        ".lora.up.weight",
        lambda _, n: f"unet.{n}",
        lambda n: f"text_encoder.{text_name(n)}",
    ),
    "ComfyUI": _named(
        *_PEFT,
        lambda p, n: f"diffusion_model.{ldm(p, n)}",
        lambda n: f"text_encoders.clip_l.transformer.{text_name(n)}",
    ),
    "SimpleTuner": _named(
        *_KOHYA,
        lambda _, n: f"lycoris_{kohya(n)}",
        lambda n: f"lycoris_{kohya(text_name(n))}",
    ),
    "no weight at the end": _named(
        ".lora_down",
        ".lora_up",
        lambda _, n: f"lora_unet_{kohya(n)}",
        lambda n: f"lora_te1_{kohya(n.removeprefix('text_model.'))}",
    ),
}


def write(path: Path, pipeline: Any, naming: str, alpha: float | None = 2.0) -> Path:
    """A LoRA of rank 4 in a trainer's naming; of attention alone in the old ones."""
    tensors: Pair = {}
    for part, network, suffixes in (
        ("unet", pipeline.unet, ATTENTION),
        ("text_encoder", pipeline.text_encoder, TEXT),
    ):
        for name, (down, up) in pairs(network, suffixes).items():
            keys = NAMINGS[naming](pipeline, part, name)
            tensors[keys[0]], tensors[keys[1]] = down, up
            if alpha is not None:
                tensors[keys[2]] = torch.tensor(alpha)
    save_file({key: t.contiguous() for key, t in tensors.items()}, path)
    return path


@pytest.mark.parametrize("naming", NAMINGS)
def test_the_naming_of_each_trainer(naming: str, model: Any, pipeline: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", pipeline, naming)
    adapted = model.adapted([f"{path}:0.75:-0.5"])
    unet = added(pipeline.unet, pairs(pipeline.unet, ATTENTION), 0.75 * 2 / 4)
    text = added(pipeline.text_encoder, pairs(pipeline.text_encoder, TEXT), -0.5 * 2 / 4)
    same(unet, adapted.unet, model.unet)
    same(text, adapted.text_encoder, model.text_encoder)


@pytest.mark.parametrize("naming", NAMINGS)
def test_a_key_that_belongs_to_nothing_is_found(
    naming: str, model: Any, pipeline: Any, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.safetensors", pipeline, naming)
    tensors = load_file(path)
    key = next(key for key in tensors if "down_blocks" in key or "input_blocks" in key)
    odd = key.replace("_blocks", "_blokcs")
    save_file({**tensors, odd: tensors[key].clone()}, path)
    with pytest.raises(
        SafelightError, match=r"1 of .* keys belongs to nothing in the model"
    ) as told:
        model.adapted([str(path)])
    assert odd[:40] in str(told.value)
    assert told.value.field == "loras"
    drawn = model.generate(
        "a cat", steps=4, seed=1, loras=[str(path)], lora_unmatched="warn", count=1
    )
    assert any(odd[:40] in warning for warning in drawn.warnings)


# --- written by others ----------------------------------------------------------------------------


def randomized(network: nn.Module) -> None:
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora" in name:
                parameter.copy_(torch.randn_like(parameter).abs() * 0.2)


def config(**how: Any) -> Any:
    return peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **how)


@pytest.mark.parametrize(
    "how",
    [
        {"target_modules": ["to_q", "to_v", "proj_in", "conv1", "downsamplers.0.conv"]},
        {"target_modules": ["to_q", "ff.net.2"], "use_rslora": True},
        {
            "target_modules": ["to_q", "to_k", "to_out.0"],
            "alpha_pattern": {"attn1.to_q": 3, "to_k": 9},
            "rank_pattern": {"to_k": 2},
        },
        {"target_modules": ["to_q", "ff.net.0.proj", "conv2", "time_emb_proj"], "use_dora": True},
    ],
    ids=["layers of all kinds", "root of the rank", "patterns", "DoRA"],
)
@pytest.mark.parametrize("form", ["folder", "diffusers"])
def test_peft(how: dict[str, Any], form: str, model: Any, pipeline: Any, tmp_path: Path) -> None:
    unet = copy.deepcopy(pipeline.unet)
    if form == "folder":
        wrapped = peft.get_peft_model(unet, config(**how))
        randomized(wrapped)
        wrapped.save_pretrained(tmp_path)
        merged = wrapped.merge_and_unload()
        path = tmp_path
    else:
        unet.add_adapter(config(**how))
        randomized(unet)
        kept = peft.get_peft_model_state_dict(unet)
        told = unet.peft_config["default"].to_dict()
        diffusers.StableDiffusionPipeline.save_lora_weights(
            tmp_path, unet_lora_layers=kept, unet_lora_adapter_metadata=told
        )
        path = tmp_path / "pytorch_lora_weights.safetensors"
        merged = copy.deepcopy(unet)
        merged.fuse_lora()
        merged.unload_lora()
    same(merged.state_dict(), model.adapted([str(path)]).unet, model.unet)


ONE = {"linear_alpha": 4, "conv_alpha": 4}
TWO = {"linear_dim": 2, "conv_dim": 2}
LYCORIS: dict[str, dict[str, Any]] = {
    "LoCon": {"algo": "locon"},
    "LoCon, Tucker": {"algo": "locon", "use_tucker": True},
    "LoCon, DoRA of rows": {"algo": "locon", "dora_wd": True, "wd_on_output": True},
    "LoCon, DoRA of columns": {"algo": "locon", "dora_wd": True, "wd_on_output": False},
    "LoHa": {"algo": "loha", **ONE},
    "LoHa, Tucker": {"algo": "loha", "use_tucker": True, **ONE},
    "LoHa, DoRA": {"algo": "loha", "dora_wd": True, **ONE},
    "LoKr": {"algo": "lokr", "factor": 4, **ONE},
    "LoKr, both low": {"algo": "lokr", "decompose_both": True, **dict.fromkeys(ONE, 2), **TWO},
    "LoKr, Tucker": {"algo": "lokr", "factor": 2, "use_tucker": True, **ONE},
    "LoKr, whole": {"algo": "lokr", "full_matrix": True},
    "LoKr, DoRA": {"algo": "lokr", "factor": 4, "dora_wd": True, **ONE},
    "GLoRA": {"algo": "glora"},
    "full": {"algo": "full", "train_norm": True},
    "OFT": {"algo": "diag-oft", "constraint": 0.01, "rescaled": True},
    "BOFT": {"algo": "boft", "constraint": 0.002},
    "IA3": {"algo": "ia3"},
}


def adapter(network: nn.Module, how: dict[str, Any]) -> Any:
    """An adapter that LyCORIS makes for a network, with random weights."""
    how = {"linear_dim": 4, "conv_dim": 4, "linear_alpha": 2, "conv_alpha": 3, **how}
    made = lycoris.create_lycoris(network, 1.0, preset="full", **how)
    torch.manual_seed(3)
    with torch.no_grad():
        for one in made.loras:
            for name, parameter in one.named_parameters():
                noise = torch.randn_like(parameter) * 0.1
                parameter.add_(noise) if "scale" in name else parameter.copy_(noise)
    return made


def tensors_of(made: Any) -> Pair:
    found: Pair = {}
    for one in made.loras:
        state = one.state_dict()
        if getattr(one, "is_diff", False):  # else it subtracts the layer's weight from itself
            state = {"diff": one.weight} | ({} if one.bias is None else {"diff_b": one.bias})
        found |= {f"{one.lora_name}.{name}": t.detach().clone() for name, t in state.items()}
    return {key: tensor.contiguous() for key, tensor in found.items()}


@pytest.mark.parametrize("kind", LYCORIS)
def test_lycoris(kind: str, model: Any, pipeline: Any, tmp_path: Path) -> None:
    unet = copy.deepcopy(pipeline.unet)
    made = adapter(unet, LYCORIS[kind])
    tensors = tensors_of(made)
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    made.merge_to(1.0)
    same(unet.state_dict(), model.adapted([str(path)]).unet, model.unet)
    # A tensor that is left out is missed.
    whole = [key for key in tensors if not key.endswith(("alpha", "scale", "bias", "b_norm"))]
    odd = {f"{key}x" if key == whole[-1] else key: tensor for key, tensor in tensors.items()}
    save_file(odd, path)
    with pytest.raises(SafelightError, match=r"half|nothing in the model|whole weight|fit|must be"):
        model.adapted([str(path)])


@pytest.mark.parametrize("algo", ["loha", "lokr"])
def test_alpha_of_products(algo: str, model: Any, pipeline: Any, tmp_path: Path) -> None:
    """The trained layers are the reference: LyCORIS 4.1 merges with the scale twice."""
    unet = copy.deepcopy(pipeline.unet)
    made = adapter(unet, {"algo": algo, "factor": 4, "linear_dim": 2, "linear_alpha": 1})
    path = tmp_path / "a.safetensors"
    save_file(tensors_of(made), path)
    made.apply_to()
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = unet.get_submodule(name)
    with torch.no_grad():
        theirs = layer(torch.eye(layer.in_features)).T
    ours = model.adapted([str(path)]).unet.get_submodule(name).weight
    assert float((ours - theirs).abs().max()) <= WITHIN
    assert not torch.equal(ours, model.unet.get_submodule(name).weight)


# --- pictures -------------------------------------------------------------------------------------


def difference(a: Any, b: Any) -> int:
    one, two = (np.asarray(x.convert("RGB"), dtype=int) for x in (a, b))
    return int(np.abs(one - two).max())


SIZE = {"width": 64, "height": 64}


def drawn(pipeline: Any) -> Any:
    generator = torch.Generator().manual_seed(5)
    made = pipeline("a red apple", num_inference_steps=4, generator=generator, **SIZE)
    return made.images[0]


@pytest.mark.parametrize("weights", [(1.0,), (-0.8,), (0.7, 0.4), (1.0, -1.0)])
def test_pictures(
    weights: tuple[float, ...], model: Any, folder: Path, pipeline: Any, tmp_path: Path
) -> None:
    """One LoRA or two, with weights of either sign, give the pictures of diffusers with PEFT."""
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    asked: list[str] = []
    for i, weight in enumerate(weights):
        path = write(tmp_path / f"{i}.safetensors", pipeline, "PEFT in diffusers", None)
        tensors = {key: t * (1 - 1.7 * i) for key, t in load_file(path).items()}
        config = {"r": 4, "lora_alpha": 2 + i, "target_modules": ATTENTION + TEXT}
        told = {f"{part}.{k}": v for part in ("unet", "text_encoder") for k, v in config.items()}
        save_file(tensors, path, {"lora_adapter_metadata": json.dumps(told)})
        theirs.load_lora_weights(tmp_path, weight_name=path.name, adapter_name=f"a{i}")
        asked.append(f"{path}:{weight}")
    theirs.set_adapters([f"a{i}" for i in range(len(weights))], list(weights))
    ours = model.generate("a red apple", steps=4, seed=5, loras=asked, **SIZE).images[0]
    without = model.generate("a red apple", steps=4, seed=5, **SIZE).images[0]
    assert difference(ours, drawn(theirs)) <= 2
    assert difference(without, drawn(pipeline)) <= 2
    assert difference(ours, without) > 10


def test_a_picture_of_kohya_s_layout(
    model: Any, folder: Path, pipeline: Any, tmp_path: Path
) -> None:
    """diffusers 0.42 leaves out the text encoder's attention of such files: merged by hand here."""
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    for network, suffixes in ((theirs.unet, ATTENTION), (theirs.text_encoder, TEXT)):
        network.load_state_dict(added(network, pairs(network, suffixes), 0.5))
    path = write(tmp_path / "ink.safetensors", pipeline, "kohya")
    ours = model.generate("a red apple", steps=4, seed=5, loras=[str(path)], **SIZE)
    assert difference(ours.images[0], drawn(theirs)) <= 2


# --- SDXL -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A tiny SDXL: the pipeline of diffusers, and ours."""
    folder = make_folder(tmp_path_factory.mktemp("xl") / "base", UNET)
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    return theirs, safelight.load(folder, device="cpu", dtype="float32", plain=True)


TEXTS = {"text_encoder": "te1", "text_encoder_2": "te2"}
XL_NAMINGS: dict[str, Callable[[Any, str, str], str]] = {
    "kohya": lambda p, part, n: (
        f"lora_unet_{kohya(ldm(p, n))}"
        if part == "unet"
        else f"lora_{TEXTS[part]}_{kohya(text_name(n))}"
    ),
    "OneTrainer": lambda _, part, n: (
        f"lora_unet_{kohya(n)}" if part == "unet" else f"lora_{TEXTS[part]}_{kohya(text_name(n))}"
    ),
    "diffusers": lambda _, part, n: f"{part}.{n if part == 'unet' else text_name(n)}",
}


def xl_tensors(pipeline: Any, naming: str, ends: tuple[str, str]) -> Pair:
    found: Pair = {}
    for part in ("unet", *TEXTS):
        suffixes = [*ATTENTION, "proj_in", "ff.net.2"] if part == "unet" else TEXT
        for name, (down, up) in pairs(getattr(pipeline, part), suffixes).items():
            key = XL_NAMINGS[naming](pipeline, part, name)
            found[key + ends[0]], found[key + ends[1]] = down, up
    return found


@pytest.mark.parametrize("naming", XL_NAMINGS)
def test_sdxl(naming: str, xl: tuple[Any, Any], tmp_path: Path) -> None:
    """Both text encoders get the LoRA, each with the text's weight."""
    theirs, ours = xl
    path = tmp_path / "a.safetensors"
    ends = _PEFT if naming == "diffusers" else _KOHYA
    save_file(xl_tensors(theirs, naming, ends), path)
    adapted = ours.adapted([f"{path}:0.5:0.25"])
    for part, weight in (("unet", 0.5), ("text_encoder", 0.25), ("text_encoder_2", 0.25)):
        network = getattr(theirs, part)
        suffixes = [*ATTENTION, "proj_in", "ff.net.2"] if part == "unet" else TEXT
        same(
            added(network, pairs(network, suffixes), weight), adapted.parts[part], ours.parts[part]
        )


def test_a_picture_of_sdxl(xl: tuple[Any, Any], tmp_path: Path) -> None:
    theirs, ours = xl
    path = tmp_path / "a.safetensors"
    save_file(xl_tensors(theirs, "diffusers", _PEFT), path)
    asked = {"steps": 3, "seed": 5, "sampler": "euler", **SIZE}
    without = ours.generate("a red apple", **asked).images[0]
    theirs.load_lora_weights(tmp_path, weight_name=path.name, adapter_name="a")
    theirs.set_adapters(["a"], [0.7])
    generator = torch.Generator().manual_seed(5)
    picture = theirs(
        "a red apple", num_inference_steps=3, guidance_scale=5.0, generator=generator, **SIZE
    ).images[0]
    theirs.unload_lora_weights()
    made = ours.generate("a red apple", loras=[f"{path}:0.7"], **asked).images[0]
    assert difference(made, picture) <= 2
    assert difference(made, without) > 2


def test_a_lora_of_another_family(model: Any, xl: tuple[Any, Any], tmp_path: Path) -> None:
    theirs, ours = xl
    path = tmp_path / "a.safetensors"
    save_file(
        xl_tensors(theirs, "kohya", _KOHYA), path, {"ss_base_model_version": "sdxl_base_v1-0"}
    )
    with pytest.raises(SafelightError, match="it is for SDXL, and this model is "):
        model.adapted([str(path)])
    keys = {f"lora_te_{kohya(text_name(n))}" for n in ("encoder.layers.0.mlp.fc1",)}
    save_file({f"{key}.lora_down.weight": torch.ones(4, 9) for key in keys}, path)
    with pytest.raises(SafelightError, match="lacks its up half"):
        ours.adapted([str(path)])
