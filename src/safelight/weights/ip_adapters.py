"""Plan an IP-Adapter for a model, from headers and configs alone.

It is a single file of `image_proj.*` and `ip_adapter.*`, and has no config: that follows from the
model's UNet and the shapes of the file's tensors. It reads what an image encoder says of a picture,
which is a file of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safelight.errors import SafelightError
from safelight.families.part import Part
from safelight.weights.check import Header, refusal
from safelight.weights.find import Source, find_image_encoder, find_ip_adapter
from safelight.weights.headers import plain_header_of
from safelight.weights.image_encoders import candidates, image_encoder, widths
from safelight.weights.kinds import IP_ADAPTER
from safelight.weights.library import Library, open_library
from safelight.weights.names import Weight, some
from safelight.weights.plan import Addition, Plan, read_config

PART = Part("safelight.nets.ip_adapter", "IPAdapter", "IPAdapterConfig")

_PROJ, _ADAPTER = IP_ADAPTER
_FACE_ID = re.compile(r"image_proj\.(perceiver_resampler\..*|norm\.weight)|ip_adapter\..*_lora\..*")
_HEAD = 64
"""The width of a head in every published resampler."""


def with_image_prompts(
    plan: Plan,
    ip_adapter: str | Path | None,
    image_encoder: str | Path | None,
    models_dir: str | Path | None,
    *,
    download: bool,
) -> Plan:
    """Return the plan of a model with an IP-Adapter, if one is named; see `with_ip_adapter`.

    ip_adapter, image_encoder: names of both, see `weights.find`. Raises SafelightError.
    """
    if ip_adapter is None:
        if image_encoder is not None:
            plan.warnings.append("image_encoder does nothing without ip_adapter: leave it out")
        return plan
    encoder = None
    if image_encoder is not None:
        encoder = find_image_encoder(image_encoder, download=download, models_dir=models_dir)
    source = find_ip_adapter(ip_adapter, download=download, models_dir=models_dir)
    return with_ip_adapter(plan, source, encoder, open_library(models_dir))


def with_ip_adapter(
    plan: Plan, source: Source, encoder: Source | None, library: Library | None
) -> Plan:
    """Return the plan of a model with an IP-Adapter and its image encoder.

    encoder: None to look for one; see `image_encoders.candidates`.

    Raises SafelightError if one of them is malformed or something else, if they do not fit the
    model or one another, or if no encoder is found.
    """
    field = "ip_adapter_image"
    if "vae" not in plan.configs:
        raise SafelightError(f"{plan.name} draws pixels: it takes no IP-Adapter", field=field)
    if "unet" not in plan.configs:
        raise SafelightError(
            f"{plan.name} is of {plan.family.title}, which takes no IP-Adapter yet; Stable "
            "Diffusion 1.x, 2.x and XL do",
            field=field,
        )
    adapter = _adapter(source, plan)
    read = _encoder_of(adapter, encoder, plan, library)
    return plan.with_additions({"ip_adapter": adapter, "image_encoder": read}, [])


def _adapter(source: Source, model: Plan) -> Addition:
    if source.path.is_dir():
        raise refusal(source.name, "a folder; give the file of an IP-Adapter that lies in it")
    header = plain_header_of(source.path, "an IP-Adapter")
    keys = header.tensors.keys()
    told = any(_FACE_ID.fullmatch(key) for key in keys)
    if told and f"{_PROJ}proj.weight" not in keys:
        raise refusal(
            source.name,
            "an IP-Adapter FaceID, which reads InsightFace's embeddings of faces and is not "
            "supported; base, Plus and full-face are",
        )
    others = [key for key in keys if not key.startswith((_PROJ, _ADAPTER))]
    if len(others) == len(keys):
        raise refusal(source.name, "this is no IP-Adapter: it has no image_proj.* and ip_adapter.*")
    if others:
        raise refusal(source.name, f"{len(others)} keys that we do not know: {some(others)}")
    raw = _raw_config(header, model)
    config = read_config(source, PART, raw, where="")
    weights = {key: Weight(header, key, info.shape) for key, info in header.tensors.items()}
    if config.num_hidden_layers > len(weights):
        raise refusal(source.name, "it has more layers than tensors")
    return Addition(source, PART, raw, config, weights, {source.path.name: header.path})


def _raw_config(header: Header, model: Plan) -> dict[str, Any]:
    """Return the config of an adapter's file. Raises SafelightError if it does not fit the UNet."""
    shapes = {key: info.shape for key, info in header.tensors.items()}
    unet = model.configs["unet"]
    reads = {key: shape for key, shape in shapes.items() if key.startswith(_ADAPTER)}
    keys = [shape for key, shape in reads.items() if key.endswith(".to_k_ip.weight")]
    cross = keys[0][-1] if keys and keys[0] else 0
    if cross != unet.cross_attention_dim:
        raise refusal(
            header.name,
            f"an IP-Adapter for text states of {cross} numbers does not fit {model.name}, whose "
            f"are {unet.cross_attention_dim}",
        )
    widths = unet.cross_attentions
    places = [f"{_ADAPTER}{2 * i + 1}.to_k_ip.weight" for i in range(max(len(widths), len(keys)))]
    found = tuple((shapes.get(key) or (0,))[0] for key in places)
    if found != widths:
        differ = next(i for i, _ in enumerate(found) if found[: i + 1] != widths[: i + 1])
        raise refusal(
            header.name,
            f"an IP-Adapter for a UNet of {len(keys)} cross-attentions does not fit {model.name}: "
            f"it has {len(widths)}, and number {differ + 1} differs",
        )
    base = {"cross_attention_dim": cross, "widths": list(widths)}
    return {**base, **_projection(header, shapes, cross)}


def _projection(
    header: Header, shapes: Mapping[str, tuple[int, ...]], cross: int
) -> dict[str, Any]:
    """Return the part of the config that is of the projection to tokens."""

    def size(name: str, axis: int) -> int:
        shape = shapes.get(_PROJ + name, ())
        if len(shape) <= axis:
            raise refusal(header.name, f"{_PROJ}{name} is missing or misshapen")
        return shape[axis]

    if f"{_PROJ}proj.weight" in shapes:
        tokens = size("proj.weight", 0) // cross
        return {"kind": "base", "image_dim": size("proj.weight", 1), "num_tokens": tokens}
    if f"{_PROJ}proj.3.weight" in shapes:
        return {"kind": "full", "image_dim": size("proj.0.weight", 1)}
    layer = re.compile(re.escape(_PROJ) + r"layers\.(\d{1,3})\.")
    numbers = [int(one[1]) + 1 for key in shapes if (one := layer.match(key))]
    wide = size("layers.0.0.to_q.weight", 0)
    return {
        "kind": "plus",
        "image_dim": size("proj_in.weight", 1),
        "num_tokens": size("latents", 1),
        "hidden_size": size("latents", 2),
        "heads_size": wide,
        "intermediate_size": size("layers.0.1.1.weight", 0),
        "num_heads": max(1, wide // _HEAD),
        "num_hidden_layers": max(numbers, default=0),
    }


def _encoder_of(
    adapter: Addition, encoder: Source | None, model: Plan, library: Library | None
) -> Addition:
    """Return the image encoder of an adapter, the one that was named or one that fits."""
    reads, needed = adapter.config.kind != "base", adapter.config.image_dim
    what = f"{'states' if reads else 'an embedding'} of {needed} numbers"
    if encoder is None:
        for source in candidates(adapter.source.path, model, library):
            if widths(source)[0 if reads else 1] == needed:
                return image_encoder(source)
        usual = _USUAL.get((reads, needed))
        raise refusal(
            adapter.source.name,
            f"it needs an image encoder with {what}{f', {usual}' if usual else ''}: give its "
            "folder or file with --image-encoder",
        )
    found = image_encoder(encoder)
    has = found.config.hidden_size if reads else found.config.projection_dim
    if has != needed:
        raise refusal(
            encoder.name,
            f"{adapter.source.name} needs an image encoder with {what}; this one's have {has}",
        )
    return found


_USUAL = {
    (False, 768): "CLIP ViT-L/14",
    (False, 1024): "CLIP ViT-H/14",
    (False, 1280): "CLIP ViT-bigG/14",
    (True, 1024): "CLIP ViT-L/14",
    (True, 1280): "CLIP ViT-H/14",
    (True, 1664): "CLIP ViT-bigG/14",
}
"""What published adapters need, by whether they read states, and the numbers of those."""
