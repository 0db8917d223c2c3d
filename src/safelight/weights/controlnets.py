"""Plan a ControlNet for a model, or a T2I-Adapter in its place, from headers and configs alone.

It may be diffusers' folder of a ControlNetModel, or of a pipeline with one, or a single file with
the original code's names or diffusers'. A single file has no config: it follows from the model's
UNet and from the file's keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safelight.controls import CONTROLNETS
from safelight.errors import SafelightError
from safelight.families.part import Part
from safelight.request_pictures import each
from safelight.weights import t2i_adapters
from safelight.weights.check import Header, axis, refusal
from safelight.weights.find import Source, find_controlnet
from safelight.weights.folder import Folder
from safelight.weights.headers import plain_header_of
from safelight.weights.kinds import is_t2i_adapter
from safelight.weights.names import Weight, from_folder, renamed, some, unet_names
from safelight.weights.networks import check_depth, read_config
from safelight.weights.plan import Addition, Plan

PART = Part("safelight.nets.controlnet", "ControlNetModel", "ControlNetConfig")

_PREFIX = "control_model."
_HINT = "controlnet_cond_embedding."
_INSIDE = {"controlnet": PART, "adapter": t2i_adapters.PART}
"""What guides in a pipeline's folder, by the name of its own folder."""

_FOREIGN = (
    ("difference", "the difference to a base model, which is not supported; give the whole one"),
    ("lora_controlnet", "a Control-LoRA, which is not supported"),
    ("task_embedding", "a ControlNet of many tasks (union), which is not supported"),
    ("control_add_embedding", "a ControlNet of many tasks (union), which is not supported"),
    ("ip_adapter.", "an IP-Adapter: give it with --ip-adapter"),
    ("image_proj.", "an IP-Adapter: give it with --ip-adapter"),
)
"""The beginnings of keys in files of other kinds, and what those are."""


def with_controlnets(
    plan: Plan,
    given: str | Path | Sequence[str | Path] | None,
    models_dir: str | Path | None = None,
    *,
    download: bool,
) -> Plan:
    """Return the plan of a model with ControlNets, if any are named; see `with_controlnet`.

    given: names of one or several, see `weights.find`. Raises SafelightError.
    """
    names = each(given)
    if len(names) > len(CONTROLNETS):
        raise SafelightError(f"{len(names)} ControlNets: at most {len(CONTROLNETS)} guide at once")
    for use, name in zip(CONTROLNETS, names, strict=False):
        source = find_controlnet(name, download=download, models_dir=models_dir)
        plan = with_controlnet(plan, source, use)
    found = [one for use, one in plan.additions.items() if use in CONTROLNETS]
    if len({one.part.network for one in found}) > 1:
        raise SafelightError(
            "a ControlNet and a T2I-Adapter cannot guide together yet: give several of one kind",
            field="control_image",
        )
    return plan


def with_controlnet(plan: Plan, source: Source, use: str = CONTROLNETS[0]) -> Plan:
    """Return the plan of a model with a ControlNet or a T2I-Adapter. use: one of CONTROLNETS.

    Raises SafelightError if it is malformed, is neither, or does not fit the model.
    """
    if "vae" not in plan.configs:
        raise SafelightError(
            f"{plan.name} draws pixels: it takes no ControlNet", field="control_image"
        )
    if "unet" not in plan.configs:
        raise SafelightError(
            f"{plan.name} is of {plan.family.title}, which takes no ControlNet yet; Stable "
            "Diffusion 1.x, 2.x and XL do",
            field="control_image",
        )
    found = _folder_plan(source) if source.path.is_dir() else _file_plan(source, plan)
    check_depth(source, found.config.depth, len(found.weights))
    (t2i_adapters.check_fit if found.part is t2i_adapters.PART else _check_fit)(found, plan)
    return plan.with_additions({use: found}, [])


def _folder_plan(source: Source) -> Addition:
    path = source.path
    if (path / "model_index.json").is_file():
        index = Folder(path, source.name).index
        inside = next((n for n in _INSIDE if index.get(n) not in (None, [None, None])), None)
        if inside is None:
            raise refusal(source.name, f"a model without a ControlNet; a {PART.network} is needed")
        named = index[inside]
        if not isinstance(named, list) or named[-1] != _INSIDE[inside].network:
            raise refusal(
                source.name,
                f"several {'ControlNets' if inside == 'controlnet' else 'T2I-Adapters'}: give its "
                f"folders {inside}, {inside}_1 and so on, each with --controlnet",
            )
        path = path / inside
    folder = Folder(path, source.name, index="config.json")
    folder.flat = True
    kind = folder.index.get("_class_name")
    part = next((one for one in _INSIDE.values() if one.network == kind), None)
    if part is None:
        raise refusal(source.name, f"{kind!r:.40} is no ControlNet; {PART.network} is")
    weights = from_folder(part, folder.part_headers("controlnet", part.stem))
    config = read_config(source, part, folder.index)
    return Addition(source, part, folder.index, config, weights, folder.files)


def _file_plan(source: Source, model: Plan) -> Addition:
    header = plain_header_of(source.path, "a ControlNet")
    if is_t2i_adapter(header.tensors):
        return t2i_adapters.plan_file(source, header, model)
    for begins, told in _FOREIGN:
        if any(key.removeprefix(_PREFIX).startswith(begins) for key in header.tensors):
            raise refusal(source.name, f"this is {told}")
    if "shuffle" in source.name.casefold():  # its weights do not tell that its maps are averaged
        raise refusal(source.name, "a ControlNet that averages over the picture is not supported")
    # The first files of this kind hold a whole model beside it.
    mine = [key for key in header.tensors if key.startswith(_PREFIX)] or header.tensors
    inner = {key.removeprefix(_PREFIX): key for key in mine}
    if any(key.startswith("input_hint_block.") for key in inner):
        names = {**unet_names(asdict(model.configs["unet"])), **_own_names(header, inner)}
        renames = {key: renamed(key, names) for key in inner}
        unknown = [key for key, name in renames.items() if name is None]
        if unknown:
            raise refusal(
                source.name,
                f"{len(unknown)} keys that a ControlNet for {model.name} does not have: "
                f"{some(unknown)}",
            )
        inner = {str(renames[key]): stored for key, stored in inner.items()}
    if not any(key.startswith(_HINT) for key in inner):
        raise refusal(source.name, "this is no ControlNet: no layers in it read a picture")
    weights = {name: Weight(header, key, header.tensors[key].shape) for name, key in inner.items()}
    raw = _raw_config(weights, model)
    files = {source.path.name: header.path}
    return Addition(source, PART, raw, read_config(source, PART, raw, where=""), weights, files)


def _own_names(header: Header, inner: Mapping[str, str]) -> dict[str, str]:
    """Return the modules that a UNet does not have, from the original names to ours."""
    found = {"middle_block_out.0": "controlnet_mid_block"}
    numbers = sorted(
        {int(one[1]) for key in inner if (one := re.match(r"input_hint_block\.(\d+)\.", key))}
    )
    for i, number in enumerate(numbers):
        blocks = f"blocks.{i - 1}"
        name = "conv_in" if i == 0 else "conv_out" if number == numbers[-1] else blocks
        found[f"input_hint_block.{number}"] = _HINT + name
    for key in inner:
        if one := re.match(r"zero_convs\.(\d+)\.0\.", key):
            found[f"zero_convs.{one[1]}.0"] = f"controlnet_down_blocks.{one[1]}"
    return found


def _raw_config(weights: Mapping[str, Weight], model: Plan) -> dict[str, Any]:
    """Return the config of a single file, in diffusers' keys."""
    unet = asdict(model.configs["unet"])
    left_out = ("sample_size", "out_channels", "up_block_types", "time_cond_proj_dim")
    levels = range(len(unet["block_out_channels"]))
    depths = [_depth(weights, f"down_blocks.{i}.attentions.0.") for i in levels]
    middle = _depth(weights, "mid_block.attentions.0.")
    shapes = {name: weight.shape for name, weight in weights.items() if len(weight.shape) == 4}
    hint = [axis(shapes, f"{_HINT}conv_in.weight", 0)]
    while (name := f"{_HINT}blocks.{2 * len(hint) - 1}.weight") in shapes:
        hint.append(axis(shapes, name, 0))
    return {
        **{key: value for key, value in unet.items() if key not in left_out},
        "_class_name": PART.network,
        "in_channels": axis(shapes, "conv_in.weight", 1),
        "conditioning_channels": axis(shapes, f"{_HINT}conv_in.weight", 1),
        "conditioning_embedding_out_channels": hint,
        "down_block_types": [
            "DownBlock2D" if n is None else "CrossAttnDownBlock2D" for n in depths
        ],
        "mid_block_type": "UNetMidBlock2D" if middle is None else "UNetMidBlock2DCrossAttn",
        # Of levels without attention the number does not matter; the middle has that of the last.
        "transformer_layers_per_block": [
            n or 0 for n in (*depths[:-1], middle if depths[-1] is None else depths[-1])
        ],
        "reverse_transformer_layers_per_block": None,
    }


def _depth(weights: Mapping[str, Weight], begins: str) -> int | None:
    """Return the number of blocks in a transformer, which may be 0; None if there is none."""
    if not any(name.startswith(begins) for name in weights):
        return None
    block = re.compile(re.escape(begins) + r"transformer_blocks\.(\d{1,3})\.")
    return max((int(one[1]) + 1 for name in weights if (one := block.match(name))), default=0)


def _check_fit(found: Addition, model: Plan) -> None:
    """Refuse a ControlNet whose maps are not those of the model's UNet."""
    unet, vae, config = model.configs["unet"], model.configs["vae"], found.config
    pairs = (
        ("text states of {} numbers", config.cross_attention_dim, unet.cross_attention_dim),
        ("channels {}", config.block_out_channels, unet.block_out_channels),
        ("{} layers a level", config.layers_per_block, unet.layers_per_block),
        ("latents of {} channels", config.in_channels, unet.out_channels),
        ("latents of {} pixels", config.factor, vae.factor),
        ("size numbers: {}", config.addition_embed_type, unet.addition_embed_type),
        (
            "{} numbers beside the text",
            config.projection_class_embeddings_input_dim,
            unet.projection_class_embeddings_input_dim,
        ),
        ("{} numbers a size", config.addition_time_embed_dim, unet.addition_time_embed_dim),
    )
    for told, theirs, ours in pairs:
        if theirs != ours:
            raise refusal(
                found.source.name,
                f"a ControlNet for {told.format(theirs)} does not fit {model.name}, whose are "
                f"{ours}",
            )
