"""Plan a T2I-Adapter for a model, from headers and configs alone.

It may be diffusers' folder of a T2IAdapter, or of a pipeline with one, or a single file with the
original code's names or diffusers'. A single file has no config: it follows from the model's UNet
and from the file's keys.
"""

from __future__ import annotations

import re

from safelight.families.part import Part
from safelight.weights.check import Header, axis, refusal
from safelight.weights.find import Source
from safelight.weights.names import Weight
from safelight.weights.networks import read_config
from safelight.weights.plan import Addition, Plan

PREFIX = "adapter."
PART = Part(
    "safelight.nets.t2i_adapter",
    "T2IAdapter",
    "T2IAdapterConfig",
    rename=lambda key: key.removeprefix(PREFIX),
)

_BLOCK = re.compile(r"body\.(\d{1,3})\.(block\d\..*|in_conv\..*)")
_INNER = re.compile(r"body\.(\d{1,3})\.(?:body|resnets)\.(\d{1,3})\.(block\d\..*)")


def plan_file(source: Source, header: Header, model: Plan) -> Addition:
    """Return what a file holds. Raises SafelightError if it does not fit the model."""
    from safelight.nets.t2i_adapter import FULL, FULL_XL, LIGHT  # with PyTorch

    keys = {key.removeprefix(PREFIX): key for key in header.tensors}
    shapes = {name: header.tensors[key].shape for name, key in keys.items()}
    light = any(".out_conv." in name for name in keys)
    nested = {name: one for name in keys if (one := _INNER.fullmatch(name))}
    if nested:  # diffusers' names, or an original light one
        levels = 1 + max(int(one[1]) for one in nested.values())
        blocks = 1 + max(int(one[2]) for one in nested.values())
        ours = {
            name: f"body.{one[1]}.resnets.{one[2]}.{one[3]}" if (one := nested.get(name)) else name
            for name in keys
        }
    else:
        flat = {name: one for name in keys if (one := _BLOCK.fullmatch(name))}
        count = 1 + max((int(one[1]) for one in flat.values()), default=-1)
        # SDXL's UNet has a level less, and the last map goes to the middle block.
        kinds = model.configs["unet"].down_block_types
        levels = len(kinds) + (not kinds[0].startswith("CrossAttn"))
        blocks, rest = divmod(count, levels)
        if rest:
            raise refusal(
                source.name,
                f"a T2I-Adapter of {count} blocks does not fit {model.name}, of {levels} levels",
            )
        ours = {name: _levelled(one, blocks) for name, one in flat.items()}
        ours = {name: ours.get(name, name) for name in keys}
    weights = {ours[name]: Weight(header, key, shapes[name]) for name, key in keys.items()}
    last = "out_conv" if light else "resnets.0.block1"
    sizes = {name: weight.shape for name, weight in weights.items()}
    channels = [axis(sizes, f"body.{i}.{last}.weight", 0) for i in range(levels)]
    is_xl = levels == len(_scales(model))
    factor = model.configs["vae"].factor * (2 if is_xl else 1)
    read = axis(sizes, "body.0.in_conv.weight" if light else "conv_in.weight", 1)
    colours, rest = divmod(read, factor**2)
    if rest or colours not in (1, 3):
        raise refusal(
            source.name,
            f"a T2I-Adapter that reads {read} numbers a place does not fit {model.name}: 1 or 3 "
            f"for each of {factor}x{factor} pixels are {factor**2} or {3 * factor**2}",
        )
    raw = {
        "_class_name": PART.network,
        "in_channels": colours,
        "channels": channels[:-1] if light else channels,  # the last two of a light one are equal
        "num_res_blocks": blocks,
        "downscale_factor": factor,
        "adapter_type": LIGHT if light else FULL_XL if is_xl else FULL,
    }
    config = read_config(source, PART, raw, where="")
    return Addition(source, PART, raw, config, weights, {source.path.name: header.path})


def check_fit(found: Addition, model: Plan) -> None:
    """Refuse an adapter whose feature maps are not added to the states of the model's UNet."""
    unet, config = model.configs["unet"], found.config
    widths = (*unet.block_out_channels, unet.block_out_channels[-1])[: len(config.widths)]
    if config.widths != widths:
        raise refusal(
            found.source.name,
            f"a T2I-Adapter for channels {config.widths} does not fit {model.name}, whose are "
            f"{unet.block_out_channels}",
        )
    scales = _scales(model)[: len(config.widths)]
    few = len(config.widths) < len(unet.block_out_channels)
    if few or config.scales != scales:
        raise refusal(
            found.source.name,
            f"a T2I-Adapter with maps of 1/{', 1/'.join(map(str, config.scales))} does not fit "
            f"{model.name}, whose are 1/{', 1/'.join(map(str, scales))}",
        )


def _scales(model: Plan) -> tuple[int, ...]:
    """Return how many pixels a place of the UNet's states stands for where maps are added.

    That is the last state of each level with attention, of others after downsampling, and that of
    the middle block.
    """
    unet, factor = model.configs["unet"], model.configs["vae"].factor
    found, last = list[int](), len(unet.down_block_types) - 1
    for level, kind in enumerate(unet.down_block_types):
        plain = not kind.startswith("CrossAttn")
        found.append(factor << (level + (plain and level < last)))
    return (*found, factor << last)


def _levelled(block: re.Match[str], blocks: int) -> str:
    """Return our name of a weight of an original block. blocks: of each level."""
    level, place = divmod(int(block[1]), blocks)
    inside = block[2] if block[2].startswith("in_conv.") else f"resnets.{place}.{block[2]}"
    return f"body.{level}.{inside}"
