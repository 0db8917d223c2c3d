"""Where each weight of Qwen-Image's autoencoder and text encoder lies in a file.

The autoencoder's convolutions are stored over frames; see `nets.vae_qwen`. Its transformer has the
names of diffusers everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from safelight.weights.names import under

NORM = "decoder.middle.0.residual.0.gamma"
"""A weight that no autoencoder of pictures has, in its original name."""

FOLDER_NORM = "decoder.mid_block.resnets.0.norm1.gamma"
"""The same in the name of a folder."""

_RESNET = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_UNUSED = re.compile(
    r"text_encoders\.qwen25_7b\.transformer\.(model\.)?(visual\..*|lm_head\.weight)"
    r"|(vae|first_stage_model)\..*\.time_conv\.\w+"
)
_TIME = re.compile(r"(.*\.)?time_conv\.\w+")


def qwen_unused(key: str) -> bool:
    """Return whether a key of a whole model's file is read by nothing that draws from text."""
    return _UNUSED.fullmatch(key) is not None


def qwen_vae_unused(key: str) -> bool:
    """Return whether a weight of the autoencoder only changes the number of frames."""
    return _TIME.fullmatch(key) is not None


def qwen_vae_folder_name(key: str) -> str | None:
    """Return our name of a key in a folder; None for what a single frame does not read."""
    return None if qwen_vae_unused(key) else key.replace(".resample.1.", ".conv.")


def qwen_vae_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape to read a tensor in: that of a kernel's last slice, of a norm's channels.

    `stored_weight` takes the slice.
    """
    if name.endswith(".gamma") and set(shape[1:]) == {1}:
        return shape[:1]
    return (*shape[:2], *shape[3:]) if len(shape) == 5 else shape


def qwen_vae_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the modules of the autoencoder, from the original names to ours.

    The original, Wan's of Alibaba, numbers the blocks of all levels in one list.
    """
    names = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        middle = f"{half}.mid_block"
        names[f"{half}.conv1"] = f"{half}.conv_in"
        names[f"{half}.head.0"], names[f"{half}.head.2"] = f"{half}.norm_out", f"{half}.conv_out"
        names |= under(f"{half}.middle.0", f"{middle}.resnets.0", _RESNET)
        names |= under(f"{half}.middle.2", f"{middle}.resnets.1", _RESNET)
        names[f"{half}.middle.1"] = f"{middle}.attentions.0"
    levels, layers = len(config["dim_mult"]), config["num_res_blocks"]
    down = up = 0
    for i in range(levels):
        for _ in range(layers):
            names |= under(f"encoder.downsamples.{down}", f"encoder.down_blocks.{down}", _RESNET)
            down += 1
        for j in range(layers + 1):
            ours = f"decoder.up_blocks.{i}.resnets.{j}"
            names |= under(f"decoder.upsamples.{up}", ours, _RESNET)
            up += 1
        if i < levels - 1:
            conv = f"encoder.down_blocks.{down}.conv"
            names[f"encoder.downsamples.{down}.resample.1"] = conv
            ours = f"decoder.up_blocks.{i}.upsamplers.0.conv"
            names[f"decoder.upsamples.{up}.resample.1"] = ours
            down, up = down + 1, up + 1
    return names


def qwen2_folder_name(key: str) -> str | None:
    """Return our name of a key of Qwen2.5-VL; None for its head, and what reads pictures."""
    inner = key.removeprefix("model.").removeprefix("language_model.").removeprefix("model.")
    return None if inner.startswith(("visual.", "lm_head.")) else inner
