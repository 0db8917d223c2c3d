"""Plan another autoencoder for a model, from headers and configs alone.

It may be diffusers' folder of an AutoencoderKL, AutoencoderKLFlux2 or AutoencoderTiny, a whole
model's folder, a single file with the original code's names or diffusers', with or without a
prefix, or the two files of TAESD.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from safelight.errors import SafelightError
from safelight.families.base import Part
from safelight.families.flow_files import KLEIN_4B
from safelight.families.flux2 import FLUX2_VAE_PART
from safelight.families.latent import TINY_PART, VAE_CONFIG, VAE_PART
from safelight.weights.check import Header, refusal
from safelight.weights.find import Source
from safelight.weights.folder import Folder
from safelight.weights.headers import plain_header_of
from safelight.weights.names import Weight, from_folder, renamed, some, vae_names
from safelight.weights.names_flux2_vae import STATISTICS, flux2_vae_names
from safelight.weights.plan import Addition, Plan, read_config

PARTS = {part.network: part for part in (VAE_PART, FLUX2_VAE_PART)} | dict(VAE_PART.others)

_TABLES = {
    VAE_PART.network: (VAE_CONFIG, vae_names),
    FLUX2_VAE_PART.network: (KLEIN_4B.configs["vae"], flux2_vae_names),
}
"""The published config, and the original code's names, of each kind with a layout of its own."""

_PREFIXES = ("first_stage_model.", "vae.")
# Tensors that only training needs, and constants that some writers add.
_UNUSED = re.compile(r"(loss|model_ema)\..*|.*\bnum_batches_tracked")
_TAESD = re.compile(r"(\d+)\.(.+)")
_USER = "an autoencoder"


def with_autoencoders(plan: Plan, sources: Mapping[str, Source]) -> Plan:
    """Return the plan of a model with other autoencoders.

    sources: "vae" takes the place of the model's own, "preview_vae" is for previews alone.

    Raises SafelightError if one is malformed, is no autoencoder, or does not fit the model.
    """
    if not sources:
        return plan
    own = plan.configs.get("vae")
    if own is None:
        raise SafelightError(f"{plan.source.name} draws pixels: it takes no autoencoder")
    found = {use: _read(source, plan, own) for use, source in sources.items()}
    told = [line for each in found.values() for line in _warnings(each, plan)]
    return plan.with_additions(found, told)


def _read(source: Source, model: Plan, own: Any) -> Addition:
    """Read an autoencoder. A single file has no config: it is read with that of the model's own."""
    plan = _folder_plan(source) if source.path.is_dir() else _file_plan(source, model)
    _check_fit(plan, model, own)
    return plan


def _folder_plan(source: Source) -> Addition:
    path = source.path
    if (path / "model_index.json").is_file():
        path = path / "vae"
    folder = Folder(path, source.name, index="config.json")
    folder.flat = True
    part = PARTS.get(str(folder.index.get("_class_name")))
    if part is None:
        told = f"{folder.index.get('_class_name')!r:.40}"
        raise refusal(source.name, f"{told} is no autoencoder; known are {', '.join(PARTS)}")
    weights = from_folder(part, folder.part_headers("vae", part.stem))
    config = read_config(source, part, folder.index)
    return Addition(source, part, folder.index, config, weights, folder.files)


def _file_plan(source: Source, model: Plan) -> Addition:
    header = plain_header_of(source.path, _USER)
    if any(_TAESD.match(key) for key in header.tensors):
        return _taesd_plan(source, header)
    prefix = next((p for p in _PREFIXES if any(k.startswith(p) for k in header.tensors)), "")
    inner = {
        key.removeprefix(prefix): key
        for key in header.tensors
        if key.startswith(prefix) and not _UNUSED.fullmatch(key.removeprefix(prefix))
    }
    if not any(key.startswith(("encoder.", "decoder.")) for key in inner):
        raise refusal(source.name, "this is no autoencoder: it has no encoder.* and decoder.*")
    if any(key.startswith("decoder.layers.") for key in inner):
        raw: Mapping[str, Any] = {"latent_channels": _channels(header, inner)}
        weights = _placed(header, TINY_PART, inner)
        config = read_config(source, TINY_PART, raw)
        return Addition(source, TINY_PART, raw, config, weights, {source.path.name: header.path})
    part = FLUX2_VAE_PART if STATISTICS in inner else VAE_PART
    raw, names_of = _TABLES[part.network]
    if model.parts["vae"] is part:
        raw = model.raw["vae"]
    config = read_config(source, part, raw)
    if any(key.startswith(("decoder.up.", "decoder.mid.")) for key in inner):
        shapes = {
            "block_out_channels": config.block_out_channels,
            "layers_per_block": config.layers_per_block,
        }
        names = names_of(shapes)
        renames = {key: renamed(key, names) for key in inner}
        unknown = [key for key, name in renames.items() if name is None]
        if unknown:
            raise refusal(source.name, f"{len(unknown)} keys that we do not know: {some(unknown)}")
        inner = {str(name): inner[key] for key, name in renames.items()}
    weights = _placed(header, part, inner)
    return Addition(source, part, raw, config, weights, {source.path.name: header.path})


def _taesd_plan(source: Source, header: Header) -> Addition:
    """Plan TAESD's own files: the encoder and the decoder, one beside the other."""
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
    return Addition(source, TINY_PART, raw, read_config(source, TINY_PART, raw), weights, files)


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


def _check_fit(plan: Addition, model: Plan, own: Any) -> None:
    """Refuse an autoencoder whose latents are not those of the model."""
    name, config = plan.source.name, plan.config
    if config.depth > len(plan.weights):
        raise refusal(name, "its config has more layers than its file tensors")
    if config.latent_channels != own.latent_channels:
        raise refusal(
            name,
            f"an autoencoder of {config.latent_channels} channels does not fit; "
            f"the model's latents have {own.latent_channels}",
        )
    if config.factor != own.factor:
        raise refusal(
            name,
            f"an autoencoder of {config.factor} pixels a latent does not fit; "
            f"the model's are {own.factor} wide",
        )
    try:
        model.family.check_configs({**model.configs, "vae": config})
    except SafelightError as e:
        raise refusal(name, str(e)) from None


def _warnings(plan: Addition, model: Plan) -> list[str]:
    """Return warnings about an autoencoder in place of a model's own."""
    theirs, ours = plan.config.scaling_factor, model.configs["vae"].scaling_factor
    if {plan.part.network, model.parts["vae"].network} != {VAE_PART.network}:
        return []  # a tiny one scales in its weights
    if 0.99 < theirs / ours < 1.01:
        return []
    return [
        f"the autoencoder {plan.source.name} scales latents by {theirs:g}, the model's own by "
        f"{ours:g}: it may be another family's"
    ]
