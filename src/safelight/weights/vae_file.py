"""An autoencoder in a single file, in the original names or diffusers', or the files of TAESD."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safelight.families.flow_files import KLEIN_4B
from safelight.families.flux2 import FLUX2_VAE_PART
from safelight.families.latent import TINY_PART, VAE_CONFIG, VAE_PART
from safelight.families.part import Part
from safelight.families.qwenimage import QWEN_VAE_PART
from safelight.families.qwenimage_files import QWEN_IMAGE
from safelight.weights.check import Header, refusal
from safelight.weights.find import Source
from safelight.weights.headers import plain_header_of
from safelight.weights.names import Weight, renamed, some, vae_names
from safelight.weights.names_flux2_vae import STATISTICS, flux2_vae_names
from safelight.weights.names_qwen import FOLDER_NORM, NORM, qwen_vae_names, qwen_vae_unused
from safelight.weights.networks import check_depth, read_config

_TABLES = {
    VAE_PART.network: (VAE_CONFIG, vae_names),
    FLUX2_VAE_PART.network: (KLEIN_4B.configs["vae"], flux2_vae_names),
    QWEN_VAE_PART.network: (QWEN_IMAGE.configs["vae"], qwen_vae_names),
}
"""The published config, and the original code's names, of each kind with a layout of its own."""

_PREFIXES = ("first_stage_model.", "vae.")
# Tensors that only training needs, and constants that some writers add.
_UNUSED = re.compile(r"(loss|model_ema)\..*|.*\bnum_batches_tracked")
_TAESD = re.compile(r"(\d+)\.(.+)")
_USER = "an autoencoder"


@dataclass(frozen=True, slots=True)
class VaeFile:
    """An autoencoder before any weight is read.

    part: what it is built from. raw: its config as a folder has it. files: names to paths.
    """

    part: Part
    raw: Mapping[str, Any]
    config: Any
    weights: dict[str, Weight]
    files: dict[str, Path]


def read_vae_file(source: Source, own: Part, like: Mapping[str, Any]) -> VaeFile:
    """Read the header of an autoencoder's file.

    own, like: what the model's own autoencoder is built from, and its config. A file has none: one
    of the same kind is read with it, another with the published config of its kind. The widths of
    a decoder of FLUX.2 are those of the file's tensors, as a smaller one is published.

    Raises SafelightError if it is malformed, or no autoencoder.
    """
    header = plain_header_of(source.path, _USER)
    if any(_TAESD.match(key) for key in header.tensors):
        return _taesd(source, header)
    prefix = next((p for p in _PREFIXES if any(k.startswith(p) for k in header.tensors)), "")
    inner = {
        key.removeprefix(prefix): key
        for key in header.tensors
        if key.startswith(prefix) and not _is_unused(key.removeprefix(prefix))
    }
    if not any(key.startswith(("encoder.", "decoder.")) for key in inner):
        raise refusal(source.name, "this is no autoencoder: it has no encoder.* and decoder.*")
    files = {source.path.name: header.path}
    if any(key.startswith("decoder.layers.") for key in inner):
        raw: Mapping[str, Any] = {"latent_channels": _channels(header, inner)}
        weights = _placed(header, TINY_PART, inner)
        return VaeFile(TINY_PART, raw, read_config(source, TINY_PART, raw), weights, files)
    part = FLUX2_VAE_PART if STATISTICS in inner else VAE_PART
    if NORM in inner or FOLDER_NORM in inner:
        part = QWEN_VAE_PART
    check_kind(source, part, own)
    published, names_of = _TABLES[part.network]
    raw = like if own is part else published
    config = read_config(source, part, raw)
    levels = len(config.block_out_channels)
    if any(key.startswith(("decoder.up.", "decoder.mid.", "decoder.middle.")) for key in inner):
        names = names_of(_shapes(config))
        renames = {key: renamed(key, names) for key in inner}
        unknown = [key for key, name in renames.items() if name is None]
        if unknown:
            raise refusal(source.name, f"{len(unknown)} keys that we do not know: {some(unknown)}")
        inner = {str(name): inner[key] for key, name in renames.items()}
    if part is FLUX2_VAE_PART and (widths := _decoder_widths(header, inner, levels)):
        raw = {**raw, "decoder_block_out_channels": widths}
        config = read_config(source, part, raw)
    return VaeFile(part, raw, config, _placed(header, part, inner), files)


def _is_unused(key: str) -> bool:
    return _UNUSED.fullmatch(key) is not None or qwen_vae_unused(key)


def _shapes(config: Any) -> dict[str, Any]:
    """Return what names of modules follow from, by the keys of each kind's config."""
    known = ("block_out_channels", "layers_per_block", "dim_mult", "num_res_blocks")
    return {key: getattr(config, key) for key in known if hasattr(config, key)}


def check_kind(source: Source, part: Part, own: Part) -> None:
    """Refuse an autoencoder of Qwen-Image for other models, and others for Qwen-Image.

    part, own: it, and the model's own. Those of FLUX.1 have as many channels, tiny ones too.
    """
    of_qwen = {one.network == QWEN_VAE_PART.network for one in (part, own)}
    if len(of_qwen) > 1:
        raise refusal(source.name, f"{part.network} does not fit; the model's is {own.network}")


def check_latents(source: Source, found: Any, own: Any, count: int) -> None:
    """Refuse an autoencoder whose latents are not those of a model.

    found, own: its config, and that of the model's autoencoder. count: of its tensors.
    """
    check_depth(source, found.depth, count)
    if found.latent_channels != own.latent_channels:
        raise refusal(
            source.name,
            f"an autoencoder of {found.latent_channels} channels does not fit; "
            f"the model's latents have {own.latent_channels}",
        )
    if found.factor != own.factor:
        raise refusal(
            source.name,
            f"an autoencoder of {found.factor} pixels a latent does not fit; "
            f"the model's are {own.factor} wide",
        )


def _taesd(source: Source, header: Header) -> VaeFile:
    """Read TAESD's own files: the encoder and the decoder, one beside the other."""
    path = source.path
    encoder = path.with_name(path.name.replace("decoder", "encoder"))
    decoder = path.with_name(path.name.replace("encoder", "decoder"))
    if encoder == decoder or not decoder.is_file():
        raise refusal(source.name, "one half of a tiny autoencoder; name it taesd_decoder, and the "
                      "other taesd_encoder")  # fmt: skip
    header = header if decoder == path else plain_header_of(decoder, _USER)
    files = {decoder.name: header.path}
    weights = _numbered(header, "decoder", first=1)
    channels = weights["decoder.layers.0.weight"].shape[1]
    if encoder.is_file():
        header = plain_header_of(encoder, _USER)
        files[encoder.name] = header.path
        weights |= _numbered(header, "encoder", first=0)
    raw = {"latent_channels": channels, "has_encoder": encoder.is_file()}
    return VaeFile(TINY_PART, raw, read_config(source, TINY_PART, raw), weights, files)


def _numbered(header: Header, half: str, first: int) -> dict[str, Weight]:
    """Return the weights of one half of TAESD, which numbers its layers in one list.

    first: the number of the first layer with weights; the decoder begins with a clamp.
    """
    found: dict[str, Weight] = {}
    for key, info in header.tensors.items():
        numbered = _TAESD.fullmatch(key)
        if numbered is None or int(numbered[1]) < first:
            raise refusal(header.name, f"{key!r:.60} belongs to no tiny autoencoder")
        name = f"{half}.layers.{int(numbered[1]) - first}.{numbered[2]}"
        found[name] = Weight(header, key, info.shape)
    if f"{half}.layers.0.weight" not in found or len(found[f"{half}.layers.0.weight"].shape) != 4:
        raise refusal(header.name, f"not the {half} of a tiny autoencoder")
    return found


def _decoder_widths(header: Header, inner: Mapping[str, str], levels: int) -> list[int]:
    """Return the widths of a decoder, of its last level first; empty if a level is not there.

    inner: the file's keys by diffusers' names.
    """
    first = "decoder.up_blocks.{}.resnets.0.conv1.weight"
    keys = [inner.get(first.format(level)) for level in reversed(range(levels))]
    shapes = [header.tensors[key].shape for key in keys if key is not None]
    return [shape[0] for shape in shapes] if len(shapes) == levels and all(shapes) else []


def _channels(header: Header, inner: Mapping[str, str]) -> int:
    """Return the latent channels that a tiny decoder reads."""
    key = inner.get("decoder.layers.0.weight")
    shape = () if key is None else header.tensors[key].shape
    if len(shape) != 4:
        raise refusal(header.name, "a tiny autoencoder without a decoder.layers.0.weight")
    return shape[1]


def _placed(header: Header, part: Part, inner: Mapping[str, str]) -> dict[str, Weight]:
    """Return weights by our names. inner: names to the file's keys."""
    found: dict[str, Weight] = {}
    for name, key in inner.items():
        ours = part.rename(name) or name
        found[ours] = Weight(header, key, part.reshape(ours, header.tensors[key].shape))
    return found
