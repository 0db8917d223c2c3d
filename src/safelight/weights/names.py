"""Where each weight of our networks lies in a checkpoint.

Our names are those of diffusers' folders, so a folder needs only two rules, for old names. A
single file has the names of the original code (CompVis latent-diffusion for UNet and VAE,
OpenCLIP for the text encoder of SD 2.x). `unet_names`, `vae_names` and `open_clip_names` are the
tables from those names to ours; a family says which parts of a file they are for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from safelight.weights.check import Header, refusal
from safelight.weights.scales import read_scales

if TYPE_CHECKING:
    from safelight.families.part import Part

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE_RESNET = {n: n for n in ("norm1", "conv1", "norm2", "conv2")} | {
    "nin_shortcut": "conv_shortcut"
}
_VAE_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight of one of our networks: tensor `key` of a file, read as `shape`.

    rows: which rows of the tensor it is, as (start, end), one after the other; empty for all of
      them in their order. transposed: it is stored with rows and columns exchanged. identity: it is
      the identity matrix, in the precision of the tensor. scale: the tensor that it is multiplied
      by, one number or one for each row.
    """

    header: Header
    key: str
    shape: tuple[int, ...]
    rows: tuple[tuple[int, int], ...] = ()
    transposed: bool = False
    identity: bool = False
    scale: str | None = None

    @property
    def dtype(self) -> str:
        return self.header.tensors[self.key].dtype


def from_folder(part: Part, headers: Iterable[Header]) -> dict[str, Weight]:
    """Return the weights of one part of a folder, by our names."""
    found: dict[str, Weight] = {}
    for header in headers:
        for key, info in header.tensors.items():
            name = part.rename(key)
            if name is None:
                continue
            if name in found:
                raise refusal(
                    header.name, f"{key!r:.60} and {found[name].key!r:.60} are the same weight"
                )
            found[name] = Weight(header, key, part.reshape(name, info.shape))
    return found


@dataclass(frozen=True, slots=True)
class Section:
    """The keys of a single file under one prefix.

    part: the network that they belong to. names: its modules, from the original names to ours;
    None: keys are named as in a folder. thirds: q, k and v of OpenCLIP's attention are one tensor.
    transposed: our names of the matrices that are stored with rows and columns exchanged.
    stacked: for an original module that has the rows of several of ours, those in their order, each
    with its share of the rows. swapped: our modules whose two halves of rows are exchanged.
    identity: our names of identity matrices, which the file leaves out, each with a weight that has
    as many rows.
    """

    part: str
    names: Mapping[str, str] | None = None
    thirds: bool = False
    transposed: Set[str] = frozenset()
    stacked: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    swapped: Set[str] = frozenset()
    identity: Mapping[str, str] = field(default_factory=dict)


def from_single_file(
    header: Header,
    parts: Mapping[str, Part],
    sections: Mapping[str, Section],
    unused: Callable[[str], bool],
) -> dict[str, dict[str, Weight]]:
    """Return the weights of each part, by our names; none for a part that is not in the file.

    sections: by their prefixes; the first that fits a key counts, and "" fits all. unused: whether
    a key is known and not read.

    Raises SafelightError that names keys which belong to nothing.
    """
    found: dict[str, dict[str, Weight]] = {part: {} for part in parts}
    unknown: list[str] = []
    scales = read_scales(header)
    for key in header.tensors:
        if unused(key) or key in scales.beside:
            continue
        prefix = next((prefix for prefix in sections if key.startswith(prefix)), None)
        if prefix is None:
            unknown.append(key)
            continue
        section = sections[prefix]
        weights = _weights(header, key, key.removeprefix(prefix), section, parts[section.part])
        if not weights:
            unknown.append(key)
        if (scale := scales.by_weight.get(key)) is not None:
            weights = {name: replace(one, scale=scale) for name, one in weights.items()}
        there = found[section.part]
        for name in weights.keys() & there.keys():
            both = f"{key!r:.50} and {there[name].key!r:.50}"
            raise refusal(header.name, f"{both} are the same weight")
        there |= weights
    if unknown:
        raise refusal(header.name, f"{len(unknown)} keys that we do not know: {some(unknown)}")
    for section in sections.values():
        there = found[section.part]
        for name, like in section.identity.items():
            if like in there and there[like].shape:
                key, rows = there[like].key, there[like].shape[0]
                there[name] = Weight(header, key, (rows, rows), identity=True)
    return found


@dataclass(frozen=True, slots=True)
class Original:
    """A tensor to write into a single file.

    part: the network. names: our weights that it is made of: one, or those whose rows it stacks.
    conv: the axes of size 1 that the original has at its end. transposed: rows and columns are
    exchanged. swapped: the two halves of the rows are.
    """

    part: str
    names: tuple[str, ...]
    conv: int = 0
    transposed: bool = False
    swapped: bool = False


def original_names(
    sections: Mapping[str, Section], weights: Mapping[str, Mapping[str, Sequence[int]]]
) -> dict[str, Original]:
    """Return what a single file holds, by its keys: the inverse of `from_single_file`.

    sections: of a family. weights: the shapes of each part's weights, by our names.

    Raises KeyError for a name that the original code has no place for.
    """
    found: dict[str, Original] = {}
    for part, shapes in weights.items():
        prefix, section = next((p, s) for p, s in sections.items() if s.part == part)
        if section.names is None:
            kept = (name for name in shapes if name not in section.identity)
            found |= {f"{prefix}{name}": Original(part, (name,)) for name in kept}
            continue
        back = {ours: theirs for theirs, ours in section.names.items()}
        stacks = {ours: theirs for theirs, all_of in section.stacked.items() for ours in all_of}
        for name, shape in shapes.items():
            module = _module(name)
            if module in stacks:
                theirs, leaf = stacks[module], name.removeprefix(module)
                names = tuple(ours + leaf for ours in section.stacked[theirs])
                found[prefix + theirs + leaf] = Original(part, names)
                continue
            third = re.fullmatch(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)", name)
            if section.thirds and third:
                if third[2] == "q":
                    names = tuple(name.replace("q_proj", f"{letter}_proj") for letter in "qkv")
                    key = f"{prefix}{back[third[1]]}.attn.in_proj_{third[3]}"
                    found[key] = Original(part, names)
                continue
            theirs = renamed(name, back)
            if theirs is None:
                raise KeyError(name)
            # There the VAE's attention has 1×1 convolutions.
            conv = 2 if part == "vae" and ".attentions." in name and len(shape) == 2 else 0
            turned, swapped = name in section.transposed, module in section.swapped
            found[prefix + theirs] = Original(part, (name,), conv, turned, swapped)
    return found


def _weights(
    header: Header, key: str, inner: str, section: Section, part: Part
) -> dict[str, Weight]:
    """Return the weights that are in tensor `key`, by our names; none if it belongs to nothing.

    inner: the key without the section's prefix.
    """
    shape = header.tensors[key].shape
    if section.names is None:
        name = part.rename(inner)
    elif pieces := _pieces(header, key, inner, section):
        return pieces
    else:
        name = renamed(inner, section.names)
    if name is None:
        return {}
    if name in section.transposed:
        return {name: Weight(header, key, shape[::-1], transposed=True)}
    if _module(name) in section.swapped and shape:
        half = shape[0] // 2
        return {name: Weight(header, key, shape, ((half, shape[0]), (0, half)))}
    return {name: Weight(header, key, part.reshape(name, shape))}


def _pieces(header: Header, key: str, inner: str, section: Section) -> dict[str, Weight]:
    """Return the weights whose rows are stacked in tensor `key`; empty if it holds one weight.

    inner: the key without the section's prefix.
    """
    shape, leaf = header.tensors[key].shape, inner.rpartition(".")[2]
    shares = section.stacked.get(_module(inner), {})
    joint = re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", inner)
    if section.thirds and joint and section.names and joint[1] in section.names:
        ours, leaf = section.names[joint[1]], joint[2]
        shares = {f"{ours}.self_attn.{letter}_proj": 1 for letter in "qkv"}
    total = sum(shares.values())
    if not total or not shape or shape[0] % total:
        return {}
    found, start = {}, 0
    for module, share in shares.items():
        end = start + shape[0] // total * share
        piece = (end - start, *shape[1:])
        found[f"{module}.{leaf}"] = Weight(header, key, piece, ((start, end),))
        start = end
    return found


def _module(name: str) -> str:
    """Return the module that a weight belongs to."""
    return name.rpartition(".")[0]


def some(names: Iterable[str]) -> str:
    """Return up to three of the names, for an error."""
    names = sorted(names)
    return ", ".join(f"{n:.48}" for n in names[:3]) + (" …" if len(names) > 3 else "")


def unet_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the modules of a UNet, from the original names to ours.

    The original numbers all blocks in one list. A downsampler is a block of its own; an upsampler
    is the last member of a block.
    """
    names = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    middle = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    if middle is not None:
        names |= under("middle_block.0", "mid_block.resnets.0", _RESNET)
    if middle == "UNetMidBlock2DCrossAttn":
        names["middle_block.1"] = "mid_block.attentions.0"
        names |= under("middle_block.2", "mid_block.resnets.1", _RESNET)
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    n = 1
    for i, kind in enumerate(config["down_block_types"]):
        for j in range(layers):
            names |= under(f"input_blocks.{n}.0", f"down_blocks.{i}.resnets.{j}", _RESNET)
            if kind.startswith("CrossAttn"):
                names[f"input_blocks.{n}.1"] = f"down_blocks.{i}.attentions.{j}"
            n += 1
        if i < levels - 1:
            names[f"input_blocks.{n}.0.op"] = f"down_blocks.{i}.downsamplers.0.conv"
            n += 1
    n = 0
    for i, kind in enumerate(config["up_block_types"]):
        attends = kind.startswith("CrossAttn")
        for j in range(layers + 1):
            names |= under(f"output_blocks.{n}.0", f"up_blocks.{i}.resnets.{j}", _RESNET)
            if attends:
                names[f"output_blocks.{n}.1"] = f"up_blocks.{i}.attentions.{j}"
            n += 1
        if i < levels - 1:
            upsampler = f"output_blocks.{n - 1}.{2 if attends else 1}.conv"
            names[upsampler] = f"up_blocks.{i}.upsamplers.0.conv"
    return names


def vae_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the modules of a VAE, from the original names to ours.

    The original counts the decoder's levels from the picture's side; ours are in the order in which
    they run.
    """
    names = {n: n for n in ("quant_conv", "post_quant_conv")}
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    for half in ("encoder", "decoder"):
        names |= {f"{half}.{n}": f"{half}.{n}" for n in ("conv_in", "conv_out")}
        names[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        middle = f"{half}.mid_block"
        names |= under(f"{half}.mid.block_1", f"{middle}.resnets.0", _VAE_RESNET)
        names |= under(f"{half}.mid.block_2", f"{middle}.resnets.1", _VAE_RESNET)
        names |= under(f"{half}.mid.attn_1", f"{middle}.attentions.0", _VAE_ATTENTION)
    for i in range(levels):
        down, up = f"encoder.down_blocks.{i}", f"decoder.up_blocks.{levels - 1 - i}"
        for j in range(layers):
            names |= under(f"encoder.down.{i}.block.{j}", f"{down}.resnets.{j}", _VAE_RESNET)
        for j in range(layers + 1):
            names |= under(f"decoder.up.{i}.block.{j}", f"{up}.resnets.{j}", _VAE_RESNET)
        names[f"encoder.down.{i}.downsample.conv"] = f"{down}.downsamplers.0.conv"
        names[f"decoder.up.{i}.upsample.conv"] = f"{up}.upsamplers.0.conv"
    return names


def open_clip_names(layers: int) -> dict[str, str]:
    """Return the modules of an OpenCLIP text encoder, from its names to ours."""
    names = {
        "token_embedding": "text_model.embeddings.token_embedding",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final": "text_model.final_layer_norm",
    }
    for i in range(layers):
        theirs, ours = f"transformer.resblocks.{i}", f"text_model.encoder.layers.{i}"
        names |= {theirs: ours} | under(theirs, ours, _CLIP_LAYER)
    return names


def under(theirs: str, ours: str, names: Mapping[str, str]) -> dict[str, str]:
    """Return names of modules inside a module, with the original name and ours before them."""
    return {f"{theirs}.{a}": f"{ours}.{b}" for a, b in names.items()}


def renamed(key: str, names: Mapping[str, str]) -> str | None:
    """Return our name of a key: that of the innermost module in `names`, and what follows it."""
    module, rest = key, ""
    while module:
        if module in names:
            return names[module] + rest
        module, dot, leaf = module.rpartition(".")
        rest = dot + leaf + rest
    return None


def text_folder_name(key: str) -> str | None:
    """Return our name of a text encoder's key; newer writers leave out `text_model.`."""
    name = key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}"
    return None if name == "text_model.embeddings.position_ids" else name


def qwen_folder_name(key: str) -> str | None:
    """Return our name of a Qwen3 text encoder's key; None for the head, which we do not build."""
    return None if key == "lm_head.weight" else key.removeprefix("model.")


def t5_folder_name(key: str) -> str | None:
    """Return our name of a T5 encoder's key; some writers store its embeddings twice."""
    return None if key == "encoder.embed_tokens.weight" else key


def vae_folder_name(key: str) -> str:
    """Return our name of a VAE's key; older writers have other names in its attention."""
    head, _, leaf = key.rpartition(".")
    head, _, module = head.rpartition(".")
    return f"{head}.{_OLD_VAE_ATTENTION.get(module, module)}.{leaf}" if head else key


def vae_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape to read a tensor in: older VAEs have 1×1 convolutions in their attention."""
    if ".attentions." in name and len(shape) > 2 and set(shape[2:]) == {1}:
        return shape[:2]
    return shape
