"""Plan an image encoder for an IP-Adapter, from headers and configs alone.

It may be transformers' folder of a CLIPVisionModelWithProjection or of a whole CLIP, or a single
file with the names of transformers or of OpenCLIP. A single file has no config: it follows from the
shapes of its tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safelight.errors import SafelightError
from safelight.families.part import Part
from safelight.weights.check import Header, read_json, refusal
from safelight.weights.find import Source
from safelight.weights.folder import Folder
from safelight.weights.headers import plain_header_of
from safelight.weights.library import Library
from safelight.weights.names import (
    Section,
    Weight,
    from_folder,
    from_single_file,
    open_clip_names,
)
from safelight.weights.networks import check_depth
from safelight.weights.plan import Addition, Plan, read_config


def _folder_name(key: str) -> str | None:
    """Return our name of a key; None for those of a whole CLIP's texts."""
    ours = key.startswith(("vision_model.", "visual_projection."))
    return key if ours and not key.endswith(".position_ids") else None


PART = Part(
    "safelight.nets.vision",
    "CLIPVisionModelWithProjection",
    "CLIPVisionConfig",
    stem="model",
    rename=_folder_name,
)
_USER = "an image encoder"

# Of published encoders, by the width of their states: the number of heads, and the activation.
_KNOWN = {
    768: (12, "quick_gelu"),  # OpenAI's ViT-B
    1024: (16, "quick_gelu"),  # OpenAI's ViT-L/14
    1280: (16, "gelu"),  # OpenCLIP's ViT-H/14
    1664: (16, "gelu"),  # OpenCLIP's ViT-bigG/14
}


def image_encoder(source: Source) -> Addition:
    """Read the headers and the config of an image encoder.

    Raises SafelightError if it is malformed, or none.
    """
    return _folder_plan(source) if source.path.is_dir() else _file_plan(source)


def candidates(adapter: Path, model: Plan, library: Library | None) -> Iterable[Source]:
    """Yield where an image encoder may be that was not named, the likeliest first.

    adapter: the file of the IP-Adapter. The published repository has two folders, `models` and
    `sdxl_models`, each with an image_encoder, which files of the other need, too.
    """
    home = adapter.absolute().parent  # a name alone has no parent
    above = home / ".." if home.name == ".." else home.parent
    folders = [home, above / "models", above / "sdxl_models"]
    if model.folder is not None:
        folders.append(model.source.path)
    for folder in dict.fromkeys(folders):
        path = folder / "image_encoder"
        if (path / "config.json").is_file():
            yield Source(path.name, path)
    for entry in () if library is None else library.entries("image_encoder"):
        yield Source(entry.name, entry.path)


def widths(source: Source) -> tuple[int, int]:
    """Return how many numbers an encoder's states and its embedding have; zeros if it is none."""
    try:
        if source.path.is_dir():
            config = read_config(source, PART, _raw_of(read_json(source.path / "config.json")))
            return config.hidden_size, config.projection_dim
        header = plain_header_of(source.path, _USER)
        there = ((key, order) for key, order in _PROJECTIONS.items() if key in header.tensors)
        shape = next((header.tensors[key].shape[::order] for key, order in there), ())
        return (shape[0], shape[1]) if len(shape) == 2 else (0, 0)
    except (OSError, SafelightError):
        return 0, 0


_PROJECTIONS = {"visual_projection.weight": -1, "visual.proj": 1, "proj": 1}
"""The keys of the projection, and the order of its axes: from states to embedding."""


def _folder_plan(source: Source) -> Addition:
    folder = Folder(source.path, source.name, index="config.json")
    folder.flat = True
    raw = _raw_of(folder.index)
    kind = raw.get("model_type")
    if kind != "clip_vision_model":
        raise refusal(
            source.name, f"{kind!r:.40} is no image encoder; a {PART.network} of CLIP is needed"
        )
    weights = from_folder(PART, folder.part_headers("image_encoder", PART.stem))
    return _planned(source, raw, weights, folder.files, "config.json: ")


def _raw_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of the image encoder, which may be a part of that of a whole CLIP."""
    vision = config.get("vision_config")
    if config.get("model_type") != "clip" or not isinstance(vision, Mapping):
        return config
    whole = {"model_type": "clip_vision_model", "projection_dim": config.get("projection_dim", 512)}
    return {**vision, **whole}


def _file_plan(source: Source) -> Addition:
    header = plain_header_of(source.path, _USER)
    shapes = {key: info.shape for key, info in header.tensors.items()}
    layers = r"transformer\.resblocks\.(\d{1,3})\."
    prefix = next((p for p in ("visual.", "") if f"{p}ln_pre.weight" in shapes), None)
    if prefix is None:
        weights = from_folder(PART, [header])
    else:
        count = _count(shapes, re.escape(prefix) + layers)
        section = Section(
            "image_encoder",
            _open_clip_names(count),
            thirds=True,
            transposed={"visual_projection.weight"},
        )
        weights = from_single_file(
            header,
            {"image_encoder": PART},
            {prefix: section},
            lambda key: not key.startswith(prefix) or _of_text(key),
        )["image_encoder"]
    raw = _shapes_config(header, {name: weight.shape for name, weight in weights.items()})
    return _planned(source, raw, weights, {source.path.name: header.path}, "")


def _open_clip_names(layers: int) -> dict[str, str]:
    """Return the modules of an OpenCLIP image encoder, from its names to ours."""
    of_text = open_clip_names(layers)
    return {
        "class_embedding": "vision_model.embeddings.class_embedding",
        "conv1": "vision_model.embeddings.patch_embedding",
        "positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "ln_pre": "vision_model.pre_layrnorm",
        "ln_post": "vision_model.post_layernorm",
        "proj": "visual_projection.weight",
        **{
            theirs: ours.replace("text_model.", "vision_model.", 1)
            for theirs, ours in of_text.items()
            if theirs.startswith("transformer.")
        },
    }


def _of_text(key: str) -> bool:
    """Return whether a key of OpenCLIP is not of its image encoder, in a file without prefix."""
    return key in ("logit_scale", "attn_mask", "text_projection")


def _planned(
    source: Source,
    raw: Mapping[str, Any],
    weights: dict[str, Weight],
    files: dict[str, Path],
    where: str,
) -> Addition:
    config = read_config(source, PART, raw, where=where)
    check_depth(source, config.depth, len(weights))
    return Addition(source, PART, raw, config, weights, files)


def _count(names: Iterable[str], pattern: str) -> int:
    """Return the number of layers, by the largest number in their names."""
    found = (re.match(pattern, name) for name in names)
    return max((int(one[1]) + 1 for one in found if one), default=0)


def _shapes_config(header: Header, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the config of a single file, in transformers' keys. shapes: by our names."""
    inside = "vision_model.embeddings."
    patch = shapes.get(f"{inside}patch_embedding.weight", ())
    positions = shapes.get(f"{inside}position_embedding.weight", ())
    out = shapes.get("visual_projection.weight", ())
    layer = "vision_model.encoder.layers."
    widen = shapes.get(f"{layer}0.mlp.fc1.weight", ())
    if not (len(patch) == 4 and len(positions) == len(out) == len(widen) == 2):
        raise refusal(header.name, f"this is no image encoder; a {PART.network} of CLIP is needed")
    width, pixels = patch[0], patch[-1]
    if width not in _KNOWN:
        raise refusal(
            header.name, f"an image encoder of unknown shapes, {width}; give its folder with a "
            "config.json"
        )  # fmt: skip
    heads, act = _KNOWN[width]
    return {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": widen[0],
        "num_hidden_layers": _count(shapes, re.escape(layer) + r"(\d{1,3})\."),
        "num_attention_heads": heads,
        "hidden_act": act,
        "projection_dim": out[0],
        "patch_size": pixels,
        "image_size": pixels * math.isqrt(max(positions[0] - 1, 0)),
    }
