"""Find the layer of a model that a key of an adapter's file means.

Trainers write a layer's path with dots, or with underscores in their place, after one of several
prefixes, and in one of two namings. With underscores a path cannot be taken apart again, so a key
is never parsed: all spellings of all layers of the model are made, and looked up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from safelight.weights.names import renamed

if TYPE_CHECKING:
    from safelight.model import Model


@dataclass(frozen=True, slots=True)
class Target:
    """A layer of a model. part: the network it is in; module: its path there."""

    part: str
    module: str


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
}
_FLAT = {
    # kohya and OneTrainer; LyCORIS and SimpleTuner
    "unet": ("lora_unet_", "lycoris_", "lycoris_unet_"),
    "text_encoder": ("lora_te_", "lora_te1_", "lycoris_", "lycoris_te_", "lycoris_te1_"),
    "text_encoder_2": ("lora_te2_", "lycoris_te2_"),
}
"""How files call each part of a model, before a path with dots and before one without."""

_PROCESSORS = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"}
_TEXT_PROCESSORS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
_TEXT_ROOT = "text_model."


def table(model: Model, modules: Mapping[str, set[str]]) -> dict[str, Target]:
    """Return every spelling of every layer of a model, with the layer.

    modules: the paths of the layers of each part.
    """
    found: dict[str, Target] = {}
    for part in _DOTTED:
        if part not in modules:
            continue
        config = model.parts[part].config
        original = model.family.original_names(part, asdict(config))
        back = {ours: theirs for theirs, ours in original.items()}
        # If the model has only its second text encoder, files may call it "text_encoder".
        alone = part == "text_encoder_2" and "text_encoder" not in modules
        called = (part, "text_encoder") if alone else (part,)
        for module in sorted(modules[part]):
            target = Target(part, module)
            for path in _paths(module, back):
                for name in called:
                    for prefix in _DOTTED[name]:
                        found.setdefault(prefix + path, target)
                    for prefix in _FLAT[name]:
                        found.setdefault(prefix + path.replace(".", "_"), target)
    return found


def _paths(module: str, back: Mapping[str, str]) -> Iterator[str]:
    """Yield the spellings of a layer's path. back: from our names to the original code's."""
    yield module
    theirs = renamed(module, back)
    if theirs is not None:
        yield theirs
    if module.startswith(_TEXT_ROOT):
        yield module.removeprefix(_TEXT_ROOT)  # newer transformers leave it out
    # Older diffusers: what is added to attention is part of its processor.
    for ours, old in _PROCESSORS.items():
        if module.endswith(f".{ours}"):
            yield f"{module.removesuffix(ours)}processor.{old}_lora"
    for ours, old in _TEXT_PROCESSORS.items():
        if module.endswith(f".self_attn.{ours}"):
            yield f"{module.removesuffix(ours)}{old}_lora"
