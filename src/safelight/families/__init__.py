"""The families of models that can be loaded, one file each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from safelight.families.base import Conditioning, Family
from safelight.families.flux import FLUX
from safelight.families.flux2 import DEV, FLUX2
from safelight.families.part import Part
from safelight.families.pixels import Pixels
from safelight.families.qwenimage import BASE as QWEN_IMAGE
from safelight.families.qwenimage_files import NOT_READ
from safelight.families.sd import SD
from safelight.families.sd3 import SD3
from safelight.families.sdxl import REFINER, SDXL
from safelight.families.single import SingleFile
from safelight.families.zimage import BASE as Z_IMAGE
from safelight.weights.check import refusal
from safelight.weights.kinds import is_t2i_adapter, kind_of

if TYPE_CHECKING:
    from safelight.weights.check import Header

__all__ = [
    "FAMILIES",
    "Conditioning",
    "Family",
    "Part",
    "SingleFile",
    "family_of_file",
    "family_of_folder",
]

FAMILIES: list[Family] = [SD, SDXL, REFINER, SD3, FLUX2, FLUX, Z_IMAGE, QWEN_IMAGE, Pixels()]
"""One instance of each family. A new family is added here, or by the code that defines it.

FLUX.2 comes before FLUX.1, whose marks its single files have, too.
"""

# Parts of pipelines that are not read with the model. A ControlNet or a T2I-Adapter is given beside
# it, and so is an IP-Adapter, which finds the model's image_encoder.
_IGNORED = {"safety_checker", "feature_extractor", "image_encoder", "controlnet", "adapter"}
_PART = "one part of a model folder; give the folder's path"
_TRANSFORMER = (
    "a transformer in diffusers' layout; give a model's folder that has it as "
    "transformer/diffusion_pytorch_model.safetensors"
)
_CONTROL = "a ControlNet, not a whole model"
_T2I_ADAPTER = "a T2I-Adapter, not a whole model: give it with --controlnet beside one"
_UPSCALER = "an upscaler, not a whole model: see safelight upscale"
_IP_ADAPTER = "an IP-Adapter, not a whole model: give it with --ip-adapter beside one"
_BITSANDBYTES = re.compile(r".*\.(nested_)?(absmax|quant_map)|.*\.bitsandbytes__\w+")
"""Tensors that bitsandbytes stores beside weights in 4 bits."""

_FOREIGN = (
    ("conditioner.embedders.", "a part of Stable Diffusion XL; the whole model is needed"),
    ("control_model.", _CONTROL),
    ("zero_convs.", _CONTROL),  # in the original names, alone in its file
    ("input_hint_block.", _CONTROL),
    ("controlnet_", _CONTROL),  # in diffusers' names
    ("lora_", "a LoRA, not a whole model"),
    ("image_proj.", _IP_ADAPTER),
    ("ip_adapter.", _IP_ADAPTER),
    ("vision_model.", "an image encoder of an IP-Adapter, not a whole model: see --image-encoder"),
    ("down_blocks.", _PART),
    ("transformer_blocks.", _TRANSFORMER),
    ("encoder.", "one part of a model; the whole model is needed"),
    ("text_model.", _PART),
)


def family_of_folder(index: Mapping[str, Any], where: str) -> Family:
    """Return the family that a model_index.json describes.

    Raises SafelightError if the family is not supported, or if it has no such part. A config is
    data: no name in it is ever imported.
    """
    pipeline = index.get("_class_name")
    if pipeline == "Flux2Pipeline":
        raise refusal(where, DEV)
    family = next((f for f in FAMILIES if f.owns(index)), None)
    if family is None and str(pipeline).startswith("QwenImage"):
        raise refusal(where, NOT_READ.format(f"{pipeline:.60}"))
    if not isinstance(pipeline, str) or family is None:
        known = ", ".join(dict.fromkeys(f.pipelines[0] for f in FAMILIES))
        raise refusal(where, f"{pipeline!r:.40} is not supported; supported are {known}")
    for name, value in index.items():
        if not isinstance(value, list) or value == [None, None] or name in _IGNORED:
            continue
        if name in family.parts:
            part = family.parts[name]
            classes = (*(part.classes or (part.network,)), *part.others)
        elif name in family.tokenizers:
            classes = family.tokenizers[name]
        elif name == "scheduler":  # its class is read with its config
            continue
        else:
            raise refusal(where, f"the part {name!r:.60} of model_index.json is not supported")
        if value[-1:] not in [[c] for c in classes]:
            raise refusal(where, f"{name} is a {value[-1:]!r:.60}; expected {classes[0]}")
    return family


def family_of_file(header: Header) -> Family:
    """Return the variant of a single-file checkpoint, by its keys and shapes.

    Raises SafelightError if it is of none, and says what the file is if its keys tell.
    """
    if any(_BITSANDBYTES.fullmatch(key) for key in header.tensors):
        raise refusal(header.name, "4-bit weights of bitsandbytes are not supported")
    for family in FAMILIES:
        variant = family.identify(header)
        if variant is not None:
            return variant
    if header.tensors and all(key.startswith("text_encoders.") for key in header.tensors):
        raise refusal(header.name, "this is one or more text encoders; the whole model is needed")
    if is_t2i_adapter(header.tensors):
        raise refusal(header.name, f"this is {_T2I_ADAPTER}")
    if kind_of(header.tensors) == "upscaler":
        raise refusal(header.name, f"this is {_UPSCALER}")
    for prefix, what in _FOREIGN:
        if any(key.startswith(prefix) for key in header.tensors):
            raise refusal(header.name, f"this is {what}")
    known = ", ".join(family.title for family in (SD, SDXL, SD3, FLUX, FLUX2, Z_IMAGE))
    raise refusal(header.name, f"not a checkpoint of {known} or {QWEN_IMAGE.title}")
