"""Find the layer of a model that a key of an adapter's file means.

Trainers write a layer's path with dots, or with underscores in their place, after one of several
prefixes, and in one of two namings. With underscores a path cannot be taken apart again, so a key
is never parsed: all spellings of all layers of the model are made, and looked up.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from safelight.weights.names import Section, renamed

if TYPE_CHECKING:
    from safelight.model import Model


@dataclass(frozen=True, slots=True)
class Target:
    """A layer as a file has it: one of the model's, or several that are one in the original code.

    part: the network it is in. name: its path there, that of several in the original code. layers:
    the paths in our network, in the order of their rows. swapped: the file has the second half of
    the rows first.
    """

    part: str
    name: str
    layers: tuple[str, ...]
    swapped: bool = False


_DOTTED = {
    # diffusers and PEFT, ComfyUI, whole checkpoints, PEFT's own files
    "unet": (
        "unet.",
        "diffusion_model.",
        "model.diffusion_model.",
        "base_model.model.",
        "unet.base_model.model.",
        "",
    ),
    "transformer": (
        "transformer.",
        "diffusion_model.",
        "model.diffusion_model.",
        "base_model.model.",
        "transformer.base_model.model.",
        "",
    ),
    "text_encoder": (
        "text_encoder.",
        "text_encoders.clip_l.",
        "text_encoders.clip_l.transformer.",
        "base_model.model.",
        "text_encoder.base_model.model.",
        "cond_stage_model.transformer.",
        "",
    ),
    "text_encoder_2": (
        "text_encoder_2.",
        "text_encoders.clip_g.",
        "text_encoders.clip_g.transformer.",
        "text_encoder_2.base_model.model.",
    ),
    "T5": ("text_encoders.t5xxl.", "text_encoders.t5xxl.transformer."),
    "Qwen3": (
        "text_encoders.qwen3_4b.",
        "text_encoders.qwen3_4b.transformer.",
        "text_encoders.qwen3_8b.",
        "text_encoders.qwen3_8b.transformer.",
    ),
    "Qwen2.5-VL": ("text_encoders.qwen25_7b.", "text_encoders.qwen25_7b.transformer."),
}
_FLAT = {
    # kohya and OneTrainer; LyCORIS and SimpleTuner
    "unet": ("lora_unet_", "lycoris_", "lycoris_unet_"),
    "transformer": ("lora_unet_", "lora_transformer_", "lycoris_", "lycoris_transformer_"),
    "text_encoder": ("lora_te_", "lora_te1_", "lycoris_", "lycoris_te_", "lycoris_te1_"),
    "text_encoder_2": ("lora_te2_", "lycoris_te2_"),
    "T5": ("lora_te3_",),  # as kohya's scripts call it, also where it is the second of two
    "Qwen3": ("lora_te_", "lora_te1_"),
    "Qwen2.5-VL": ("lora_te_", "lora_te1_"),
}
"""How files call each network of a model, before a path with dots and before one without."""

_KINDS = {"T5EncoderModel": "T5", "Qwen3Model": "Qwen3", "Qwen2Model": "Qwen2.5-VL"}
"""Text encoders that are not CLIP's, whose names in files depend on their kind."""

_ROOTS = {"Qwen3": "model.", "Qwen2.5-VL": "model."}
"""What files may write before a path, as the whole language model around the network has it."""

_PROCESSORS = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"}
_TEXT_PROCESSORS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
_TEXT_ROOT = "text_model."
_SPLIT = re.compile(r"(\.attention\.to)_([qkv])$")
"""Layers of Z-Image that some trainers write with a dot in place of the underscore."""

_XLABS = {
    ".img_attn.qkv": ".processor.qkv_lora1",
    ".img_attn.proj": ".processor.proj_lora1",
    ".txt_attn.qkv": ".processor.qkv_lora2",
    ".txt_attn.proj": ".processor.proj_lora2",
    ".linear2": ".processor.proj_lora",
}
"""What XLabs' trainer calls layers of FLUX.1, by the ends of their original names."""


def layers_of(shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> dict[str, set[str]]:
    """Return the paths of the layers that have a weight, by part. shapes: of the weights."""
    return {
        part: {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
        for part, names in shapes.items()
    }


def table(model: Model, modules: Mapping[str, set[str]]) -> dict[str, Target]:
    """Return every spelling of every layer of a model, with the layer.

    modules: the paths of the layers of each part.
    """
    found: dict[str, Target] = {}
    for part in modules:
        dotted, flat = _prefixes(model, part, modules)
        if not dotted:
            continue
        section = model.family.original(part, asdict(model.parts[part].config))
        for path, target in _spellings(section, modules[part]):
            for prefix in dotted:
                found.setdefault(prefix + path, target)
            for prefix in flat:
                found.setdefault(prefix + path.replace(".", "_"), target)
    return found


def _prefixes(
    model: Model, part: str, modules: Mapping[str, set[str]]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what files write before a path with dots, and before one without; nothing for a part
    that no adapter changes.
    """
    own, known = (part,), model.family.parts.get(part)
    if known is not None and (kind := _KINDS.get(known.network)) is not None:
        number = part.removeprefix("text_encoder").removeprefix("_")
        dotted = (f"{part}.", f"{part}.base_model.model.", *_DOTTED[kind])
        flat = (f"lora_te{number}_", f"lycoris_te{number}_", *_FLAT[kind])
        if (root := _ROOTS.get(kind)) is not None:
            dotted += tuple(prefix + root for prefix in dotted)
            flat += tuple(prefix + root.replace(".", "_") for prefix in flat)
        return dotted, flat
    if part == "text_encoder_2" and "text_encoder" not in modules:
        # If the model has only its second text encoder, files may call it "text_encoder".
        own = (part, "text_encoder")
    dotted = tuple(prefix for name in own for prefix in _DOTTED.get(name, ()))
    return dotted, tuple(prefix for name in own for prefix in _FLAT.get(name, ()))


def _spellings(section: Section, modules: set[str]) -> Iterator[tuple[str, Target]]:
    """Yield each spelling of each layer of a network, without a prefix."""
    part = section.part
    back = {ours: theirs for theirs, ours in (section.names or {}).items()}
    for module in sorted(modules):
        target = Target(part, module, (module,))
        for path in _paths(module):
            yield path, target
        theirs = renamed(f"{module}.weight", back)
        if theirs is not None:
            swapped = Target(part, module, (module,), module in section.swapped)
            yield from _originals(theirs.removesuffix(".weight"), swapped)
    for theirs, shares in section.stacked.items():
        if modules >= shares.keys():
            yield from _originals(theirs, Target(part, theirs, tuple(shares)))


def _originals(name: str, target: Target) -> Iterator[tuple[str, Target]]:
    """Yield the spellings that come from a layer's name in the original code."""
    yield name, target
    for end, processor in _XLABS.items():
        if name.endswith(end):
            yield name.removesuffix(end) + processor, target
    if name.endswith(".linear1") and len(target.layers) > 3:
        # In FLUX.1 it has queries, keys, values and the feed-forward's rows; XLabs changes three.
        # In FLUX.2 it is one layer of ours.
        path = f"{name.removesuffix('linear1')}processor.qkv_lora"
        yield path, Target(target.part, path, target.layers[:3])


def _paths(module: str) -> Iterator[str]:
    """Yield the spellings of a layer's path in the naming of diffusers."""
    yield module
    if module.startswith("transformer_blocks."):
        yield module.removeprefix("tran")  # some exporters of FLUX.2 cut too much off
    if (spelled := _SPLIT.sub(r"\1.\2", module)) != module:
        yield spelled
    if module.startswith(_TEXT_ROOT):
        yield module.removeprefix(_TEXT_ROOT)  # newer transformers leave it out
    # Older diffusers: what is added to attention is part of its processor.
    for ours, old in _PROCESSORS.items():
        if module.endswith(f".{ours}"):
            yield f"{module.removesuffix(ours)}processor.{old}_lora"
    for ours, old in _TEXT_PROCESSORS.items():
        if module.endswith(f".self_attn.{ours}"):
            yield f"{module.removesuffix(ours)}{old}_lora"
